"""How much an operation suffers from a low format: products, sums, exponentials and the like."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.compute.runtime import generator
from pipeline.studies.number_formats import DTYPES, round_to_format, unit_roundoff
from pipeline.tables import markdown

ROWS, WIDTH, LOGITS = 64, 768, 1000


@dataclass(frozen=True)
class Sensitivity:
    """One operation in one format. Errors are relative, norm by norm, against float64.

    None stands for what was not measured: torch has no such kernel, or it means nothing here.
    """

    operation: str
    format: str
    rounded: float  # operands in the format, all the rest in float64
    amplification: float  # that error by the format's unit roundoff
    kernel: float | None  # torch's own kernel on tensors of the format
    accumulated: float | None  # running sum rounded to the format after every addition
    lost: float  # share of exact results that the format cannot hold: they overflow or vanish


@dataclass(frozen=True)
class Case:
    """An operation and its operands in float64; those after the first `rounded` ones stay exact."""

    function: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    rounded: int = 1
    terms: Callable[..., Tensor] | None = None  # (..., K) addends whose sum over K is the result


def cases(seed: int = 0) -> dict[str, Case]:
    """The operations of a transformer, on values as they occur in one.

    Activations and the residual stream are N(0, 1), weights N(0, 0.02), logits N(0, 4) so that
    the largest are in the tens, exponents uniform from -10 to 10, summed losses uniform to 10.
    """
    chance = generator(seed, "sensitivity")

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64) * std

    logits = normal(ROWS, LOGITS, std=4.0)
    targets = torch.randint(LOGITS, (ROWS,), generator=chance)
    uniform = torch.rand(ROWS, WIDTH, generator=chance, dtype=torch.float64)
    return {
        "matmul": Case(
            torch.matmul,
            (normal(ROWS, WIDTH), normal(WIDTH, ROWS, std=0.02)),
            rounded=2,
            terms=lambda a, b: a.unsqueeze(1) * b.t().unsqueeze(0),
        ),
        "sum": Case(lambda x: x.sum(-1), (10 * uniform,), terms=lambda x: x),
        "layer_norm": Case(lambda x: F.layer_norm(x, (WIDTH,)), (normal(ROWS, WIDTH) + 1,)),
        "exp": Case(torch.exp, (20 * uniform - 10,)),
        "softmax": Case(lambda x: F.softmax(x, -1), (logits,)),
        "cross_entropy": Case(
            lambda x, y: F.cross_entropy(x, y, reduction="none"), (logits, targets)
        ),
    }


def sensitivities(device: torch.device) -> list[Sensitivity]:
    """Every operation in every format; torch's own kernels run on `device`."""
    return [
        measured(operation, case, name, device)
        for operation, case in cases().items()
        for name in DTYPES
    ]


def measured(operation: str, case: Case, name: str, device: torch.device) -> Sensitivity:
    """One row of the table."""
    exact = case.function(*case.operands)
    changed, kept = case.operands[: case.rounded], case.operands[case.rounded :]
    low = [round_to_format(x, name) for x in changed]
    rounded = relative_error(case.function(*low, *kept), exact)
    kernel = _kernel(case, low, DTYPES[name], device)
    held = round_to_format(exact, name)
    return Sensitivity(
        operation,
        name,
        rounded,
        rounded / unit_roundoff(name),
        None if kernel is None else relative_error(kernel, exact),
        relative_error(_accumulated(case.terms(*low, *kept), name), exact) if case.terms else None,
        (~held.isfinite() | ((held == 0) & (exact != 0))).double().mean().item(),
    )


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; infinite or NaN where a result is."""
    return ((result - exact).norm() / exact.norm()).item()


def amplifications(rows: list[Sensitivity]) -> dict[str, float]:
    """By operation: the median over formats of how much rounding of its operands is amplified."""
    return {
        op: statistics.median(s.amplification for s in rows if s.operation == op)
        for op in dict.fromkeys(s.operation for s in rows)
    }


def page(rows: list[Sensitivity]) -> str:
    """Markdown: what the numbers say to "products are insensitive, exponentials are not"."""
    amplified = amplifications(rows)
    ratio = amplified["exp"] / amplified["matmul"]
    verdict = "So it is here." if ratio > 2 else "The numbers here do not bear that out."
    low = next(s for s in rows if (s.operation, s.format) == ("matmul", "bf16"))
    kernel = f", torch's kernel {low.kernel:.1%}" if low.kernel is not None else ""
    ranges = "; ".join(
        f"{op} " + " by ".join(f"{x.min():.3g} to {x.max():.3g}" for x in c.operands[: c.rounded])
        for op, c in cases().items()
    )
    columns = (
        *("operation", "format", "operands rounded", "amplification", "kernel"),
        *("accumulated in it", "results lost"),
    )
    return (
        "# Sensitivity\n\n"
        "Relative error against float64. Rounding the operands and nothing else is amplified, in "
        "units of the format's roundoff, by "
        + ", ".join(f"{value:.2f} in {op}" for op, value in amplified.items())
        + f': exponentials suffer {ratio:.1f} times as much as products. "Products are '
        f'insensitive, exponentials are not": {verdict}\n\n'
        f"Operands that were rounded: {ranges}. The relative error of exp(x) is that of x times "
        "x, so this figure follows from the exponents: smaller ones suffer less, larger ones "
        "more.\n\n"
        f"What a product does not bear is an accumulator in the format: in bf16 its error is "
        f"{low.accumulated:.1%}, with rounded operands alone {low.rounded:.1%}{kernel}. Hence "
        "every mode accumulates in fp32.\n\n"
        + markdown(columns, [tuple(vars(s).values()) for s in rows])
    )


def _kernel(
    case: Case, low: list[Tensor], dtype: torch.dtype | None, device: torch.device
) -> Tensor | None:
    """The result of torch's kernel for tensors of this dtype, in float64; None if it has none."""
    if dtype is None:
        return None
    try:
        result = case.function(
            *(x.to(dtype).to(device) for x in low),
            *(x.to(device) for x in case.operands[case.rounded :]),
        )
    except (RuntimeError, TypeError) as error:
        if _is_missing(error):
            return None
        raise
    return result.cpu().double()


def _is_missing(error: RuntimeError | TypeError) -> bool:
    """Whether torch says that it has no such kernel or dtype, not that something went wrong.

    On MPS a dtype that is missing is a TypeError; on CUDA products in fp8 are refused in words of
    their own, which name the dtype or cuBLAS.
    """
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return False
    words = ("not implemented", "not supported", "float8", "cublas_status_not_supported")
    return isinstance(error, NotImplementedError | TypeError) or any(
        word in str(error).lower() for word in words
    )


def _accumulated(terms: Tensor, name: str) -> Tensor:
    """The sum over the last dimension as an accumulator of this format would make it."""
    total = torch.zeros_like(terms[..., 0])
    for k in range(terms.size(-1)):
        total = round_to_format(total + terms[..., k], name)
    return total
