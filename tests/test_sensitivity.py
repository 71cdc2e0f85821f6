"""Sensitivity: amplification as theory has it, accumulators, and what a format cannot hold."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline import sensitivity
from pipeline.formats import DTYPES, unit_roundoff
from pipeline.sensitivity import Case, amplifications, cases, measured, sensitivities

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found() -> list[sensitivity.Sensitivity]:
    return sensitivities(CPU)


def cell(found, operation: str, name: str) -> sensitivity.Sensitivity:
    return next(s for s in found if (s.operation, s.format) == (operation, name))


def test_every_operation_is_measured_in_every_format(found) -> None:
    pairs = {(s.operation, s.format) for s in found}
    assert pairs == {(op, name) for op in cases() for name in DTYPES}


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
