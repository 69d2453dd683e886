"""Trains a tiny Qwen to answer from its demonstrations: 9,000 steps of 256, about 5 minutes on one H200.

Two throw-away auxiliary heads make the copying emerge at this size: the digit from the mean image feature, and digit
and type from the second layer's state at each answer. Batches under 128 did not learn it.
Shapes: as in lvlm_sequences.py (B, L) and lvlm_model.py (N, M, W).
"""

import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assets_src.digit_images import load_digits, split_by_image
from assets_src.lvlm_model import build_config, encode_images, hidden_states, patchify
from assets_src.lvlm_processor import build_processor
from assets_src.lvlm_sequences import Batch, Encoder, TrainingBatches, World
from lever_lm.utils.transformers_compat import import_transformers

PROBED_LAYER = 1
AUX_WEIGHT = 0.3
WARMUP_STEPS = 300


def augment(images: Tensor) -> Tensor:
    """Rotated, scaled, shifted, dimmed and noisy copies of (N, P, P) in 0..1."""

    def uniform(width: float) -> Tensor:
        return (torch.rand(len(images), device=images.device) - 0.5) * width

    angle, scale = uniform(0.35), 1 + uniform(0.3)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([cos, -sin, uniform(0.2), sin, cos, uniform(0.2)], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, (len(images), 1, *images.shape[1:]), align_corners=False)
    moved = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    light = 1 + uniform(0.4)[:, None, None]
    return (moved * light + 0.05 * torch.randn_like(moved)).clamp(0, 1)


class AuxiliaryHeads(nn.Module):
    """Linear probes whose gradient shapes the model; dropped after training."""

    def __init__(self, model: nn.Module, num_types: int) -> None:
        super().__init__()
        width = model.config.text_config.hidden_size
        self.image_digit = nn.Linear(width, 10)
        self.state_digit = nn.Linear(width, 10)
        self.state_type = nn.Linear(width, num_types)
        self.state: Tensor | None = None
        model.model.language_model.layers[PROBED_LAYER].register_forward_hook(self._keep_state)

    def _keep_state(self, module: nn.Module, inputs: tuple, output) -> None:
        self.state = output[0] if isinstance(output, tuple) else output

    def forward(self, features: Tensor, image_digits: Tensor, batch: Batch) -> Tensor:
        shown = features[..., : self.image_digit.in_features].mean(dim=1)
        loss = F.cross_entropy(self.image_digit(shown).float(), image_digits)
        at_answers = self.state.flatten(0, 1)[batch.probe_at].float()
        normed = F.rms_norm(at_answers, at_answers.shape[-1:])
        loss = loss + F.cross_entropy(self.state_digit(normed).float(), batch.probe_digits)
        return loss + F.cross_entropy(self.state_type(normed).float(), batch.probe_types)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)


def build_optimizer(modules: list[nn.Module], device: str) -> torch.optim.Optimizer:
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=device == "cuda")


def train(
    model: nn.Module, batches, images: Tensor, digits: Tensor, *, steps: int, peak_lr: float, num_types: int
) -> dict:
    """images (N, P, P) in 0..1 and digits (N,) on the model's device. Every image is encoded anew in each step."""
    device = images.device.type
    heads = AuxiliaryHeads(model, num_types).to(device)
    optimizer = build_optimizer([model, heads], device)
    parameters = [*model.parameters(), *heads.parameters()]
    started = time.perf_counter()
    for step, cpu_batch in enumerate(batches):
        batch = cpu_batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            features = encode_images(model.model.visual, patchify(augment(images)))
            states = hidden_states(model, batch.ids, batch.positions, features, batch.image_rows)
            logits = model.lm_head(states.flatten(0, 1)[batch.predict_at]).float()
            token_loss = F.cross_entropy(logits, batch.labels, reduction="none")
            aux_loss = heads(features, digits, batch)
            loss = (token_loss * batch.weights).sum() / batch.weights.sum() + AUX_WEIGHT * aux_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            query_loss = token_loss[batch.weights > 1].mean().item()
            print(f"step {step} {seconds:.0f}s query loss {query_loss:.3f} aux {aux_loss.item():.3f}", flush=True)
    return {"steps": steps, "seconds": round(time.perf_counter() - started), "query_loss": round(query_loss, 4)}


def save(model: nn.Module, processor, out: Path) -> None:
    """Weights in bf16, config, generation config, tokenizer, processor and chat template; replaces `out`."""
    shutil.rmtree(out, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private, and an installed asset must be readable


def build(
    out: Path,
    world: World,
    family: str = "qwen2_5_vl",
    seed: int = 0,
    device: str = "cpu",
    steps: int = 9000,
    batch_size: int = 256,
    workers: int = 0,
    peak_lr: float = 7e-4,
) -> dict:
    transformers = import_transformers()
    torch.manual_seed(seed)
    processor = build_processor(world.corpus, family)
    config = build_config(processor.tokenizer, family)
    model = transformers.AutoModelForImageTextToText.from_config(config).to(device).train()
    greys, labels = load_digits()
    train_rows, _ = split_by_image(labels)
    images = torch.from_numpy(greys[train_rows]).to(device) / 255
    digits = torch.from_numpy(labels[train_rows]).to(device)
    encoder = Encoder(processor.tokenizer, world)
    dataset = TrainingBatches(encoder, world.sample, labels[train_rows], steps, batch_size, seed)
    batches = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=device == "cuda",
        prefetch_factor=4 if workers else None,
    )
    summary = train(model, batches, images, digits, steps=steps, peak_lr=peak_lr, num_types=len(world.questions))
    save(model, processor, out)
    return {"parameters": model.num_parameters(), **summary}
