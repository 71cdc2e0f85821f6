"""Records read from disk and checked, whoever wrote them.

A record may come from a colleague, from an older version of this project, or from a cache that
lost half of it. Whatever passes here is trusted from then on: every name, path and number in it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from pipeline import config, regular
from pipeline.errors import MESSAGE, InputError, cut, quoted
from pipeline.records import stage_graph
from pipeline.records.run_data import Event, Log

Check = Callable[[Any], bool]

SCHEMA = 1  # of the records that this version writes; older ones do not say
# Outputs of earlier versions of a stage, which the records of that time name.
EARLIER_OUTS = {"train": ("artifacts/train_study",)}

ENDS = 256 << 10  # bytes of a record's beginning, and of its end, where these are enough
LONGEST_LINE = 8 << 20  # bytes; the settings of a run may hold long prompts
MOST_EVENTS = 10_000  # that are no points
MOST_VALUES = 1_000  # in one event
MOST_METRICS = 10_000  # in a record, those of each kind of point counted
LARGEST = 1e300  # size of a finite metric, so that sums of them are finite too
LATEST = 253_402_300_799_000  # the last millisecond of the year 9999


class RecordError(InputError):
    """A record cannot be read: the message says where, and what is wrong."""


class Settings(dict[str, Any]):
    """A record's settings; a missing one is the record's error, not the program's."""

    def __missing__(self, name: str) -> NoReturn:
        raise RecordError(f"its record has no setting {name}: another version wrote it")


def read(path: Path, stage: str = "", whole: bool = True) -> Log:
    """The record in a file, of `stage` or, without a name, of any stage.

    With `whole=False`, for a stage that is at work or failed, an incomplete last line is left
    out. Raises RecordError, which names the line and the reason.
    """
    with regular.opened(path) as file:
        return parse(iter(functools.partial(file.readline, LONGEST_LINE + 1), b""), stage, whole)


def ends(path: Path, stage: str = "", whole: bool = True) -> Log:
    """The first and the last events of a record of any length, with points between them left out.

    Enough for its settings, its tags and what its metrics came to. With `whole=False` it may still
    be at work. Raises as `read` does.
    """
    with regular.opened(path) as file:
        lines = []
        while file.tell() < ENDS and (line := file.readline(LONGEST_LINE + 1)):
            lines.append(line)
        if os.fstat(file.fileno()).st_size - file.tell() > ENDS:
            file.seek(-ENDS, os.SEEK_END)
            file.readline()  # a line that began before
        lines += file.readlines()
    return parse(lines, stage, whole)


def parse(lines: Iterable[bytes], stage: str = "", whole: bool = True) -> Log:
    """The record in these lines, which include their line ends; see `read`."""
    log, ended = Log(), False
    for number, line in enumerate(lines, 1):
        if not whole and not line.endswith(b"\n") and len(line) <= LONGEST_LINE:
            break
        try:
            if ended:
                raise RecordError("comes after the end event")
            event = _checked(_decoded(line), stage, number == 1, log)
            stage = stage or event["stage"]
        except RecordError as error:
            raise RecordError(f"line {number}: {error}") from None
        log.append(event)
        ended = event["kind"] == "end"
        if log.others > MOST_EVENTS or log.metrics > MOST_METRICS:
            raise RecordError(
                f"more than {MOST_EVENTS:,} events beside the points, or {MOST_METRICS:,} metrics"
            )
    if whole and not len(log):
        raise RecordError("empty")
    if (most := log.largest()) > LARGEST:
        raise RecordError(f"a metric is {most:.1g}; expected at most {LARGEST:g}, or infinity")
    if whole and not ended:
        raise RecordError("cut short: its last line is not an end event")
    return log


def _decoded(line: bytes) -> Any:
    if len(line) > LONGEST_LINE:
        raise RecordError(f"longer than {LONGEST_LINE:,} bytes")
    if not line.endswith(b"\n"):
        raise RecordError("cut short")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {cut(str(error))}") from None


