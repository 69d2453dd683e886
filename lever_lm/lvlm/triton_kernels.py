"""Two of the small operations between the matrix products of a Qwen on a GPU, each in one pass over its memory.

T tokens, H heads, D numbers of a head. As separate operations of torch they pass three and ten times. Written in Triton
(Tillet et al., 2019), which compiles each in half a second when it is first used and needs a C compiler; numbers are
rounded once, at the end.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

_BLOCK = 4096


@triton.jit
def _silu_mul(gate, up, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    g, u = (tl.load(gate + at, mask=at < count).to(tl.float32), tl.load(up + at, mask=at < count).to(tl.float32))
    tl.store(gate + at, g * tl.sigmoid(g) * u, mask=at < count)


@triton.jit
def _rotate(x, cos, sin, out, stride, heads: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
    token, half = tl.program_id(0).to(tl.int64), size // 2
    row, col = tl.arange(0, rows)[:, None], tl.arange(0, cols)[None, :]
    mask = (row < heads) & (col < half)
    first, angle = x + token * stride + row * size + col, token * size + col
    a, b = tl.load(first, mask=mask).to(tl.float32), tl.load(first + half, mask=mask).to(tl.float32)
    c, s = tl.load(cos + angle, mask=col < half).to(tl.float32), tl.load(sin + angle, mask=col < half).to(tl.float32)
    first = out + token * heads * size + row * size + col
    tl.store(first, a * c - b * s, mask=mask)
    tl.store(first + half, b * c + a * s, mask=mask)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return gate · σ(gate) · up, in the memory of `gate`: two contiguous tensors of one shape."""
    _silu_mul[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, gate.numel(), _BLOCK)
    return gate


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rotary positions applied to (T, H, D), whose first half is turned with its second (RoFormer,
    arXiv:2104.09864, §3.2). cos, sin: (T, D), both halves alike."""
    tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sides = [triton.next_power_of_2(side) for side in (heads, size // 2)]
    _rotate[(tokens,)](x, cos, sin, out, x.stride(0), heads, size, *sides)
    return out
