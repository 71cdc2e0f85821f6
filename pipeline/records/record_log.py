"""The events of one record in memory: points lie in arrays, since a long training has millions."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Event = dict[str, Any]


class Curve(Sequence[tuple[int, float]]):
    """The (step, value) of each point of one metric, in the order of writing."""

    def __init__(self, steps: array[int], values: array[float]):
        self.steps, self.values = steps, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return list(zip(self.steps[at], self.values[at], strict=True))
        return self.steps[at], self.values[at]

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.steps, self.values, strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __add__(self, other: Curve) -> Curve:
        return Curve(self.steps + other.steps, self.values + other.values)


class Points:
    """All points of one record with the same metrics, as most of a training's have."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.places = array("q")  # in the record
        self.times, self.steps = array("q"), array("q")
        self.values = array("d")  # of all metrics, point by point

    def __getitem__(self, at: int) -> Event:
        width = len(self.names)
        values = self.values[at * width : (at + 1) * width]
        return {
            "kind": "metrics",
            "time": self.times[at],
            "step": self.steps[at],
            "values": dict(zip(self.names, values, strict=True)),
        }


class Log(Sequence[Event]):
    """The events of one record. As dicts, its points would take ten times the memory."""

    def __init__(self, events: Iterable[Event] = ()):
        self.others = 0  # events that are no points
        self._order: list[Event | Points] = []  # `Points` stands for the next point of these
        self._points: dict[tuple[str, ...], Points] = {}
        for event in events:
            self.append(event)

    @classmethod
    def of(cls, record: Sequence[Event]) -> Log:
        """The record itself, if it is a Log already."""
        return record if isinstance(record, Log) else cls(record)

    def append(self, event: Event) -> None:
        if event["kind"] != "metrics":
            self.others += 1
            self._order.append(event)
            return
        names = tuple(event["values"])
        points = self._points.get(names)
        if points is None:
            points = self._points[names] = Points(names)
        points.places.append(len(self._order))
        points.times.append(event.get("time", 0))
        points.steps.append(event["step"])
        points.values.extend(event["values"].values())
        self._order.append(points)

    @property
    def curves(self) -> dict[str, Curve]:
        """Every metric's points, in the order of writing."""
        parts: dict[str, list[tuple[Points, array[float]]]] = defaultdict(list)
        for points in self._points.values():
            for at, name in enumerate(points.names):
                parts[name].append((points, points.values[at :: len(points.names)]))
        return {name: _merged(of_one_metric) for name, of_one_metric in parts.items()}

    def of_kind(self, *kinds: str) -> Iterator[Event]:
        events = self if "metrics" in kinds else (e for e in self._order if isinstance(e, dict))
        return (event for event in events if event["kind"] in kinds)

    @property
    def metrics(self) -> int:
        """The number of metrics, those of each kind of point counted."""
        return sum(map(len, self._points))

    def largest(self) -> float:
        """The largest absolute value of all that are finite."""
        finite = (map(abs, filter(math.isfinite, p.values)) for p in self._points.values())
        return max((max(values, default=0.0) for values in finite), default=0.0)

    def knows(self, names: tuple[str, ...]) -> bool:
        """Whether a point with these metrics has come before."""
        return names in self._points

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, int) and isinstance(event := self._order[at], dict):
            return event  # a record begins and ends with such
        return list(self)[at]

    def __iter__(self) -> Iterator[Event]:
        next_point: dict[int, int] = defaultdict(int)
        for item in self._order:
            if isinstance(item, dict):
                yield item
            else:
                yield item[next_point[id(item)]]
                next_point[id(item)] += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def _merged(parts: list[tuple[Points, array[float]]]) -> Curve:
    """One metric out of several kinds of points."""
    if len(parts) == 1:
        return Curve(parts[0][0].steps, parts[0][1])
    rows = sorted(
        row
        for points, values in parts
        for row in zip(points.places, points.steps, values, strict=True)
    )
    return Curve(array("q", [step for _, step, _ in rows]), array("d", [v for *_, v in rows]))
