"""Shipping: bounded, warned about once, idempotent; rows found, opened and swept."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.errors import InputError
from pipeline.experiments import sync
from pipeline.records import dvc_history, record_file
from pipeline.storage import digests
from pipeline.tracking import mlflow_run, mlflow_store, mlflow_ui, mlflow_view, recording
from tests.conftest import NANO, recipe

pytestmark = [
    pytest.mark.usefixtures("own_store"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def run_stage(stage: str, config, points: int = 3) -> None:
    with recording.record(stage, config) as record:
        for step in range(points):
            record.metrics({f"{stage}/value": step / 3}, step)


def all_rows() -> list:
    client = mlflow_store.connect()
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
    history = mlflow_store.connect().get_metric_history(row.info.run_id, "train/value")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 0.333333), (2, 0.666667)]


def test_an_edited_input_under_the_same_params_opens_a_new_row(make_config) -> None:
    config = make_config()
    for stage in ("tokenize", "import_hf_weights", "train", "tokenize", "train"):
        run_stage(stage, config)
    old, new = all_rows()
    assert old.data.tags["superseded"] == new.info.run_id
    client = mlflow_store.connect()
    for row in (old, new):
        for stage in ("tokenize", "import_hf_weights", "train"):
            assert len(client.get_metric_history(row.info.run_id, f"{stage}/value")) == 3


def test_shipping_a_record_twice_changes_nothing(make_config) -> None:
    run_stage("tokenize", make_config())
    (row,) = all_rows()
    client = mlflow_store.connect()
    events = record_file.read(paths.record("tokenize"))
    shown = mlflow_run.Row(client, row.info.run_id, row.info.experiment_id)
    shown.write(events, "best", mlflow_run.from_workspace)
    assert len(client.get_metric_history(row.info.run_id, "tokenize/value")) == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")],
)
def test_the_row_ends_as_the_stage_does(make_config, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), recording.record("tokenize", make_config()):
        raise error
    (row,) = all_rows()
    assert row.info.status == status
    assert not paths.record("tokenize").exists()


def test_a_row_whose_process_is_gone_does_not_run_for_ever(make_config) -> None:
    run_stage("tokenize", make_config())
    (row,) = all_rows()
    client = mlflow_store.connect()
    client.update_run(row.info.run_id, status="RUNNING")
    client.set_tag(row.info.run_id, "pipeline.process", "999999-1.00")
    run_stage("tokenize", make_config(sample__seed=9))
    assert sorted(r.info.status for r in all_rows()) == ["FINISHED", "KILLED"]


def train_with_checkpoints(config) -> None:
    """A record of train as train.py writes it: validated at its steps 3 and 6, best after 3."""
    with recording.record("train", config) as record:
        record.dataset("tokens", "d" * 64, "data/tokens/train.bin", "train")
        record.tags({"digest.train": "d" * 64, "digest.val": "e" * 64})
        for step in range(6):
            record.metrics({"train/loss": 9 - step, "train/grad_norm": 1.0}, step)
            if step in (2, 5):
                record.metrics({"train/val_loss": 10 + step}, step)
        for name, folder, done in (("best", paths.MODEL, 3), ("last", paths.LAST, 6)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(f"{{}} {name}")
            record.checkpoint(name, folder, step=done)


def all_models() -> dict:
    client = mlflow_store.connect()
    experiment = client.get_experiment_by_name("gpt2")
    found = client.search_logged_models([experiment.experiment_id])
    assert len(found) == len({model.name for model in found})
    return {model.name: model for model in found}


@pytest.mark.parametrize(
    ("mode", "copied", "shown"),
    [
        ("best", {"best"}, True),
        ("all", {"best", "last"}, True),
        ("reference", set(), True),
        ("none", set(), False),
    ],
)
def test_checkpoints_are_copied_or_referred_to_as_asked(
    make_config, mode: str, copied: set[str], shown: bool
) -> None:
    train_with_checkpoints(make_config(tracking__checkpoints=mode))
    (row,) = all_rows()
    listed = mlflow_store.connect().list_artifacts(row.info.run_id, "checkpoints")
    assert {Path(f.path).name for f in listed} == copied
    assert row.data.tags["checkpoint.best.path"] == "artifacts/model"
    models = all_models()
    assert models.keys() == ({"best at step 3", "last at step 6"} if shown else set())
    for name, model in models.items():
        short = name.split()[0]
        copy = f"runs:/{row.info.run_id}/checkpoints/{short}" if short in copied else None
        assert model.tags.get("copy") == copy


def test_a_model_tells_its_step_losses_and_where_dvc_keeps_its_files(make_config) -> None:
    train_with_checkpoints(make_config())
    with recording.record("evaluate", make_config()) as record:
        record.metrics({"init_val/loss": 10.8, "val/loss": 5.5}, 6)
    models = all_models()
    md5 = digests.dvc_md5(paths.MODEL)
    assert models["best at step 3"].params == {"step": "3", "path": "artifacts/model", "md5": md5}
    found = {
        name: {(m.key, m.value, m.step, m.dataset_digest) for m in model.metrics}
        for name, model in models.items()
    }
    d, e = "d" * 36, "e" * 36
    best = {("train/loss", 7.0, 2, d), ("train/val_loss", 12.0, 2, e), ("val/loss", 5.5, 6, e)}
    assert found["best at step 3"] == best
    assert found["last at step 6"] == {("train/loss", 4.0, 5, d), ("train/val_loss", 15.0, 5, e)}
    (row,) = all_rows()
    assert {(o.model_id, o.step) for o in row.outputs.model_outputs} == {
        (models["best at step 3"].model_id, 3),
        (models["last at step 6"].model_id, 6),
    }


def test_replaying_checkpoints_doubles_neither_models_nor_points(make_config) -> None:
    train_with_checkpoints(make_config())
    (row,) = all_rows()
    client = mlflow_store.connect()
    before = {name: sorted(map(str, model.metrics)) for name, model in all_models().items()}
    again = mlflow_run.Row(client, row.info.run_id, row.info.experiment_id)
    again.write(record_file.read(paths.record("train")), "best", mlflow_run.from_workspace)
    assert {n: sorted(map(str, m.metrics)) for n, m in all_models().items()} == before
    assert len(client.get_metric_history(row.info.run_id, "train/val_loss")) == 2
    assert len(client.get_run(row.info.run_id).outputs.model_outputs) == 2


def test_rows_that_stand_together_have_colours_of_their_own(make_config) -> None:
    number = len(mlflow_view.COLORS)
    for seed in range(number + 1):
        head = record_file.start_event("tokenize", make_config(sample__seed=seed))
        mlflow_run.open_row(mlflow_store.connect(), head | {"time": head["time"] + seed}, [])
    colors = [row.data.tags["mlflow.runColor"] for row in all_rows()]
    assert len(set(colors[:number])) == len(set(colors[1:])) == number


@pytest.fixture
def commit_has(monkeypatch) -> Callable[..., None]:
    """commit_has("yaml text"): what git shows as HEAD's params.yaml."""

    def answers(text: str) -> None:
        known = {"show": text, "rev-parse": "1234567890"}
        monkeypatch.setattr(record_file.git, "said", lambda word, *_: known.get(word, ""))

    return answers


