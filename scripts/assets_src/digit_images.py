"""The handwritten digits behind every asset: loading, splitting, smudging.

Shapes: N images, P = IMAGE_SIZE pixels a side. Images are grey, (N, P, P), in 0..1.
Source: UCI Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, CC BY 4.0), scikit-learn's 8x8 copy.
"""

import random

import numpy as np
from PIL import Image

IMAGE_SIZE = 56  # Qwen2.5-VL's smallest image: 4 x 4 patches of 14 pixels, merged 2 x 2 into 4 tokens
TRAIN_FRACTION = 0.7
# CLIP's and Qwen's shared normalisation, one value per RGB channel.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 digits as (N, P, P) uint8 and their labels (N,) int64, in scikit-learn's order."""
    from sklearn.datasets import load_digits as load_uci_digits

    uci = load_uci_digits()
    images = []
    for ink in uci.images:  # (8, 8), 0..16
        grey = (ink * 255 / 16).clip(0, 255).astype(np.uint8)
        images.append(np.asarray(Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)))
    return np.stack(images), uci.target.astype(np.int64)


def split_by_image(labels: np.ndarray, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows of the train and the val images, 70/30 within each digit.

    Every asset uses the same split, so that neither tiny model has been trained on a val image.
    """
    rng = random.Random(f"split-{seed}")
    train, val = [], []
    for digit in range(10):
        rows = np.flatnonzero(labels == digit).tolist()
        rng.shuffle(rows)
        cut = int(TRAIN_FRACTION * len(rows))
        train += rows[:cut]
        val += rows[cut:]
    return sorted(train), sorted(val)


def gaussian_blur(images: np.ndarray, sigma: float) -> np.ndarray:
    """(N, P, P) -> (N, P, P): two passes of a kernel that reaches 3 sigma, edges reflected."""
    radius = int(3 * sigma)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(images, pad, mode="reflect"), len(kernel), axis=axis)
        images = windows @ kernel
    return images


def smudge(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred, pale and noisy, yet readable: (N, P, P) in 0..1 -> the same.

    Strong enough that CLIP's embedding shows it linearly, weak enough that the LVLM still reads the digit.
    """
    noise = rng.standard_normal(images.shape)
    return (0.3 + 0.6 * gaussian_blur(images, sigma=2.0) + 0.06 * noise).clip(0, 1)
