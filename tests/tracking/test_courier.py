"""The process that ships: whatever becomes of it, the stage goes on, says so once and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline import paths
from pipeline.experiments import sync
from pipeline.records import record_file
from pipeline.tracking import mlflow_store, recording
from tests.conftest import ROOT, record_is_complete, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Courier = recording.Courier  # before `own_store` puts another in its place


@pytest.fixture(autouse=True)
def _courier(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "Courier", Courier)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """The processes that couriers have started."""
    started: list[subprocess.Popen] = []
    start = Courier._start

    def noted(self: recording.Courier, *words: str) -> subprocess.Popen | None:
        if child := start(self, *words):
            started.append(child)
        return child

    monkeypatch.setattr(Courier, "_start", noted)
    return started


def rows() -> list:
    client = mlflow_store.connect()
    experiment = client.get_experiment_by_name("gpt2")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def steps_of(row) -> list[int]:
    history = mlflow_store.connect().get_metric_history(row.info.run_id, "train/value")
    return sorted(point.step for point in history)


# A stage as a process, which says what it has imported when its record is closed.
STAGE = """
import psutil, sys
from pathlib import Path
from pipeline import config; from pipeline.tracking import recording as tracking
with tracking.record("train", config.load(Path(sys.argv[1]))) as record:
    for step in range(5):
        record.metrics({"train/value": step / 3}, step)
    if "killed" in sys.argv:
        print(psutil.Process().children()[0].pid, flush=True)
        sys.stdin.read()
