"""The table of number formats, against what the standards say."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from pipeline.compute import emulation
from pipeline.drawing import figures
from pipeline.studies import number_formats
from pipeline.studies.number_formats import Format, round_to_format

# IEEE 754 (fp32, fp16), bfloat16 as in Wang & Kanwar 2019, tf32 as NVIDIA describes it, and the
# two fp8 formats of Micikevicius et al. 2022.
KNOWN = {
    "fp32": (1, 8, 23, (2 - 2**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2.0**-23),
    "tf32": (1, 8, 10, (2 - 2**-10) * 2.0**127, 2.0**-126, 2.0**-136, 2.0**-10),
    "bf16": (1, 8, 7, (2 - 2**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2.0**-7),
    "fp16": (1, 5, 10, 65504.0, 2.0**-14, 2.0**-24, 2.0**-10),
    "fp8_e4m3": (1, 4, 3, 448.0, 2.0**-6, 2.0**-9, 2.0**-3),
    "fp8_e5m2": (1, 5, 2, 57344.0, 2.0**-14, 2.0**-16, 2.0**-2),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_format_has_the_bits_and_bounds_of_its_standard(name: str) -> None:
    found = next(f for f in number_formats.formats() if f.name == name)
    assert found == Format(name, *KNOWN[name])
    assert number_formats.unit_roundoff(name) == KNOWN[name][-1] / 2


def test_the_sign_is_looked_for_and_not_written_down(monkeypatch) -> None:
    scale = number_formats._of(
        "e8m0", torch.float8_e8m0fnu
    )  # of fp8 blocks: an exponent and no sign
    assert (scale.sign_bits, scale.exponent_bits, scale.mantissa_bits, scale.bits) == (0, 8, 0, 8)
    monkeypatch.setattr(number_formats, "round_tf32", lambda x: emulation.round_tf32(x).abs())
    assert number_formats._probed_tf32().sign_bits == 0
    assert number_formats.page([number_formats._probed_tf32()]).count("| tf32   |    0 |") == 1


def test_the_table_has_every_format_and_no_other() -> None:
    assert [f.name for f in number_formats.formats()] == list(KNOWN) == list(number_formats.DTYPES)


def test_tf32_is_probed_and_not_written_down(monkeypatch) -> None:
    def eleven_bits(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(torch.int32) + (1 << 11)
        return (bits & (-1 << 12)).view(torch.float32)

    assert emulation.round_tf32 is number_formats.round_tf32
    monkeypatch.setattr(number_formats, "round_tf32", eleven_bits)
    found = next(f for f in number_formats.formats() if f.name == "tf32")
    assert (found.mantissa_bits, found.epsilon, found.bits) == (11, 2.0**-11, 20)


@pytest.mark.parametrize("name", KNOWN)
def test_rounding_keeps_the_formats_own_numbers_and_the_nearest_of_others(name: str) -> None:
    _, _, mantissa, largest, normal, subnormal, epsilon = KNOWN[name]
    own = torch.tensor([0.0, 1.0, 1 + epsilon, -largest, normal, subnormal], dtype=torch.float64)
    assert torch.equal(round_to_format(own, name), own)
    between = torch.tensor([1 + 0.49 * epsilon, 1 + 0.51 * epsilon], dtype=torch.float64)
    if mantissa < 23:
        assert round_to_format(between, name).tolist() == [1.0, 1 + epsilon]
    assert not round_to_format(torch.tensor([largest * 1.1], dtype=torch.float64), name).isfinite()


def nearest(x: float, name: str) -> float:
    """`x` rounded to the format in exact arithmetic."""
    _, _, mantissa, largest, normal, subnormal, _ = KNOWN[name]
    if math.isnan(x) or math.isinf(x):
        return math.nan if name == "fp8_e4m3" else x
    size = abs(Fraction(x))
    power = max(Fraction(normal), Fraction(2) ** (math.frexp(x)[1] - 1))
    steps = size / (power / 2**mantissa)
    below = math.floor(steps)
    away = 2 * (steps - below)
    up = away > 1 or (away == 1 and (name == "tf32" or below % 2))
    found = (below + up) * (power / 2**mantissa)
    if found > Fraction(largest):
        return math.nan if name == "fp8_e4m3" else math.copysign(math.inf, x)
    return math.copysign(float(found), x)


def doubles(name: str) -> torch.Tensor:
    """Numbers around and between those of the format: ties, hairs beside them, both ends."""
    _, _, mantissa, largest, normal, subnormal, epsilon = KNOWN[name]
    draw = torch.Generator().manual_seed(3)
    spread = torch.rand(300, generator=draw, dtype=torch.float64) + 1
    low, high = round(math.log2(subnormal)) - 3, round(math.log2(largest)) + 2
    powers = torch.randint(low, high, (300,), generator=draw)
    own = [math.ldexp(*pair) for pair in zip(spread.tolist(), powers.tolist(), strict=True)]
    own = torch.tensor([*own, normal, largest, subnormal], dtype=torch.float64)
    ends = torch.tensor([0.0, math.inf, math.nan, 5e-324, 1.7e308, 1e-300], dtype=torch.float64)
    kept = torch.tensor([nearest(x, name) for x in own.tolist()], dtype=torch.float64)
    gaps = [math.ldexp(1.0, math.frexp(x)[1] - 1 - mantissa) for x in kept.tolist()]
    ties = kept + torch.tensor(gaps, dtype=torch.float64).clamp(min=subnormal) / 2
    beside = [ties * (1 + sign * 2.0**-power) for sign in (1, -1) for power in (26, 40, 52)]
    found = torch.cat([own, kept, ties, *beside, ends])
    return torch.cat([found, -found])


@pytest.mark.parametrize("name", KNOWN)
def test_doubles_are_rounded_once_as_exact_arithmetic_has_it(name: str) -> None:
    given = doubles(name)
    expected = torch.tensor([nearest(x, name) for x in given.tolist()], dtype=torch.float64)
    found = round_to_format(given, name)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    known = ~expected.isnan()
    assert torch.equal(found[known].signbit(), expected[known].signbit()), "zeros keep their sign"
    twice = round_to_format(given.float(), name).double()
    if name != "fp32":
        assert not torch.equal(twice.nan_to_num(), expected.nan_to_num()), "the cases tell apart"


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_numbers_are_rounded_the_same(name: str, dtype: torch.dtype) -> None:
    given = doubles(name).to(dtype)
    expected = [nearest(x, name) for x in given.double().tolist()]
    expected = torch.tensor(expected, dtype=torch.float64).to(dtype)
    found = round_to_format(given, name)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_hair_above_a_tie_is_rounded_up() -> None:
    hair = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert round_to_format(hair, "bf16").item() == 1.0078125


def test_the_page_says_what_tf32_shares() -> None:
    page = number_formats.page(number_formats.formats())
    assert "range, of fp32 and bf16" in page and "precision, of fp16" in page
    assert page.count("\n|") == len(KNOWN) + 2


def test_the_figure_has_one_square_a_bit() -> None:
    (axis,) = figures.bit_layout(number_formats.formats()).axes
    squares = [p for p in axis.patches if p.get_y() < 99]
    assert len(squares) == sum(f.bits for f in number_formats.formats())
    mantissas = {round(p.get_x()) for p in squares if p.get_y() == -1}
    assert mantissas == set(range(19)), "tf32: 1 + 8 + 10 squares in a row"
    meanings = {p.get_label(): p.get_facecolor() for p in axis.patches if p.get_y() == 99}
    assert len(set(meanings.values())) == 3
    for row, name in enumerate(KNOWN):
        own = sorted((p for p in squares if p.get_y() == -row), key=lambda p: p.get_x())
        found = [next(m for m, c in meanings.items() if c == p.get_facecolor()) for p in own]
        _, exponent, mantissa, *_ = KNOWN[name]
        assert found == ["sign"] + ["exponent"] * exponent + ["mantissa"] * mantissa, name
