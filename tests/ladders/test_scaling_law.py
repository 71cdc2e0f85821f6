"""The law of size and length: known exponents found again, and bands that hold what they claim."""

from __future__ import annotations

import random

import pytest

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


def test_a_band_holds_trainings_to_come_about_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(12):
        noise = random.Random(100 + seed).gauss(0, 0.02)
        band = fit(points(CHINCHILLA, 0.02, seed), noise=0.02, draws=40).at(2.56e8, 1e9)
        inside += band.has(CHINCHILLA(2.56e8, 1e9) + noise)
    assert inside >= 9


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
