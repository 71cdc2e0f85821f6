"""tf32, bf16 and fp16 products at fp32 speed, for CPUs that have no instructions for them.

What tensor cores do can be had from fp32 kernels: a product of two numbers of at most 11
significant bits is exact in fp32, so rounding the operands, multiplying and accumulating in fp32
and rounding the result gives the format's numerics (up to the order of the sum).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.compute.buffers import reused

aten = torch.ops.aten

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
PIECE = 1 << 20  # elements rounded at a time in place: 6 MB with the copy, so it stays in cache

# Where a product's operands stand among its arguments. What tf32 hardware does not multiply
# (a bias, the saved output in attention's backward pass) is not listed.
OPERANDS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.addbmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (0, 1, 2, 3),
}
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default

# Inference mode hands these over whole; elsewhere torch has taken them apart before.
COMPOSITES = (
    aten.linear.default,
    aten.matmul.default,
    aten.scaled_dot_product_attention.default,
)

_thread = threading.local()


class EmulatedProducts(TorchDispatchMode):
    """While entered, products of the calling thread have the numerics of `name`.

    bf16, fp16: autocast (or the caller) chooses the operands' dtype as usual; this mode widens
    them, runs the fp32 kernel, and rounds the result. tf32: fp32 operands are rounded to tf32,
    the result stays fp32. Gradients are products of the same kinds and treated alike, as the
    CPU's backward pass runs in the calling thread.

    Fused attention is one kernel: its operands (q, k, v and the output's gradient) and results
    are rounded, the probabilities and their gradients inside it stay fp32. `naive` attention
    rounds these as well.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        assert name in ("tf32", *LOW), name
        self.name = name
        self.count = 0  # products that went through the emulation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with self:
                return func.decompose(*args, **kwargs)
        positions = OPERANDS.get(func)
        if positions is None or getattr(_thread, "exact", False):
            return func(*args, **kwargs)
        given = args[positions[0]].dtype
        if given not in ((torch.float32,) if self.name == "tf32" else LOW.values()):
            return func(*args, **kwargs)
        self.count += 1
        if self.name == "tf32":
            args = [round_tf32(a) if i in positions else a for i, a in enumerate(args)]
            return func(*args, **kwargs)
        with _noted("rounding"):
            args, kwargs = tree_map(_widened, (args, kwargs))  # the same values, held in fp32
        result = func(*args, **kwargs)  # exact products of two low numbers, added up in fp32
        with _noted("rounding"):
            if func is FLASH:  # its second result, the sums' logarithm, is for its backward pass
                return result[0].to(given), result[1]
            return tree_map(lambda r: r.to(given), result)


@contextmanager
def _noted(fact: str) -> Iterator[None]:
    """Inside, `fact` is true of the calling thread."""
    before = getattr(_thread, fact, False)
    setattr(_thread, fact, True)
    try:
        yield
    finally:
        setattr(_thread, fact, before)


def exact_products() -> AbstractContextManager[None]:
    """Inside, products are left alone: for code that rounds its operands itself."""
    return _noted("exact")


def rounding() -> bool:
    """Whether what runs in this thread now only rounds numbers, which hardware does unseen."""
    return getattr(_thread, "rounding", False)


@_noted("rounding")
def round_tf32(x: Tensor, out: Tensor | None = None) -> Tensor:
    """fp32 `x` to the nearest number with 10 mantissa bits, ties away from zero; `out` may be `x`.

    As the PTX instruction cvt.rna.tf32.f32; infinities stay, numbers beyond the largest tf32
    become infinite, any NaN stays a NaN.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    # A NaN whose upper mantissa bits are all ones would be carried over to a zero. A sum finds
    # NaNs in the quickest pass there is, and seldom misleads (infinities, overflow).
    odd = None if x.sum().isfinite() else x.isnan()
    # Half a unit of the 10th mantissa bit is added and the 13 bits below it are cut off: rounding
    # to nearest. A carry out of the mantissa raises the exponent, as it has to.
    bits = torch.add(x.contiguous().view(torch.int32), 1 << 12, out=out.view(torch.int32))
    bits.bitwise_and_(-1 << 13)
    return out if odd is None else out.masked_fill_(odd, torch.nan)


@_noted("rounding")
def round_to(x: Tensor, name: str, out: Tensor | None = None) -> Tensor:
    """fp32 `x` rounded to the format `name` and kept in fp32; contiguous `out` may be `x`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    source = x.contiguous().view(-1).split(PIECE)
    for piece, target in zip(source, out.view(-1).split(PIECE), strict=True):
        if name == "tf32":
            round_tf32(piece, out=target)
        else:
            low = reused("rounding", (piece.numel(),), LOW[name], piece.device)
            target.copy_(low.copy_(piece))
    return out


def _widened(a: Any) -> Any:
    return a.float() if isinstance(a, Tensor) and a.dtype in LOW.values() else a
