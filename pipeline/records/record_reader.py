"""Records as they are read: checked, whoever wrote them, and small in memory.

A record may come from a colleague, from an older version of this project, or out of a cache that
lost half of it. What passes here is trusted from then on: every name, path and number in it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, overload

from pipeline import config, regular
from pipeline.errors import InputError, cut, quoted
from pipeline.records import stage_graph

Event = dict[str, Any]
Check = Callable[[Any], bool]

SCHEMA = 1  # of the records that this version writes; those from before it was noted have none

LONGEST_LINE = 8 << 20  # bytes; the settings of a run may hold long prompts
MOST_EVENTS = 10_000  # beside the points
MOST_VALUES = 1_000  # in one event
MOST_METRICS = 10_000  # of a record, those of each kind of point counted
LARGEST = 1e300  # of a metric that is finite, so that sums of them are
LATEST = 253_402_300_799_000  # the last millisecond of the year 9999


class RecordError(InputError):
    """A record that cannot be read: where, and what is wrong."""


class Settings(dict[str, Any]):
    """A record's settings. One that is missing is an error of the record, not of the program."""

    def __missing__(self, name: str) -> NoReturn:
        raise RecordError(f"its record has no setting {name}: another version of this project")


class Curve(Sequence[tuple[int, float]]):
    """The (step, value) of each point of one metric, in the order of writing."""

    def __init__(self, steps: array[int], values: array[float]):
        self.steps, self.values = steps, values

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, at: int) -> tuple[int, float]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[int, float]]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return list(zip(self.steps[at], self.values[at], strict=True))
        return self.steps[at], self.values[at]

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.steps, self.values, strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def joined(self, other: Curve) -> Curve:
        return Curve(self.steps + other.steps, self.values + other.values)


class Points:
    """All points of one record with the same metrics, as most of a training's have."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.places = array("q")  # in the record
        self.times, self.steps = array("q"), array("q")
        self.values = array("d")  # of all metrics, point by point

    def __getitem__(self, at: int) -> Event:
        wide = len(self.names)
        values = self.values[at * wide : (at + 1) * wide]
        return {
            "kind": "metrics",
            "time": self.times[at],
            "step": self.steps[at],
            "values": dict(zip(self.names, values, strict=True)),
        }


class Log(Sequence[Event]):
    """The events of one record. Points lie in arrays: as dicts they take ten times as much."""

    def __init__(self, events: Iterable[Event] = ()):
        self.others = 0  # events that are no points
        self._order: list[Event | Points] = []  # of these the next point
        self._points: dict[tuple[str, ...], Points] = {}
        for event in events:
            self.append(event)

    @classmethod
    def of(cls, record: Sequence[Event]) -> Log:
        """The record itself, if it is one already."""
        return record if isinstance(record, Log) else cls(record)

    def append(self, event: Event) -> None:
        if event["kind"] != "metrics":
            self.others += 1
            self._order.append(event)
            return
        values = event["values"]
        points = self._points.get(names := tuple(values))
        if points is None:
            points = self._points[names] = Points(names)
        points.places.append(len(self._order))
        points.times.append(event.get("time", 0))
        points.steps.append(event["step"])
        points.values.extend(values.values())
        self._order.append(points)

    @property
    def curves(self) -> dict[str, Curve]:
        """Every metric's points, in the order of writing."""
        found: dict[str, list[tuple[Points, array[float]]]] = defaultdict(list)
        for points in self._points.values():
            for at, name in enumerate(points.names):
                found[name].append((points, points.values[at :: len(points.names)]))
        return {name: _in_order(parts) for name, parts in found.items()}

    def of_kind(self, kind: str) -> Iterator[Event]:
        if kind == "metrics":
            return (event for event in self if event["kind"] == kind)
        return (e for e in self._order if isinstance(e, dict) and e["kind"] == kind)

    @property
    def metrics(self) -> int:
        """The metrics of each kind of points, counted."""
        return sum(map(len, self._points))

    def largest(self) -> float:
        """Of all finite values, whatever their sign."""
        finite = (map(abs, filter(math.isfinite, p.values)) for p in self._points.values())
        return max((max(values, default=0.0) for values in finite), default=0.0)

    def knows(self, names: tuple[str, ...]) -> bool:
        """Whether a point with these metrics has come before."""
        return names in self._points

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, at: int) -> Event: ...
    @overload
    def __getitem__(self, at: slice) -> list[Event]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, int) and isinstance(found := self._order[at], dict):
            return found  # a record begins and ends with such
        return list(self)[at]

    def __iter__(self) -> Iterator[Event]:
        used: dict[int, int] = defaultdict(int)
        for item in self._order:
            if isinstance(item, dict):
                yield item
            else:
                yield item[used[id(item)]]
                used[id(item)] += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def _in_order(parts: list[tuple[Points, array[float]]]) -> Curve:
    """One metric out of several kinds of points."""
    if len(parts) == 1:
        return Curve(parts[0][0].steps, parts[0][1])
    rows = sorted(
        row
        for points, values in parts
        for row in zip(points.places, points.steps, values, strict=True)
    )
    return Curve(array("q", [step for _, step, _ in rows]), array("d", [v for *_, v in rows]))


