"""Which points of a curve MLflow gets: a page of many long runs stays quick to open.

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

MOST = 1000  # points of a curve of so many steps as are known; steps whose points are all kept


class Thinning:
    """The lowest and the highest of every few steps, the window, so that no spike is lost.

    With the number of `steps` known, all windows are as wide as MOST asks for. Else the first MOST
    steps are whole, and then windows grow with the steps before them: each doubling of the steps
    adds a quarter of MOST, so a million steps have 3,500 points.
    """

    def __init__(self, steps: int = 0) -> None:
        self._width = 1 if 0 < steps <= MOST else 2 * math.ceil(steps / MOST)
        self._first: int | None = None  # a fork begins where its parent was
        self._held: list[Metric] = []  # of the window at work, in their order

    def of_step(self, points: Sequence[Metric]) -> list[Metric]:
        """What is to be shipped once these points of the next step are there."""
        window = self._window(points[0].step)
        over = self._held and self._held[0].step not in window
        before = self._taken() if over else []
        if len(window) == 1:
            return [*before, *points]
        self._held += points
        return before

    def rest(self) -> list[Metric]:
        """At an end, what is to be shipped of the steps held back, the last of them whole."""
        return self._taken(self._held[-1].step) if self._held else []

    def _window(self, step: int) -> range:
        """The steps of the window that this one is in."""
        self._first = step if self._first is None else self._first
        number = step - self._first
        doublings = (number // MOST).bit_length()
        width = self._width or (4 << doublings if doublings else 1)
        begins = step - number % width
        return range(begins, begins + width)

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
