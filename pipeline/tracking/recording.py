"""A stage's record, and the process beside the stage that ships it to MLflow meanwhile."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.config import Config
from pipeline.process import this_process
from pipeline.records import record_file
from pipeline.records.record_file import Record
from pipeline.tracking.shipping import END_SECONDS, SHORT_SECONDS, SLOWEST_UPLOAD

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # for the process that ships to end, beyond the time it is given


class Courier:
    """The process that ships one stage's record, `python -m pipeline ship`, seen from the stage.

    It reads the record from the disk, so that the stage has nothing to do for it. Whatever fails
    is a warning, never an error of the stage: the record keeps everything.
    """

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
            if code := self._wait(patience + GRACE_SECONDS):
                self._warn(f"ended with exit code {code}")
        except subprocess.TimeoutExpired as late:
            self._warn(f"did not end within {late.timeout:.0f} s")
        finally:  # a signal may have ended the wait
            self._child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # not even then: a dead disk
                self._child.wait(GRACE_SECONDS)

    def _wait(self, patience: float) -> int:
        """The child's exit code. Raises TimeoutExpired where it takes longer, or is suspended."""
        assert self._child
        began = awake = time.monotonic()
        while True:
            now = time.monotonic()
            if not _is_suspended(self._child.pid):
                awake = now
            left = min(began + patience, awake + SHORT_SECONDS) - now
            try:
                return self._child.wait(max(0.0, min(left, 0.5)))
            except subprocess.TimeoutExpired:
                if left <= 0:
                    raise subprocess.TimeoutExpired("", now - began) from None

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


def _is_suspended(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):  # it has ended
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


@contextlib.contextmanager
def record(stage: str, config: Config, journal: Path | None = None) -> Iterator[Record]:
    """A stage's record, shipped while it is written; its row ends as the stage does."""
    entry = Record(stage, config, journal)
    courier = Courier(entry, config.tracking.checkpoints)
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