def read(path: Path, stage: str = "", whole: bool = True) -> Log:
    """The record of `stage`, or of any, in a file.

    Of one that is not `whole`, as its stage is at work or failed, a last line that was cut is
    left out. Raises InputError that names the line and the reason.
    """
    with regular.opened(path) as lines:
        return parse(iter(functools.partial(lines.readline, LONGEST_LINE + 1), b""), stage, whole)


def parse(lines: Iterable[bytes], stage: str = "", whole: bool = True) -> Log:
    """As `read`, of lines with their ends."""
    log, ended = Log(), False
    for number, line in enumerate(lines, 1):
        if not whole and not line.endswith(b"\n") and len(line) <= LONGEST_LINE:
            break
        try:
            if ended:
                raise RecordError("comes after the end")
            event = _checked(_decoded(line), stage, number == 1, log)
            stage = stage or event["stage"]
        except RecordError as error:
            raise RecordError(f"line {number}: {error}") from None
        log.append(event)
        ended = event["kind"] == "end"
        if log.others > MOST_EVENTS or log.metrics > MOST_METRICS:
            raise RecordError(
                f"more than {MOST_EVENTS:,} events that are no points, or too many metrics"
            )
    if whole and not len(log):
        raise RecordError("empty")
    if (most := log.largest()) > LARGEST:
        raise RecordError(f"a metric of {most:.1g}: expected less than {LARGEST:g}, or infinity")
    if whole and not ended:
        raise RecordError("cut short: its last line is not the end of a stage")
    return log


def _decoded(line: bytes) -> Any:
    if len(line) > LONGEST_LINE:
        raise RecordError(f"longer than {LONGEST_LINE:,} bytes")
    if not line.endswith(b"\n"):
        raise RecordError("cut short")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"no JSON: {cut(str(error))}") from None


def _checked(event: Any, stage: str, first: bool, log: Log) -> Event:
    """The event, with what older versions did not write; raises RecordError."""
    kind = event.get("kind") if isinstance(event, dict) else None
    if kind == "metrics" and not first and _is_point(event, log):
        return event
    if not isinstance(kind, str) or (kind == "start") != first or kind not in _FIELDS:
        wanted = "a start event" if first else f"an event of {', '.join(list(_FIELDS)[1:])}"
        raise RecordError(f"{_told(event)}: {wanted} is expected")
    if first and (found := event.setdefault("schema", 0)) != SCHEMA and found != 0:
        raise RecordError(f"schema {_told(found)}: this version reads schema {SCHEMA} and before")
    for name, default in _DEFAULTS.get(kind, {}).items():
        given = event.setdefault(name, default)
        if isinstance(given, dict) and default:
            event[name] = default | given
    for name, (check, wanted) in _FIELDS[kind].items():
        if name not in event:
            raise RecordError(f"{kind}.{name}: missing; expected {wanted}")
        if not check(event[name]):
            raise RecordError(f"{kind}.{name}={_told(event[name])}: expected {wanted}")
    if kind == "metrics":
        _check_points(event["values"], log)
    elif first:
        known = (stage,) if stage else tuple(stage_graph.stages())
        if event["stage"] not in known:
            raise RecordError(f"start.stage={_told(event['stage'])}: expected {', '.join(known)}")
        _check_settings(event["params"])
        event["params"] = Settings(event["params"])
    elif kind in ("artifact", "checkpoint") and not _is_of(stage, event["path"]):
        raise RecordError(f"{kind}.path={_told(event['path'])}: no output of {stage}")
    return event


