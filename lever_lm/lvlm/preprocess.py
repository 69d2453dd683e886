"""From image files to the patches that a Qwen vision tower reads: decoded and resized ahead of it, on other cores."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lever_lm.config.schema import LvlmConfig
from lever_lm.data import Image, open_image
from lever_lm.lvlm.images import fitted
from lever_lm.utils.errors import LeverError
from lever_lm.utils.transformers_compat import first_line

CHUNK = 16  # images that go through the vision tower together


def patches(images: Sequence[Image], image_processor, config: LvlmConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the patches (ΣP, C) of all images one after another, and their grids (n, 3) in patches: time, height,
    width. Raises LeverError naming an image that cannot be read or shown."""
    factor = image_processor.patch_size * image_processor.merge_size
    resized = [fitted(open_image(image), config, factor) for image in images]
    made = image_processor(images=resized, return_tensors="pt")
    return made["pixel_values"].to(dtype), made["image_grid_thw"]


def _made(chunk: list[Image], work: tuple):
    """Return the `patches` of a chunk, or the LeverError that one of its images raised: the loader would raise it with
    the worker's traceback as its text."""
    try:
        return patches(chunk, *work)
    except LeverError as error:
        return error


def chunked(images: Sequence[Image]) -> list[list[Image]]:
    """Return the images in order, CHUNK at a time."""
    return [list(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]


def chunked_patches(
    images: Sequence[Image], image_processor, config: LvlmConfig, dtype: torch.dtype, *, workers: int, pin: bool
) -> Iterator[tuple[list[Image], Tensor, Tensor]]:
    """Yield (images, patches, grids) of one chunk after another. With workers, chunks are made in as many processes
    while the caller uses the chunks before."""
    import qwen_vl_utils  # noqa: F401 - once, and not in every worker

    chunks = chunked(images)
    loader = torch.utils.data.DataLoader(
        chunks,
        batch_size=None,
        collate_fn=partial(_made, work=(image_processor, config, dtype)),
        num_workers=min(workers, len(chunks)),
        pin_memory=pin,
        generator=torch.Generator(),  # the loader draws a seed, and not from the generator that a policy trains with
    )
    done = iter(loader)
    for chunk in chunks:
        try:
            ready = next(done)
        except RuntimeError as error:
            if not loader.num_workers:
                raise
            # a worker was killed: the memory that it shares with this process is often too small
            raise LeverError(
                f"a process that decodes images died ({first_line(error)}): more shared memory (docker run "
                "--shm-size=8g), or --set lvlm.workers=0"
            ) from error
        if isinstance(ready, LeverError):
            raise ready
        yield chunk, *ready
