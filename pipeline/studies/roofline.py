"""Error against speed, and what bounds each operation: measured on this device, for this model.

Arithmetic intensity is floating-point operations by bytes moved, each operand read once and each
result written once. Below the ridge, peak rate by bandwidth, memory is the roof (Williams,
Waterman and Patterson 2009).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.compute.precision import PRECISIONS, Precision, choose_precision
from pipeline.compute.runtime import generator
from pipeline.compute.throughput import SQUARE, medians
from pipeline.tables import markdown

PRODUCT_COLUMNS = ("product", "shape", "mode", "in effect", "error", "ms", "GFLOP/s", "of fp32")
OPERATION_COLUMNS = (
    *("operation", "shape", "FLOP/byte", "bound by", "GFLOP/s", "GB/s"),
    *("of its roof", "MB moved", "ms", "of it the call"),
)

REFERENCE_ROWS = 64  # of a product are made again in float64
CPU_FLOPS = 3e9  # most of one product on a CPU; its rows are cut, and the table says how many
RESULT_BYTES = 1 << 29  # of one fp32 result, on any device: a small GPU is to do it, too
STREAM_BYTES = {"cuda": 1 << 30, "mps": 1 << 28, "cpu": 1 << 28}  # of each of two arrays
LAUNCHES = ("cuda", "mps")  # a CPU is busy with any model that one would train on it
MOSTLY_CALL = 0.5  # of a product's time, in the median: from there on times are those of calls
REFERENCE = "124M"  # in the names of what is measured beside the model there: GPT-2 124M's


@dataclass(frozen=True)
class Shape:
    """A matrix product (batch, rows, inner) x (batch, inner, columns) of the model."""

    name: str
    rows: int
    inner: int
    columns: int
    batch: int = 1
    linear: bool = True  # a linear layer's: where those are fp8, the others are bf16

    def __str__(self) -> str:
        return f"{self.batch} x ({self.rows}, {self.inner}) ({self.columns})"

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.columns

    def bytes_moved(self, operand: int, result: int) -> float:
        """Both operands read and the result written once, with that many bytes a number."""
        read = self.rows * self.inner + self.inner * self.columns
        return float(self.batch) * (operand * read + result * self.rows * self.columns)

    def mode(self, precision: Precision) -> Precision:
        """The precision of this very product."""
        return precision if self.linear else precision.of_the_rest()


@dataclass(frozen=True)
class Operation:
    """An operation of the model, timed in fp32 on one tensor of this shape."""

    seconds: float
    bytes_moved: float
    name: str
    shape: Any
    flops: float

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flops / self.seconds

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.bytes_moved


@dataclass(frozen=True)
class Product(Operation):
    """One of the model's products, of a `Shape`, in one mode."""

    precision: Precision
    error: float  # relative, norm by norm, against float64

    @property
    def reference(self) -> bool:
        return self.name.startswith(REFERENCE)


