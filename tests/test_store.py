"""A store that is down, hung, damaged, locked, full or deleted: one warning, and no loss."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import paths, records, store, tracking

pytestmark = [
    pytest.mark.usefixtures("own_store"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

Heal = Callable[[], None]


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(tracking, "END_SECONDS", 20.0)
    monkeypatch.setattr(tracking, "DOWN_SECONDS", 3.0)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "SHIP_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(store, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def naive(action: Callable[[], object], heal: Heal = lambda: None) -> str:
    """What becomes of a call as a plain training loop makes it: "works", "raises" or "hangs"."""
    outcome = []

    def call() -> None:
        try:
            action()
            outcome.append("works")
        except Exception:
            outcome.append("raises")

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(0.8)
    said = outcome[0] if outcome else "hangs"
    heal()
    thread.join(20)  # the limits that _quick sets end it; MLflow's own are minutes
    return said


def log_a_point() -> None:
    """As `mlflow.log_metric` does it: make the experiment and the run, then log."""
    from mlflow import MlflowClient

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or store.store_uri())
    run = client.create_run(client.create_experiment(f"naive-{time.time()}"))
    client.log_metric(run.info.run_id, "loss", 1.0)


def warnings(caplog) -> list[str]:
    """Whatever a person would see, of any library; a stage's logging begins at WARNING."""
    return [record.getMessage() for record in caplog.records if record.levelname != "INFO"]


def rows_of_all_steps(steps: int, key: str = "tokenize/value") -> list:
    """Every active row; of the newest one each step is there once."""
    client = store.connect()
    experiment = client.get_experiment_by_name("gpt2")
    found = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    history = client.get_metric_history(found[0].info.run_id, key)
    assert sorted(point.step for point in history) == list(range(steps))
    return found


def record_is_complete(steps: int) -> bool:
    events = records.read(paths.record("tokenize"))
    points = [e["step"] for e in events if "tokenize/value" in e.get("values", {})]
    return points == list(range(steps)) and events[-1]["status"] == "FINISHED"


# From the start


