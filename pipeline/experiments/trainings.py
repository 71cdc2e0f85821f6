"""Every training of this repository: how far it is, how well it does, when it will end or did."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline import paths, screen
from pipeline.errors import InputError
from pipeline.records import dvc_history, record_reader
from pipeline.records.run_data import Log, RunData
from pipeline.resume import run_folder

COLUMNS = ("name", "state", "step", "loss", "val loss", "tokens/s", "left or ended", "MiB", "id")
STATES = {"running": "at work", "preempted": "interrupted"}
RECENT = 200  # steps whose time tells how long the rest will take
IDLE = 60.0  # seconds without one at work after which nobody waits for the next of a sweep
STEP = ("batch_size", "sequence_length", "accumulate")  # whose product are a step's tokens
LAST = 20  # steps whose mean is the loss: that of one has noise


@dataclass(frozen=True)
class Training:
    """One training, as its record and its folder tell."""

    name: str
    state: str
    step: int | None  # steps done; of one that was stopped those that are kept
    steps: int | None
    loss: float | None  # nats/token
    val_loss: float | None
    tokens_per_second: float | None
    left: float | None  # seconds, of one at work
    time: float  # when it was last heard of, in seconds since 1970
    record: str = ""  # its id
    id: str = ""  # its folder's name
    size: int = 0  # bytes in that folder

    @property
    def at_work(self) -> bool:
        return self.state == STATES["running"]

    def row(self) -> tuple[str, ...]:
        """One tuple of COLUMNS."""
        when = screen.duration(self.left) if self.at_work else screen.moment(self.time)
        step = "-" if self.step is None else f"{self.step:,}/{self.steps or 0:,}"
        losses = ("-" if v is None else f"{v:.3f}" for v in (self.loss, self.val_loss))
        size = f"{self.size / 2**20:,.0f}" if self.id else ""
        rate = screen.count(self.tokens_per_second)
        return (self.name, self.state, step, *losses, rate, when, size, self.id[:7])

    def line(self) -> str:
        """How far it is, in one line."""
        name, state, step, loss, _, rate, left, *_ = self.row()
        return f"{name}: {state}, step {step}, loss {loss}, {rate} tokens/s, {left} left"


def every() -> list[Training]:
    """Those at work, then the others, the newest first; each once, however many share it."""
    found = kept()
    known = {one.record for one in found if one.record}
    for experiment in dvc_history.experiments(("train",), brief=True):
        record = experiment.records.get("train")
        if record and record[0]["id"] not in known and record[-1].get("status") == "FINISHED":
            known.add(record[0]["id"])
            found.append(_finished(experiment.name, record))
    return _in_order(found)


def kept() -> list[Training]:
    """Those that have a folder below .runs: at work, interrupted, or not in DVC's cache yet."""
    return [_of_folder(left) for left in run_folder.every()]


def page(found: Sequence[Training]) -> str:
    """A table of them, and what can be done about those that were stopped."""
    if not found:
        return "no training yet: `make repro` makes the first one"
    said = screen.table(COLUMNS, [one.row() for one in found], left=2)
    if any(one.state in ("interrupted", "killed", "failed") for one in found):
        said += "\n\nThe same command as before resumes one that was stopped; "
        said += "`python -m pipeline rm ID` gives its disk space back."
    return said


def watch() -> None:
    """Show those that have a folder until none has been at work for a while; see `screen.show`."""
    seen: dict[str, Training] = {}
    busy = 0.0

    def draw() -> str:
        nonlocal busy
        now = {one.id: one for one in kept()}
        # One whose folder is gone has ended: its result is in DVC's cache.
        seen.update({id: replace(one, state="finished") for id, one in seen.items()} | now)
        if any(one.at_work for one in seen.values()):
            busy = time.monotonic()
        return page(_in_order(seen.values())) if seen else "no training is at work"

    def more(seconds: float) -> bool:
        if not busy or time.monotonic() - busy > IDLE:
            return False
        time.sleep(seconds)
        return True

    screen.show(draw, more)


def _in_order(found: Iterable[Training]) -> list[Training]:
    return sorted(found, key=lambda one: (not one.at_work, -one.time))


def _of_folder(left: run_folder.Left) -> Training:
    params = left.identity.get("params", {})
    stage = str(left.identity.get("stage"))
    journal, result = left.folder / run_folder.JOURNAL, left.folder / paths.record(stage)
    record = Log()
    for path in (journal, result):
        with contextlib.suppress(InputError, OSError):  # none yet, or one of anything
            record = record if len(record) else record_reader.ends(path, stage)
    name = left.status.get("name") or (record[0]["name"] if len(record) else "")
    state = STATES.get(left.state, left.state)
    done, pace = _pace(record)
    if state != STATES["running"]:
        done = done if state == "finished" else left.status.get("step", 0)
        pace = None
    steps = params.get("train.steps")
    seconds = None if pace is None or not steps else pace * (steps - done)
    if seconds is not None and (minutes := params.get("train.time_budget")):
        seconds = max(0.0, min(seconds, 60 * minutes - (time.time() - _began(record))))
    tokens = math.prod(params.get(f"train.{name}", 0) for name in STEP)
    return Training(
        name=(name or dvc_history.WORKSPACE) + ("" if steps else f": {stage}"),
        state=state,
        step=done if steps else None,
        steps=steps,
        loss=_loss(record),
        val_loss=_last(record, "train/val_loss"),
        tokens_per_second=tokens / pace if pace else _last(record, "perf/tokens_per_second"),
        left=seconds,
        time=left.status.get("time", 0),
        record=record[0]["id"] if len(record) else "",
        id=left.folder.name,
        size=left.size,
    )


def _finished(name: str, record: Log) -> Training:
    done = _last(record, "train/steps")
    return Training(
        name=name,
        state="finished",
        step=None if done is None else int(done),
        steps=record[0]["params"].get("train.steps"),
        loss=_loss(record),
        val_loss=_last(record, "train/val_loss"),
        tokens_per_second=_last(record, "perf/tokens_per_second"),
        left=None,
        time=record[-1]["time"] / 1000,
        record=record[0]["id"],
    )


def _pace(record: Log) -> tuple[int, float | None]:
    """Steps done, and the seconds from one to the next of late, validations included."""
    steps: list[tuple[int, int]] = []  # (step, time), those of the last process from `resumed` on
    resumed = 0
    for event in record:
        if event["kind"] in ("start", "resume"):
            resumed = len(steps)
        elif event["kind"] == "metrics" and "train/loss" in event["values"]:
            steps.append((event["step"], event["time"]))
    if not steps:
        return 0, None
    own = steps[resumed:][-RECENT:]
    if len(own) < 2 or own[-1][0] <= own[0][0]:
        return steps[-1][0] + 1, None
    (first, began), *_, (last, now) = own
    return last + 1, (now - began) / 1000 / (last - first) or None


def _began(record: Log) -> float:
    """When its last process did, as far as the record's ends know."""
    return max(event["time"] for event in record.of_kind("start", "resume")) / 1000


def _loss(record: Log) -> float | None:
    recent = RunData({"train": record}).values("train/loss")[-LAST:]
    return statistics.fmean(recent) if recent else None


def _last(record: Log, metric: str) -> float | None:
    return RunData({"train": record}).last(metric)