def _is_point(event: Event, log: Log) -> bool:
    """Whether it is one like those before it: nearly every event of a long training is."""
    step, time, values = event.get("step"), event.get("time"), event.get("values")
    return (
        type(step) is int
        and type(time) is int
        and 0 <= step < 1 << 53
        and 0 <= time <= LATEST
        and type(values) is dict
        and log.knows(tuple(values))
        and set(map(type, values.values())) == {float}
    )


def _check_points(values: Event, log: Log) -> None:
    """Names as MLflow takes them, and numbers; the names of a point seen before are known."""
    if not log.knows(tuple(values)) and not _are_named(values):
        raise RecordError(f"metrics.values={_told(values)}: expected {_NAMES}")
    for name, value in values.items():
        if type(value) is float:
            continue
        if type(value) is not int or abs(value) > 1 << 53:
            raise RecordError(f"metrics.values: {name}={_told(value)}: expected a number")


def _is_of(stage: str, path: str) -> bool:
    """Whether a path is an output of the stage, or lies in one."""
    parts = PurePosixPath(path)
    places = {parts.as_posix(), *(parent.as_posix() for parent in parts.parents)}
    return ".." not in parts.parts and bool(places & set(stage_graph.stages()[stage].outs))


def _told(value: Any) -> str:
    """A value in a message, of which the beginning will do."""
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value):,}"
    return quoted(value)


# --- what each field may hold, and how a message says so

_ID = re.compile(r"[\w. -]{1,128}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{1,128}(\.dir)?")
# As MLflow takes it: no part that is empty or leads elsewhere.
_NAME = re.compile(r"[\w-][\w. -]{0,99}(/[\w-][\w. -]{0,99}){0,5}", re.ASCII)
_SETTING = re.compile(r"\w+(\.\w+){0,5}", re.ASCII)
# What rows are found by, and what they say of themselves, is not for a record's tags to say.
_OURS = re.compile(
    r"(mlflow|pipeline|record|shipped|dvc|checkpoint|git)\..*|superseded|code|model|init"
)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NAMES = f"at most {MOST_VALUES:,} plain names"


def _text(longest: int) -> Check:
    """Text that can stand in a name and in a file: without a NUL or half a surrogate pair."""
    return lambda value: (
        isinstance(value, str) and len(value) <= longest and not _NO_TEXT.search(value)
    )


