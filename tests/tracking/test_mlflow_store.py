"""A store that is down, hung, damaged, locked, full or deleted: one warning, and no loss."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import config as configuration
from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.errors import StorageError
from pipeline.experiments import sync
from pipeline.records import record_file
from pipeline.tracking import mlflow_run, mlflow_store, mlflow_ui, recording
from tests.conftest import ROOT, params, record_is_complete, wait_for

pytestmark = [
    pytest.mark.usefixtures("own_store"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi"),  # of MLflow's server
]

Heal = Callable[[], None]


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(recording, "SHORT_SECONDS", 3.0)
    monkeypatch.setattr(recording, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(recording, "SHIP_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(mlflow_store, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def naive(action: Callable[[], object], heal: Heal = lambda: None, patience: float = 20.0) -> str:
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
    thread.join(patience)
    said = outcome[0] if outcome else "hangs"
    heal()
    thread.join(20)  # the limits that _quick sets end it; MLflow's own are minutes
    return said


def log_a_point() -> None:
    """As `mlflow.log_metric` does it: make the experiment and the run, then log."""
    from mlflow import MlflowClient

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or mlflow_store.store_uri())
    run = client.create_run(client.create_experiment(f"naive-{time.time()}"))
    client.log_metric(run.info.run_id, "loss", 1.0)


def warnings(caplog) -> list[str]:
    """Whatever a person would see, of any library; a stage's logging begins at WARNING."""
    return [record.getMessage() for record in caplog.records if record.levelname != "INFO"]


def rows_of_all_steps(steps: int, key: str = "train/value") -> list:
    """Every active row; of the newest one each step is there once."""
    client = mlflow_store.connect()
    experiment = client.get_experiment_by_name("gpt2")
    found = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    history = client.get_metric_history(found[0].info.run_id, key)
    assert sorted(point.step for point in history) == list(range(steps))
    return found


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
    with socket.socket() as bound:  # and never listening: nobody else gets the port meanwhile
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # each has a warning of urllib3
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
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
    monkeypatch.setattr(
        record_file, "code_digest", lambda: "code"
    )  # a plain user may not read ours
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copyfile(database, Path(folder) / "mlflow.db")
        (Path(folder) / ".dvc").mkdir()
        (Path(folder) / "mlflow.db").chmod(0o444)
        if root:
            for path in (Path(folder), *Path(folder).iterdir()):
                os.chown(path, 65534, -1)
            os.seteuid(65534)
            try:
                open(find_spec("mlflow").origin).close()
            except PermissionError:
                os.seteuid(0)
                pytest.skip("the environment lies where its owner alone may read it")

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


SAID = {
    closed_port: "ConnectionRefusedError",
    silent_socket: "TimeoutError",
    server_of_errors: "500 error",
    garbage: "file is not a database",
    a_folder: "unable to open database file",
    read_only: "attempt to write a readonly database",
    locked: "database is locked",
    full_disk: "disk",
}


@pytest.mark.alone
@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_costs_one_warning_and_sync_fills_it_later(
    make_config, monkeypatch, own_store: Path, caplog, fault
) -> None:
    attempts = []
    monkeypatch.setattr(recording, "connect", lambda: attempts.append(1) or mlflow_store.connect())
    config = make_config()  # read before a fault takes the right to
    with fault(monkeypatch, own_store) as heal:
        began = time.monotonic()
        with recording.record("train", config) as record:
            started = time.monotonic() - began
            for step in range(3):
                record.metrics({"train/value": step / 3}, step)
            wait_for(lambda: len(attempts) > 1)
        ended = time.monotonic() - began
        (warned,) = warnings(caplog)
        assert (
            warned.startswith(f"MLflow at {mlflow_store.store_uri()}: ") and SAID[fault] in warned
        )
        assert "`python -m pipeline sync`" in warned
        assert started < 2, "a stage does not wait for the store to begin"
        assert ended < 10
        assert record_is_complete(3)
        heal()
        assert len(sync.sync()) == 1
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
        patience = 0.8 if hangs else 20.0
        assert naive(log_a_point, heal, patience) == ("hangs" if hangs else "raises")


@pytest.mark.parametrize("uri", ["mysql://h/x", "mssql+pyodbc://h/x", "postgresql+nosuch://h/x"])
def test_a_database_driver_that_is_missing_is_one_line(
    make_config, monkeypatch, caplog, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("//", "//me:secret@"))
    with recording.record("train", make_config()):
        pass
    mlflow_run.attach(["some record"], Path("folder"), "name")
    with pytest.raises(SystemExit) as ended:
        command(["ui"])
    assert ended.value.code == StorageError.exit_code
    said = warnings(caplog)
    assert len(said) == 3 and not [text for text in said if "\n" in text or "secret" in text]
    for text in said:
        assert f"{uri} lacks its database driver: No module named" in text or "nosuch" in text


