"""The best rate of a width, and whether it moves: against made-up losses whose answer is known."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from pipeline.ladders.best_rate import judge, vertex

WIDTHS, RATES = (32, 64, 128), [2.0**k for k in range(-11, -5)]


def bowls(moves: float, noise: float = 0.0, seeds: int = 2, seed: int = 0, bend: float = 0.1):
    """Losses of parabolas whose lowest point is 2**(-8.3 + moves * doublings)."""
    random = np.random.default_rng(seed)
    levels = random.normal(0, 0.3, seeds)  # of a seed's data, the same at every rate
    return {
        width: {
            rate: [
                6
                + bend * (math.log2(rate) + 8.3 - moves * n) ** 2
                + level
                + random.normal(0, noise)
                for level in levels
            ]
            for rate in RATES
        }
        for n, width in enumerate(WIDTHS)
    }


def test_the_best_rate_is_the_lowest_point_of_a_parabola() -> None:
    found = judge(bowls(-0.4)).found
    assert [one.log2 for one in found] == pytest.approx([-8.3, -8.7, -9.1])
    assert [math.log2(one.rate) for one in found] == [-8, -9, -9]
    assert [one.std for one in found] == pytest.approx([0] * 3, abs=1e-9), "levels move no vertex"


def test_the_pull_of_a_loss_on_the_vertex_is_its_derivative() -> None:
    x, y = [-9.0, -8.1, -7.0], [6.2, 6.05, 6.13]
    place, pull = vertex(x, y)
    a, b, _ = np.polyfit(x, y, 2)
    assert place == pytest.approx(-b / (2 * a))
    for k in range(3):
        raised = [one + 1e-6 * (n == k) for n, one in enumerate(y)]
        assert pull[k] == pytest.approx((vertex(x, raised)[0] - place) / 1e-6, rel=1e-3)


def test_the_std_is_that_of_vertices_over_many_draws() -> None:
    drawn = [judge(bowls(-0.4, noise=0.004, seed=seed)).found for seed in range(200)]
    for n in range(3):
        seen = statistics.stdev(found[n].log2 for found in drawn)
        told = math.sqrt(statistics.fmean(found[n].std ** 2 for found in drawn))
        assert told == pytest.approx(seen, rel=0.2)


def test_of_widths_with_one_best_rate_one_in_twenty_seems_to_move() -> None:
    drawn = [judge(bowls(0, noise=0.004, seed=seed)) for seed in range(400)]
    assert {one.freedom for one in drawn} == {6}
    assert 0.02 < statistics.fmean(one.moves for one in drawn) < 0.09


def test_a_rate_at_the_edge_is_no_number_and_gives_no_verdict() -> None:
    losses = bowls(-3, noise=0.004)
    verdict = judge({**losses, 64: bowls(3)[128]})
    assert [one.words() for one in verdict.found][1:] == ["at the edge: try higher"] + [
        "at the edge: try lower"
    ]
    assert verdict.words() == (
        "No verdict: a lowest loss is at the edge of the rates, or beside one that failed or is 1 "
        "nat/token higher; give more rates, higher ones for 64 channels, lower ones for 128 "
        "channels."
    )


@pytest.mark.parametrize("loss", [math.inf, 7.5])
def test_beside_a_rate_that_failed_or_is_far_higher_there_is_no_parabola(loss: float) -> None:
    losses = bowls(0, noise=0.004)
    rate = judge(losses).found[1].rate
    losses[64][2 * rate] = [loss, loss]
    verdict = judge(losses)
    assert verdict.found[1].words() == "beside a failed or far higher one: try closer"
    assert "give more rates, closer ones for 64 channels." in verdict.words()
    assert all(one.std < 1 for one in (verdict.found[0], verdict.found[2])), "theirs is untouched"


def test_the_verdict_says_what_becomes_of_a_copied_rate() -> None:
    down, up = judge(bowls(-0.5, noise=0.002)), judge(bowls(0.5, noise=0.002))
    assert down.slope == pytest.approx(-0.5, abs=0.05)
    assert "moves with the width (-0.5" in down.words()
    assert "1.4 times too high; multiply it by 0.7 at each doubling" in down.words()
    assert "1.4 times too low; multiply it by 1.4 at each doubling" in up.words()
    assert "moves by little with the width (-0.05" in judge(bowls(-0.05, noise=0.0005)).words()
    stays = judge(bowls(0, noise=0.004, seed=1)).words()
    assert "does not move with the width by more than the noise" in stays
    assert "can be copied" in stays


def test_a_rate_that_may_move_by_half_is_not_said_to_be_good_elsewhere() -> None:
    drawn = [judge(bowls(-0.45, noise=0.05, seed=seed)) for seed in range(100)]
    copied = ["can be copied to the others" in one.words() for one in drawn]
    assert statistics.fmean(copied) < 0.04
    assert sum(not one.moves and one.interval < 0.5 for one in drawn) > 5


def test_a_std_that_says_nothing_is_no_percentage() -> None:
    drawn = [judge(bowls(0, noise=0.05, bend=0.01, seed=seed)).found for seed in range(100)]
    vague = [one.words() for found in drawn for one in found if one.std > 2]
    assert vague and all("by a factor of more than 4" in words for words in vague)


def test_too_much_noise_or_one_seed_is_not_taken_for_a_rate_that_stays() -> None:
    loud = judge(bowls(-0.1, noise=0.04, bend=0.04, seed=1))
    assert loud.interval > 0.5
    assert "do not tell whether the best rate moves" in loud.words()
    one = judge(bowls(-0.4, seeds=1))
    assert math.isnan(one.found[0].std) and "±" not in one.found[0].words()
    assert "-0.40 log2 per doubling" in one.words()
    assert "whether that is more than the noise is unknown" in one.words()