print(*sys.modules)
"""


def stage(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, str(ROOT / "recipes" / "nano.yaml"), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.alone
def test_a_row_is_whole_and_its_stage_has_imported_nothing_of_a_store() -> None:
    out, said = stage().communicate()
    assert said == ""
    (row,) = rows()
    assert (row.info.status, steps_of(row)) == ("FINISHED", list(range(5)))
    loaded = set(out.split())
    assert "pipeline.tracking.recording" in loaded
    assert not {"mlflow", "sqlalchemy", "pandas", "requests"} & loaded


@pytest.mark.alone
def test_what_a_killed_stage_has_written_arrives_and_no_process_stays() -> None:
    killed = stage("killed")
    assert killed.stdout
    courier = psutil.Process(int(killed.stdout.readline()))
    killed.kill()
    _, said = killed.communicate()
    wait_for(lambda: not courier.is_running() or courier.status() == psutil.STATUS_ZOMBIE)
    assert said == ""
    (row,) = rows()
    assert (row.info.status, steps_of(row)) == ("RUNNING", list(range(5)))
    assert row.data.tags["pipeline.process"].startswith(f"{killed.pid}-")


def train(make_config, meanwhile: Callable[[], None], points: int = 5) -> float:
    """Record a stage in which something happens; how many seconds its writing took."""
    with recording.record("train", make_config()) as record:
        meanwhile()
        began = time.monotonic()
        for step in range(points):
            record.metrics({"train/value": step / 3}, step)
        return time.monotonic() - began


def test_a_process_that_dies_costs_one_warning_and_sync_ships_the_rest(
    make_config, children, caplog
) -> None:
    train(make_config, lambda: children[0].kill())
    (warned,) = caplog.messages
    code = 1 if sys.platform == "win32" else -signal.SIGKILL
    assert f"ended with exit code {code}" in warned and "sync" in warned
    assert record_is_complete(5)
    assert len(sync.sync()) == 1
    (row,) = rows()
    assert (row.info.status, steps_of(row)) == ("FINISHED", list(range(5)))


@pytest.mark.alone
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_process_that_reads_nothing_does_not_hold_the_stage_up(
    make_config, children, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(recording, "END_SECONDS", 1.0)
    monkeypatch.setattr(recording, "GRACE_SECONDS", 1.0)
    points = 2000
    seconds = train(make_config, lambda: children[0].send_signal(signal.SIGSTOP), points)
    assert seconds < 2
    (warned,) = caplog.messages
    assert "did not end within 2 s" in warned
    assert children[0].returncode == -signal.SIGKILL
    assert record_is_complete(points)


def write_lines(path: Path, events: list[record_file.Event]) -> None:
    path.write_text("".join(f"{json.dumps(event)}\n" for event in events), "utf-8")


@pytest.fixture
def taken(monkeypatch) -> list[record_file.Event]:
    """The events that a row was given; no store is asked."""
    events: list[record_file.Event] = []
    row = SimpleNamespace(write=lambda new, *_: events.extend(new))
    row.enter = row.leave = row.replay = lambda *_: None
    monkeypatch.setattr(recording, "connect", lambda: None)
    monkeypatch.setattr(recording, "open_row", lambda *_: row)
    monkeypatch.setattr(recording, "SHIP_EVERY_SECONDS", 0.05)
    return events


def test_a_half_written_line_waits_for_its_end_also_under_the_record_s_final_name(taken) -> None:
    start = {"kind": "start", "stage": "tokenize", "id": "1", "invocation": "one"}
    path = Path("tokenize.jsonl")
    write_lines(record_file.part(path), [start])
    shipper = recording.Shipper(path, "1-1.00", "best")
    with open(record_file.part(path), "ab", buffering=0) as record:
        record.write(b'{"kind": "tags", "num')
        wait_for(lambda: taken)
        time.sleep(0.2)
        os.replace(record_file.part(path), path)
        record.write(b'ber": 1}\n{"kind": "tags", "cut off')
    shipper.close(20.0)
    assert taken == [start, {"kind": "tags", "number": 1}]


@pytest.mark.skipif(sys.platform == "win32", reason="a deleted file keeps its name there")
def test_a_killed_stage_s_rest_is_not_mixed_with_the_next_one_s(make_config, taken) -> None:
    killed = record_file.Record("train", make_config())
    shipper = recording.Shipper(killed.path, "1-1.00", "best")
    wait_for(lambda: taken)
    for file in killed._files:  # as a kill does
        file.close()
    record = record_file.Record("train", make_config())
    record.metrics({"train/value": 0.0})
    record.close("FINISHED")
    shipper.close(20.0)
    assert taken == [killed.head]


def test_a_process_that_cannot_be_started_is_a_warning(make_config, monkeypatch, caplog) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no process is left")

    with monkeypatch.context() as patch:
        patch.setattr(recording.subprocess, "Popen", refused)
        patch.setattr(record_file.git, "said", lambda *_: "")
        train(make_config, lambda: None)
    (warned,) = caplog.messages
    assert "could not be started: no process is left" in warned
    assert record_is_complete(5)


@pytest.mark.parametrize(
    ("hurried", "size", "patience"),
    [(False, 0, 60.0), (False, 5_000_000, 65.0), (True, 5_000_000, 10.0)],
)
def test_a_stage_gives_its_uploads_time_and_waits_seconds_when_it_was_stopped(
    make_config, monkeypatch, hurried: bool, size: int, patience: float
) -> None:
    copy = "import pathlib, sys; pathlib.Path('word').write_bytes(sys.stdin.buffer.read())"
    monkeypatch.setattr(
        Courier,
        "_start",
        lambda *_: subprocess.Popen([sys.executable, "-c", copy], stdin=subprocess.PIPE),
    )
    record = record_file.Record("train", make_config())
    record._write({"kind": "artifact", "bytes": size})
    record.close("FAILED")
    Courier(record, "best").close(hurried)
    assert float(Path("word").read_text("utf-8")) == patience


@pytest.mark.skipif(sys.platform == "win32", reason="sessions of Unix")
def test_a_signal_to_the_terminal_s_processes_does_not_reach_it(make_config, children) -> None:
    with recording.record("train", make_config()):
        assert os.getsid(children[0].pid) != os.getsid(0)


def test_a_record_that_cannot_begin_leaves_no_process_and_no_word_but_its_own(
    make_config, children, caplog, capfd
) -> None:
    paths.RECORDS.write_text("a file where a folder is to be")
    with pytest.raises(OSError), recording.record("train", make_config()):
        pass
    assert not children
    assert (caplog.messages, capfd.readouterr().err) == ([], "")


def test_who_is_interrupted_while_waiting_for_the_store_leaves_no_process(
    make_config, children, monkeypatch
) -> None:
    with pytest.raises(KeyboardInterrupt), recording.record("train", make_config()):
        wait, calls = children[0].wait, []

        def interrupted(timeout: float) -> int:
            calls.append(timeout)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return wait(timeout)

        monkeypatch.setattr(children[0], "wait", interrupted)
    assert children[0].returncode is not None
    assert record_is_complete(0)


# A store that hangs where Python would wait for it at the end of the process.
HANGING = """
import concurrent.futures, runpy, sys, time
from pipeline.tracking import mlflow_run as rows, mlflow_store as store
pool = concurrent.futures.ThreadPoolExecutor(1)
store.connect = lambda: None
def hang(*_):
    open("asked", "w").close()
    pool.submit(time.sleep, 120).result()
rows.open_row = hang
sys.argv.insert(1, "ship")
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


def test_a_store_that_hangs_for_ever_does_not_keep_its_process() -> None:
    start = {"kind": "start", "stage": "train", "invocation": "one"}
    write_lines(Path("train.jsonl"), [start])
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING, "train.jsonl", "1-1.00", "best"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input="0.5",
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert time.monotonic() - began < 60
    assert done.returncode == 0
    assert "the store did not answer within" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
def test_a_cluster_s_sigterm_to_all_processes_of_a_job_leaves_it_to_end_with_its_stage() -> None:
    write_lines(Path("train.jsonl"), [{"kind": "start", "stage": "train", "invocation": "one"}])
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, "train.jsonl", "1-1.00", "best"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
    )
    wait_for(Path("asked").exists)
    process.terminate()
    process.communicate(b"0.5", timeout=110)
    assert process.returncode == 0
