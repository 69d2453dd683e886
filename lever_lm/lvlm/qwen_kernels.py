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
from torch.nn import functional as F

NAME = "lever_flash_varlen"
_ALIGNED = 8  # bf16 matrix products are fast where every side is a multiple of this


def speed_up_vision(visual) -> None:
    """Make a vision tower of Qwen on a GPU, in half precision, take the fast ways. What it computes is the same."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _varlen)
    visual.config._attn_implementation = NAME
    for block in visual.blocks:
        if hasattr(block.mlp, "gate_proj"):
            _align(block.mlp)


def compile_parts(model) -> None:
    """Fuse the small operations between the matrix products, in both towers. Takes 15 seconds once, and a C compiler;
    lengths may change freely."""
    for name, part in model.model.named_modules():
        last = name.rpartition(".")[-1]
        if "norm" in last or last == "mlp":
            part.compile(dynamic=True)
    library = sys.modules[type(model).__module__]
    for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"):
        rotate = getattr(library, name)
        if not hasattr(rotate, "__wrapped__"):  # once in a process
            setattr(library, name, _fused_on_a_gpu(rotate))


def _fused_on_a_gpu(rotate: Callable) -> Callable:
    fused = torch.compile(rotate, dynamic=True)
    return wraps(rotate)(lambda query, *rest, **more: (fused if query.is_cuda else rotate)(query, *rest, **more))


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
