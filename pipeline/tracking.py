"""Records on their way to MLflow: while a stage runs, and later by `sync`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import experiments, history, paths, records, view
from pipeline.config import Config, load
from pipeline.errors import StorageError, UserError
from pipeline.records import Event, Record
from pipeline.rows import Row, from_workspace, open_row, shipped
from pipeline.store import connect, said, store_errors, store_uri, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SHIP_EVERY_SECONDS = 2.0
END_SECONDS = 60.0  # how long a finished stage waits for its last points ...
SLOWEST_UPLOAD = 1e6  # ... and artifacts, in bytes a second
DOWN_SECONDS = 10.0  # how long it waits for a store that had failed before
RETRY_SECONDS = 10.0


class Shipper:
    """A thread that carries one stage's events to its row while the stage computes.

    It never raises into the stage: whatever fails is one warning, the record keeps it all, and
    the thread tries again, from the stage's first event on, which doubles nothing.
    """

    def __init__(self, stage: str, config: Config):
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._taken: list[Event] = []
        self._upstream = list(records.upstream(stage))
        self._checkpoints = config.tracking.checkpoints
        self._patience = END_SECONDS
        self._closing = threading.Event()
        self._has_row = False
        self.problem = ""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        self._patience += event.get("bytes", 0) / SLOWEST_UPLOAD
        self._events.put(event)

    def close(self, hurried: bool = False) -> None:
        """Ship what is left; bounded, whatever the store does, and by seconds if `hurried`."""
        self._closing.set()
        self._events.put(None)
        down = self.problem and not self._has_row
        patience = DOWN_SECONDS if down or hurried else self._patience
        self._thread.join(patience)
        if self._thread.is_alive():
            self._warn(f"the store did not answer within {patience:.0f} s")

    def _run(self) -> None:
        first = self._events.get()
        assert first and first["kind"] == "start"
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
        row = open_row(connect(), head, [*self._upstream, *records.beside(head)])
        self._has_row = True
        row.enter(head)
        for record in self._upstream:
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
        log.warning(
            "MLflow at %s: %s. The stage goes on and its record keeps it all: what is missing is "
            "shipped as soon as that can be, or by `python -m pipeline.tracking sync` once the "
            "stage is finished.",
            without_secrets(store_uri()),
            problem,
        )


@contextlib.contextmanager
def record(stage: str, config: Config, journal: Path | None = None) -> Iterator[Record]:
    """A stage's record, shipped while it is written; its row ends as the stage does."""
    shipper = Shipper(stage, config)
    entry = Record(stage, config, shipper, journal)
    status = "FAILED"
    try:
        yield entry
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        try:  # a full disk may be what ended the stage
            entry.tags({f"env.{name}": version for name, version in records.versions().items()})
            entry.close(status)
        finally:
            shipper.close(hurried=status == "KILLED")


def sync() -> list[str]:
    """Bring the store up to date: the names of the rows that were made or completed.

    Every record in DVC's experiments, in the commits of every branch and tag and in the workspace
    is given to its row in the order in which the stages ran, as they did themselves. What no
    record holds does not come back: stages that failed or whose record is gone, comparisons
    (their command attaches them again), and what a person wrote on the page.
    """
    steps = history.steps([*experiments.experiments(), *experiments.commits()])
    known = {step.head["id"] for step in steps}
    client = connect()
    arrived = shipped(client)
    names = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            parts = {record[0]["id"] for record in [step.record, *step.others]}
            if any(parts <= row for row in arrived):
                continue
            row = _replay(client, step, known, Path(folder))
            arrived.append(parts)
            names[row.id] = client.get_run(row.id).info.run_name
    return list(names.values())


def _replay(client: MlflowClient, step: history.Step, known: set[str], folder: Path) -> Row:
    def fetch(path: str, sha256: str) -> Path | None:
        found = from_workspace(path, sha256) or experiments.copy_of(step.where, path, folder)
        return found if found and records.tree_digest(found) == sha256 else None

    row = open_row(client, step.head, step.others)
    for record_ in [*step.others, step.record]:
        row.replay(record_, step.head.get("checkpoints", "best"), fetch)
    row.settle(step.head, step.record[-1], known)
    return row


def main(words: list[str]) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sync", help="fill MLflow's store from the records")
    page = commands.add_parser("ui", help="that, then MLflow's page")
    page.add_argument("port", type=int, nargs="?", default=5000)
    asked = parser.parse_args(words)
    try:
        log.info("rows made or completed: %s", ", ".join(sync()) or "none, all are up to date")
        if asked.command == "ui":
            sys.exit(show(asked.port))
    except UserError as error:
        log.error("error: %s", error)
        sys.exit(error.exit_code)
    except store_errors() as error:
        log.error("error: MLflow at %s: %s", without_secrets(store_uri()), said(error))
        sys.exit(StorageError.exit_code)


def show(port: int) -> int:
    """Print the link to the prepared table and serve it, unless a server has the store already."""
    found = connect().get_experiment_by_name(load().tracking.experiment)
    remote = store_uri().startswith("http")
    server = without_secrets(store_uri()) if remote else f"http://127.0.0.1:{port}"
    link = view.link(server.rstrip("/"), found.experiment_id if found else "0")
    log.info("The prepared comparison:\n  %s", link)
    if remote:
        return 0
    log.info("MLflow takes half a minute to start; Ctrl-C ends it.")
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    # Not among the words of the command, where everybody on the machine could read a password.
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": store_uri()}
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.call(command, cwd=paths.root(), env=environment)
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
