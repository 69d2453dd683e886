"""The library's Qwen2-VL to Qwen3-VL on a GPU, faster: the same layers, other kernels.

Attention of the vision tower runs over all windows of all images in one kernel. The library calls attention once for
each window unless the implementation's name holds `flash`: 18 images a second on an H200, over 100 this way. The kernel
is torch's own (FlashAttention, arXiv:2307.08691), so nothing is to be installed.
"""

import sys
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn import functional as F

from lever_lm.utils.progress import Track
from lever_lm.utils.transformers_compat import first_line

NAME = "lever_flash_varlen"
_ALIGNED = 8  # bf16 matrix products are fast where every side is a multiple of this


def has_fast_kernels(device: torch.device) -> bool:
    """Return whether attention over several sequences at once runs on a device: on GPUs since Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def load_kernels(device: torch.device, dtype: torch.dtype, fuse: bool) -> Callable[[], Exception | None]:
    """Return what loads, in another thread if that is wanted, what takes a GPU a second at its first use: a matrix
    product, a norm, attention, and where that is asked for (lvlm.compile) the kernels of ours. It returns why these
    cannot be had."""
    from torch.nn.attention import varlen  # noqa: F401 - here, as two threads that import are in each other's way

    lacking, ours = None, None
    if fuse:
        try:
            from lever_lm.lvlm import triton_kernels as ours
        except Exception as error:  # no Triton; and drivers fail in ways of their own
            lacking = error

    def load() -> Exception | None:
        x = torch.zeros(64, 1, 64, device=device, dtype=dtype)
        ends = torch.tensor([0, 64], device=device, dtype=torch.int32)
        F.linear(F.rms_norm(x[:, 0], [64]), x[:, 0], x[0, 0])
        _varlen(None, *[x[None].transpose(1, 2)] * 3, None, cu_seq_lens_q=ends, max_length_q=64, scaling=1.0)
        if ours is None:
            return lacking
        try:
            ours.silu_mul(ours.rotated(x, x[:, 0], x[:, 0]), x)
        except Exception as error:  # no compiler
            return error
        return None

    return load


def speed_up(model, fuse: bool, lacking: Exception | None, track: Track) -> None:
    """Make a Qwen on a GPU, in half precision, take the fast ways: what is computed is the same, and rounded less
    often. fuse: small operations by kernels of ours, unless they are `lacking`, which is said."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _varlen)
    visual = model.model.visual
    visual.config._attn_implementation = NAME
    for block in visual.blocks:
        if hasattr(block.mlp, "gate_proj"):
            _align(block.mlp)
    for part in model.modules():
        if hasattr(part, "variance_epsilon"):
            part.__class__ = _RMSNorm
    if lacking:
        mend = "they need Triton and a C compiler; lvlm.compile=false does without"
        list(track((), f"no fused kernels, so the model is a little slower: {first_line(lacking)} ({mend})", 0))
    elif fuse:
        _fuse(model)


def _fuse(model) -> None:
    from lever_lm.lvlm.triton_kernels import rotated

    for part in model.modules():
        if hasattr(part, "gate_proj") and isinstance(part.gate_proj, Linear) and _is_silu(part.act_fn):
            part.__class__ = _GatedMLP
    library = sys.modules[type(model).__module__]
    for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"):
        rotate = getattr(library, name)
        if not hasattr(rotate, "__wrapped__"):  # once in a process
            setattr(library, name, _rotation(rotate, rotated))


class _RMSNorm(Module):
    """In place of the library's class, with what it holds."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


class _GatedMLP(Module):
    """In place of the library's class, with what it holds."""

    def forward(self, hidden: Tensor) -> Tensor:
        from lever_lm.lvlm.triton_kernels import silu_mul

        return self.down_proj(silu_mul(self.gate_proj(hidden), self.up_proj(hidden)))


def _is_silu(activation) -> bool:
    x = torch.tensor([-1.0, 0.5, 2.0])
    return torch.equal(activation(x), F.silu(x))


def _rotation(rotate: Callable, rotated: Callable) -> Callable:
    """Return the library's function for queries and keys, (B, heads, L, D), or (T, heads, D) in the vision tower, with
    another kernel for those on a GPU."""

    @wraps(rotate)
    def chosen(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest, **more) -> tuple[Tensor, Tensor]:
        if not query.is_cuda or query.dtype == torch.float32:
            return rotate(query, key, cos, sin, *rest, **more)
        if query.ndim == 3:
            return rotated(query, cos, sin), rotated(key, cos, sin)
        batch = query.shape[0]
        angles = [angle.expand(batch, -1, -1).flatten(0, 1) for angle in (cos, sin)]
        both = (rotated(x.transpose(1, 2).flatten(0, 1), *angles) for x in (query, key))
        return tuple(x.unflatten(0, (batch, -1)).transpose(1, 2) for x in both)

    return chosen


def _varlen(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **options) -> tuple[Tensor, None]:
    """Attention by the library's signature: (1, heads, T, size) of T patches → (1, T, heads, size). `cu_seq_lens_q`
    holds the end of each window."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = options["cu_seq_lens_q"].to(query.device, torch.int32), int(options["max_length_q"])
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return varlen_attn(*rows, ends, ends, longest, longest, scale=options["scaling"])[None], None


@torch.no_grad()
def _align(mlp) -> None:
    """Pad the inner width (3,420 in the 3B and 7B models) with zeros: silu(0) · 0 adds nothing."""
    missing = -mlp.gate_proj.out_features % _ALIGNED
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight = _frozen(F.pad(layer.weight, (0, 0, 0, missing)))
        layer.bias = _frozen(F.pad(layer.bias, (0, missing)))
        layer.out_features += missing
    mlp.down_proj.weight = _frozen(F.pad(mlp.down_proj.weight, (0, missing)))
    mlp.down_proj.in_features += missing


def _frozen(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
