"""The loss as a law of parameters and tokens: fitted, with a band of what it cannot know."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

DELTA = 1e-3  # of the Huber loss on log L, as Hoffmann et al. 2022, D.3, have it
LEAST = 1e-4  # nats/token: a term of the law is above 0, so that its logarithm is finite
STEEPEST = 3.0  # of both exponents; published ones lie between 0.05 and 1
DRAWS = 300  # of the bootstrap
INSIDE = 0.9  # of the draws lie inside a band
TERMS = 5  # numbers that are fitted
_STARTS = tuple(itertools.product((0.1, 0.7, 0.95), (0.2, 0.8), (0.2, 0.8)))


@dataclass(frozen=True)
class Point:
    """A finished training: its size, its length, and what came of it."""

    parameters: int  # the tied embedding once, padded rows included
    tokens: int  # trained on
    loss: float  # of validation, nats/token


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats/token (Hoffmann et al. 2022, eq. 2)."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def __call__(self, parameters: float, tokens: float) -> float:
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def words(self) -> str:
        return (
            f"L(N, D) = {self.e:.3g} + {self.a:.3g} / N^{self.alpha:.3f} "
            f"+ {self.b:.3g} / D^{self.beta:.3f}"
        )


@dataclass(frozen=True)
class Band:
    """What is expected of a training, and where INSIDE of the draws have it, nats/token."""

    loss: float
    low: float
    high: float

    def has(self, loss: float) -> bool:
        return self.low <= loss <= self.high

    def words(self) -> str:
        return f"{self.loss:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Fit:
    """The law of some points, those of resampled points, and the noise of a single training."""

    points: tuple[Point, ...]
    law: Law
    draws: tuple[Law, ...]
    errors: tuple[float, ...]  # of a training beside the law, one for each draw, nats/token

    def at(self, parameters: float, tokens: float) -> Band:
        """A training to come: the law's own uncertainty, and the noise of one training."""
        found = [
            law(parameters, tokens) + error
            for law, error in zip(self.draws, self.errors, strict=True)
        ]
        low, high = np.quantile(found, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
        loss = self.law(parameters, tokens)
        return Band(loss, min(loss, float(low)), max(loss, float(high)))

    def spread(self, name: str) -> tuple[float, float]:
        """Where INSIDE of the draws have a term of the law: e, alpha or beta."""
        values = [getattr(law, name) for law in self.draws]
        low, high = np.quantile(values, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
        return float(low), float(high)

    def beyond(self, parameters: float, tokens: float) -> tuple[float, float]:
        """By which factors a training has more parameters, and tokens, than any that was fitted."""
        return beyond(self.points, parameters, tokens)

    @property
    def residual(self) -> float:
        """Root mean square beside the law by the degrees of freedom left, nats/token."""
        squares = sum(error**2 for error in _errors(self.law, self.points))
        return math.sqrt(squares / max(1, len(self.points) - TERMS))


def fit(
    points: Sequence[Point], noise: float = 0.0, seeds: int = 0, draws: int = DRAWS, seed: int = 0
) -> Fit:
    """The law with the least Huber loss on log L, and its bootstrap; the same points, the same fit.

    A draw resamples the errors of the law, not the points: these lie on a grid of few sizes, and a
    draw that misses a size would say nothing about it. The lengths of a size are forks of one run,
    with its weights, data order and first steps: they share one error, and each has one beside it.
    Both are widened by the degrees of freedom that the law takes of them, and are together at
    least the `noise`: the std of seeds in nats/token, as uncertain as that of so many `seeds` is
    (Student's t; 0 or 1: taken as known).

    No term is below 0. Where the points do not tell E from the two others, it is one of a range
    (`spread`), and a forecast far from the points gets the width that comes of it.
    """
    law = _best(points, _starts(points))
    by_size, by_point = _parts(_errors(law, points), points)
    size_of = [p.parameters for p in points]
    random = np.random.default_rng(seed)
    square = float(np.mean(by_size**2) + np.mean(by_point**2))

    def drawn(sizes: Sequence[int]) -> list[float]:
        """An error for each point, of so many parameters."""
        unsure = (seeds - 1) / random.chisquare(seeds - 1) if seeds > 1 else 1.0
        beside = math.sqrt(max(0.0, noise**2 * unsure - square))
        shared = {
            size: random.choice(by_size) + random.normal(0.0, beside)
            for size in dict.fromkeys(sizes)
        }
        return [float(shared[size] + random.choice(by_point)) for size in sizes]

    centre, laws = _coordinates(law, points), []
    errors: list[float] = []  # of a training of a size of its own
    for _ in range(draws):
        *moves, own = drawn([*size_of, 0])
        moved = [
            Point(p.parameters, p.tokens, max(LEAST, law(p.parameters, p.tokens) + error))
            for p, error in zip(points, moves, strict=True)
        ]
        errors.append(own)
        laws.append(_best(moved, [centre, *_starts(moved)[::6]]))
    return Fit(tuple(points), law, tuple(laws), tuple(errors))


def beyond(points: Sequence[Point], parameters: float, tokens: float) -> tuple[float, float]:
    """By which factors a training has more parameters, and tokens, than any of the points."""
    most = max(p.parameters for p in points), max(p.tokens for p in points)
    return parameters / most[0], tokens / most[1]


def _parts(errors: Sequence[float], points: Sequence[Point]) -> tuple[Any, Any]:
    """The errors that sizes share, one a size, and what each point has beside its size's.

    Not centred: a robust fit leaves an outlier where it is. E, A and alpha take degrees of freedom
    of the sizes, B and beta of the lengths.
    """
    sizes: dict[int, list[float]] = {}
    for point, error in zip(points, errors, strict=True):
        sizes.setdefault(point.parameters, []).append(error)
    shared = {size: float(np.mean(found)) for size, found in sizes.items()}
    beside = [e - shared[p.parameters] for p, e in zip(points, errors, strict=True)]
    n, s = len(points), len(sizes)
    return (
        np.array(list(shared.values())) * math.sqrt(s / max(1, s - 3)),
        np.array(beside) * math.sqrt(n / max(1, n - s - 2)),
    )


def _errors(law: Law, points: Iterable[Point]) -> list[float]:
    return [p.loss - law(p.parameters, p.tokens) for p in points]


# --- in the coordinates of the search: the logarithms of the three terms at the points' middle, and
# the exponents; there none of the five depends much on the others


def _middle(points: Sequence[Point]) -> tuple[float, float]:
    """Mean of log N and of log D."""
    return (
        float(np.mean([math.log(p.parameters) for p in points])),
        float(np.mean([math.log(p.tokens) for p in points])),
    )


def _coordinates(law: Law, points: Sequence[Point]) -> tuple[float, ...]:
    n, d = _middle(points)
    terms = law.e, law.a * math.exp(-law.alpha * n), law.b * math.exp(-law.beta * d)
    return (*(math.log(max(LEAST, term)) for term in terms), law.alpha, law.beta)


def _starts(points: Sequence[Point]) -> list[tuple[float, ...]]:
    """Shares of E in the smallest loss, with shallow and steep exponents."""
    least = min(p.loss for p in points)
    return [
        (math.log(share * least), *[math.log((1 - share) * least / 2)] * 2, alpha, beta)
        for share, alpha, beta in _STARTS
    ]


def _best(points: Sequence[Point], starts: Iterable[tuple[float, ...]]) -> Law:
    """The law with the least Huber loss on log L, of those that L-BFGS finds from the starts."""
    n, d = _middle(points)
    log_n = np.array([math.log(p.parameters) for p in points]) - n
    log_d = np.array([math.log(p.tokens) for p in points]) - d
    seen = np.log([p.loss for p in points])

    def loss(x: Any) -> tuple[float, Any]:
        terms = np.exp([x[0] + 0 * log_n, x[1] - x[3] * log_n, x[2] - x[4] * log_d])
        total = terms.sum(0)
        error = np.log(total) - seen
        inner = np.abs(error) <= DELTA
        huber = np.where(inner, error**2 / 2, DELTA * (np.abs(error) - DELTA / 2))
        slope = np.clip(error, -DELTA, DELTA) * terms / total
        by_exponent = [-(slope[1] * log_n).sum(), -(slope[2] * log_d).sum()]
        # Of the size of 1, as the search's tolerances expect.
        return huber.sum() / DELTA**2, np.array([*slope.sum(1), *by_exponent]) / DELTA**2

    most = math.log(max(p.loss for p in points))
    bounds = [(math.log(LEAST), most)] * 3 + [(0.0, STEEPEST)] * 2
    found = [minimize(loss, x, jac=True, method="L-BFGS-B", bounds=bounds) for x in starts]
    e, a, b, alpha, beta = map(float, min(found, key=lambda one: one.fun).x)
    return Law(math.exp(e), math.exp(a + alpha * n), math.exp(b + beta * d), alpha, beta)
