"""One stage's events on their way to its row in MLflow, in a process beside the stage's.

MLflow's client takes seconds to import and holds Python's lock whenever it works, a hundred
libraries come with it, and a store may hang or crash one of them. None of that is to touch what
the stage computes: it starts `python -m pipeline ship` and writes its events into a pipe.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.records import record_file
from pipeline.records.record_file import Event
from pipeline.tracking.mlflow_run import from_workspace, open_row
from pipeline.tracking.mlflow_store import connect, said, store_uri, without_secrets

log = logging.getLogger(__name__)

SHIP_EVERY_SECONDS = 2.0
END_SECONDS = 60.0  # how long a finished stage waits at most for its last points, which arrive
# How long where nothing arrives any more, or where it was stopped ...
SHORT_SECONDS = 10.0
SLOWEST_UPLOAD = 1e6  # ... but for artifacts under way, in bytes a second
BEAT_SECONDS = 0.5  # how often the stage hears meanwhile that there is hope
RETRY_SECONDS = 10.0
CLOSE = "close"  # the last line of a stage, which is no event
NICENESS = 10  # where the stage needs every core, it comes first


class _Heard:
    """A client of MLflow whose answers are counted, and which says whether it uploads."""

    def __init__(self, client: Any):
        self._client, self.answers, self.uploads = client, 0, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def asked(*words: Any, **options: Any) -> Any:
            self.uploads = name.startswith("log_artifact")
            answer = found(*words, **options)
            self.answers, self.uploads = self.answers + 1, False
            return answer

        return asked


class Shipper:
    """A thread that ships one stage's events while they come.

    It never raises: whatever fails is one warning, the record keeps it all, and the thread tries
    again, from the stage's first event on, which doubles nothing. `process` is the stage's, as
    `process.this_process` names it, `checkpoints` what tracking.checkpoints says.
    """

    def __init__(self, process: str, checkpoints: str):
        self._process, self._checkpoints = process, checkpoints
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._taken: list[Event] = []
        self._closing = threading.Event()
        self._client: Any = None
        self._bytes = 0
        self._has_row = self._finished = False
        self.problem = ""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        self._finished = event.get("status") == "FINISHED"
        self._bytes += event.get("bytes", 0)
        self._events.put(event)

    def close(self, patience: float, beat: Callable[[], object] = lambda: None) -> None:
        """Ship what is left, within so many seconds, and as long as anything arrives.

        Meanwhile, `beat` is called: whoever hears nothing knows that this process is stuck.
        """
        self._closing.set()
        self._events.put(None)
        if self.problem and not self._has_row:
            patience = min(patience, SHORT_SECONDS)
        began = moved = time.monotonic()
        seen = self._progress()
        while self._thread.is_alive():
            now = time.monotonic()
            if (progress := self._progress()) != seen:
                seen, moved = progress, now
            uploads = self._client is not None and self._client.uploads
            quiet = SHORT_SECONDS + (self._bytes / SLOWEST_UPLOAD if uploads else 0)
            left = min(began + patience, moved + quiet) - now
            if left <= 0:
                # MLflow's import, and a new database, take longer than a stopped stage waits.
                late = "the store did not answer" if self._client else "MLflow had not started"
                self._warn(f"{late} within {now - began:.0f} s of the stage's end")
                return
            beat()
            self._thread.join(min(left, BEAT_SECONDS))

    def _progress(self) -> float:
        """What changes while the store answers; before that, while MLflow's import computes."""
        return self._client.answers if self._client else -round(time.process_time(), 1)

    def _run(self) -> None:
        first = self._events.get()
        if first is None:  # the stage failed before its record began
            return
        self._taken.append(first)
        while not self._attempt():
            self._closing.wait(RETRY_SECONDS)

    def _attempt(self) -> bool:
        """Ship from the first event to the last one; whether there is nothing left to try."""
        last, self._has_row = self._closing.is_set(), False
        try:
            self._ship(self._taken[0])
            return True
        except Exception as error:  # a store's errors are of every kind; none may stop a run
            self._warn(said(error))
        if not self._closing.is_set():
            return False
        self._events.put(None)  # the attempt may have taken it
        return last or not self._has_row  # a row that was lost in the end is worth another one

    def _ship(self, head: Event) -> None:
        upstream = list(record_file.upstream(head["stage"]))
        client: Any = _Heard(connect())
        self._client = client
        row = open_row(client, head, [*upstream, *record_file.beside(head)])
        self._has_row = True
        row.enter(head, self._process)
        for record in upstream:
            row.replay(record, self._checkpoints, from_workspace)
        row.write(self._taken, self._checkpoints, from_workspace)
        for events in self._batches():
            self._taken += events
            row.write(events, self._checkpoints, from_workspace)
        if self._taken[-1]["kind"] == "end":
            row.leave(head, self._taken[-1])

    def _batches(self) -> Iterator[list[Event]]:
        """What has come, every few seconds, until the stage says that it is over."""
        while True:
            events = [self._events.get()]
            deadline = time.monotonic() + SHIP_EVERY_SECONDS
            while events[-1] is not None and (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(queue.Empty):
                    events.append(self._events.get(timeout=left))
            if known := [event for event in events if event is not None]:
                yield known
            if events[-1] is None:
                return

    def _warn(self, problem: str) -> None:
        if self.problem:  # a store that did not answer in time may well fail later, too
            return
        self.problem = problem
        log.warning("MLflow at %s: %s. %s", without_secrets(store_uri()), problem, self._then())

    def _then(self) -> str:
        """What becomes of the points that have not arrived."""
        sync = "`python -m pipeline sync`"
        if not self._closing.is_set():
            return (
                "The stage goes on and its record keeps it all: what is missing is shipped as soon "
                f"as that can be, or by {sync} once the stage is finished."
            )
        if self._finished:
            return f"The record keeps it all: {sync} ships what is missing."
        return "MLflow will be brought up to date by the next run."  # sync reads finished records


def main(words: list[str]) -> None:
    """`python -m pipeline ship PROCESS CHECKPOINTS`: an event a line, then how long to wait.

    Where that last line never comes the stage was killed, and what has arrived is shipped. On
    standard output it says that it is alive: when it begins, and while it ends.
    """
    # What libraries print has no place there.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _beat()
    with contextlib.suppress(AttributeError, OSError):  # Windows has no niceness
        os.nice(NICENESS)
        # Linux weighs sessions against each other first, and this one is a session of its own.
        Path("/proc/self/autogroup").write_text(str(NICENESS))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    # requests silences this, but in the thread that ships, where it may be undone by another's
    # warnings.catch_warnings; a filter from before all threads stays.
    warnings.filterwarnings("ignore", message="SOCKS support in urllib3")
    shipper = Shipper(*words)
    patience = END_SECONDS
    for line in sys.stdin.buffer:
        if not line.endswith(b"\n"):  # cut off by a kill
            break
        event: Event = json.loads(line)
        if event["kind"] == CLOSE:
            patience = event["patience"]
            break
        shipper(event)
    shipper.close(patience, _beat)


def _beat() -> None:
    with contextlib.suppress(OSError):  # the stage is gone
        os.write(1, b".")
