"""DVC's queue: experiments put there, waited for, and why one has no result."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline import paths
from pipeline.errors import InputError
from pipeline.records import dvc_history

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
# `dvc queue kill` takes the worker that ran the task along. So long after a failure, workers that
# are missing are started again; at any other time somebody has stopped them on purpose.
HEAL_SECONDS = 30.0
ALONE_SECONDS = 30.0  # without a worker: what is queued waits for `dvc queue start`
OPEN = ("queued", "running")


def enqueue(
    members: dict[str, list[str]], inputs: dict[str, list[str]] | None = None
) -> dict[str, str]:
    """{stash revision: name} of the members in DVC's queue; all of them or none.

    `members` are the changes of each by its name, in Hydra's grammar, `inputs` the paths that DVC
    copies into its workspace. Raises InputError with what DVC says.
    """
    before = {task.rev for task in dvc_history.queue()}
    queued: list[str] = []
    try:
        for name, changes in members.items():
            words = [word for change in changes for word in ("-S", change)]
            words += [word for path in (inputs or {}).get(name, []) for word in ("-C", path)]
            dvc("exp", "run", "--queue", "--name", name, *words)
            queued.append(name)
    except BaseException:
        if queued:
            dvc("queue", "remove", *queued)
        raise
    # Twice: a task on its way from the queue to a worker stands in neither list for a moment.
    tasks = [*dvc_history.queue(), *dvc_history.queue()]
    return {task.rev: task.name for task in tasks if task.name in queued and task.rev not in before}


def dvc(*words: str) -> str:
    """What a dvc command says. Raises InputError where it fails.

    In a session of its own, which Ctrl-C in this terminal does not reach: neither the workers
    that it starts nor, half-way, its work on the git repository. Its output goes to a file,
    since workers keep it open for hours. Workers and stages find dvc and python by PATH.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", *words],
            cwd=paths.root(),
            env=os.environ | {"PATH": path, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            **apart,
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    if process.returncode:
        raise InputError(f"dvc {' '.join(words)}: exit {process.returncode}\n{text.strip()}")
    return text


@dataclass
class Watch:
    """The members in DVC's queue, by stash revision, from the first look at them to the last."""

    names: dict[str, str]
    jobs: int
    states: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    failures: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    failed_at: float = -HEAL_SECONDS
    alone_since: float | None = None

    def start(self) -> None:
        """The workers that are missing."""
        dvc("queue", "start", "--jobs", str(self.jobs))

    def wait(self) -> None:
        """Until no member is open, or none will ever be run; other tasks are nobody's business."""
        with tqdm(total=0, bar_format="{desc}", disable=None, leave=False) as line:
            while True:
                if news := self.look():
                    line.clear()
                    log.info("%s", news)
                if not self.named(*OPEN) or self.is_alone():
                    return
                line.set_description_str(self.summary())
                time.sleep(POLL_SECONDS)

    def look(self) -> str:
        """Take the states down; a line for each that is new."""
        found = {task.rev: task.state for task in dvc_history.queue() if task.rev in self.names}
        news = []
        for rev, name in self.names.items():
            gone = "removed" if rev in self.absent else self.states.get(rev, "queued")
            state = found.get(rev, gone)  # on its way to a worker it is in no list, but once
            if state != self.states.get(rev):
                self.states[rev] = state
                if state == "failed":
                    self.failures[rev], self.failed_at = why(name, rev), time.monotonic()
                news.append(f"{self.clock()}  {name}: {self.failures.get(rev, state)}")
        self.absent = self.names.keys() - found.keys()
        return "\n".join(news)

    def is_alone(self) -> bool:
        """Whether workers have been missing for long; those lost to a kill are replaced."""
        now, workers = time.monotonic(), dvc_history.workers()
        lost = workers < self.jobs and now - self.failed_at < HEAL_SECONDS
        if lost and "queued" in self.states.values():
            try:
                self.start()
            except InputError as error:  # at the next look once more
                log.warning("%s", error)
        self.alone_since = None if workers else self.alone_since or now
        return bool(self.alone_since) and now - self.alone_since > ALONE_SECONDS

    def problems(self) -> list[str]:
        """A line for each member that has no result."""
        reasons = {
            "removed": "taken out of the queue",
            **dict.fromkeys(OPEN, "waits, and no worker is left: `dvc queue start` goes on"),
        }
        return [
            f"{self.names[rev]}: {self.failures.get(rev) or reasons[state]}"
            for rev, state in self.states.items()
            if state != "success"
        ]

    def named(self, *states: str) -> list[str]:
        return [self.names[rev] for rev, state in self.states.items() if state in states]

    def summary(self) -> str:
        running = ", ".join(self.named("running")) or "none"
        ended = len(self.names) - len(self.named(*OPEN))
        queued = len(self.named("queued"))
        return f"{self.clock()}  running: {running}; {queued} queued, {ended} ended"

    def clock(self) -> str:
        seconds = round(time.monotonic() - self.began)
        return f"{seconds // 60:>3}:{seconds % 60:02}"


def why(name: str, rev: str) -> str:
    """Why a task failed, by its log, and where that is."""
    try:
        lines = [line for line in dvc("queue", "logs", rev, "-e", "utf-8").splitlines() if line]
    except InputError as error:  # it failed before there was a log
        return f"failed, {error}"
    if any(re.match("(ERROR: )?interrupted", line) for line in lines):
        reason = "killed"
    else:
        said = [line for line in lines if not line.startswith("ERROR: ")] or ["without a word"]
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        reason = f"failed, {[*said, *errors][-1]}"
    return f"{reason} (dvc queue logs {name})"
