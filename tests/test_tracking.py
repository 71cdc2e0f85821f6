"""Shipping: bounded, warned about once, idempotent; rows found, opened and swept."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from pathlib import Path

import pytest

from pipeline import paths, records, rows, tracking
from tests.conftest import NANO

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, made once as `connect` makes it: the schema takes seconds."""
    from pipeline.rows import _create_sqlite

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    _create_sqlite(path)
    return path


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, empty_store: Path, monkeypatch) -> None:
    (tmp_path / ".dvc").mkdir()
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(records, "_invocation", lambda: "one")


def run_stage(stage: str, config, points: int = 3) -> None:
    with tracking.record(stage, config) as record:
        for step in range(points):
            record.metrics({f"{stage}/value": step / 3}, step)


def all_rows() -> list:
    client = rows.connect()
    experiment = client.get_experiment_by_name("gpt2")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def test_a_row_gathers_the_stages_of_one_experiment(make_config) -> None:
    config = make_config()
    for stage in ("tokenize", "import_hf_weights", "train"):
        run_stage(stage, config)
    (row,) = all_rows()
    assert row.info.status == "FINISHED"
    assert row.data.params["train.lr"] == "0.002"
    assert "tracking.experiment" not in row.data.params
    history = rows.connect().get_metric_history(row.info.run_id, "train/value")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 0.333333), (2, 0.666667)]


def test_an_edited_input_under_the_same_params_opens_a_new_row(make_config) -> None:
    config = make_config()
    for stage in ("tokenize", "import_hf_weights", "train", "tokenize", "train"):
        run_stage(stage, config)
    old, new = all_rows()
    assert old.data.tags["superseded"] == new.info.run_id
    client = rows.connect()
    for row in (old, new):
        for stage in ("tokenize", "import_hf_weights", "train"):
            assert len(client.get_metric_history(row.info.run_id, f"{stage}/value")) == 3


def test_shipping_a_record_twice_changes_nothing(make_config) -> None:
    run_stage("tokenize", make_config())
    (row,) = all_rows()
    client = rows.connect()
    events = records.read(paths.record("tokenize"))
    shown = rows.Row(client, row.info.run_id, row.info.experiment_id)
    shown.write(events, "best", rows.from_workspace)
    assert len(client.get_metric_history(row.info.run_id, "tokenize/value")) == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")],
)
def test_the_row_ends_as_the_stage_does(make_config, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), tracking.record("tokenize", make_config()):
        raise error
    (row,) = all_rows()
    assert row.info.status == status
    assert not paths.record("tokenize").exists()


def test_a_row_whose_process_is_gone_does_not_run_for_ever(make_config) -> None:
    run_stage("tokenize", make_config())
    (row,) = all_rows()
    client = rows.connect()
    client.update_run(row.info.run_id, status="RUNNING")
    client.set_tag(row.info.run_id, "pipeline.process", "999999-1.00")
    run_stage("tokenize", make_config(sample__seed=9))
    assert sorted(r.info.status for r in all_rows()) == ["FINISHED", "KILLED"]


def silent_socket() -> socket.socket:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return listening


@pytest.mark.parametrize("fault", ["refuses", "hangs", "garbage"])
def test_a_store_that_fails_costs_one_warning_and_no_record(
    make_config, monkeypatch, tmp_path: Path, caplog, fault: str
) -> None:
    monkeypatch.setattr(tracking, "END_SECONDS", 3.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    server = silent_socket()
    port = server.getsockname()[1]
    if fault == "refuses":
        server.close()
    if fault == "garbage":
        (tmp_path / "mlflow.db").write_bytes(b"not a database" * 500)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    began = time.monotonic()
    run_stage("tokenize", make_config())
    assert time.monotonic() - began < 30
    server.close()
    warnings = [r.getMessage() for r in caplog.records if "MLflow at" in r.getMessage()]
    assert len(warnings) == 1
    assert "secret" not in caplog.text
    values = [e["values"] for e in records.read(paths.record("tokenize")) if "values" in e]
    assert [v["tokenize/value"] for v in values if "tokenize/value" in v] == [0, 0.333333, 0.666667]


@pytest.mark.parametrize(
    ("mode", "copied", "models"),
    [
        ("best", {"best"}, 0),
        ("all", {"best", "last"}, 0),
        ("reference", set(), 2),
        ("none", set(), 0),
    ],
)
def test_checkpoints_are_copied_or_referred_to_as_asked(
    make_config, mode: str, copied: set[str], models: int
) -> None:
    config = make_config(tracking__checkpoints=mode)
    with tracking.record("train", config) as record:
        for name, folder in (("best", paths.MODEL), ("last", paths.LAST)):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(f"{{}} {name}")
            record.checkpoint(name, folder, step=5)
    (row,) = all_rows()
    client = rows.connect()
    listed = client.list_artifacts(row.info.run_id, "checkpoints")
    assert {Path(f.path).name for f in listed} == copied
    found = client.search_logged_models([row.info.experiment_id])
    assert len(found) == models
    assert {m.tags["path"] for m in found} <= {"artifacts/model", "artifacts/last"}
    assert row.data.tags["checkpoint.best.path"] == "artifacts/model"


def test_only_the_very_bytes_that_a_record_saw_are_attached(tmp_path: Path) -> None:
    path = Path("samples.md")
    path.write_text("one")
    digest = records.tree_digest(path)
    assert rows.from_workspace("samples.md", digest) == path
    path.write_text("two")
    assert rows.from_workspace("samples.md", digest) is None


def test_sync_leaves_a_failed_stage_failed_and_a_running_one_running(make_config) -> None:
    config = make_config()
    shutil.copyfile(NANO, "params.yaml")
    run_stage("tokenize", config)
    run_stage("import_hf_weights", config)
    with pytest.raises(RuntimeError), tracking.record("train", config):
        raise RuntimeError
    tracking.sync()
    assert [row.info.status for row in all_rows()] == ["FAILED"]
    with tracking.record("train", config):
        for _ in range(100):
            if [row.info.status for row in all_rows()][-1] == "RUNNING":
                break
            time.sleep(0.05)
        tracking.sync()
        assert [row.info.status for row in all_rows()][-1] == "RUNNING"


def test_a_store_that_comes_back_gets_what_it_missed(make_config, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "SHIP_EVERY_SECONDS", 0.1)
    real, calls = rows.Row.write, []

    def fails_twice(self, events, *rest) -> None:
        calls.append(1)
        if len(calls) in (2, 3):
            raise ConnectionError("gone")
        real(self, events, *rest)

    monkeypatch.setattr(rows.Row, "write", fails_twice)
    with tracking.record("tokenize", make_config()) as record:
        for step in range(20):
            record.metrics({"tokenize/value": step}, step)
            time.sleep(0.1)
    (row,) = all_rows()
    assert row.info.status == "FINISHED"
    history = rows.connect().get_metric_history(row.info.run_id, "tokenize/value")
    assert [m.step for m in history] == list(range(20))


def test_two_experiments_of_one_key_at_a_time_get_a_row_each(make_config) -> None:
    config = make_config()
    places = [Path("a"), Path("b")]  # two workspaces, one store
    for stage in ("tokenize", "import_hf_weights", "train"):
        for place in places:
            place.mkdir(exist_ok=True)
            with contextlib.chdir(place):
                run_stage(stage, config)
    client = rows.connect()
    assert len(all_rows()) == 2
    for row in all_rows():
        for stage in ("tokenize", "import_hf_weights", "train"):
            assert len(client.get_metric_history(row.info.run_id, f"{stage}/value")) == 3