class _Failing(BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def do_GET(self) -> None:
        body = b'{"error_code": "INTERNAL_ERROR", "message": "no space left"}'
        self.send_response(500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PATCH = do_PUT = do_GET

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def closed_port(monkeypatch, database: Path) -> Iterator[Heal]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    yield lambda: monkeypatch.delenv("MLFLOW_TRACKING_URI")


@contextlib.contextmanager
def silent_socket(monkeypatch, database: Path) -> Iterator[Heal]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        yield lambda: monkeypatch.delenv("MLFLOW_TRACKING_URI")


@contextlib.contextmanager
def server_of_errors(monkeypatch, database: Path) -> Iterator[Heal]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Failing) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield lambda: monkeypatch.delenv("MLFLOW_TRACKING_URI")
        server.shutdown()


@contextlib.contextmanager
def garbage(monkeypatch, database: Path) -> Iterator[Heal]:
    database.write_bytes(b"not a database" * 500)
    yield database.unlink


@contextlib.contextmanager
def a_folder(monkeypatch, database: Path) -> Iterator[Heal]:
    database.unlink()
    database.mkdir()
    yield database.rmdir


@contextlib.contextmanager
def read_only(monkeypatch, database: Path) -> Iterator[Heal]:
    """For a plain user: root writes everywhere, so it becomes one, in a folder of its own."""
    if sys.platform == "win32":
        pytest.skip("permissions of Unix")
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copyfile(database, Path(folder) / "mlflow.db")
        (Path(folder) / ".dvc").mkdir()
        (Path(folder) / "mlflow.db").chmod(0o444)
        if root:
            for path in (Path(folder), *Path(folder).iterdir()):
                os.chown(path, 65534, -1)
            os.seteuid(65534)

        def heal() -> None:
            if root:
                os.seteuid(0)
            (Path(folder) / "mlflow.db").unlink(missing_ok=True)

        try:
            yield heal
        finally:
            heal()


@contextlib.contextmanager
def locked(monkeypatch, database: Path) -> Iterator[Heal]:
    with contextlib.closing(sqlite3.connect(database, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield other.rollback


@contextlib.contextmanager
def full_disk(monkeypatch, database: Path) -> Iterator[Heal]:
    """No write may end beyond the first pages: a record is that small, the database is not."""
    resource = pytest.importorskip("resource", reason="limits of Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, before[1]))

    def heal() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        yield heal
    finally:
        heal()


FAULTS = [
    pytest.param(closed_port, id="closed-port", marks=pytest.mark.fault(45)),
    pytest.param(silent_socket, id="silent-socket", marks=pytest.mark.fault(46)),
    pytest.param(server_of_errors, id="error-500", marks=pytest.mark.fault(45)),
    pytest.param(garbage, id="garbage", marks=pytest.mark.fault(47)),
    pytest.param(a_folder, id="a-folder", marks=pytest.mark.fault(47)),
    pytest.param(read_only, id="read-only", marks=pytest.mark.fault(47)),
    pytest.param(locked, id="locked", marks=pytest.mark.fault(47)),
    pytest.param(full_disk, id="full-disk", marks=pytest.mark.fault(47)),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_costs_one_warning_and_sync_fills_it_later(
    make_config, monkeypatch, own_store: Path, caplog, fault
) -> None:
    with fault(monkeypatch, own_store) as heal:
        began = time.monotonic()
        with tracking.record("tokenize", make_config()) as record:
            started = time.monotonic() - began
            for step in range(3):
                record.metrics({"tokenize/value": step / 3}, step)
        ended = time.monotonic() - began
        (warned,) = warnings(caplog)
        assert warned.startswith("MLflow at ") and "`python -m pipeline.tracking sync`" in warned
        assert started < 2, "a stage does not wait for the store to begin"
        assert ended < 10
        assert record_is_complete(3)
        heal()
        assert len(tracking.sync()) == 1
        (row,) = rows_of_all_steps(3)
        assert row.info.status == "FINISHED"
        assert len(warnings(caplog)) == 1


CONTROLS = [
    pytest.param(*fault.values, id=fault.id, marks=pytest.mark.fault(*mark.args, control=True))
    for fault in FAULTS
    for mark in fault.marks
]


@pytest.mark.parametrize("fault", CONTROLS)
def test_a_naive_call_raises_or_hangs_on_it(monkeypatch, own_store: Path, fault) -> None:
    from mlflow.store.db import utils

    monkeypatch.setattr(utils, "MAX_RETRY_COUNT", 1)  # of ten tries in minutes
    assert naive(log_a_point) == "works"
    with fault(monkeypatch, own_store) as heal:
        hangs = fault in (silent_socket, locked)
        assert naive(log_a_point, heal) == ("hangs" if hangs else "raises")


# In mid-run


@pytest.fixture
def rest_server(own_store: Path) -> Iterator[Callable[[int], tuple[int, Heal]]]:
    """start(port) -> (port, stop): MLflow's own REST handlers over the test's store."""
    from mlflow.server import app, handlers
    from werkzeug.serving import make_server

    running = []

    def start(port: int = 0) -> tuple[int, Heal]:
        server = make_server("127.0.0.1", port, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append(server)

        def stop() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        return server.server_port, stop

    handlers.initialize_backend_stores(store.store_uri(), default_artifact_root=str(own_store))
    yield start
    for server in running:
        server.shutdown()


def write_until_shipped(record: records.Record, steps: range) -> str:
    """Points that have arrived, all of them; the id of their row."""
    for step in steps:
        record.metrics({"tokenize/value": step / 3}, step)
    client = store.connect()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if experiment := client.get_experiment_by_name("gpt2"):
            for run in client.search_runs([experiment.experiment_id], order_by=["start_time DESC"]):
                history = client.get_metric_history(run.info.run_id, "tokenize/value")
                if steps[-1] in {point.step for point in history}:
                    return run.info.run_id
        time.sleep(0.05)
    raise AssertionError(f"step {steps[-1]} never arrived")