def note_of(row) -> str:
    return row.data.tags["mlflow.note.content"]


def test_a_note_says_what_changed_and_how_it_came_out(make_config, commit_has) -> None:
    commit_has(recipe())
    for loss, config in ((6.0, make_config()), (5.5, make_config(train__lr=0.001))):
        with recording.record("evaluate", config) as record:
            record.metrics({"val/loss": loss}, 6)
    parent, child = all_rows()
    assert note_of(parent).startswith("**Nothing changed** against the settings of commit")
    assert "against commit `1234567`: `train.lr` from `0.002` to `0.001`.\n" in note_of(child)
    assert "Validation loss 5.5000 (-0.5000)" in note_of(child)
    assert f"the difference from {parent.info.run_name}" in note_of(child)


def test_a_note_that_a_person_wrote_stays(make_config) -> None:
    run_stage("tokenize", make_config())
    (row,) = all_rows()
    mlflow_store.connect().set_tag(row.info.run_id, "mlflow.note.content", "mine")
    run_stage("import_hf_weights", make_config())
    (row,) = all_rows()
    assert note_of(row) == "mine"


def test_only_the_very_bytes_that_a_record_saw_are_attached(tmp_path: Path) -> None:
    path = Path("samples.md")
    path.write_text("one")
    digest = digests.tree_digest(path)
    assert mlflow_run.from_workspace("samples.md", digest) == path
    path.write_text("two")
    assert mlflow_run.from_workspace("samples.md", digest) is None


def test_sync_leaves_a_failed_stage_failed_and_a_running_one_running(make_config) -> None:
    config = make_config()
    shutil.copyfile(NANO, "params.yaml")
    run_stage("tokenize", config)
    run_stage("import_hf_weights", config)
    with pytest.raises(RuntimeError), recording.record("train", config):
        raise RuntimeError
    sync.sync()
    assert [row.info.status for row in all_rows()] == ["FAILED"]
    with recording.record("train", config):
        for _ in range(100):
            if [row.info.status for row in all_rows()][-1] == "RUNNING":
                break
            time.sleep(0.05)
        sync.sync()
        assert [row.info.status for row in all_rows()][-1] == "RUNNING"


def forget_the_store(empty_store: Path) -> None:
    shutil.copyfile(empty_store, "mlflow.db")


def test_a_row_comes_back_as_far_as_its_records_are_kept(
    make_config, empty_store: Path, caplog
) -> None:
    """Superseded: its own record is in no experiment, commit or workspace any more."""
    for _ in range(2):
        run_stage("tokenize", make_config())
    superseded, kept = all_rows()
    assert superseded.data.tags["superseded"] == kept.info.run_id
    forget_the_store(empty_store)
    assert sync.sync() == [kept.info.run_name]
    (row,) = all_rows()
    assert row.data.tags["record.tokenize"] == kept.data.tags["record.tokenize"]
    assert row.info.start_time == kept.info.start_time
    assert row.info.end_time == kept.info.end_time
    assert sync.sync() == []


