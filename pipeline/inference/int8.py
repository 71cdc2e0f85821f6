"""Weights in int8 for sampling: one scale an output channel, and products that use them as stored.

A product splits its activations in two int8 numbers, so that only the weights are rounded: one
part carries the seven highest bits of each row, the other eight more of what the first left.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 127  # symmetric: -128 stays unused
# What the first part leaves is at most half a unit: in units of 1/254 that is at most 127.
FINER = 2.0 * LARGEST
ROWS = 4096  # of a weight rounded at a time, 12 MB at 768 channels


class Int8Linear:
    """x (..., K) -> (..., N) in `dtype`, as `F.linear` with the weights that int8 can hold.

    Memory: N K bytes and 4 N for the scales, a quarter of fp32. Where no kernel multiplies int8
    exactly (see `exact_kernel`) the weights are widened at every call, which is right and slow.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.scale = quantize(weight)
        self.bias, self.dtype = bias, dtype
        self.kernel = weight.device.type == "cpu" and exact_kernel()

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernel:
            y = _product(x.reshape(-1, x.size(-1)).float(), self.weight, self.scale, self.bias)
            return y.view(*x.shape[:-1], -1).to(self.dtype)
        y = F.linear(x, self.weight.to(x.dtype)).float().mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(self.dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> int8 (N, K) and scales (N,) fp32: symmetric, the largest of a channel is 127.

    Each weight is off by at most half its channel's scale.
    """
    scale = _step(weight.float())
    whole = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    # By pieces: beside GPT-2's embedding, its copy in fp32 would be four times the result.
    for part, unit, out in zip(*(t.split(ROWS) for t in (weight, scale, whole)), strict=True):
        out.copy_((part / unit).round_())
    return whole, scale[:, 0]


def _step(x: Tensor) -> Tensor:
    """(N, K) -> (N, 1): what one unit is worth if the largest number of a row is 127 of them."""
    smallest = torch.finfo(torch.float32).tiny  # a row of zeros stays zeros
    return torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True).div_(LARGEST).clamp_(smallest)


def _product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) fp32, int8 weight (N, K), scale and bias (N,) -> (M, N) fp32."""
    rows, step = len(x), _step(x)
    parts = torch.empty(2 * rows, x.size(1), dtype=torch.int8)  # the weights are read once
    units = x / step
    coarse = units.round()
    parts[:rows] = coarse
    parts[rows:] = units.sub_(coarse).mul_(FINER).round_()
    sums = torch._int_mm(parts, weight.t()).float()  # (2M, N)
    y = sums[:rows].add_(sums[rows:], alpha=1 / FINER).mul_(step)
    return y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale)


@functools.cache
def exact_kernel() -> bool:
    """Whether this CPU's int8 product is fast and adds without saturating.

    Instructions before VNNI add pairs of products in 16 bits, which the largest operands overflow:
    so they are tried, not looked up.
    """
    if not torch.backends.mkldnn.is_available():
        return False  # torch's own loop: right, and slower than widening
    x = torch.full((2, 256), LARGEST, dtype=torch.int8)
    x[1] = -LARGEST
    sums = torch._int_mm(x, x[:1].expand(64, -1).contiguous().t())
    most = 256 * LARGEST * LARGEST
    return bool((sums[0] == most).all() and (sums[1] == -most).all())