def test_causes_that_go_round_in_a_circle_are_told_in_one_line() -> None:
    first, second = RuntimeError("first"), OSError("second")
    first.__cause__, second.__cause__ = second, first
    assert mlflow_store.said(first) == "OSError: second"


# In mid-run


def write_until_shipped(record: record_file.Record, steps: range) -> str:
    """Points that have arrived, all of them; the id of their row."""
    for step in steps:
        record.metrics({"train/value": step / 3}, step)
    client, found = mlflow_store.connect(), []

    def arrived() -> bool:
        if not (experiment := client.get_experiment_by_name("gpt2")):
            return False
        for run in client.search_runs([experiment.experiment_id]):
            history = client.get_metric_history(run.info.run_id, "train/value")
            if steps[-1] in {point.step for point in history}:
                found.append(run.info.run_id)
        return bool(found)

    wait_for(arrived)
    return found[0]


def delete_row(database: Path, row: str) -> Heal:
    mlflow_store.connect().delete_run(row)
    return lambda: None


def delete_experiment(database: Path, row: str) -> Heal:
    client = mlflow_store.connect()
    client.delete_experiment(client.get_run(row).info.experiment_id)
    return lambda: None


def delete_database(database: Path, row: str) -> Heal:
    database.unlink()
    return lambda: None


def lock_database(database: Path, row: str) -> Heal:
    other = sqlite3.connect(database, timeout=20)
    other.execute("BEGIN EXCLUSIVE")

    def heal() -> None:
        other.rollback()
        other.close()

    return heal


def fill_disk(database: Path, row: str) -> Heal:
    resource = pytest.importorskip("resource", reason="limits of Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


DELETIONS = [
    pytest.param(delete_row, id="row-deleted", marks=pytest.mark.fault(48)),
    pytest.param(delete_experiment, id="experiment-deleted", marks=pytest.mark.fault(48)),
    pytest.param(delete_database, id="database-deleted", marks=pytest.mark.fault(47)),
]
STOPPAGES = [
    # MLflow itself waits 20 s for a lock, without a word.
    pytest.param(lock_database, id="locked", marks=[pytest.mark.fault(47), pytest.mark.slow]),
    pytest.param(fill_disk, id="full-disk", marks=pytest.mark.fault(47)),
]


@pytest.mark.parametrize("fault", [*DELETIONS, *STOPPAGES])
def test_what_is_lost_or_stuck_in_mid_run_is_whole_when_the_stage_ends(
    make_config, own_store: Path, caplog, fault
) -> None:
    with recording.record("tokenize", make_config()) as upstream:
        upstream.metrics({"tokenize/value": 1.0})
    with recording.record("train", make_config()) as record:
        before = write_until_shipped(record, range(3))
        heal = fault(own_store, before)
        try:
            for step in range(3, 6):
                record.metrics({"train/value": step / 3}, step)
            wait_for(lambda: warnings(caplog))
        finally:
            heal()
        after = write_until_shipped(record, range(6, 9))
    assert len(warnings(caplog)) == 1
    assert record_is_complete(9)
    (row,) = rows_of_all_steps(9)
    assert (row.info.run_id, row.info.status) == (after, "FINISHED")
    assert row.data.metrics["tokenize/value"] == 1.0
    assert (before == after) == (fault in (lock_database, fill_disk))
    assert sync.sync() == []


@pytest.mark.fault(48)
@pytest.mark.parametrize("deletion", [delete_row, delete_experiment])
def test_what_is_deleted_right_before_the_end_is_made_again_at_once(
    make_config, monkeypatch, own_store: Path, caplog, deletion
) -> None:
    monkeypatch.setattr(recording, "RETRY_SECONDS", 3600.0)
    with recording.record("train", make_config()) as record:
        deletion(own_store, write_until_shipped(record, range(3)))
    (row,) = rows_of_all_steps(3)
    assert row.info.status == "FINISHED"
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(*case.values, id=case.id, marks=pytest.mark.fault(row, control=True))
        for case, row in zip([*DELETIONS, STOPPAGES[1]], (48, 48, 47, 47), strict=True)
    ],
)
def test_a_naive_training_loop_ends_there(own_store: Path, fault) -> None:
    client = mlflow_store.connect()
    run = client.create_run(client.create_experiment("naive"))
    client.log_metric(run.info.run_id, "loss", 1.0, step=0)
    heal = fault(own_store, run.info.run_id)
    try:
        with pytest.raises(mlflow_store.store_errors()):
            client.log_metric(run.info.run_id, "loss", 1.0, step=1)
        if fault is delete_experiment:
            with pytest.raises(mlflow_store.store_errors(), match="already exists"):
                client.create_experiment("naive")
    finally:
        heal()


