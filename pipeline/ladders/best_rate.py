"""The best learning rate of each width, from a few losses, and whether it moves with the width."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

Losses = Mapping[float, Sequence[float]]  # by rate, of each seed in the same order, nats/token

SURE = 0.95  # of the interval that a verdict rests on
LITTLE = 0.1  # log2 per doubling: 7%, which is less than anybody tunes a rate to
UNSURE = 0.5  # log2 per doubling: half of what muP takes from the matrices' rates; see `Verdict`
FAR = 1.0  # nats/token above the lowest loss: so steep a side is no parabola's
VAGUE = 2.0  # log2: a std beyond it says nothing of a rate


@dataclass(frozen=True)
class Best:
    """The best rate of a width; at the edge of the rates there is none."""

    width: int
    rate: float  # with the lowest mean loss, of those tried
    loss: float  # its mean loss, nats/token
    log2: float = math.nan  # of the best rate, by the parabola
    std: float = math.nan  # of that, from the seeds; NaN with one seed
    try_: str = ""  # "lower" or "higher" where `rate` is at the edge; "closer" beside a FAR one

    def words(self) -> str:
        if self.try_ == "closer":
            return f"beside a failed or far higher one: try {self.try_}"
        if self.try_:
            return f"at the edge: try {self.try_}"
        if self.std > VAGUE:
            return f"{2**self.log2:.3g}, by a factor of more than {2**VAGUE:g}"
        # The std of a logarithm is a factor; for small ones it reads well as a percentage.
        spread = "" if math.isnan(self.std) else f" ± {2**self.std - 1:.0%}"
        return f"{2**self.log2:.3g}{spread}"


@dataclass(frozen=True)
class Verdict:
    """Whether the best rate moves with the width: a straight line in log2 of both."""

    found: tuple[Best, ...]
    freedom: int  # degrees of freedom of the noise; 0 with one seed

    @cached_property
    def _weights(self) -> np.ndarray:
        doublings = np.log2([one.width for one in self.found])
        apart = doublings - doublings.mean()
        return apart / (apart**2).sum()

    @property
    def slope(self) -> float:
        """Of the best rate: log2 per doubling of the width."""
        return float(self._weights @ [one.log2 for one in self.found])

    @property
    def interval(self) -> float:
        """Half the width of the slope's interval, which the noise of seeds alone makes."""
        std = math.hypot(*(self._weights * [one.std for one in self.found]))
        return float(stats.t.ppf((1 + SURE) / 2, self.freedom)) * std if self.freedom else math.nan

    @property
    def moves(self) -> bool:
        return abs(self.slope) > self.interval

    def words(self) -> str:
        """One sentence."""
        if edge := [one for one in self.found if one.try_]:
            named = ", ".join(f"{one.try_} ones for {one.width} channels" for one in edge)
            return (
                "No verdict: a lowest loss is at the edge of the rates, or beside one that failed "
                f"or is {FAR:g} nat/token higher; give more rates, {named}."
            )
        by = f"{self.slope:+.2f} log2 per doubling of the channels"
        if not self.freedom:
            return (
                f"The best rate moves by {by}; whether that is more than the noise is unknown, as "
                "there is one seed only: give --seeds."
            )
        said = f"{by}, {SURE:.0%} interval ± {self.interval:.2f} from the seeds"
        if self.moves and abs(self.slope) < LITTLE:
            return (
                f"The best rate moves by little with the width ({said}), more than the noise and "
                f"less than {2**LITTLE - 1:.0%} at a doubling: it can be copied to another width."
            )
        if self.moves:
            way = "high" if self.slope < 0 else "low"
            return (
                f"The best rate moves with the width ({said}): a rate copied to twice the channels "
                f"is {2 ** abs(self.slope):.2g} times too {way}; multiply it by "
                f"{2**self.slope:.2g} at each doubling."
            )
        if not abs(self.slope) + self.interval <= UNSURE:
            return (
                f"These trainings do not tell whether the best rate moves with the width ({said}): "
                "give more --seeds, or more steps."
            )
        return (
            f"The best rate does not move with the width by more than the noise ({said}): a rate "
            "found at one of these widths can be copied to the others."
        )


def judge(losses: Mapping[int, Losses]) -> Verdict:
    """The verdict on the losses of several widths, which share their rates and seeds.

    The best rate of a width is the vertex of the parabola, in log2 of the rate, through the lowest
    mean loss and its two neighbours. Its std follows from the scatter of single losses beside the
    sum of a seed's own level and a rate's own, since a seed's level moves no vertex; that scatter
    is taken over the three rates of every width together.
    """
    triples = {width: lowest_three(by_rate) for width, by_rate in losses.items()}
    scatter = [scattered([losses[width][rate] for rate in t]) for width, t in triples.items() if t]
    freedom = sum(free for _, free in scatter)
    noise = math.sqrt(sum(squares for squares, _ in scatter) / freedom) if freedom else math.nan
    found = (_best(width, losses[width], triple, noise) for width, triple in triples.items())
    return Verdict(tuple(found), freedom)


def lowest_three(by_rate: Losses) -> list[float]:
    """The rate of the lowest mean loss between its neighbours; [] where they make no parabola."""
    rates = sorted(by_rate)
    means = [statistics.fmean(by_rate[rate]) for rate in rates]
    at = means.index(min(means))
    if not 0 < at < len(rates) - 1 or max(means[at - 1], means[at + 1]) > means[at] + FAR:
        return []
    return rates[at - 1 : at + 2]


def scattered(rows: Sequence[Sequence[float]]) -> tuple[float, int]:
    """(sum of squares, degrees of freedom) of losses, (rates, seeds), beside both their levels."""
    table = np.array(rows)
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    return float((rest**2).sum()), (table.shape[0] - 1) * (table.shape[1] - 1)


def _best(width: int, by_rate: Losses, triple: Sequence[float], noise: float) -> Best:
    means = {rate: statistics.fmean(found) for rate, found in by_rate.items()}
    rate = min(means, key=lambda one: (means[one], one))
    if not triple:
        side = {min(means): "lower", max(means): "higher"}.get(rate, "closer")
        return Best(width, rate, means[rate], try_=side)
    seeds = len(by_rate[rate])
    log2, pull = vertex([math.log2(one) for one in triple], [means[one] for one in triple])
    return Best(width, rate, means[rate], log2, math.hypot(*pull) * noise / math.sqrt(seeds))


def vertex(x: Sequence[float], y: Sequence[float]) -> tuple[float, list[float]]:
    """(lowest place of the parabola through three points, its derivative by each y)."""
    total = sum(x)
    parts = [1 / math.prod(x[k] - other for other in x if other != x[k]) for k in range(3)]
    bend = math.fsum(part * one for part, one in zip(parts, y, strict=True))
    slope = math.fsum(
        part * (total - place) * one for part, place, one in zip(parts, x, y, strict=True)
    )
    place = slope / (2 * bend)
    pull = [
        part * (total - own - 2 * place) / (2 * bend) for part, own in zip(parts, x, strict=True)
    ]
    return place, pull
