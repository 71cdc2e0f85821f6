"""Which points of a training's curves MLflow gets: a page of many long runs stays quick to open.

A record keeps every point. What is left out follows from the record alone, so that shipping it
again doubles nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Metric

MOST = 1000  # points of a curve, some more where it has none that are numbers


class Thinning:
    """The lowest and the highest of as many steps as MOST asks for, so that no spike is lost."""

    def __init__(self, steps: int) -> None:
        self._width = 2 * math.ceil(steps / MOST)  # steps of which two points are kept
        self._held: list[Metric] = []  # of the steps at work, in their order

    def of_step(self, points: Sequence[Metric]) -> list[Metric]:
        """What is to be shipped once these points of the next training step are there."""
        if self._width <= 2:
            return list(points)
        window = points[0].step // self._width
        over = self._held and self._held[0].step // self._width != window
        before = self._taken() if over else []
        self._held += points
        return before

    def rest(self) -> list[Metric]:
        """At the end, what is to be shipped of the steps held back, the last of them whole."""
        return self._taken(self._held[-1].step) if self._held else []

    def _taken(self, *whole: int) -> list[Metric]:
        curves: dict[str, list[Metric]] = defaultdict(list)
        for point in self._held:
            curves[point.key].append(point)
        self._held = []
        kept = []
        for curve in curves.values():
            finite = [point for point in curve if math.isfinite(point.value)]
            ends = [f(finite, key=lambda point: point.value).step for f in (min, max) if finite]
            kept += [p for p in curve if p.step in (*ends, *whole) or not math.isfinite(p.value)]
        return kept


def is_sampled(number: int) -> bool:
    """Whether a curve without an end keeps its point of this number: ever fewer of the later ones.

    All of the first MOST, then every second of as many again, every fourth of twice as many, ...
    """
    stride = 1 << (number // MOST).bit_length()
    return number % stride == 0