def test_a_deleted_experiment_stays_deleted_and_can_be_restored(make_config) -> None:
    with recording.record("train", make_config()):
        pass
    client = mlflow_store.connect()
    deleted = client.get_experiment_by_name("gpt2")
    client.delete_experiment(deleted.experiment_id)
    with recording.record("train", make_config()) as record:
        record.metrics({"train/value": 0.0})
    (row,) = rows_of_all_steps(1)
    assert row.info.experiment_id != deleted.experiment_id
    kept = client.get_experiment(deleted.experiment_id)
    assert (kept.lifecycle_stage, kept.name) == ("deleted", f"gpt2 (deleted, {kept.experiment_id})")


@pytest.mark.fault(45)
def test_a_server_that_dies_in_mid_run_and_comes_back_gets_every_point_once(
    make_config, monkeypatch, rest_server, caplog
) -> None:
    port, stop = rest_server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # a busy machine answers late
    with recording.record("train", make_config()) as record:
        row = write_until_shipped(record, range(3))
        stop()
        for step in range(3, 6):
            record.metrics({"train/value": step / 3}, step)
        wait_for(lambda: warnings(caplog))
        rest_server(port)
        assert write_until_shipped(record, range(6, 9)) == row
    assert len(warnings(caplog)) == 1
    assert record_is_complete(9)
    (found,) = rows_of_all_steps(9)
    assert found.info.status == "FINISHED"


@pytest.mark.fault(45, control=True)
def test_a_naive_training_loop_ends_where_its_server_does(monkeypatch, rest_server) -> None:
    port, stop = rest_server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    assert naive(log_a_point) == "works"
    stop()
    assert naive(log_a_point) == "raises"


@pytest.mark.fault(46)
def test_a_write_goes_to_the_disk_alone_whatever_the_store_does(make_config, monkeypatch) -> None:
    released, callers = threading.Event(), set()

    def hang() -> None:
        callers.add(threading.current_thread())
        released.wait()
        raise ConnectionError("it never answered")

    monkeypatch.setattr(recording, "connect", hang)
    record = record_file.Record("train", make_config())
    shipper = recording.Shipper(record.path, "1-1.00", "best")
    wait_for(lambda: callers)
    for step in range(1000):
        record.metrics({"train/value": step / 3}, step)
    assert not released.is_set() and len(record.so_far()) == 1001
    assert threading.current_thread() not in callers
    released.set()
    record.close("FINISHED")
    shipper.close(20.0)
    assert shipper.problem == "ConnectionError: it never answered"
    assert record_is_complete(1000)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("KILLED", "MLflow will be brought up to date by the next run."),
        ("FAILED", "MLflow will be brought up to date by the next run."),
        ("FINISHED", "`python -m pipeline sync` ships what is missing."),
    ],
)
@pytest.mark.parametrize("ready", [False, True])
def test_a_stage_that_ends_before_mlflow_is_there_says_what_is_so(
    make_config, monkeypatch, caplog, status: str, words: str, ready: bool
) -> None:
    released, called = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        called.set()
        released.wait()
        raise ConnectionError("too late")

    if ready:
        monkeypatch.setattr(recording, "connect", lambda: None)
    monkeypatch.setattr(recording, "open_row" if ready else "connect", hang)
    record = record_file.Record("tokenize", make_config())
    shipper = recording.Shipper(record.path, "1-1.00", "best")
    wait_for(called.is_set)
    record.close(status)
    shipper.close(0.1)
    released.set()
    shipper._thread.join()  # it would go on while the next test changes what it reads
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said.endswith(words) and "goes on" not in said
    assert ("the store did not answer" in said) == ready
    assert ("MLflow had not started" in said) == (not ready)


@pytest.mark.fault(75)
@pytest.mark.parametrize("later", [1e9, -1e6], ids=["set back", "before 1970"])
def test_a_row_of_a_wrong_clock_has_an_end_after_its_start_and_the_page_opens(
    make_config, monkeypatch, caplog, later: float
) -> None:
    clock = iter([2e9 if later > 0 else later])
    wrong = SimpleNamespace(time=lambda: next(clock, later), monotonic=time.monotonic)
    monkeypatch.setattr(record_file, "time", wrong)
    with recording.record("train", make_config()) as record:
        record.metrics({"train/value": 0.0})
    (row,) = rows_of_all_steps(1)
    assert 0 < row.info.start_time <= row.info.end_time
    assert sync.sync() == []
    monkeypatch.setattr(mlflow_ui, "_serve", lambda port: None)
    shutil.copyfile(ROOT / "recipes/nano.yaml", paths.PARAMS)
    assert mlflow_ui.show(5000) == 0
    assert not warnings(caplog)