def _checked(event: Any, stage: str, first: bool, log: Log) -> Event:
    """The event, with defaults for what older versions did not write; raises RecordError."""
    kind = event.get("kind") if isinstance(event, dict) else None
    if not isinstance(kind, str) or (kind == "start") != first or kind not in _FIELDS:
        wanted = "a start event" if first else f"an event: {', '.join(list(_FIELDS)[1:])}"
        raise RecordError(f"{_shown(event)}: expected {wanted}")
    if first and (schema := event.setdefault("schema", 0)) not in (0, SCHEMA):
        raise RecordError(f"schema {_shown(schema)}: expected {SCHEMA} or none")
    for name, (check, wanted, *default) in _FIELDS[kind].items():
        for value in default:
            given = event.setdefault(name, value)
            event[name] = value | given if isinstance(given, dict) and value else given
        if name not in event:
            raise RecordError(f"{kind}.{name}: missing; expected {wanted}")
        if not check(event[name]):
            raise RecordError(f"{kind}.{name}={_shown(event[name])}: expected {wanted}")
    if kind == "metrics":
        _check_points(event["values"], log)
    elif first:
        known = (stage,) if stage else tuple(stage_graph.stages())
        if event["stage"] not in known:
            raise RecordError(f"start.stage={_shown(event['stage'])}: expected {', '.join(known)}")
        _check_settings(event["params"])
        event["params"] = Settings(event["params"])
    elif kind in ("artifact", "checkpoint") and not _is_of(stage, event["path"]):
        raise RecordError(f"{kind}.path={_shown(event['path'])}: not an output of {stage}")
    return event


def _check_points(values: Event, log: Log) -> None:
    """Raise RecordError unless names are such as MLflow takes, and values are numbers.

    Nearly all points of a long training have the names of one before them.
    """
    if not log.knows(tuple(values)) and not _are_named(values):
        raise RecordError(f"metrics.values={_shown(values)}: expected {_NAMES}")
    for name, value in values.items():
        if type(value) is float:
            continue
        if type(value) is not int or abs(value) > 1 << 53:
            raise RecordError(f"metrics.values: {name}={_shown(value)}: expected a number")


def _is_of(stage: str, path: str) -> bool:
    """Whether a path is an output of the stage, or lies inside one."""
    parts = PurePosixPath(path)
    places = {parts.as_posix(), *(parent.as_posix() for parent in parts.parents)}
    outs = {*stage_graph.stages()[stage].outs, *EARLIER_OUTS.get(stage, ())}
    return ".." not in parts.parts and bool(places & outs)


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value):,}"
    return quoted(value)


# --- what each field may hold, and how a message says so

_ID = re.compile(r"[\w. -]{1,128}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{1,128}(\.dir)?")
# As MLflow takes it: no part that is empty or leads elsewhere.
_NAME = re.compile(r"[\w-][\w. -]{0,99}(/[\w-][\w. -]{0,99}){0,5}", re.ASCII)
_SETTING = re.compile(r"\w+(\.\w+){0,5}", re.ASCII)
# Tags that MLflow or this project gives to a row: a record must not set them.
_OURS = re.compile(
    r"(mlflow|pipeline|record|shipped|dvc|checkpoint|git)\..*|superseded|code|model|init|changed"
)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NAMES = f"at most {MOST_VALUES:,} plain names"


def _text(longest: int) -> Check:
    """Text of at most so many characters, without a NUL or half a surrogate pair."""
    return lambda value: (
        isinstance(value, str) and len(value) <= longest and not _NO_TEXT.search(value)
    )