@dataclass(frozen=True)
class Roofline:
    """All that was measured. `rates` are FLOP/s of a large square product by mode."""

    device: str
    bandwidth: float  # bytes/s
    rates: dict[str, float]
    products: list[Product]
    operations: list[Operation]
    notes: tuple[str, ...] = ()  # why a mode is emulated, or was not measured
    call_seconds: float = 0.0  # of an operation on a single number: what any call takes
    call_share: float = 0.0  # of the model's products' time, where it was looked at

    def roof(self, intensity: float, mode: str) -> float:
        """FLOP/s that memory and the mode's products allow at this intensity."""
        return min(intensity * self.bandwidth, self.rates[mode])

    def ridge(self, mode: str) -> float:
        """The intensity in FLOP/byte below which memory bounds."""
        return self.rates[mode] / self.bandwidth

    def bound(self, intensity: float, mode: str) -> str:
        return "memory" if intensity < self.ridge(mode) else "compute"

    def speed(self, product: Product) -> float:
        """How many times as fast as the same product in fp32."""
        (plain,) = (p for p in self.in_mode("fp32") if p.shape == product.shape)
        return plain.seconds / product.seconds

    def in_mode(self, mode: str) -> list[Product]:
        return [p for p in self.products if p.precision.asked == mode]

    def speed_and_error(self, reference: bool = False) -> dict[str, tuple[float, float]]:
        """{mode: (speed relative to fp32, relative error)}, medians over the model's products.

        `reference`: over GPT-2 124M's instead, which are there if `mostly_calls`.
        """
        found = {}
        for mode in self.rates:
            products = [p for p in self.in_mode(mode) if p.reference is reference]
            errors = statistics.median(p.error for p in products)
            found[mode] = statistics.median(map(self.speed, products)), errors
        return found

    @property
    def mostly_calls(self) -> bool:
        """Whether what the model's products take is the call more than the arithmetic."""
        return self.call_share > MOSTLY_CALL

    def about_calls(self) -> str:
        """What the figures of the model's own shapes are worth, if `mostly_calls`."""
        return (
            f"{self.call_share:.0%} of the time of the model's own products is the call, not the "
            "arithmetic: they are too small for this device, and their speeds say little of its "
            f"formats. So those of GPT-2 {REFERENCE} stand beside them"
        )

    def product_rows(self) -> list[tuple[Any, ...]]:
        """One tuple of PRODUCT_COLUMNS for each product in each mode."""
        rows = []
        for p in self.products:
            mode = p.shape.mode(p.precision)
            effective = mode.effective + (" emulated" if mode.emulated else "")
            place = (p.name, str(p.shape), p.precision.asked, effective)
            rows.append((*place, p.error, p.seconds * 1e3, p.rate / 1e9, self.speed(p)))
        return rows

    def operation_rows(self) -> list[tuple[Any, ...]]:
        """One tuple of OPERATION_COLUMNS for each operation, and for each product in fp32."""
        rows = []
        for f in (*self.operations, *self.in_mode("fp32")):
            bound, moved = self.bound(f.intensity, "fp32"), f.bytes_moved / f.seconds
            share = moved / self.bandwidth if bound == "memory" else f.rate / self.rates["fp32"]
            of_it_the_call = round(min(1.0, self.call_seconds / f.seconds), 3)
            rows.append(
                (f.name, str(f.shape), f.intensity, bound, f.rate / 1e9, moved / 1e9, share)
                + (f.bytes_moved / 1e6, f.seconds * 1e3, of_it_the_call)
            )
        return rows

    def products_page(self) -> str:
        """Markdown: error and time of every product in every mode."""
        beside = f" {self.about_calls()}: {self._words(True)}." if self.mostly_calls else ""
        return (
            f"# Error against speed\n\n{self.device}. Medians over the model's products: "
            + f"{self._words(False)}. Error is against float64.{beside}\n"
            + "".join(f"\n- {note}" for note in self.notes)
            + ("\n" if self.notes else "")
            + f"\n{markdown(PRODUCT_COLUMNS, self.product_rows())}"
        )

    def _words(self, reference: bool) -> str:
        return "; ".join(
            f"{mode} {speed:.2f} times fp32's speed, relative error {error:.1e}"
            for mode, (speed, error) in self.speed_and_error(reference).items()
        )

    def operations_page(self) -> str:
        """Markdown: what bounds the operations that are no products, and the products in fp32."""
        rows = self.operation_rows()
        limited = [row[0] for row in rows if row[3] == "memory"]
        return (
            f"# What bounds each operation\n\n{self.device}, fp32. Measured bandwidth "
            f"{self.bandwidth / 1e9:.1f} GB/s, measured matrix rate {self.rates['fp32'] / 1e9:.0f} "
            f"GFLOP/s: below {self.ridge('fp32'):.1f} FLOP/byte memory is the roof. That is so "
            f"for {len(limited)} of {len(rows)}: {', '.join(limited) or 'none'}.\n\n"
            "Neither roof says much of what is small. A call on a single number takes "
            f"{self.call_seconds * 1e6:.1f} microseconds; the last column is that by the whole "
            "time. And what moves a few megabytes may live in a cache, where it can pass its roof: "
            "the bandwidth is that of arrays far larger than any cache."
            + (f" {self.about_calls()}." if self.mostly_calls else "")
            + f"\n\n{markdown(OPERATION_COLUMNS, rows)}"
        )


