"""What the records of one run say: settings, curves, tags, events."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.records import stage_graph
from pipeline.records.record_reader import Curve, Event, Log


class Unread(Mapping[str, Log]):
    """Records by stage that are read when somebody first asks for one of them."""

    def __init__(self, read: Callable[[], dict[str, Log]]):
        self._read = read

    @functools.cached_property
    def _records(self) -> dict[str, Log]:
        return self._read()

    def __getitem__(self, stage: str) -> Log:
        return self._records[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


@dataclass(frozen=True)
class Experiment:
    """The records of one experiment by stage, as far as they are there, and what they say."""

    name: str
    rev: str  # of git; "" for the workspace
    records: Mapping[str, Sequence[Event]]
    # Records that could not be read, a phrase each; known once `records` were looked at.
    unreadable: list[str] = field(default_factory=list, compare=False)

    @property
    def head(self) -> Event:
        """The start event of the stage that started last: the settings in force are its."""
        return max((record[0] for record in self.records.values()), key=lambda e: e["time"])

    @property
    def params(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return self.head["params"]

    @functools.cached_property
    def curves(self) -> dict[str, Curve]:
        """(step, value) by metric, in the order of writing."""
        found: dict[str, Curve] = {}
        for log_ in self._logs():
            for key, curve in log_.curves.items():
                found[key] = found[key].joined(curve) if key in found else curve
        return found

    @functools.cached_property
    def tags(self) -> dict[str, str]:
        """Every tag; of one written twice, the last value."""
        return {key: v for event in self.events("tags") for key, v in event["values"].items()}

    def values(self, key: str) -> list[float]:
        """The values of a metric, in the order of writing; none where there is no such metric."""
        return list(self.curves[key].values) if key in self.curves else []

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return self.curves[key].values[-1] if key in self.curves else None

    def events(self, kind: str) -> Iterator[Event]:
        """Of one kind, in the order of the chain."""
        return (event for log_ in self._logs() for event in log_.of_kind(kind))

    def _logs(self) -> Iterator[Log]:
        """In the order of the chain."""
        return (Log.of(self.records[s]) for s in stage_graph.stages() if s in self.records)