def _matches(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _whole(most: int) -> Check:
    return lambda value: type(value) is int and 0 <= value <= most


def _is_small(values: Any) -> bool:
    return isinstance(values, dict) and len(values) <= MOST_VALUES


def _are_named(values: Any) -> bool:
    return _is_small(values) and all(_NAME.fullmatch(name) for name in values)


def _are_texts(values: Any) -> bool:
    return _are_named(values) and all(isinstance(value, str) for value in values.values())


def _are_tags(values: Any) -> bool:
    return _are_texts(values) and not any(_OURS.fullmatch(name) for name in values)


def _check_settings(values: Event) -> None:
    """Settings by dotted name; those that this version knows are of its types."""
    types = _types()
    for name, value in values.items():
        if not _SETTING.fullmatch(name):
            raise RecordError(f"start.params: {_told(name)}: no setting's name")
        kinds = types.get(name, ())
        if not _is_plain(value) or (kinds and type(value) not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds) or "a plain value"
            raise RecordError(f"start.params: {name}={_told(value)}: expected {wanted}")


@functools.cache
def _types() -> dict[str, tuple[type, ...]]:
    wide = {float: (int, float), tuple: (list, tuple)}
    return {name: wide.get(kind, (kind,)) for name, kind in config.kinds().items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    if type(value) is int:
        return abs(value) < 1 << 63
    if type(value) is float:
        return math.isfinite(value)
    return value is None or isinstance(value, (str, bool))


def _is_change(value: Any) -> bool:
    """Of the parent: {} or {settings, changed: {name: [theirs, ours]}}."""
    if not isinstance(value, dict) or not _is_small(changed := value.get("changed", {})):
        return False
    pairs = changed.values()
    good = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs) and all(
        _SETTING.fullmatch(name) for name in changed
    )
    return good and (not value or _is_id(value.get("settings")))


_is_hex = _matches(_HEX)
_is_id = _matches(_ID)
_TIME = (_whole(LATEST), "milliseconds since 1970, a whole number")
_STEP = (_whole(1 << 53), "a whole number, at least 0")
_IDS = "letters, digits, spaces and ._-"
_DIGEST = (lambda v: v == "" or _is_id(v), "a digest")
_CALLED = (_text(250), "text of at most 250 characters")
_FOLDER = (lambda v: v == "" or _matches(_NAME)(v), "a folder's plain name")
_PLACED = {
    "path": (_text(4096), "a path"),
    "sha256": (_is_hex, "a SHA-256"),
}
_FIELDS: dict[str, dict[str, tuple[Check, str]]] = {
    "start": {
        "id": (_is_id, _IDS),
        "stage": (_text(100), "a stage's name"),
        "time": _TIME,
        "key": (_is_id, _IDS),
        "invocation": (_is_id, _IDS),
        "name": _CALLED,
        "experiment": (_matches(config.PLAIN_NAME), "a plain name"),
        "params": (_is_small, f"at most {MOST_VALUES:,} settings by name"),
        "code": _DIGEST,
        "checkpoints": (
            lambda v: v in ("best", "all", "reference", "none"),
            "best, all, reference or none",
        ),
        "settings": _DIGEST,
        "git": (_are_texts, "texts by name"),
        "environment": (_are_texts, "texts by name"),
        "parent": (_is_change, "the settings that differ from the commit's"),
    },
    "resume": {
        "time": _TIME,
        "name": _CALLED,
        "invocation": (lambda v: v == "" or _is_id(v), _IDS),
    },
    "metrics": {"time": _TIME, "step": _STEP, "values": (_is_small, _NAMES)},
    "tags": {"values": (_are_tags, f"texts by name, {_NAMES}, none that rows keep for themselves")},
    "dataset": {
        "name": (_matches(_NAME), "a plain name"),
        "digest": (_is_id, "a digest"),
        "source": (_text(4096), "text"),
        "context": (_matches(_NAME), "a plain name"),
    },
    "artifact": {"folder": _FOLDER, **_PLACED},
    "checkpoint": {
        "name": (_matches(_NAME), "a plain name"),
        "step": _STEP,
        **_PLACED,
        "md5": (lambda v: v == "" or _is_hex(v), "DVC's MD5"),
    },
    "end": {
        "status": (lambda v: v in ("FINISHED", "FAILED", "KILLED"), "FINISHED, FAILED or KILLED"),
        "time": _TIME,
    },
}
# What former versions did not write.
_DEFAULTS: dict[str, Event] = {
    "start": {
        "name": "",
        "experiment": "gpt2",
        "code": "",
        "checkpoints": "best",
        "settings": "",
        "git": {"commit": "", "branch": "", "dirty": ""},
        "environment": {"host": ""},
        "parent": {},
    },
    "resume": {"name": "", "invocation": ""},
    "artifact": {"folder": ""},
    "checkpoint": {"md5": ""},
}
