"""The number formats of the trade, from torch's dtypes, tf32's from the rounding used here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.compute.emulation import round_tf32
from pipeline.tables import markdown

DTYPES = {
    "fp32": torch.float32,
    "tf32": None,  # a way of multiplying fp32 numbers, which no tensor holds
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Format:
    """A binary floating-point format; `epsilon` is the gap above 1."""

    name: str
    sign_bits: int
    exponent_bits: int
    mantissa_bits: int  # those that are stored; the leading one is not
    largest: float
    smallest_normal: float
    smallest_subnormal: float
    epsilon: float

    @property
    def bits(self) -> int:
        """All of them, the sign included. A tf32 number has 19 and is held in 32."""
        return self.sign_bits + self.exponent_bits + self.mantissa_bits


def formats() -> list[Format]:
    """One Format for every name, widest first."""
    return [_probed_tf32() if dtype is None else _of(n, dtype) for n, dtype in DTYPES.items()]


def unit_roundoff(name: str) -> float:
    """Largest relative error of rounding to nearest: half the gap above 1."""
    return next(f.epsilon for f in formats() if f.name == name) / 2


def round_to_format(x: Tensor, name: str) -> Tensor:
    """`x` rounded once to the nearest number of the format, in x's dtype.

    Ties go to the even one, in tf32 away from zero. Numbers beyond the largest become infinite; in
    e4m3, which has no infinity, NaN.
    """
    dtype = DTYPES[name]
    single = _to_odd(x) if x.dtype is torch.float64 and dtype is not torch.float32 else x.float()
    rounded = (round_tf32(single) if dtype is None else single.to(dtype)).to(x.dtype)
    if dtype is torch.float8_e4m3fn:  # some versions of torch saturate here, others do not
        info = torch.finfo(dtype)
        half_a_gap = info.eps * 2.0 ** math.floor(math.log2(info.max)) / 2
        rounded = rounded.masked_fill(x.abs() > info.max + half_a_gap, torch.nan)
    return rounded


def _to_odd(x: Tensor) -> Tensor:
    """fp64 `x` in fp32, cut off and with a last bit of 1 wherever that is not exact.

    Rounding that to a format with fewer bits is as rounding `x` once (Boldo and Melquiond 2008).
    """
    single = x.float()
    back = single.double()
    cut_off = single.view(torch.int32) - (back.abs() > x.abs()).int()
    return (cut_off | (back != x).int()).view(torch.float32)


def page(known: list[Format]) -> str:
    """Markdown: the table, and which formats share a range or a precision."""
    columns = ("format", "sign", "exponent", "mantissa", "largest", "smallest normal", "epsilon")
    rows = [
        (f.name, f.sign_bits, f.exponent_bits, f.mantissa_bits)
        + (f.largest, f.smallest_normal, f.epsilon)
        for f in known
    ]
    tf32 = next(f for f in known if f.name == "tf32")
    others = [f for f in known if f is not tf32]
    range_like = [f.name for f in others if f.exponent_bits == tf32.exponent_bits]
    precise_like = [f.name for f in others if f.mantissa_bits == tf32.mantissa_bits]
    return (
        "# Number formats\n\n"
        f"tf32 has the exponent bits, hence the range, of {' and '.join(range_like)}, and the "
        f"mantissa bits, hence the precision, of {' and '.join(precise_like)}. Its numbers have "
        f"{tf32.bits} bits and lie in 32.\n\n{markdown(columns, rows)}"
    )


def _of(name: str, dtype: torch.dtype) -> Format:
    info = torch.finfo(dtype)
    mantissa, sign = round(-math.log2(info.eps)), int(info.min < 0)
    return Format(
        name,
        sign_bits=sign,
        exponent_bits=info.bits - sign - mantissa,
        mantissa_bits=mantissa,
        largest=info.max,
        smallest_normal=info.smallest_normal,
        smallest_subnormal=info.smallest_normal * info.eps,
        epsilon=info.eps,
    )


def _probed_tf32() -> Format:
    """tf32 from what survives its rounding: torch has no dtype for it, and so no finfo."""
    steps = [2.0**-k for k in range(1, 24)]
    epsilon = min(s for s in steps if _survives(1 + s))
    mantissa = round(-math.log2(epsilon))
    powers = [k for k in range(-149, 128) if _survives(2.0**k)]
    normal = next(k for k in powers if _survives(2.0**k * (1 + epsilon)))
    top = 2.0 ** powers[-1] * (2 - epsilon)
    assert _survives(top) and not _survives(2.0 ** powers[-1] * (2 - epsilon / 2))
    return Format(
        "tf32",
        sign_bits=int(_survives(-1.0)),
        exponent_bits=math.ceil(math.log2(powers[-1] - normal + 3)),  # and two for 0 and infinity
        mantissa_bits=mantissa,
        largest=top,
        smallest_normal=2.0**normal,
        smallest_subnormal=2.0 ** powers[0],
        epsilon=epsilon,
    )


def _survives(value: float) -> bool:
    x = torch.tensor([value], dtype=torch.float32)
    return round_tf32(x).equal(x) and bool(x.isfinite())
