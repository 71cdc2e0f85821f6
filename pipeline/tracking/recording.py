"""Records on their way to MLflow: while a stage runs, and later by `sync`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.records import record_file
from pipeline.records.record_file import Event, Record
from pipeline.tracking.shipping import CLOSE, END_SECONDS, SHORT_SECONDS, SLOWEST_UPLOAD

if TYPE_CHECKING:
    pass

from pipeline.process import this_process

log = logging.getLogger(__name__)

START_SECONDS = 30.0  # how long Python may take to start on a machine that has much to do
GRACE_SECONDS = 5.0  # how long the process that ships may take to end


class Courier:
    """Carries one stage's events to the process that ships them, `python -m pipeline ship`.

    It never waits for that process while the stage computes, and it never raises into the stage:
    whatever fails is a warning, and the record keeps it all.
    """

    def __init__(self, checkpoints: str):
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._patience = END_SECONDS
        self._heard = time.monotonic() + START_SECONDS - SHORT_SECONDS
        self._threads = [
            threading.Thread(target=task, name=f"courier-{task.__name__}", daemon=True)
            for task in (self._carry, self._listen)
        ]
        try:
            self._child = self._start(this_process(), checkpoints)
            for thread in self._threads:
                thread.start()
        except (OSError, RuntimeError) as error:  # no process or thread is left
            self._child = None
            self._warn(f"could not be started: {error}")

    def __call__(self, event: Event) -> None:
        if self._child:
            self._patience += event.get("bytes", 0) / SLOWEST_UPLOAD
            self._events.put(event)

    def close(self, hurried: bool = False) -> None:
        """Have the rest shipped; bounded, whatever happens, and by seconds if `hurried`."""
        if not self._child:
            return
        patience = SHORT_SECONDS if hurried else self._patience
        self._events.put({"kind": CLOSE, "patience": patience})
        try:
            if code := self._wait(patience + GRACE_SECONDS):
                self._warn(f"ended with exit code {code}")
        except subprocess.TimeoutExpired as late:
            self._warn(f"did not end within {late.timeout:.0f} s")
        finally:  # somebody may have asked to stop meanwhile
            self._child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # not even then: a dead disk
                self._child.wait(GRACE_SECONDS)
            for thread in self._threads:
                thread.join(GRACE_SECONDS)

    def _wait(self, patience: float) -> int:
        """The child's exit code. Raises TimeoutExpired where it takes longer, or says nothing."""
        assert self._child
        began = time.monotonic()
        while True:
            alive = max(began, self._heard) + SHORT_SECONDS
            left = min(began + patience, alive) - (now := time.monotonic())
            try:
                return self._child.wait(max(0.0, min(left, 0.5)))
            except subprocess.TimeoutExpired:
                if left <= 0:
                    raise subprocess.TimeoutExpired("", now - began) from None

    def _listen(self) -> None:
        """Note when the child was last heard of: what is suspended says nothing."""
        assert self._child and self._child.stdout
        with self._child.stdout as said:
            while said.read1():
                self._heard = time.monotonic()

    def _start(self, *words: str) -> subprocess.Popen:
        home = str(Path(__file__).resolve().parents[2])
        places = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "pipeline", "ship", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
            # Ctrl-C is for the stage, which then has an end to ship.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def _carry(self) -> None:
        """Into a pipe in a thread: nobody reads it while that process is suspended."""
        assert self._child and self._child.stdin
        kind = None
        while kind != CLOSE:
            event = self._events.get()
            kind = event["kind"]
            with contextlib.suppress(OSError):  # it has ended, as close will tell
                self._child.stdin.write(json.dumps(event).encode() + b"\n")
                self._child.stdin.flush()
        with contextlib.suppress(OSError):
            self._child.stdin.close()

    def _warn(self, problem: str) -> None:
        log.warning(
            "MLflow: the process that ships this stage's record %s. The record keeps it all: "
            "`python -m pipeline sync` ships what is missing once the stage is finished.",
            problem,
        )


@contextlib.contextmanager
def record(stage: str, config: Config, journal: Path | None = None) -> Iterator[Record]:
    """A stage's record, shipped while it is written; its row ends as the stage does."""
    courier = Courier(config.tracking.checkpoints)
    try:
        entry = Record(stage, config, courier, journal)
    except BaseException:
        courier.close(hurried=True)
        raise
    status = "FAILED"
    try:
        yield entry
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        try:  # a full disk may be what ended the stage
            entry.tags({f"env.{name}": version for name, version in record_file.versions().items()})
            entry.close(status)
        finally:
            courier.close(hurried=status == "KILLED")
