"""fp8: the blocks' linear layers multiply 8-bit numbers, all else is as in bf16.

Activations and weights are e4m3 (3 mantissa bits, up to 448), gradients e5m2 (2 bits, up to
57,344), as Micikevicius et al. 2022 propose. Eight bits hold few powers of two, so every tensor is
multiplied by a power of two that brings its largest magnitude just below the format's (dynamic,
per tensor): a power of two rounds nothing. Products accumulate in fp32 and give bf16.

What that costs: the largest magnitude must be known before anything is rounded, so an operand is
gone through twice. Compiled, the first time is part of the kernel that makes it, and the second
writes what products read, transposed too where the backward pass wants it: no pass only copies.

A layer multiplies in fp8 if and only if it is an `Fp8Linear`. The head and attention stay bf16;
embeddings are looked up in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2  # of operands, of gradients
RESULT = torch.bfloat16
MULTIPLE = 16  # of which cuBLAS wants the sides of fp8 operands to be
SMALLEST = 2.0**-100  # magnitude that is scaled up: below it the scale itself would overflow
EXPONENT = 0x7F800000  # the bits of an fp32 number that are its exponent


@dataclass(frozen=True)
class Scaled:
    """A matrix as `values` times the 0-dim fp32 `unit`, a power of two."""

    values: Tensor  # in an fp8 dtype, or numbers of that format in fp32 where it is emulated
    unit: Tensor

    def t(self) -> Scaled:
        return Scaled(self.values.t(), self.unit)


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in fp8, forward and backward: see `mark`."""

    emulated: bool

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, emulated=self.emulated)


def mark(model: nn.Module, *, fp8: bool, emulated: bool) -> None:
    """Turn linear layers into `Fp8Linear`s, or back, in place; parameters stay as they are."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = Fp8Linear if fp8 else nn.Linear
            layer.emulated = emulated


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, emulated: bool) -> Tensor:
    """x (..., C), weight (O, C), bias (O,) -> x weight^T + bias (..., O) in bf16.

    `emulated`: operands are scaled and rounded, the product is fp32's, for devices without fp8.
    """
    flat = _Linear.apply(x.reshape(-1, x.size(-1)), weight, bias, emulated)
    return flat.view(*x.shape[:-1], weight.size(0))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, emulated: bool) -> Tensor:
        a, w = (scaled(operand, FORWARD, emulated) for operand in (x, weight))
        # The backward pass multiplies the rounded operands again: a quarter of their fp32 memory.
        ctx.save_for_backward(a.values, a.unit, w.values, w.unit)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype
        return product(a, w.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, a_unit, w, w_unit = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        # Emulated as the forward pass was. Along the columns, as the bias' sum goes: the compiler
        # makes both in one pass over the gradient, which it may compute anew for each pass.
        g = scaled(grad, BACKWARD, a.dtype is torch.float32, first=0)
        grad_x = product(g, Scaled(w, w_unit)).to(of_x)  # y = x w^T, so dx = dy w
        grad_weight = product(g.t(), Scaled(a, a_unit)).to(of_weight)  # and dw = dy^T x
        return grad_x, grad_weight, grad.sum(0, dtype=torch.float32).to(of_bias), None


def scaled(x: Tensor, dtype: torch.dtype, emulated: bool, first: int | tuple[()] = ()) -> Scaled:
    """`x` rounded to the fp8 `dtype` after scaling, ties to even, what is not finite kept so.

    The largest magnitude is sought along the dimension `first`, then among the rest; () is all.
    """
    x = x.detach().float()
    scale = _scale(x.abs().amax(first).amax(), torch.finfo(dtype).max)
    # The largest may be rounded past the end of the format, which has no such number.
    limit = torch.finfo(dtype).max
    values = (x * scale).clamp(-limit, limit).to(dtype)
    return Scaled(values.float() if emulated else values, 1 / scale)


def _scale(largest: Tensor, limit: float) -> Tensor:
    """The greatest power of two that keeps `largest` within `limit`; 0-dim fp32, on the device.

    It is the exponent of the quotient, the mantissa's bits cleared: no logarithm, nothing rounded.
    An infinite `largest` gives 0, which makes a NaN of the infinity; a NaN stays one.
    """
    bits = (limit / largest.clamp(min=SMALLEST)).view(torch.int32)
    return torch.where(largest.isnan(), largest, (bits & EXPONENT).view(torch.float32))


def product(a: Scaled, b: Scaled, bias: Tensor | None = None) -> Tensor:
    """a (N, K) times b (K, M), + bias (M,): accumulated in fp32, rounded once to bf16 (N, M)."""
    if a.values.dtype is torch.float32:
        with torch.autocast(a.values.device.type, enabled=False):
            exact = (a.values @ b.values) * a.unit * b.unit
        return (exact if bias is None else exact + bias.to(RESULT)).to(RESULT)
    rows, columns = a.values.size(0), b.values.size(1)
    padded = torch._scaled_mm(
        _padded(a.values),
        _padded(b.values.t()).t(),  # column by column, as the tensor cores want it
        scale_a=a.unit,
        scale_b=b.unit,
        bias=None if bias is None else _padded(bias.to(RESULT)),
        out_dtype=RESULT,
        use_fast_accum=False,  # which would keep 14 bits of the sums (pytorch#147971)
    )
    return padded[:rows, :columns]


def _padded(x: Tensor) -> Tensor:
    """Contiguous, with zeros up to the sides that the kernels take."""
    missing = [-size % MULTIPLE for size in reversed(x.shape)]
    sides = [end for size in missing for end in (0, size)]
    return (F.pad(x, sides) if any(missing) else x).contiguous()
