"""What the records of one run say: settings, curves, tags, events."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.records import stage_graph
from pipeline.records.record_log import Curve, Event, Log


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

    def _in_order(self) -> Iterator[Log]:
        return (Log.of(self.records[s]) for s in stage_graph.stages() if s in self.records)


@dataclass(frozen=True)
class Experiment(RunData):
    """A run that git or DVC knows by a name, or the workspace's own."""

    name: str
    rev: str  # of git; "" for the workspace
    records: Mapping[str, Sequence[Event]]
    # Records that could not be read, a phrase each; known once `records` were looked at.
    unreadable: list[str] = field(default_factory=list, compare=False)

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