def _matches(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _may_be(check: Check) -> Check:
    return lambda value: value == "" or check(value)


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
    """Raise RecordError unless settings have names, and known ones the types of this version."""
    types = _types()
    for name, value in values.items():
        if not _SETTING.fullmatch(name):
            raise RecordError(f"start.params: {_shown(name)}: not the name of a setting")
        kinds = types.get(name, ())
        if not _is_plain(value) or (kinds and type(value) not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds) or "a plain value"
            raise RecordError(f"start.params: {name}={_shown(value)}: expected {wanted}")


@functools.cache
def _types() -> dict[str, tuple[type, ...]]:
    wide = {float: (int, float), tuple: (list, tuple)}
    return {
        name: tuple(type_ for kind in kinds for type_ in wide.get(kind, (kind,)))
        for name, kinds in config.kinds().items()
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    if type(value) is int:
        return abs(value) < 1 << 63
    if type(value) is float:
        return math.isfinite(value)
    return value is None or isinstance(value, (str, bool))


def _is_change(value: Any) -> bool:
    """Whether a value is {} or {settings: digest, changed: {name: [theirs, ours]}}."""
    if not isinstance(value, dict) or not _is_small(changed := value.get("changed", {})):
        return False
    return (not value or _is_id(value.get("settings"))) and all(
        _SETTING.fullmatch(name) and isinstance(pair, list) and len(pair) == 2
        for name, pair in changed.items()
    )


_is_hex = _matches(_HEX)
_is_id = _matches(_ID)
_TIME = (_whole(LATEST), "milliseconds since 1970, a whole number")
_STEP = (_whole(1 << 53), "a whole number, at least 0")
_IDS = "letters, digits, spaces and ._-"
_DIGEST = (_may_be(_is_id), "a digest", "")
_CALLED = (_text(250), "text of at most 250 characters", "")
_PLAIN = (_matches(_NAME), "a plain name")
_FOLDER = (_may_be(_matches(_NAME)), "a folder's plain name", "")
_PLACED = {"path": (_text(4096), "a path"), "sha256": (_is_hex, "a SHA-256")}
# By kind and field: a check, what it expects, and a default where older versions wrote none.
_FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "start": {
        "id": (_is_id, _IDS),
        "stage": (_text(100), "a stage's name"),
        "time": _TIME,
        "key": (_is_id, _IDS),
        "invocation": (_is_id, _IDS),
        "name": _CALLED,
        "experiment": (_matches(config.PLAIN_NAME), "a plain name", "gpt2"),
        "params": (_is_small, f"at most {MOST_VALUES:,} settings by name"),
        "code": _DIGEST,
        "checkpoints": (
            lambda v: v in ("best", "all", "reference", "none"),
            "best, all, reference or none",
            "best",
        ),
        "settings": _DIGEST,
        "git": (_are_texts, "texts by name", {"commit": "", "branch": "", "dirty": ""}),
        "environment": (_are_texts, "texts by name", {"host": ""}),
        "parent": (_is_change, "the settings that differ from the commit's", {}),
    },
    "resume": {"time": _TIME, "name": _CALLED, "invocation": (_may_be(_is_id), _IDS, "")},
    "metrics": {"time": _TIME, "step": _STEP, "values": (_is_small, _NAMES)},
    "tags": {"values": (_are_tags, f"texts by name, {_NAMES}, none reserved for rows")},
    "text": {
        "time": _TIME,
        "step": _STEP,
        "text": (_text(4096), "text of at most 4,096 characters"),
    },
    "dataset": {
        "name": _PLAIN,
        "digest": (_is_id, "a digest"),
        "source": (_text(4096), "text"),
        "context": _PLAIN,
    },
    "artifact": {"folder": _FOLDER, **_PLACED},
    "checkpoint": {
        "name": _PLAIN,
        "step": _STEP,
        **_PLACED,
        "md5": (_may_be(_is_hex), "DVC's MD5", ""),
    },
    "end": {
        "status": (lambda v: v in ("FINISHED", "FAILED", "KILLED"), "FINISHED, FAILED or KILLED"),
        "time": _TIME,
        "why": (_text(2 * MESSAGE), "text", ""),  # `cut` says by how much it was longer
    },
}
