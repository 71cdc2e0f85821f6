"""A difference is called rounding by the format of what was computed, or not at all."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.diagnostics import trace
from pipeline.diagnostics.trace import WHOLE, Made, Trace
from pipeline.experiments import rounding

BOTH = ("a", "b")


def of(precision: str, made: Made) -> Trace:
    return Trace({"x": made}, {}, True, precision, frozenset(["h.c_fc"]), (1, 1))


def said(a: list[float], b: list[float], precision: str, made: Made) -> str:
    values = [{WHOLE: torch.tensor(numbers)} for numbers in (a, b)]
    return rounding.size(values, "x", [of(precision, made)] * 2, BOTH)


PRODUCT = ("addmm",)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (Made(trace.FORWARD, "h.c_fc", {}, PRODUCT, torch.bfloat16), "fp8"),
        (Made(trace.FORWARD, "h.attn", {}, ("bmm",), torch.bfloat16), "bf16"),
        (Made(trace.FORWARD, "h.drop", {}, ("native_dropout",), torch.bfloat16), "bf16"),
        (Made(trace.FORWARD, "h.ln", {}, ("native_layer_norm",), torch.float32), "fp32"),
        (Made(trace.BACKWARD, "h.ln", {}, PRODUCT, torch.bfloat16), "fp8"),
        (Made(trace.LOSS, "", {}, PRODUCT, torch.float64), "fp8"),
        (Made(trace.GRADIENTS, "h.ln", {}, (), torch.float32), "fp8"),
        (Made(trace.UPDATE, "h.ln", {}, (), torch.float32), "fp32"),
    ],
)
def test_the_format_is_that_of_what_was_computed_there(made: Made, wanted: str) -> None:
    assert rounding.format_of(made, of("fp8", made)) == wanted


@pytest.mark.parametrize("precision", rounding.EPSILONS)
def test_each_format_has_a_limit_below_half_of_the_largest_number(precision: str) -> None:
    made = Made(trace.GRADIENTS, "", {}, PRODUCT)
    epsilon = rounding.EPSILONS[precision]
    assert said([1.0, 1.0], [1.0, 1.0 - epsilon], precision, made).endswith(": rounding.")
    assert said([1.0, 1.0], [1.0, 0.5], precision, made).endswith("another computation.")
    low = precision not in ("fp32", "tf32")
    made = Made(trace.LOSS, "", {}, PRODUCT)
    assert low == ("does not tell" in said([1.0], [1.0 + epsilon], precision, made))


def test_numbers_that_are_not_finite_are_counted_and_no_rounding() -> None:
    made = Made(trace.FORWARD, "h.c_fc", {}, PRODUCT)
    assert said([1.0, math.nan, math.inf], [1.0, 2.0, math.inf], "fp32", made) == (
        "Of its 3 numbers are not finite: 2 in a and 1 in b."
    )