def shapes(n_embd: int, n_head: int, vocab_rows: int, sequences: int, tokens: int) -> list[Shape]:
    """The forward products of a GPT for a micro-batch of `sequences` by `tokens`."""
    c, rows, heads = n_embd, sequences * tokens, sequences * n_head
    return [
        Shape("attn.c_attn", rows, c, 3 * c),
        Shape("attn q k^T", tokens, c // n_head, tokens, heads, linear=False),
        Shape("attn weights v", tokens, tokens, c // n_head, heads, linear=False),
        Shape("attn.c_proj", rows, c, c),
        Shape("mlp.c_fc", rows, c, 4 * c),
        Shape("mlp.c_proj", rows, 4 * c, c),
        Shape("head", rows, c, vocab_rows, linear=False),
    ]


def fitted(shape: Shape, device: torch.device) -> Shape:
    """The shape, with fewer rows where a CPU would take long or the result be very large."""
    share = RESULT_BYTES / (4 * shape.batch * shape.rows * shape.columns)
    if device.type == "cpu":
        share = min(share, CPU_FLOPS / shape.flops)
    if share >= 1:
        return shape
    if shape.batch > 1:
        return replace(shape, batch=max(2, int(shape.batch * share)))
    return replace(shape, rows=max(REFERENCE_ROWS, int(shape.rows * share)))


def measure(model_shapes: list[Shape], device: torch.device, device_name: str) -> Roofline:
    """Bandwidth, peak rates, the model's products in every mode, and its other operations."""
    side = SQUARE.get(device.type, 1024)
    modes = [choose_precision(name, device) for name in PRECISIONS]
    # A mode that comes to another one here has no figures of its own.
    own = [mode for mode in modes if mode.effective == mode.asked]
    square = _timed_products(Shape("square", side, side, side), own)
    products = [p for shape in model_shapes for p in _timed_products(fitted(shape, device), own)]
    operations = list(_timed_operations(model_shapes[-1], device))
    share = _call_share(products, own) if device.type in LAUNCHES else 0.0
    if share > MOSTLY_CALL:
        large = reference_shapes()
        products += [p for shape in large for p in _timed_products(fitted(shape, device), own)]
        operations += _timed_operations(large[-1], device)
    one = torch.ones(1, device=device)
    return Roofline(
        device_name,
        bandwidth(device),
        {product.precision.asked: product.rate for product in square},
        products,
        operations,
        tuple(f"{mode.asked}: {mode.reason}" for mode in modes if mode.reason),
        medians([lambda: one.add_(one)], device)[0],
        share,
    )


def _call_share(products: list[Product], precisions: list[Precision]) -> float:
    """Of the products' time, in the median: the same call with next to nothing to compute."""
    empty = _timed_products(Shape("empty", 16, 16, 16), precisions)
    seconds = {p.precision: p.seconds for p in empty}
    return statistics.median(min(1.0, seconds[p.precision] / p.seconds) for p in products)


def reference_shapes() -> list[Shape]:
    """Those of GPT-2 124M with 32 sequences of 1,024 tokens: what a large GPU is busy with."""
    own = shapes(n_embd=768, n_head=12, vocab_rows=50304, sequences=32, tokens=1024)
    return [replace(shape, name=f"{REFERENCE} {shape.name}") for shape in own]


def bandwidth(device: torch.device) -> float:
    """Bytes/s of a += b over arrays far larger than any cache.

    A roof for what streams through memory once; what stays in a cache may pass it. In place,
    since a CPU reads the lines of a fresh result before it writes them, which no formula counts.
    """
    count = STREAM_BYTES.get(device.type, 1 << 28) // 4
    a, b = (torch.ones(count, device=device) for _ in range(2))
    (seconds,) = medians([lambda: a.add_(b)], device)
    return 3 * 4 * count / seconds


def relative_error(product: Tensor, a: Tensor, b: Tensor) -> float:
    """Norm of the first rows' distance from the float64 product, by the norm of that."""
    rows = REFERENCE_ROWS
    a, b, product = (x.cpu().double() for x in (a[..., :rows, :], b, product[..., :rows, :]))
    exact = a @ b
    return ((product - exact).norm() / exact.norm()).item()


def _timed_products(shape: Shape, precisions: list[Precision]) -> list[Product]:
    device = precisions[0].device
    chance = generator(0, f"product {shape.name}")
    sizes = ((shape.rows, shape.inner), (shape.inner, shape.columns))
    lead = (shape.batch,) if shape.batch > 1 else ()
    a, b = (torch.randn(*lead, *size, generator=chance).to(device) for size in sizes)
    # Operands have the mode's format already: autocast casts a weight once, not a product.
    modes = [shape.mode(p) for p in precisions]
    calls = [mode.multiplication(a, b) for mode in modes]
    errors = [relative_error(call(), a, b) for call in calls]
    # An emulated product moves fp32 numbers, whatever format their values are in.
    moved = [shape.bytes_moved(p.operand_bytes, p.result_bytes) for p in modes]
    times = medians(calls, device)
    return [
        Product(seconds, bytes_moved, shape.name, shape, shape.flops, precision, error)
        for seconds, bytes_moved, precision, error in zip(
            times, moved, precisions, errors, strict=True
        )
    ]


def _timed_operations(head: Shape, device: torch.device) -> Iterator[Operation]:
    """The model's other operations, fp32, on the tokens that the product `head` has as rows.

    Logits get the rows that `head` itself is cut to. FLOPs by the count of their formulas.
    """
    c, columns = head.inner, head.columns
    rows = min(head.rows, RESULT_BYTES // (4 * 4 * c))
    x, other = (torch.randn(rows, c, device=device) for _ in range(2))
    wide = torch.randn(rows, 4 * c, device=device)
    logits = torch.randn(fitted(head, device).rows, columns, device=device)
    ids, targets = (torch.randint(columns, (n,), device=device) for n in (rows, len(logits)))
    table = torch.randn(columns, c, device=device)
    ones = torch.ones(c, device=device)
    weight = torch.nn.Parameter(torch.randn(columns, c, device=device))
    weight.grad = torch.randn_like(weight)
    adamw = torch.optim.AdamW([weight], fused=device.type in ("cpu", "cuda", "mps"))
    # For each number of the tensor: FLOPs, and reads and writes of fp32 numbers, each once.
    listed: list[tuple[str, Callable[[], Any], Tensor, int, int]] = [
        ("embedding", lambda: F.embedding(ids, table), x, 0, 2),
        ("layer_norm", lambda: F.layer_norm(x, (c,), ones, ones), x, 8, 2),
        ("residual add", lambda: x + other, x, 1, 3),
        ("gelu", lambda: F.gelu(wide, approximate="tanh"), wide, 14, 2),
        ("softmax", lambda: torch.softmax(logits, -1), logits, 5, 2),
        ("cross_entropy", lambda: F.cross_entropy(logits, targets), logits, 5, 1),
        ("AdamW", adamw.step, weight, 15, 7),
    ]
    for name, call, on, flops, moved in listed:
        with torch.no_grad():
            (seconds,) = medians([call], device)
        n = on.numel()
        whose = head.name.removesuffix("head")
        yield Operation(seconds, 4.0 * moved * n, whose + name, tuple(on.shape), float(flops * n))
