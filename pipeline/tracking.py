"""Records on their way to MLflow: while a stage runs, and later by `sync`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import experiments, history, paths, records, runs, view
from pipeline.config import Config, load
from pipeline.errors import InputError, StorageError
from pipeline.experiments import Experiment
from pipeline.records import Event, Record
from pipeline.rows import Row, from_workspace, open_row, rename, shipped, sweep
from pipeline.shipping import CLOSE, END_SECONDS, SHORT_SECONDS, SLOWEST_UPLOAD
from pipeline.store import (
    artifact_root,
    connect,
    said,
    store_uri,
    without_secrets,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
            self._child = self._start(runs.this_process(), checkpoints)
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
            entry.tags({f"env.{name}": version for name, version in records.versions().items()})
            entry.close(status)
        finally:
            courier.close(hurried=status == "KILLED")


def sync(problems: list[str] | None = None) -> list[str]:
    """Bring the store up to date: the names of the rows that were made or completed.

    A record that is not to be read, or that the store refuses, is left out with a warning, and
    its experiment, file and reason are appended to `problems`. Raises one of `store_errors` where
    the store itself does not answer.

    Every record in DVC's experiments, in the commits of every branch and tag and in the workspace
    is given to its row in the order in which the stages ran, as they did themselves. What no
    record holds does not come back: stages that failed or whose record is gone, comparisons
    (their command attaches them again), and what a person wrote on the page. A row follows the
    name that DVC has for its experiment now.
    """
    problems = [] if problems is None else problems
    found = list(experiments.experiments())
    everything = [*found, *experiments.commits()]
    steps = history.steps(everything)
    problems += dict.fromkeys(f"{one.name}: {why}" for one in everything for why in one.unreadable)
    known = {step.head["id"] for step in steps}
    client = connect()
    arrived = shipped(client)
    sweep(client)
    touched: dict[str, tuple[Row, history.Step]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            parts = {record[0]["id"] for record in [step.record, *step.others]}
            if any(parts <= row for row in arrived):
                continue
            with _alone(client, step, problems):
                row = _replay(client, step, Path(folder))
                arrived.append(parts)
                touched[row.id] = row, step
    names = {}
    for row, step in touched.values():
        with _alone(client, step, problems):
            row.settle(step.head, step.record[-1], known)
            names[row.id] = client.get_run(row.id).info.run_name
    return list((names | _renamed(client, found)).values())


@contextlib.contextmanager
def _alone(client: MlflowClient, step: history.Step, problems: list[str]) -> Iterator[None]:
    """What a record does that the store refuses is a warning, unless the store answers no more."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # of whatever kind: who wrote the record, or the store, decides
        client.search_experiments(max_results=1)
        path = paths.record(step.head["stage"]).as_posix()
        problems.append(f"{step.where.name}: {path}: {said(error)}")
        log.warning("%s; left out", problems[-1])


def _renamed(client: MlflowClient, found: list[Experiment]) -> dict[str, str]:
    """Rows by id with their new names, where `dvc exp rename` has given one.

    Where DVC took all of an experiment from its cache, two share every record: a row whose name
    one of them still has keeps it.
    """
    named: dict[str, list[Experiment]] = {}
    for experiment in found:
        if experiment.rev and experiment.records:
            named.setdefault(experiment.head["id"], []).append(experiment)
    renamed = {}
    for sharing in named.values():
        head, name = sharing[0].head, sharing[0].name
        if len(sharing) == 1 and head["name"] != name:
            known = {record[0]["id"] for record in sharing[0].records.values()}
            renamed |= rename(client, head, known, name)
    return renamed


def _replay(client: MlflowClient, step: history.Step, folder: Path) -> Row:
    def fetch(path: str, sha256: str) -> Path | None:
        found = from_workspace(path, sha256) or experiments.copy_of(step.where, path, folder)
        return found if found and records.tree_digest(found) == sha256 else None

    row = open_row(client, step.head, step.others, tidy=False)
    for record_ in [*step.others, step.record]:
        row.replay(record_, step.head["checkpoints"], fetch)
    return row


def show(port: int) -> int:
    """Print the link to the prepared table and serve it, unless a server has the store already."""
    found = connect().get_experiment_by_name(load().tracking.experiment)
    remote = store_uri().startswith("http")
    with socket.socket() as knock:
        if not remote and not knock.connect_ex(("127.0.0.1", port)):
            raise InputError(f"port {port}: another server has it: `make ui PORT={port + 1}`")
    server = without_secrets(store_uri()) if remote else f"http://127.0.0.1:{port}"
    link = view.link(server.rstrip("/"), found.experiment_id if found else "0")
    log.info("The prepared comparison:\n  %s", link)
    if not remote:
        log.info("MLflow takes some seconds to start; Ctrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            _serve(port)
    return 0


def _serve(port: int) -> None:
    """MLflow's page, for browsers of this machine alone, until it is stopped.

    `mlflow ui` would start fifteen processes, most of them for jobs of language models, and answer
    any page that makes a browser believe that its own address is this one's.
    """
    places = {"_MLFLOW_SERVER_FILE_STORE": store_uri()} | {
        "_MLFLOW_SERVER_REGISTRY_STORE": os.environ.get("MLFLOW_REGISTRY_URI") or store_uri(),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifact_root(),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    os.environ.update(places, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = f"localhost:{port},127.0.0.1:{port}"
    import uvicorn

    app = "mlflow.server.fastapi_app:app"
    with warnings.catch_warnings():  # of what its libraries will do away with
        warnings.simplefilter("ignore")
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
