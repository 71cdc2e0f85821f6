"""Records in memory: the events of one, and what those of a run say together.

Points lie in arrays, since a long training has millions.
"""

from __future__ import annotations

import functools
import json
import math
import re
from array import array
from collections import UserDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.records import stage_graph

Event = dict[str, Any]
ID = re.compile("[0-9a-f]{32}")  # of a record


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
        points = {kind: iter(kind) for kind in self._points.values()}
        for item in self._order:
            yield item if isinstance(item, dict) else next(points[item])

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


def row_name(head: Event) -> str:
    """What MLflow calls the run of a start event: DVC's name for it, or one made of its key."""
    return head["name"] or f"repro-{head['key'][:6]}"


class RunData:
    """The records of one run by stage, as far as they are there, and what they say."""

    def __init__(self, records: Mapping[str, Sequence[Event]]):
        self.records = records

    @property
    def head(self) -> Event:
        """The start event of the stage that started last: its settings are the ones in force."""
        return max((record[0] for record in self.records.values()), key=lambda e: e["time"])

    @property
    def params(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return self.head["params"]

    @property
    def dvc_name(self) -> str:
        """The name that DVC has for the run; "" for one that is no experiment of DVC's."""
        return self.head["name"]

    @functools.cached_property
    def curves(self) -> dict[str, Curve]:
        """(step, value) by metric, in the order of writing."""
        curves: dict[str, Curve] = {}
        for record in self._in_order():
            for name, curve in record.curves.items():
                curves[name] = curves[name] + curve if name in curves else curve
        return curves

    @functools.cached_property
    def tags(self) -> dict[str, str]:
        """Every tag; of one written twice, the last value."""
        return {name: v for event in self.events("tags") for name, v in event["values"].items()}

    def values(self, metric: str) -> list[float]:
        """The values of a metric, in the order of writing; none where there is no such metric."""
        return list(self.curves[metric].values) if metric in self.curves else []

    def last(self, metric: str) -> float | None:
        """The newest value of a metric."""
        return self.curves[metric].values[-1] if metric in self.curves else None

    def events(self, kind: str) -> Iterator[Event]:
        """The events of one kind, in the order of dvc.yaml's stages."""
        return (event for record in self._in_order() for event in record.of_kind(kind))

    @functools.cached_property
    def lineage(self) -> list[dict[str, Any]]:
        """The trainings that it was forked from, the oldest first: name, step, record's id."""
        try:
            told = json.loads(self.tags.get("fork.lineage", "[]"))
            kept = [
                {"name": one["name"], "step": one["step"], "record": one["record"]} for one in told
            ]
        except (ValueError, TypeError, LookupError, RecursionError):
            return []  # written by another version
        kinds = {"name": str, "step": int, "record": str}
        whole = all(type(one[key]) is kind for one in kept for key, kind in kinds.items())
        return kept if whole and all(ID.fullmatch(one["record"]) for one in kept) else []

    @property
    def texts(self) -> dict[int, str]:
        """What the model said while it was trained, by the steps done."""
        return {event["step"]: event["text"] for event in self.events("text")}

    def _in_order(self) -> Iterator[Log]:
        return (Log.of(self.records[s]) for s in stage_graph.stages() if s in self.records)


def samples(content: bytes) -> dict[str, list[tuple[str, str]]]:
    """samples.jsonl: by prompt the pairs of texts before and after training, in its order."""
    texts: dict[str, dict[str, list[str]]] = {}
    for line in content.decode("utf-8").split("\n")[:-1]:
        sample = json.loads(line)
        by_time = texts.setdefault(sample["prompt"], {"before": [], "after": []})
        by_time[sample["when"]].append(sample["text"])
    return {p: list(zip(t["before"], t["after"], strict=True)) for p, t in texts.items()}


@dataclass(frozen=True)
class Experiment(RunData):
    """A run that git or DVC knows by a name, or the workspace's own."""

    name: str
    rev: str  # of git; "" for the workspace
    records: Mapping[str, Sequence[Event]]
    # Records that could not be read, a phrase each; known once `records` were looked at.
    unreadable: list[str] = field(default_factory=list, compare=False)
    # Where DVC has a file of the outputs of `rev`, given its path; None where it has none.
    place: Callable[[str], Path | None] = field(default=lambda _: None, compare=False)

    @property
    def dvc_name(self) -> str:
        return self.name if self.rev else super().dvc_name


class Unread(UserDict[str, Log]):
    """Records by stage that are read when somebody first asks for one of them."""

    def __init__(self, read: Callable[[], dict[str, Log]]):
        self._read = read

    @functools.cached_property
    def data(self) -> dict[str, Log]:  # type: ignore[override]
        return self._read()
