"""Every training of this repository: how far it is, how well it does, when it will end or did."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline import paths, terminal
from pipeline.errors import InputError
from pipeline.experiments import screen
from pipeline.records import dvc_history, record_reader
from pipeline.records.run_data import Log, RunData
from pipeline.resume import run_folder

COLUMNS = ("name", "state", "step", "loss", "val loss", "tokens/s", "left or ended", "MiB", "id")
AT_WORK = "at work"
STATES = {"running": AT_WORK, "preempted": "interrupted"}
RECENT = 200  # steps whose time tells how long the rest will take
LAST = 20  # steps whose mean is the loss: that of one has noise
IDLE = 60.0  # seconds without one at work after which nobody waits for the next of a sweep
STEP = ("batch_size", "sequence_length", "accumulate")  # whose product are a step's tokens


@dataclass(frozen=True)
class Training:
    """One training, as its record and its folder tell."""

    name: str
    state: str
    record: Log  # its ends suffice
    params: Mapping[str, Any]
    time: float  # when it was last heard of, in seconds since 1970
    saved: int | None = None  # steps that one which was stopped will go on from
    id: str = ""  # its folder's name
    size: int = 0  # bytes in that folder
    why: str = ""  # it failed

    @property
    def done(self) -> int:
        """Steps done; of one that was stopped those that are kept."""
        steps = self._data.curves["train/loss"].steps[-1:] if self._loss else ()
        return self.saved if self.saved is not None else sum(steps) + len(steps)

    @property
    def pace(self) -> float | None:
        """Seconds from one step to the next of late, validations included, of one at work."""
        points: list[tuple[int, int]] = []  # of the process that came last
        for event in self.record.of_kind("resume", "metrics"):
            if event["kind"] == "resume":
                points = []
            elif "train/loss" in event["values"]:
                points.append((event["time"], event["step"]))
        (began, first), (now, last) = [*points[-RECENT:], (0, 0)][0], [(0, 0), *points][-1]
        return (now - began) / 1000 / (last - first) if self.at_work and last > first else None

    @property
    def left(self) -> float | None:
        """Seconds until one at work has made its last step."""
        if self.pace is None:
            return None
        seconds = self.pace * (self.params["train.steps"] - self.done)
        if minutes := self.params["train.time_budget"]:
            began = max(event["time"] for event in self.record.of_kind("start", "resume")) / 1000
            seconds = max(0.0, min(seconds, 60 * minutes - (time.time() - began)))
        return seconds

    @property
    def at_work(self) -> bool:
        return self.state == AT_WORK

    def row(self) -> tuple[str, ...]:
        """One tuple of COLUMNS."""
        pace, loss = self.pace, statistics.fmean(self._loss[-LAST:]) if self._loss else None
        rate = self._data.last("perf/tokens_per_second")
        if pace:
            rate = math.prod(self.params[f"train.{name}"] for name in STEP) / pace
        steps = self.params.get("train.steps")
        return (
            *(self.name, self.state, f"{self.done:,}/{steps:,}" if steps else "-"),
            *(screen.number(one, ".3f") for one in (loss, self._data.last("train/val_loss"))),
            screen.number(rate),
            screen.duration(self.left) if self.at_work else screen.moment(self.time),
            *(screen.number(self.size / 2**20) if self.id else "", self.id[:7]),
        )

    def line(self) -> str:
        """How far it is, in one line."""
        name, state, step, loss, _, rate, left, *_ = self.row()
        return f"{name}: {state}, step {step}, loss {loss}, {rate} tokens/s, {left} left"

    @property
    def _data(self) -> RunData:
        return RunData({"train": self.record})

    @property
    def _loss(self) -> list[float]:
        return self._data.values("train/loss")


def every() -> list[Training]:
    """Those with a folder, then all that have ended; each once, however many names share it."""
    found = kept()
    known = {one.record[0]["id"] for one in found if len(one.record)}
    aside = paths.root().glob(".dvc/tmp/exps/*/*/records")  # where later stages may be at work
    workspaces = [dvc_history.of_workspace(path.parent, ("train",), brief=True) for path in aside]
    for experiment in [*dvc_history.experiments(("train",), brief=True), *workspaces]:
        record = Log.of(experiment.records.get("train", ()))
        if record and record[-1].get("status") == "FINISHED" and record[0]["id"] not in known:
            known.add(record[0]["id"])
            name, ended = experiment.dvc_name or experiment.name, record[-1]["time"] / 1000
            found.append(Training(name, "finished", record, record[0]["params"], ended))
    return found


def kept() -> list[Training]:
    """Those that have a folder below .runs: at work, interrupted, or not in DVC's cache yet."""
    return [_of_folder(left) for left in run_folder.every()]


def _of_folder(left: run_folder.Left) -> Training:
    stage, record = str(left.identity.get("stage")), Log()
    for path in (run_folder.JOURNAL, paths.record(stage)):
        with contextlib.suppress(InputError, OSError):  # none yet, or one of anything
            record = record or record_reader.ends(left.folder / path, stage, whole=False)
    name = left.status.get("name") or dvc_history.WORKSPACE
    stopped = left.state not in ("running", "finished")
    return Training(
        name if stage == "train" else f"{name}: {stage}",
        STATES.get(left.state, left.state),
        record,
        left.identity.get("params", {}),
        left.status.get("time", 0),
        left.status.get("step", 0) if stopped else None,
        left.folder.name,
        left.size,
        str(left.status.get("message", "")) if left.state == "failed" else "",
    )


def page(found: Iterable[Training], none: str = "no training yet: `make repro` makes one") -> str:
    """A table of them, at work first, then the newest, and what to do about those stopped."""
    ordered = sorted(found, key=lambda one: (not one.at_work, -one.time))
    said = screen.table(COLUMNS, [one.row() for one in ordered], left=2) if ordered else none
    for one in ordered:
        if one.why:
            said += "\n\n" + terminal.line(f"{one.name} failed: {one.why.splitlines()[0]}")
    if any(one.saved is not None for one in ordered):
        said += "\n\nThe same command as before resumes one that was stopped; "
        said += "`python -m pipeline rm ID` gives its disk space back."
    return said


def watch() -> None:
    """Show those that have a folder until none has been at work for a while; see `screen.show`."""
    seen: dict[str, Training] = {}
    busy = -math.inf

    def draw() -> str:
        nonlocal busy
        # One whose folder is gone has ended: its result is in DVC's cache.
        ended = {id: replace(one, state="finished") for id, one in seen.items()}
        seen.update(ended | {one.id: one for one in kept()})
        if any(one.at_work for one in seen.values()):
            busy = time.monotonic()
        return page(seen.values(), "no training is at work")

    def more(seconds: float) -> bool:
        if waits := time.monotonic() - busy < IDLE:
            time.sleep(seconds)
        return waits

    screen.show(draw, more)
