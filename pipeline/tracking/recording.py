"""A stage's record, and the process beside the stage that ships it to its row in MLflow.

MLflow's client takes seconds to import and holds Python's lock whenever it works, a hundred
libraries come with it, and a store may hang or crash one of them. None of that may touch what the
stage computes: the stage starts `python -m pipeline ship`, which reads the record from the disk
while it is written. Whatever fails there is a warning, never an error of the stage.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline import terminal
from pipeline.config import Config
from pipeline.errors import MESSAGE, cut, reason
from pipeline.process import this_process
from pipeline.records import record_file
from pipeline.records.record_file import Event, Record
from pipeline.tracking.mlflow_run import from_workspace, open_row
from pipeline.tracking.mlflow_store import connect, said, store_uri, without_secrets

log = logging.getLogger(__name__)

SHIP_EVERY_SECONDS = 2.0
RETRY_SECONDS = 10.0
END_SECONDS = 60.0  # the longest wait of a finished stage while its last points arrive ...
SHORT_SECONDS = 10.0  # ... and where the store has failed already, or the stage was stopped
GRACE_SECONDS = 5.0  # for the process that ships to end, beyond the time it is given
SLOWEST_UPLOAD = 1e6  # bytes/s: artifacts get that much more time
AT_ONCE = 1 << 22  # bytes of the record that are read and shipped at a time
NICENESS = 10  # the stage comes first where it needs every core


@contextlib.contextmanager
def record(stage: str, config: Config, journal: Path | None = None) -> Iterator[Record]:
    """A stage's record, shipped while it is written; its row ends as the stage does."""
    entry = Record(stage, config, journal)
    courier = Courier(entry, config.tracking.checkpoints)
    status, why = "FINISHED", ""
    try:
        yield entry
    except BaseException as error:
        status = "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"
        why = cut(terminal.shown(without_secrets(reason(error))), MESSAGE)
        raise
    finally:
        try:  # a full disk may be what ended the stage
            entry.tags({f"env.{name}": version for name, version in record_file.versions().items()})
            entry.close(status, why)
        finally:
            courier.close(hurried=status == "KILLED")


class Courier:
    """The process that ships one stage's record, `python -m pipeline ship`, seen from the stage."""

    def __init__(self, record: Record, checkpoints: str):
        self._record = record
        self._child: subprocess.Popen[bytes] | None = None
        try:
            self._child = self._start(str(record.path), this_process(), checkpoints)
        except OSError as error:  # no process is left
            self._warn(f"could not be started: {error}")

    def close(self, hurried: bool = False) -> None:
        """Wait until the rest is shipped, within bounds; for some seconds only if `hurried`."""
        if not self._child:
            return
        assert self._child.stdin
        uploads = self._record.bytes / SLOWEST_UPLOAD
        patience = SHORT_SECONDS if hurried else END_SECONDS + uploads
        try:
            with contextlib.suppress(OSError), self._child.stdin as stdin:  # it may have ended
                stdin.write(str(patience).encode())
            if code := self._child.wait(patience + GRACE_SECONDS):
                self._warn(f"ended with exit code {code}")
        except subprocess.TimeoutExpired as late:
            self._warn(f"did not end within {late.timeout:.0f} s")
        finally:  # a signal may have ended the wait
            self._child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # not even then: a dead disk
                self._child.wait(GRACE_SECONDS)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        home = str(Path(__file__).resolve().parents[2])
        places = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "pipeline", "ship", *words],
            stdin=subprocess.PIPE,  # its end tells the child that the stage is over
            stdout=subprocess.DEVNULL,  # libraries print
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
            # Ctrl-C is for the stage, which then has an end to ship.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def _warn(self, problem: str) -> None:
        log.warning(
            "MLflow: the process that ships this stage's record %s. The record keeps everything: "
            "`python -m pipeline sync` ships what is missing once the stage is finished.",
            problem,
        )


