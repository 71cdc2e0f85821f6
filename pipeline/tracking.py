"""Records on their way to MLflow: while a stage runs, and later by `sync`."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from pipeline import paths, records, view
from pipeline.config import Config, load
from pipeline.records import Event, Record
from pipeline.rows import connect, from_workspace, open_row, store_uri

log = logging.getLogger(__name__)

SHIP_EVERY_SECONDS = 2.0
END_SECONDS = 60.0  # how long a finished stage waits for its last points ...
SLOWEST_UPLOAD = 1e6  # ... and artifacts, in bytes a second
RETRY_SECONDS = 10.0


class Shipper:
    """A thread that carries one stage's events to its row while the stage computes.

    It never raises into the stage: whatever fails is one warning, the record keeps it all, and
    the thread tries again, from the stage's first event on, which doubles nothing.
    """

    def __init__(self, stage: str, config: Config):
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._taken: list[Event] = []
        self._upstream = list(records.upstream(stage))
        self._checkpoints = config.tracking.checkpoints
        self._patience = END_SECONDS
        self._closing = threading.Event()
        self.problem = ""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        self._patience += event.get("bytes", 0) / SLOWEST_UPLOAD
        self._events.put(event)

    def close(self) -> None:
        """Ship what is left; bounded, whatever the store does."""
        self._events.put(None)
        self._closing.set()
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._warn(f"the store did not answer within {self._patience:.0f} s")

    def _run(self) -> None:
        first = self._events.get()
        assert first and first["kind"] == "start"
        self._taken.append(first)
        while True:
            try:
                self._ship(self._taken[0])
                return
            except Exception as error:  # a store's errors are of every kind; none may stop a run
                self._warn(f"{type(error).__name__}: {error}")
            if self._closing.wait(RETRY_SECONDS):
                return

    def _ship(self, head: Event) -> None:
        row = open_row(connect(), head, [*self._upstream, *records.beside(head)])
        row.enter(head)
        for record in self._upstream:
            row.replay(record, self._checkpoints, from_workspace)
        row.write(self._taken, self._checkpoints, from_workspace)
        for events in self._batches():
            self._taken += events
            row.write(events, self._checkpoints, from_workspace)
        if self._taken[-1]["kind"] == "end":
            row.leave(head, self._taken[-1]["status"])

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
            "MLflow at %s: %s. The record keeps it all; `python -m pipeline.tracking sync` ships "
            "the records of finished stages later.",
            _without_secrets(store_uri()),
            _without_secrets(problem.partition("\n")[0])[:300],
        )


def _without_secrets(text: str) -> str:
    """URIs may carry a user and a password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextlib.contextmanager
def record(stage: str, config: Config) -> Iterator[Record]:
    """A stage's record, shipped while it is written; its row ends as the stage does."""
    shipper = Shipper(stage, config)
    entry = Record(stage, config, shipper)
    status = "FAILED"
    try:
        yield entry
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        entry.tags({f"env.{name}": version for name, version in records.versions().items()})
        entry.close(status)
        shipper.close()


def sync() -> list[str]:
    """Bring the store up to date from the workspace's records; the ids of the rows they fill."""
    chains = [records.read(paths.record(s)) for s in records.UPSTREAM if paths.record(s).exists()]
    if not chains:
        return []
    head = max((r[0] for r in chains), key=lambda e: e["time"])
    stages = (*records.UPSTREAM[head["stage"]], head["stage"])
    chain = [r for r in chains if r[0]["stage"] in stages]
    client = connect()
    row = open_row(client, head, [r for r in chain if r[0]["id"] != head["id"]])
    for record_ in chain:
        row.replay(record_, load().tracking.checkpoints, from_workspace)
    run = client.get_run(row.id)
    parts = {id_ for tag, id_ in run.data.tags.items() if tag.startswith("record.")}
    # A part that is not among the finished records failed, or is at work this very moment.
    if run.info.status != "FINISHED" and parts == {r[0]["id"] for r in chain}:
        client.set_terminated(row.id, "FINISHED", end_time=chain[-1][-1]["time"])
    return [row.id]


def main(words: list[str]) -> None:
    """`sync`: fill the store from the records. `ui [port]`: that, then MLflow's page."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not words or words[0] not in ("sync", "ui"):
        sys.exit("usage: python -m pipeline.tracking sync | ui [port]")
    log.info("rows brought up to date: %s", ", ".join(sync()) or "none, no records here")
    if words[0] == "ui":
        port = int(words[1]) if len(words) > 1 else 5000
        found = connect().get_experiment_by_name(load().tracking.experiment)
        local = f"http://127.0.0.1:{port}"
        remote = os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")
        server = _without_secrets(store_uri()) if remote else local
        link = view.link(server, found.experiment_id if found else "0")
        log.info("The prepared comparison:\n  %s", link)
        if remote:
            return
        log.info("MLflow takes half a minute to start; Ctrl-C ends it.")
        command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", store_uri()]
        with contextlib.suppress(KeyboardInterrupt):
            sys.exit(subprocess.call(command, cwd=paths.root()))


if __name__ == "__main__":
    main(sys.argv[1:])