@pytest.mark.parametrize("stopped_in", ["replay", "settle"])
def test_a_row_that_a_stopped_sync_left_open_is_closed_by_the_next(
    make_config, empty_store: Path, monkeypatch, stopped_in: str
) -> None:
    run_stage("tokenize", make_config())
    forget_the_store(empty_store)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            mlflow_run, "this_process", lambda: "999999-1.00"
        )  # of which nobody is left
        patched.setattr(mlflow_run.Row, stopped_in, stop)
        sync.sync()
    (left,) = all_rows()
    assert left.info.status == "RUNNING"
    assert sync.sync() == [left.info.run_name]
    (row,) = all_rows()
    assert (row.info.run_id, row.info.status) == (left.info.run_id, "FINISHED")
    assert len(mlflow_store.connect().get_metric_history(row.info.run_id, "tokenize/value")) == 3
    assert sync.sync() == []


@pytest.mark.parametrize("git", [False, True])
def test_no_database_of_dvc_stays_open(monkeypatch, git: bool) -> None:
    opened, connect = [], sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *a, **k: opened.append(connect(*a, **k)) or opened[-1]
    )
    if git:
        subprocess.run(["git", "init", "--quiet"], check=True)
    assert [found.name for found in dvc_history.experiments()] == ["workspace"]
    assert bool(opened) == git
    for database in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            database.execute("select 1")


@pytest.mark.parametrize("verb", ["sync", "ui"])
def test_a_store_that_is_not_there_ends_sync_and_ui_in_one_message(
    make_config, monkeypatch, caplog, verb: str
) -> None:
    run_stage("tokenize", make_config())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
        with pytest.raises(SystemExit) as ended:
            command([verb])
    assert ended.value.code == 5
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert [e.startswith(f"error: MLflow at http://127.0.0.1:{port}") for e in errors] == [True]
    assert "secret" not in caplog.text


def test_two_experiments_of_one_key_at_a_time_get_a_row_each(make_config) -> None:
    config = make_config()
    places = [Path("a"), Path("b")]  # two workspaces, one store
    for stage in ("tokenize", "import_hf_weights", "train"):
        for place in places:
            place.mkdir(exist_ok=True)
            with contextlib.chdir(place):
                run_stage(stage, config)
    client = mlflow_store.connect()
    assert len(all_rows()) == 2
    for row in all_rows():
        for stage in ("tokenize", "import_hf_weights", "train"):
            assert len(client.get_metric_history(row.info.run_id, f"{stage}/value")) == 3


def test_a_resumed_row_has_the_name_of_the_experiment_that_finished_it(
    make_config, monkeypatch, tmp_path: Path
) -> None:
    for name in ("stopped", "finished"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        with (
            contextlib.suppress(KeyboardInterrupt),
            recording.record("train", make_config(), tmp_path / "journal.jsonl") as record,
        ):
            record.metrics({"train/value": 1.0}, 0)
            if name == "stopped":
                raise KeyboardInterrupt
    (row,) = all_rows()
    assert (row.info.run_name, row.data.tags["dvc.exp_name"]) == ("finished", "finished")
    assert row.info.status == "FINISHED"


def test_a_port_that_another_server_has_is_passed_over_and_not_linked(
    own_store: Path, monkeypatch, caplog
) -> None:
    Path("params.yaml").write_bytes(NANO.read_bytes())
    caplog.set_level(logging.INFO)
    served: list[int] = []

    def serve(port: int) -> None:
        """Stands in for the page: answers for a second."""
        served.append(port)
        with HTTPServer(("127.0.0.1", port), Healthy) as server:
            server.timeout = 1
            server.handle_request()
            deadline = time.monotonic() + 10
            while "MLflow is at" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)

    monkeypatch.setattr(mlflow_ui, "_serve", serve)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # is not asked for this machine's page
    with socket.socket() as another:
        another.bind(("127.0.0.1", 0))
        another.listen()
        port = another.getsockname()[1]
        assert mlflow_ui.show(port) == 0
        monkeypatch.setattr(mlflow_ui, "PORTS", 1)
        with pytest.raises(InputError, match=f"ports {port} to {port}: other servers have them"):
            mlflow_ui.show(port)
    (chosen,) = served
    assert port < chosen < port + 20
    (said,) = [message for message in caplog.messages if "http" in message]
    assert f"http://127.0.0.1:{chosen}/#/experiments/0/runs?" in said


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("port", [-1, 0, 1 << 16])
def test_a_port_that_there_is_none_of_is_refused(own_store: Path, port: int) -> None:
    Path("params.yaml").write_bytes(NANO.read_bytes())
    with pytest.raises(InputError, match=f"port {port}: expected a number from 1 to 65535"):
        mlflow_ui.show(port)


def test_no_address_is_said_where_the_page_never_answers(
    own_store: Path, monkeypatch, caplog
) -> None:
    Path("params.yaml").write_bytes(NANO.read_bytes())
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(mlflow_ui, "_serve", lambda port: time.sleep(0.5))
    assert mlflow_ui.show(40_000) == 0
    assert "http" not in caplog.text