class Shipper:
    """A thread that ships one stage's record while it is written.

    It never raises: a failure is one warning, and the thread tries again from the record's first
    event on, which doubles nothing. `path` is the record's final name, `process` the stage's
    process as `process.this_process` names it, `checkpoints` the setting tracking.checkpoints.
    """

    def __init__(self, path: Path, process: str, checkpoints: str):
        self._path, self._process, self._checkpoints = path, process, checkpoints
        self._record = _opened(path)
        self._closing = threading.Event()
        self._connected = self._has_row = False
        self.problem = ""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def close(self, patience: float) -> None:
        """The stage is over: ship the rest, within `patience` seconds."""
        self._closing.set()
        if self.problem and not self._has_row:
            patience = min(patience, SHORT_SECONDS)
        self._thread.join(patience)
        if self._thread.is_alive():
            # MLflow's import, and a new database, take longer than a stopped stage waits.
            late = "the store did not answer" if self._connected else "MLflow had not started"
            self._warn(f"{late} within {patience:.0f} s of the stage's end")

    def _run(self) -> None:
        with self._record:
            while not self._attempt():
                self._closing.wait(RETRY_SECONDS)

    def _attempt(self) -> bool:
        """Ship from the first event to the last; True if there is nothing left to try."""
        last, self._has_row = self._closing.is_set(), False
        try:
            self._ship()
            return True
        except Exception as error:  # a store's errors are of every kind; none may stop a run
            self._warn(said(error))
        # A row that was lost at the very end is worth another attempt.
        return self._closing.is_set() and (last or not self._has_row)

    def _ship(self) -> None:
        batches = self._batches()
        events = next(batches)
        head = events[0]
        upstream = list(record_file.upstream(head["stage"]))
        client = connect()
        self._connected = True
        row = open_row(client, head, [*upstream, *record_file.beside(head)])
        self._has_row = True
        row.enter(head, self._process)
        for record in upstream:
            row.replay(record, self._checkpoints, from_workspace)
        row.write(events, self._checkpoints, from_workspace)
        for events in batches:
            row.write(events, self._checkpoints, from_workspace)
        if events[-1]["kind"] == "end":
            row.leave(head, events[-1])

    def _batches(self) -> Iterator[list[Event]]:
        """All events of the record: those that are there, then every few seconds what has come."""
        self._record.seek(0)
        events: list[Event] = []
        over = False
        while events or not over:
            over = self._closing.is_set()  # before it reads: a stage that is over writes no more
            if events := self._read_on():
                yield events
            self._closing.wait(SHIP_EVERY_SECONDS)

    def _read_on(self) -> list[Event]:
        """The next whole lines; the last one may be half written, or cut off by a kill."""
        lines = self._record.readlines(AT_ONCE)
        if lines and not lines[-1].endswith(b"\n"):
            self._record.seek(-len(lines.pop()), os.SEEK_CUR)
        return [json.loads(line) for line in lines]

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
                "The stage continues and its record keeps everything: what is missing is shipped "
                f"as soon as the store answers, or by {sync} once the stage is finished."
            )
        if record_file.part(self._path).exists():  # sync reads finished records alone
            return "MLflow will be brought up to date by the next run."
        return f"The record keeps everything: {sync} ships what is missing."


def _opened(path: Path) -> BinaryIO:
    """The record that the stage is writing, or has just given its final name.

    One handle is kept: it goes on with the same file, whatever its name becomes.
    """
    try:
        return _open_shared(record_file.part(path))
    except FileNotFoundError:
        return _open_shared(path)


def _open_shared(path: Path) -> BinaryIO:
    """A file, opened for reading so that another process may rename or delete it meanwhile."""
    if sys.platform != "win32":
        return open(path, "rb")
    else:  # else, since a type checker follows one system's branch
        import _winapi
        import msvcrt

        share = 1 | 2 | 4  # reading, writing and, what Python's own `open` does not, deleting
        null, access = _winapi.NULL, _winapi.GENERIC_READ
        handle = _winapi.CreateFile(str(path), access, share, null, _winapi.OPEN_EXISTING, 0, null)
        return open(msvcrt.open_osfhandle(handle, os.O_RDONLY | os.O_BINARY), "rb")


def main(words: list[str]) -> None:
    """`python -m pipeline ship RECORD PROCESS CHECKPOINTS`, the arguments of `Shipper`.

    Standard input ends when the stage does. It holds how many seconds the stage will wait, or
    nothing where the stage was killed: then what it has written is shipped all the same.
    """
    # A cluster ends all processes of a job by it; this one is ended by its standard input.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # Windows has no niceness
        os.nice(NICENESS)
        # Linux weighs sessions against each other first, and this one is a session of its own.
        Path("/proc/self/autogroup").write_text(str(NICENESS))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    # requests silences this, but in the thread that ships, where it may be undone by another's
    # warnings.catch_warnings; a filter from before all threads stays.
    warnings.filterwarnings("ignore", message="SOCKS support in urllib3")
    path, process, checkpoints = words
    shipper = Shipper(Path(path), process, checkpoints)
    shipper.close(float(sys.stdin.buffer.read() or END_SECONDS))
