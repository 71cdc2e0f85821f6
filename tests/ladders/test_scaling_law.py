"""The law of size and length: known exponents found again, and bands that hold what they claim."""

from __future__ import annotations

import random
import statistics

import pytest

from pipeline.ladders import scaling_law
from pipeline.ladders.scaling_law import Band, Fit, Law, Point, fit

# Of Hoffmann et al. 2022, eq. 10, as Besiroglu et al. 2024 have corrected it.
CHINCHILLA = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
SIZES = (1e6, 4e6, 16e6, 64e6)
LENGTHS = (1e6, 1e7, 1e8, 1e9)


def points(law: Law, noise: float = 0.0, seed: int = 0) -> list[Point]:
    draw = random.Random(seed)
    return [Point(int(n), int(d), law(n, d) + draw.gauss(0, noise)) for n in SIZES for d in LENGTHS]


def test_the_law_is_the_published_formula() -> None:
    assert Law(2.0, 30.0, 400.0, 0.5, 0.25)(9e4, 1e8) == pytest.approx(2.0 + 30 / 300 + 400 / 100)


def test_exponents_of_points_without_noise_are_found_again() -> None:
    found = fit(points(CHINCHILLA), draws=2).law
    assert found.alpha == pytest.approx(CHINCHILLA.alpha, rel=0.02)
    assert found.beta == pytest.approx(CHINCHILLA.beta, rel=0.02)
    assert found.e == pytest.approx(CHINCHILLA.e, abs=0.05)
    assert found(2e8, 4e9) == pytest.approx(CHINCHILLA(2e8, 4e9), abs=0.02)


def test_exponents_of_noisy_points_lie_in_their_ranges() -> None:
    found = fit(points(CHINCHILLA, 0.01), noise=0.01, draws=60)
    for name in ("e", "alpha", "beta"):
        low, high = found.spread(name)
        assert low <= getattr(CHINCHILLA, name) <= high and low < high, name


def default_ladder(seed: int) -> tuple[list[Point], float]:
    """Points of the command's own grid whose lengths share their size's error, and an outcome."""
    draw = random.Random(seed)
    law, seen = Law(3.0, 60.0, 900.0, 0.25, 0.5), []
    for n in (810_224, 1_639_296, 2_505_648, 3_377_728):
        shared = draw.gauss(0, 0.05)
        for d in (102_400, 204_800, 409_600):
            seen.append(Point(n, d, law(n, d) + shared + draw.gauss(0, 0.01)))
    return seen, law(7_248_640, 409_600) + draw.gauss(0, 0.05)


def test_a_band_holds_trainings_to_come_and_is_no_wider_than_that_takes() -> None:
    """Of twelve made-up ladders all; docs/larger.md says so, and how wide they are."""
    widths = []
    for seed in range(12):
        seen, outcome = default_ladder(seed)
        band = fit(seen, noise=0.05, draws=25).at(7_248_640, 409_600)
        assert band.has(outcome), seed
        widths.append(band.high - band.low)
    assert statistics.median(widths) < 10 * 0.05 and max(widths) < 15 * 0.05


def test_lengths_of_a_size_share_an_error_since_they_are_forks_of_one_run(monkeypatch) -> None:
    law, best = Law(3.0, 60.0, 900.0, 0.25, 0.5), scaling_law._best
    drawn: list[list[Point]] = []

    def fitted(seen: list[Point], starts) -> Law:
        drawn.append(list(seen))
        return law if len(drawn) > 1 else best(seen, starts)

    monkeypatch.setattr(scaling_law, "_best", fitted)
    shifts = {10**6: 0.05, 2 * 10**6: -0.05, 4 * 10**6: 0.05, 8 * 10**6: -0.05}
    lengths = (10**5, 2 * 10**5, 4 * 10**5)
    found = fit([Point(n, d, law(n, d) + e) for n, e in shifts.items() for d in lengths], draws=20)
    for moved in drawn[1:]:
        errors = [p.loss - found.law(p.parameters, p.tokens) for p in moved]
        for at in range(0, 12, 3):
            assert max(errors[at : at + 3]) - min(errors[at : at + 3]) < 0.02
    assert max(found.errors) - min(found.errors) > 0.1


def test_a_std_of_few_seeds_is_itself_uncertain() -> None:
    def width(seeds: int) -> float:
        band = fit(points(CHINCHILLA, 0.001), 0.1, seeds, draws=40).at(2.56e8, 1e9)
        return band.high - band.low

    assert width(3) > 1.2 * width(0) and width(0) < 8 * 0.1


def test_the_band_holds_the_forecast() -> None:
    """An outlier that the robust law leaves would move a mean, and the band off the forecast."""
    seen = points(CHINCHILLA)
    seen[5] = Point(seen[5].parameters, seen[5].tokens, seen[5].loss * 1.2)
    found = fit(seen, draws=8)
    assert found.at(2.56e8, 1e9).has(found.law(2.56e8, 1e9))
    above = Fit(found.points, found.law, (found.law,) * 3, (0.1, 0.2, 0.3)).at(2.56e8, 1e9)
    assert above.low == above.loss < above.high


def test_an_outlier_does_not_move_the_law() -> None:
    """The Huber loss: a least-squares fit of log L follows it."""
    seen = points(CHINCHILLA)
    seen[5] = Point(seen[5].parameters, seen[5].tokens, seen[5].loss * 1.2)
    assert fit(seen, draws=1).law(2e8, 4e9) == pytest.approx(CHINCHILLA(2e8, 4e9), abs=0.02)


def test_what_the_points_do_not_tell_has_a_wide_range() -> None:
    """A narrow grid far above E: the same losses come of an E anywhere below them."""
    law = Law(1.8, 400.0, 400.0, 0.34, 0.28)
    near = [
        Point(n, d, law(n, d) + random.Random(n + d).gauss(0, 0.02))
        for n in (800_000, 1_600_000, 3_200_000)
        for d in (50_000, 100_000, 200_000)
    ]
    found = fit(near, noise=0.02, draws=60)
    low, high = found.spread("e")
    assert high - low > 1
    one, far = found.at(3_200_000, 200_000), found.at(124_000_000, 2_500_000_000)
    assert far.high - far.low > 5 * (one.high - one.low), "the width grows with the distance"


def test_the_same_points_have_the_same_fit() -> None:
    seen = points(CHINCHILLA, 0.01)[:9]
    assert fit(seen, 0.01, draws=3) == fit(seen, 0.01, draws=3)


def test_seeds_that_lie_further_apart_than_the_errors_of_the_law_widen_the_band() -> None:
    def width(found: Fit) -> float:
        band = found.at(2.56e8, 1e9)
        return band.high - band.low

    seen = points(CHINCHILLA, 0.001)
    assert width(fit(seen, 0.1, draws=30)) > 5 * width(fit(seen, 0.0, draws=30))


def test_beyond_says_by_how_much_the_largest_rung_is_left_behind() -> None:
    found = fit(points(CHINCHILLA), draws=1)
    assert found.beyond(128e6, 5e8) == (2.0, 0.5)
    assert Band(5.0, 4.9, 5.2).has(5.2) and not Band(5.0, 4.9, 5.2).has(5.21)
