"""Sensitivity: amplification as theory has it, accumulators, and what a format cannot hold."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.studies import sensitivity
from pipeline.studies.number_formats import DTYPES, unit_roundoff
from pipeline.studies.sensitivity import Case, amplifications, cases, measured, sensitivities

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found() -> list[sensitivity.Sensitivity]:
    return sensitivities(CPU)


def cell(found, operation: str, name: str) -> sensitivity.Sensitivity:
    return next(s for s in found if (s.operation, s.format) == (operation, name))


def test_every_operation_is_measured_in_every_format(found) -> None:
    pairs = {(s.operation, s.format) for s in found}
    assert pairs == {(op, name) for op in cases() for name in DTYPES}


# What every case is to compute, written out.
FORMULAS = {
    "matmul": lambda a, b: torch.einsum("ik,kj->ij", a, b),
    "sum": lambda x: torch.stack([row.cumsum(0)[-1] for row in x]),
    "layer_norm": lambda x: (
        (x - x.mean(-1, True)) / ((x - x.mean(-1, True)).pow(2).mean(-1, True) + 1e-5).sqrt()
    ),
    "exp": lambda x: math.e**x,
    "softmax": lambda x: math.e**x / (math.e**x).sum(-1, True),
    "cross_entropy": lambda x, y: (math.e**x).sum(-1).log() - x[torch.arange(len(x)), y],
}


@pytest.mark.parametrize("operation", cases())
def test_a_case_computes_what_its_name_says(operation: str) -> None:
    case = cases()[operation]
    result = case.function(*case.operands)
    torch.testing.assert_close(result, FORMULAS[operation](*case.operands), rtol=1e-10, atol=1e-12)
    if case.terms:
        torch.testing.assert_close(case.terms(*case.operands).sum(-1), result)


def test_operands_are_spread_as_the_page_says(found, monkeypatch) -> None:
    page = sensitivity.page(found)
    exponents = cases()["exp"].operands[0]
    assert -10 <= exponents.min() < -9.99 and 9.99 < exponents.max() <= 10
    assert "; exp -10 to 10; " in page
    a, b = (f"{x.min().item():.3g} to {x.max().item():.3g}" for x in cases()["matmul"].operands)
    assert f"rounded: matmul {a} by {b}; sum " in page
    small = {"exp": Case(torch.exp, (torch.tensor([-0.5, 0.25]),))}
    monkeypatch.setattr(sensitivity, "cases", lambda: small)
    assert "Operands that were rounded: exp -0.5 to 0.25." in sensitivity.page(found)


@pytest.mark.parametrize("x", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
def test_exp_amplifies_rounding_by_its_exponent(x: float, name: str) -> None:
    values = x * (1 + torch.rand(20_000, generator=torch.Generator().manual_seed(0)).double() / 9)
    one = measured("exp", Case(torch.exp, (values,)), name, CPU).amplification
    same = measured("same", Case(lambda v: v, (values,)), name, CPU).amplification
    # d exp(x) / exp(x) = x dx / x: the relative error of x, times x.
    assert one / same == pytest.approx(x * 1.06, rel=0.08)


def test_products_are_less_sensitive_than_exponentials(found) -> None:
    amplified = amplifications(found)
    assert amplified["exp"] > 4 * amplified["matmul"]
    assert amplified["softmax"] > 2 * amplified["matmul"]
    assert "So it is here." in sensitivity.page(found)
    # Two rounded operands, errors uniform between -u and u relative to the binade: at most
    # sqrt(2) u / sqrt(3), and not below half of that.
    assert 0.4 < amplified["matmul"] < math.sqrt(2 / 3)


def test_the_page_would_deny_a_claim_that_the_numbers_do_not_bear_out(found) -> None:
    tame = [s for s in found if s.operation != "exp"]
    tame += [sensitivity.Sensitivity("exp", "bf16", 0.001, 0.6, None, None, 0.0)]
    assert "do not bear that out" in sensitivity.page(tame)


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("operation", ["matmul", "sum"])
def test_an_accumulator_in_the_format_is_worse_than_rounded_operands(
    found, operation: str, name: str
) -> None:
    one = cell(found, operation, name)
    assert one.accumulated > 5 * one.rounded


def test_a_running_sum_of_ones_stops_where_the_format_has_no_next_number() -> None:
    ones = torch.ones(1, 400, dtype=torch.float64)
    total = sensitivity._accumulated(ones, "bf16")
    assert total.item() == 256  # 256 + 1 is halfway to 258 and goes to the even 256
    assert sensitivity._accumulated(ones, "fp16").item() == 400


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_torchs_own_kernels_are_no_better_than_rounded_operands(found, name: str) -> None:
    for operation in ("matmul", "softmax", "layer_norm", "exp"):
        one = cell(found, operation, name)
        assert one.rounded <= one.kernel < 3 * one.rounded, operation


def test_a_kernel_that_torch_has_not_is_none_and_not_a_number(found) -> None:
    assert cell(found, "matmul", "tf32").kernel is None
    assert cell(found, "softmax", "fp8_e4m3").kernel is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory, a Float8 product is not supported"),
        torch.AcceleratorError("CUDA error: an illegal memory access; not implemented: Float8"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=["memory", "accelerator", "asynchronous"],
)
def test_an_error_that_is_no_missing_kernel_is_not_hidden(error: RuntimeError) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is torch.float64:
            return x
        raise error

    with pytest.raises(type(error), match="memory"):
        measured("any", Case(fail, (torch.ones(2).double(),)), "fp8_e4m3", CPU)


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("\"exp_cuda\" is not there for 'Float8_e4m3fn'"),
        TypeError("Trying to convert Float8_e4m3fn to the MPS backend"),
        RuntimeError('"addmm_cuda" not implemented for Half'),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLt"),
    ],
    ids=["class", "dtype", "message", "library"],
)
def test_a_kernel_or_dtype_that_is_missing_is_none(error: Exception) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is torch.float64:
            return x
        raise error

    assert measured("any", Case(fail, (torch.ones(2).double(),)), "bf16", CPU).kernel is None


def test_a_softmax_kernel_forced_low_shows(found) -> None:
    def forced(x: torch.Tensor) -> torch.Tensor:
        exact = x.dtype is torch.float64
        return torch.softmax(x if exact else x.bfloat16(), -1).to(x.dtype)

    low = measured("softmax", Case(forced, cases()["softmax"].operands), "fp32", CPU)
    assert low.kernel > 1e4 * cell(found, "softmax", "fp32").kernel
    assert low.kernel == pytest.approx(cell(found, "softmax", "bf16").kernel, rel=0.1)


def test_results_beyond_the_format_are_counted_as_lost(found) -> None:
    exponents = cases()["exp"].operands[0]
    over = (exponents > math.log(464)).double().mean().item()  # e4m3 ends at 448, half a gap on
    under = (exponents < math.log(2.0**-10)).double().mean().item()
    assert cell(found, "exp", "fp8_e4m3").lost == pytest.approx(over + under, abs=1e-3)
    assert cell(found, "exp", "bf16").lost == 0
    assert cell(found, "softmax", "fp16").lost > 0.1 > cell(found, "softmax", "bf16").lost


def test_rounding_alone_is_within_the_unit_roundoff() -> None:
    for name in DTYPES:
        values = torch.rand(1000, generator=torch.Generator().manual_seed(1)).double() + 1
        one = measured("same", Case(lambda v: v, (values,)), name, CPU)
        assert 0.2 < one.amplification <= 1
        assert one.rounded == one.amplification * unit_roundoff(name)