@pytest.mark.fault(75, control=True)
def test_mlflow_refuses_a_time_before_1970() -> None:
    client = mlflow_store.connect()
    run = client.create_run("0")
    with pytest.raises(mlflow_store.store_errors(), match="timestamp"):
        client.log_metric(run.info.run_id, "loss", 1.0, timestamp=-1)


# A training that goes on in another process

CHILD = """
import sys
from pathlib import Path
from pipeline.process import this_process
from pipeline.tracking import recording
recording.SHIP_EVERY_SECONDS = 0.05
shipper = recording.Shipper(Path("journal.jsonl"), this_process(), "best")
print("handed over", flush=True)
sys.stdin.read()
"""


def journal(make_config, steps: int) -> list[record_file.Event]:
    """What a training of so many steps wrote, without its end, as it lies in the scratch folder."""
    record = record_file.Record("train", make_config())
    record.dataset("tokens", "d" * 64, "data/tokens/train.bin", "train")
    for step in range(steps):
        record.metrics({"train/value": step / 3, "train/loss": 9.0 - step}, step)
        if step % 4 == 3:
            record.metrics({"train/val_loss": 9.5 - step}, step)
    events = record.so_far()
    record.close("FINISHED")
    return [*events, *record_file.read(paths.record("train"))[-2:]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A workspace whose trainer was killed (SIGKILL) after it had shipped 8 of its 12 steps."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / ".dvc").mkdir()
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(record_file, "_invocation", lambda: "one")
        events = journal(lambda: configuration.from_dict(params()), 12)
        shutil.rmtree(paths.RECORDS)
        lines = [json.dumps(event) + "\n" for event in events]
        (folder / "whole.jsonl").write_text("".join(lines), "utf-8")
        early = next(n for n, event in enumerate(events) if event.get("step") == 8)
        (folder / "journal.jsonl").write_text("".join(lines[:early]), "utf-8")
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert child.stdout and child.stdout.readline() == b"handed over\n"
            wait_for(lambda: shipped_steps() == list(range(8)))
        finally:
            child.kill()
            child.communicate()
    return folder


def shipped_steps() -> list[int]:
    client = mlflow_store.connect()
    if not (experiment := client.get_experiment_by_name("gpt2")):
        return []
    return sorted(
        point.step
        for run in client.search_runs([experiment.experiment_id])
        for point in client.get_metric_history(run.info.run_id, "train/value")
    )


@pytest.mark.parametrize(
    "meanwhile",
    ["nothing", pytest.param("row deleted", marks=pytest.mark.fault(48)), "database deleted"],
)
def test_a_training_that_was_killed_goes_on_in_its_row(
    make_config, killed: Path, own_store: Path, caplog, meanwhile: str
) -> None:
    shutil.copyfile(killed / "mlflow.db", own_store)
    client = mlflow_store.connect()
    (before,) = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    assert before.info.status == "RUNNING"
    if meanwhile == "row deleted":
        client.delete_run(before.info.run_id)
    if meanwhile == "database deleted":
        own_store.unlink()
    recording.Shipper(killed / "whole.jsonl", "1-1.00", "best").close(20.0)
    (row,) = rows_of_all_steps(12)
    assert row.info.status == "FINISHED"
    assert (row.info.run_id == before.info.run_id) == (meanwhile == "nothing")
    for key, steps in (("train/loss", range(12)), ("train/val_loss", range(3, 12, 4))):
        history = mlflow_store.connect().get_metric_history(row.info.run_id, key)
        assert [point.step for point in history] == list(steps)
    assert not warnings(caplog)


def test_a_resumption_that_the_store_missed_comes_with_sync(
    make_config, monkeypatch, own_store: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    with (
        pytest.raises(KeyboardInterrupt),
        recording.record("train", make_config(), journal) as record,
    ):
        record.metrics({"train/value": 0.0}, 0)
        raise KeyboardInterrupt
    (killed_row,) = rows_of_all_steps(1)
    with (
        closed_port(monkeypatch, own_store) as heal,
        recording.record("train", make_config(), journal) as record,
    ):
        record.metrics({"train/value": 0.5}, 1)
    heal()
    assert len(sync.sync()) == 1
    (row,) = rows_of_all_steps(2)
    assert (killed_row.info.status, row.info.status) == ("KILLED", "FINISHED")
    assert row.info.run_id == killed_row.info.run_id
