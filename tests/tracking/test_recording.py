"""Shipping: bounded, warned about once, idempotent; rows found, opened and swept."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.errors import InputError
from pipeline.experiments import sync
from pipeline.records import dvc_history, record_file, stage_graph
from pipeline.records.run_data import RunData
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
    ("error", "status", "said"),
    [
        (RuntimeError("no"), "FAILED", "**Failed** in `train`{}:\n\n```text\nRuntimeError: no\n"),
        (InputError("a: odd\udc80 \0"), "FAILED", "error: a: odd\\udc80 \\x00"),
        (InputError("at http://me:word@host/"), "FAILED", "error: at http://host/"),
        (KeyboardInterrupt(), "KILLED", "**Interrupted** in `train`{}: the same command resumes."),
        (SystemExit(143), "KILLED", "**Interrupted** in `train`{}: the same command resumes."),
    ],
)
def test_the_row_ends_as_the_stage_does_and_says_why(
    make_config, error: BaseException, status: str, said: str
) -> None:
    with pytest.raises(type(error)), recording.record("train", make_config()) as record:
        record.metrics({"train/loss": 5.5}, 6)
        record.metrics({"train/val_loss": 5.25}, 6)
        raise error
    (row,) = all_rows()
    assert row.info.status == status
    steps = make_config().train.steps
    losses = f" after 7 of {steps} steps (training loss 5.5000, validation loss 5.2500)"
    assert said.format(losses) in note_of(row) and "No results" not in note_of(row)
    assert not paths.record("train").exists()
    record_file.read(record_file.part(paths.record("train")))


@pytest.mark.parametrize("edited", [False, True])
def test_a_row_whose_process_is_gone_does_not_run_for_ever_and_says_so(
    make_config, edited: bool
) -> None:
    run_stage("tokenize", make_config())
    (row,) = all_rows()
    client = mlflow_store.connect()
    client.log_metric(row.info.run_id, "train/loss", 5.5)
    client.update_run(row.info.run_id, status="RUNNING")
    client.set_tag(row.info.run_id, "pipeline.process", "999999-1.00")
    if edited:
        client.set_tag(row.info.run_id, "mlflow.note.content", "mine")
    for _ in range(2):
        mlflow_run.sweep(client)
        (row,) = all_rows()
        assert row.info.status == "KILLED"
        client.update_run(row.info.run_id, status="RUNNING")
    told = "**Its process is gone** without a word (training loss 5.5000): the same command goes on"
    assert note_of(row).count(told) == (not edited)
    assert ("What changed" in note_of(row)) == (not edited)


@pytest.fixture
def dvc(monkeypatch) -> Iterator[Callable[..., psutil.Process]]:
    """dvc("repro", "train"): a living process with that command line, which runs the stages."""
    started: list[subprocess.Popen] = []

    def start(*words: str) -> psutil.Process:
        code = "import sys; sys.stdin.read()"
        command = [sys.executable, "-c", code, *words]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        process = psutil.Process(started[-1].pid)
        name = f"{process.pid}-{process.create_time():.2f}"
        monkeypatch.setattr(record_file, "_invocation", lambda: name)
        monkeypatch.setattr(record_file, "_is_dvc", lambda words: "repro" in words)
        return process

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_a_row_runs_until_the_last_stage_of_its_command_has_ended(make_config, dvc) -> None:
    dvc("repro")
    for stage in stage_graph.stages():
        run_stage(stage, make_config())
        (row,) = all_rows()
        assert row.info.status == ("FINISHED" if stage == "sample" else "RUNNING"), stage
        mlflow_run.sweep(mlflow_store.connect())
        assert all_rows()[0].info.status == row.info.status


@pytest.mark.parametrize("words", [("repro", "train"), ("run", "train")], ids=["dvc", "by hand"])
def test_a_row_ends_with_the_stage_that_was_asked_for(make_config, dvc, words) -> None:
    dvc(*words)
    run_stage("train", make_config())
    (row,) = all_rows()
    assert row.info.status == "FINISHED"


def test_a_command_that_ends_between_two_stages_leaves_what_its_last_stage_did(
    make_config, dvc
) -> None:
    process = dvc("repro")
    run_stage("train", make_config())
    process.kill()
    process.wait()
    mlflow_run.sweep(mlflow_store.connect())
    (row,) = all_rows()
    end = record_file.read(paths.record("train"))[-1]
    assert (row.info.status, row.info.end_time) == ("FINISHED", end["time"])
    assert "gone" not in note_of(row)


def test_what_nobody_compares_runs_by_lies_in_one_file_for_each_stage(make_config) -> None:
    with recording.record("train", make_config()) as record:
        record.tags({"digest.val": "e" * 64, "health.verdict": "fine", "precision.asked": "bf16"})
        record.metrics({"perf/forecast_memory_mib": 9.0, "perf/mfu": 0.5})
        for step in range(3):
            scale = 1.0 if step < 2 else 0.5
            values = {"train/loss_scale": scale, "perf/step_seconds": step, "train/skipped": 0.0}
            record.metrics(values | {"train/loss": float("nan") if step == 1 else 1.0}, step)
    (row,) = all_rows()
    assert row.data.metrics.keys() == {"train/loss", "train/loss_scale", "perf/mfu"}
    assert not [tag for tag in row.data.tags if re.match("env|digest|record|shipped|prec", tag)]
    assert row.data.tags["health.verdict"] == "fine"
    facts = facts_of(row, "train")
    assert facts["tags"].keys() >= {"digest.val", "precision.asked", "env.torch"}
    assert facts["metrics"]["perf/forecast_memory_mib"] == 9.0
    bounds = {"last": 1.0, "least": 1.0, "most": 1.0}
    assert facts["metrics"]["train/loss"] == {"points": 3, "finite": 2, **bounds}
    assert facts["metrics"]["train/skipped"]["most"] == 0.0
    assert facts["environment"]["user"] == row.info.user_id == row.data.tags["mlflow.user"] != ""


def test_texts_of_all_runs_lie_in_a_table(make_config) -> None:
    lines = [
        {"when": when, "prompt": "Ho", "text": f"{when} {number}\x1b"}
        for when in ("before", "after")
        for number in (1, 2)
    ]
    paths.SAMPLES_JSONL.parent.mkdir(parents=True)
    paths.SAMPLES_JSONL.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with recording.record("sample", make_config()) as record:
        record.artifact(paths.SAMPLES_JSONL, "samples")
    (row,) = all_rows()
    client = mlflow_store.connect()
    again = mlflow_run.Row(client, row.info.run_id, row.info.experiment_id)
    again.write(record_file.read(paths.record("sample")), "best", mlflow_run.from_workspace)
    table = client.load_table(row.info.experiment_id, "samples.json")  # as the page finds it
    assert table.to_dict("list") == {
        "prompt": ["Ho [1]", "Ho [2]"],
        "after": ["after 1\\x1b", "after 2\\x1b"],
        "before": ["before 1\\x1b", "before 2\\x1b"],
    }


def test_texts_while_training_lie_in_a_table_each_step_once(make_config) -> None:
    with recording.record("train", make_config()) as record:
        for step, text in ((100, "Ho \x1b"), (200, "Ho, my"), (200, "Ho, my lord")):  # resumed
            record.text(step, text)
    found = RunData({"train": record_file.read(paths.record("train"))})
    assert found.texts == {100: "Ho \x1b", 200: "Ho, my lord"}
    (row,) = all_rows()
    client = mlflow_store.connect()
    assert client.load_table(row.info.experiment_id, "while_training.json").to_dict("list") == {
        "done": ["step     100", "step     200"],
        "text": ["Ho \\x1b", "Ho, my lord"],
    }


def test_a_row_of_an_earlier_version_is_completed_and_not_doubled(make_config) -> None:
    """It had a tag for each record that it held, and for each that had arrived."""
    shutil.copyfile(NANO, "params.yaml")
    run_stage("tokenize", make_config())
    (row,) = all_rows()
    client = mlflow_store.connect()
    for name in ("records", "shipped"):
        (id_,) = json.loads(row.data.tags[f"pipeline.{name}"]).values()
        client.delete_tag(row.info.run_id, f"pipeline.{name}")
        client.set_tag(row.info.run_id, f"{name.removesuffix('s')}.tokenize", id_)
    assert sync.sync() == [row.info.run_name]
    (again,) = all_rows()
    assert again.info.run_id == row.info.run_id
    assert len(client.get_metric_history(row.info.run_id, "tokenize/value")) == 3
    assert sync.sync() == []


def train_with_checkpoints(config) -> None:
    """A record of train as train.py writes it: validated at its steps 3 and 6, best after 3."""
    with recording.record("train", config) as record:
        for split, digit in (("train", "d"), ("val", "e")):
            record.dataset("tokens", digit * 64, f"data/tokens/{split}.bin", split)
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


def facts_of(row, stage: str) -> dict:
    path = mlflow_store.connect().download_artifacts(row.info.run_id, f"facts/{stage}.json")
    return json.loads(Path(path).read_text("utf-8"))


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
    kept = facts_of(row, "train")["files"]
    assert {"artifacts/model", "artifacts/last"} <= {file.get("path") for file in kept}
    models = all_models()
    named = {f"{row.info.run_name} best, step 3", f"{row.info.run_name} last, step 6"}
    assert models.keys() == (named if shown else set())
    for name, model in models.items():
        short = name.split(",")[0].split()[-1]
        copy = f"runs:/{row.info.run_id}/checkpoints/{short}" if short in copied else None
        assert model.tags.get("copy") == copy


def test_a_model_tells_its_step_losses_and_where_dvc_keeps_its_files(make_config) -> None:
    train_with_checkpoints(make_config())
    with recording.record("evaluate", make_config()) as record:
        record.metrics({"init_val/loss": 10.8, "val/loss": 5.5}, 6)
    models = {name.partition(" ")[2]: model for name, model in all_models().items()}
    md5 = digests.dvc_md5(paths.MODEL)
    assert models["best, step 3"].params == {"step": "3", "path": "artifacts/model", "md5": md5}
    found = {
        name: {(m.key, m.value, m.step, m.dataset_digest) for m in model.metrics}
        for name, model in models.items()
    }
    d, e = "d" * 36, "e" * 36
    best = {("train/loss", 7.0, 2, d), ("train/val_loss", 12.0, 2, e), ("val/loss", 5.5, 6, e)}
    assert found["best, step 3"] == best
    assert found["last, step 6"] == {("train/loss", 4.0, 5, d), ("train/val_loss", 15.0, 5, e)}
    (row,) = all_rows()
    assert {(o.model_id, o.step) for o in row.outputs.model_outputs} == {
        (models["best, step 3"].model_id, 3),
        (models["last, step 6"].model_id, 6),
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
    assert mlflow_run.ids(row.data.tags) == mlflow_run.ids(kept.data.tags) != {}
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
