"""Claims about rows and records, seen from outside: dvc commands in, MLflow's client out."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from omegaconf import OmegaConf

from pipeline.records import record_file, stage_graph
from pipeline.reports.run_page import compact
from pipeline.terminal import shown
from pipeline.tracking import row_facts
from tests.conftest import Checkout, tiny_pipeline

# MLflow's client and its libraries warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STAGES = tuple(stage_graph.stages())


class Story:
    """One tiny pipeline and what each command left behind, in the order they were given."""

    def __init__(self, repo: Checkout):
        self.repo = repo
        self.said: dict[str, str] = {}
        self.rows: dict[str, list[str]] = {}  # ids of the rows that a command added
        self.records: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self._known: set[str] = set()

    def tell(self, name: str, *commands: tuple[str, ...], queued: int = 0) -> None:
        self.said[name] = "".join(self.repo.dvc(*command) for command in commands)
        if queued:
            self.repo.wait_for_queue(queued)
        new = [run.info.run_id for run in self.runs() if run.info.run_id not in self._known]
        self.rows[name] = new
        self._known |= set(new)
        self.records[name] = {
            s: record_file.read(self.repo.folder / "records" / f"{s}.jsonl") for s in STAGES
        }

    def client(self, store: str = "mlflow.db") -> Any:
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{self.repo.folder.as_posix()}/{store}")

    def runs(self, store: str = "mlflow.db") -> list[Any]:
        client = self.client(store)
        experiment = client.get_experiment_by_name("gpt2")
        return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])

    def points(self, run_id: str) -> Counter[str]:
        client = self.client()
        keys = client.get_run(run_id).data.metrics
        return Counter({key: len(client.get_metric_history(run_id, key)) for key in keys})


def expected_points(chain: dict[str, list[dict[str, Any]]]) -> Counter[str]:
    return Counter(
        key
        for record in chain.values()
        for event in record
        if event["kind"] == "metrics"
        for key in row_facts.shown(event["values"])
    )


def experiment_lock(repo: Checkout, name: str) -> Any:
    """The dvc.lock of a DVC experiment."""
    refs = repo.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    ref = next(ref for ref in refs if ref.endswith(f"/{name}"))
    return OmegaConf.create(repo.run("git", "show", f"{ref}:dvc.lock").stdout)


def experiment_records(repo: Checkout, name: str) -> dict[str, list[dict[str, Any]]]:
    """A DVC experiment's records, by its own dvc.lock, out of the cache."""
    lock, found = experiment_lock(repo, name), {}
    for stage in STAGES:
        outs = {out.path: out.md5 for out in lock.stages[stage].outs}
        md5 = outs[f"records/{stage}.jsonl"]
        cached = repo.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        found[stage] = record_file.read(cached)
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    told = Story(tiny_pipeline(tmp_path_factory.mktemp("story")))
    told.tell("repro", ("repro",))
    told.tell("again", ("repro",))
    told.repo.run("git", "add", "--all")
    told.repo.run("git", "commit", "--quiet", "--message", "first results")
    told.tell("cached train", ("exp", "run", "-n", "cached", "-S", "sample.seed=2"))
    told.tell("temp", ("exp", "run", "--temp", "-n", "aside", "-S", "sample.seed=3"))
    told.tell(
        "queue",
        ("exp", "run", "--queue", "-n", "four", "-S", "train.lr=0.001", "-S", "sample.seed=4"),
        ("exp", "run", "--queue", "-n", "five", "-S", "train.lr=0.001", "-S", "sample.seed=5"),
        ("queue", "start", "-j", "1"),
        queued=2,
    )
    told.tell("forced", ("repro", "-f"))
    return told


def test_every_command_adds_its_rows_and_no_other(story: Story) -> None:
    added = {name: len(rows) for name, rows in story.rows.items()}
    assert added == {
        "repro": 1,
        "again": 0,
        "cached train": 1,
        "temp": 1,
        "queue": 2,
        "forced": 1,
    }, story.said


def test_every_row_is_finished(story: Story) -> None:
    assert [run.info.status for run in story.runs()] == ["FINISHED"] * 6


@pytest.mark.parametrize("name", ["repro", "cached train", "forced"])
def test_points_equal_the_records_of_the_workspace(story: Story, name: str) -> None:
    (row,) = story.rows[name]
    assert story.points(row) == expected_points(story.records[name])


@pytest.mark.parametrize("name", ["aside", "four", "five"])
def test_points_equal_the_records_of_the_experiment(story: Story, name: str) -> None:
    (row,) = [run.info.run_id for run in story.runs() if run.info.run_name == name]
    assert story.points(row) == expected_points(experiment_records(story.repo, name))


def test_two_queued_experiments_share_one_training(story: Story) -> None:
    four, five = (experiment_records(story.repo, name) for name in ("four", "five"))
    assert four["train"][0]["id"] == five["train"][0]["id"]
    assert four["sample"][0]["id"] != five["sample"][0]["id"]


def test_a_cached_train_leaves_its_curve_in_the_new_row(story: Story) -> None:
    (row,) = story.rows["cached train"]
    assert story.points(row)["train/loss"] == 6
    before, after = story.records["repro"], story.records["cached train"]
    assert before["train"][0]["id"] == after["train"][0]["id"]


def test_forcing_the_chain_opens_a_new_row_and_marks_the_old_one(story: Story) -> None:
    (old,), (new,) = story.rows["cached train"], story.rows["forced"]
    runs = {run.info.run_id: run.data.tags for run in story.runs()}
    assert runs[old]["superseded"] == new
    assert [id_ for id_, tags in runs.items() if "superseded" in tags] == [old]


def test_a_second_repro_says_that_everything_is_up_to_date(story: Story) -> None:
    assert "up to date" in story.said["again"]


def test_a_row_tells_params_inputs_environment_and_where_its_files_are(story: Story) -> None:
    (row,) = [run for run in story.runs() if run.info.run_name == "four"]
    assert row.data.params["train.lr"] == "0.001"
    assert row.data.tags["dvc.exp_name"] == "four"
    assert len(row.data.tags["mlflow.source.git.commit"]) == 40
    assert row.data.tags["precision.effective"] == "fp32"
    assert {d.dataset.name for d in row.inputs.dataset_inputs} == {"text train", "text val"}
    names = {f.path for f in story.client().list_artifacts(row.info.run_id)}
    assert {"checkpoints", "samples", "samples.json", "init", "report", "facts"} <= names
    assert len(row.data.metrics) < 20
    assert len([tag for tag in row.data.tags if not tag.startswith("mlflow.")]) < 20


def test_the_copied_checkpoint_opens_in_transformers(story: Story, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    (row,) = [run for run in story.runs() if run.info.run_name == "four"]
    folder = story.client().download_artifacts(row.info.run_id, "checkpoints/best", str(tmp_path))
    assert GPT2LMHeadModel.from_pretrained(folder).config.n_embd == 16


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("cached", "`sample.seed` from `1234` to `2`."),
        ("aside", "`sample.seed` from `1234` to `3`."),
        ("four", "`train.lr` from `0.002` to `0.001`; `sample.seed` from `1234` to `4`."),
    ],
)
def test_a_note_says_what_changed_against_the_commit(story: Story, name: str, changed: str) -> None:
    (row,) = [run for run in story.runs() if run.info.run_name == name]
    note = row.data.tags["mlflow.note.content"]
    commit = row.data.tags["mlflow.source.git.commit"][:7]
    assert f"**Changed** against commit `{commit}`: {changed}\n" in note
    (parent,) = [run for run in story.runs() if run.info.run_id in story.rows["repro"]]
    own, theirs = (run.data.metrics["val/loss"] for run in (row, parent))
    assert f"Validation loss {own:.4f} ({own - theirs:+.4f})" in note
    assert f"from {parent.info.run_name}, which has that commit's settings" in note
    plain = parent.data.tags["mlflow.note.content"]
    assert plain.startswith("**Nothing changed** against the settings of commit")


def test_a_model_carries_the_md5_that_dvc_gives_its_files(story: Story) -> None:
    (row,) = [run for run in story.runs() if run.info.run_name == "four"]
    found = story.client().search_logged_models([row.info.experiment_id])
    ours = [model for model in found if model.source_run_id == row.info.run_id]
    lock = experiment_lock(story.repo, "four")
    locked = {out.path: out.md5 for out in lock.stages["train"].outs}
    assert {m.params["path"]: m.params["md5"] for m in ours} == {
        path: locked[path] for path in ("artifacts/model", "artifacts/last")
    }


def test_git_stays_clean_after_a_repro_that_changed_nothing(story: Story) -> None:
    story.repo.run("git", "add", "--all")
    story.repo.run("git", "commit", "--quiet", "--message", "results")
    story.repo.dvc("repro")
    assert story.repo.run("git", "status", "--porcelain").stdout == ""


def test_editing_generation_runs_sample_alone(story: Story) -> None:
    path = story.repo.folder / "pipeline/inference/generation.py"
    path.write_text(path.read_text("utf-8") + "# touched\n", "utf-8")
    said = story.repo.dvc("repro")
    assert [s for s in STAGES if f"Running stage '{s}'" in said] == ["sample"], said


def test_wrong_values_end_in_a_line_each_before_any_work(story: Story) -> None:
    changes = ("precision=fp4", "train.lr=abc", "+train.lrr=1")
    words = [word for change in changes for word in ("-S", change)]
    said = story.repo.dvc("exp", "run", "--temp", *words, expect=255)
    for problem in (
        "precision=fp4: expected one of fp32, tf32, bf16, fp16, fp8",
        "train.lr=abc: expected a number above 0",
        "train.lrr: unknown setting; did you mean train.lr?",
    ):
        assert problem in said
    assert "Traceback" not in said
    assert len(story.runs()) == 7  # those of the story and of the edited generation.py


def test_every_study_is_linked_from_every_row(story: Story) -> None:
    linked = {
        "numerics": {"roofline.png", "loss_scale.png", "dtypes_bf16.md", "sensitivity.md"},
        "init_study": {"init_study.png", "init_study.md"},
    }
    for row in story.runs():
        for folder, expected in linked.items():
            listed = story.client().list_artifacts(row.info.run_id, folder)
            assert expected <= {Path(f.path).name for f in listed}, row.info.run_name
        listed = {f.path for f in story.client().list_artifacts(row.info.run_id, "facts")}
        assert listed == {f"facts/{stage}.json" for stage in STAGES}


def test_two_learning_rates_are_compared_and_linked_from_their_rows(story: Story) -> None:
    repo = story.repo
    said = repo.run(sys.executable, "-m", "pipeline", "compare", "train.lr").stdout
    folder = repo.folder / "comparisons" / "train.lr"
    assert (folder / "comparison.md").read_text("utf-8") in said
    with open(folder / "comparison.csv", newline="", encoding="utf-8") as file:
        found = {row["value"]: row for row in csv.DictReader(file)}
    assert found.keys() == {"0.002", "0.001"}
    losses = {
        row.data.params["train.lr"]: row.data.metrics["val/loss"]
        for row in story.runs()
        if row.info.run_name == "four" or row.info.run_id in story.rows["forced"]
    }
    assert {value: float(row["outcome"]) for value, row in found.items()} == losses
    difference = losses["0.001"] - losses["0.002"]
    assert float(found["0.001"]["difference"]) == pytest.approx(difference)
    assert "train.lr=0.002 ran with one seed only" in said
    held = {
        row.info.run_name
        for row in story.runs()
        if story.client().list_artifacts(row.info.run_id, "comparison/train.lr")
    }
    (forced,) = [r.info.run_name for r in story.runs() if r.info.run_id in story.rows["forced"]]
    assert {"four", "five", forced} <= held


def test_a_comparison_that_nobody_ran_ends_in_one_message(story: Story) -> None:
    done = story.repo.run(sys.executable, "-m", "pipeline", "compare", "init.std", expect=3)
    assert "error: no two runs differ in init.std alone" in done.stderr
    assert "Traceback" not in done.stderr


def test_experiments_are_reported_side_by_side_with_the_files_that_dvc_keeps(story: Story) -> None:
    repo = story.repo
    repo.run(sys.executable, "-m", "pipeline", "report", "four", "five", "--out", "page.html")
    page = (repo.folder / "page.html").read_text("utf-8")
    together, _, apart = page.partition("Each run")
    assert "<b>five</b>: shares its training with four" in together
    assert "sample.seed" in together and "train.steps" not in together
    lock = experiment_lock(repo, "five")
    md5 = next(o.md5 for o in lock.stages["sample"].outs if o.path == "artifacts/samples.jsonl")
    cached = repo.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    for line in cached.read_text("utf-8").split("\n")[:-1]:
        sample = json.loads(line)
        assert f'<h3 class="prompt">{escape(shown(sample["prompt"]))}</h3>' in apart
        assert f"{shown(compact(sample['text']))}</blockquote>" in apart
    assert apart.count("data:image/png;base64,") == 5, "studies that runs share are shown once"


def test_the_workspace_is_reported_as_its_last_stage_did(story: Story) -> None:
    repo = story.repo
    repo.run(sys.executable, "-m", "pipeline", "report")
    later = (repo.folder / "report.html").read_text("utf-8")
    kept = (repo.folder / "artifacts/report.html").read_text("utf-8")
    assert kept.count("data:image") == later.count("data:image") == 5
    assert kept.count("data-plot") == later.count("data-plot") > 3
    assert "no record of this run" not in kept and "at work" not in kept + later
    assert "wrote this page" in kept and "wrote this page" not in later


def test_a_report_of_an_unknown_experiment_lists_those_that_there_are(story: Story) -> None:
    done = story.repo.run(sys.executable, "-m", "pipeline", "report", "four", "fore", expect=3)
    assert "error: fore: no run of that name; there are: " in done.stderr
    assert all(name in done.stderr for name in ("aside", "cached", "five", "workspace"))
    assert "Traceback" not in done.stderr


def test_a_record_that_is_in_no_cache_any_more_is_left_out_by_name(story: Story) -> None:
    repo = story.repo
    code = (
        "import logging; logging.basicConfig(format='%(message)s')\n"
        "from pipeline.records.dvc_history import experiments\n"
        "print(*sorted(f'{e.name}:{len(e.records)}' for e in experiments(('sample',))))"
    )
    whole = repo.run(sys.executable, "-c", code).stdout.split()
    assert whole == ["aside:1", "cached:1", "five:1", "four:1", "workspace:1"]
    lock = experiment_lock(repo, "five")
    md5 = next(o.md5 for o in lock.stages["sample"].outs if o.path == "records/sample.jsonl")
    cached = repo.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    kept = cached.read_bytes()
    cached.unlink()
    done = repo.run(sys.executable, "-c", code)
    cached.write_bytes(kept)
    assert "five:0" in done.stdout
    assert "experiment five: records/sample.jsonl is in no cache any more" in done.stderr


# What only the live path knows: which process it was, and on which machine it wrote the row.
VOLATILE = {"pipeline.process"}


def files_below(client: Any, run_id: str, folder: str | None = None) -> set[tuple[str, int]]:
    """(path, bytes) of a row's files, without comparisons: they are made again by their command."""
    found = set()
    for file in client.list_artifacts(run_id, folder):
        if file.is_dir and file.path != "comparison":
            found |= files_below(client, run_id, file.path)
        elif not file.is_dir:
            found.add((file.path, file.file_size))
    return found


def store_as_text(story: Story, copy: str) -> dict[str, Any]:
    """All that MLflow's store holds, by row name, in plain values; ids of rows are their names.

    Read from a copy of a name of its own: MLflow keeps a database open, even a deleted one.
    """
    # By SQLite itself: the newest pages may lie in the write-ahead log beside the file.
    with (
        contextlib.closing(sqlite3.connect(story.repo.folder / "mlflow.db")) as store,
        contextlib.closing(sqlite3.connect(story.repo.folder / copy)) as target,
    ):
        store.backup(target)
    client, runs = story.client(copy), story.runs(copy)
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(names)

    def named(text: str) -> str:
        for id_, name in names.items():
            text = text.replace(id_, name)
        return text

    def points(run_id: str, key: str) -> list[tuple[int, int, float]]:
        history = client.get_metric_history(run_id, key)
        return sorted((m.step, m.timestamp, m.value) for m in history)

    models: dict[str, Any] = {}
    for model in client.search_logged_models([runs[0].info.experiment_id]):
        values = {(m.key, m.step, m.timestamp, m.value, m.dataset_digest) for m in model.metrics}
        tags = {key: named(value) for key, value in model.tags.items()}
        shown = (model.status, model.model_type, model.params, tags, values)
        models.setdefault(model.source_run_id, {})[model.name] = shown
    return {
        names[run.info.run_id]: {
            "info": (run.info.status, run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": {k: named(v) for k, v in run.data.tags.items() if k not in VOLATILE},
            "metrics": {key: points(run.info.run_id, key) for key in run.data.metrics},
            "datasets": {(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs},
            "files": files_below(client, run.info.run_id),
            "models": models[run.info.run_id],
            "outputs": sorted(output.step for output in run.outputs.model_outputs),
        }
        for run in runs
    }


def test_a_deleted_store_is_rebuilt_from_the_records_as_it_was(story: Story) -> None:
    repo = story.repo
    before = store_as_text(story, "before.db")
    (repo.folder / "mlflow.db").unlink()
    shutil.rmtree(repo.folder / "mlartifacts")
    said = repo.run(sys.executable, "-m", "pipeline", "sync").stdout
    assert all(name in said for name in before), said
    after = store_as_text(story, "after.db")
    assert after.keys() == before.keys()
    for name, row in before.items():
        for part, expected in row.items():
            assert after[name][part] == expected, (name, part)
    said = repo.run(sys.executable, "-m", "pipeline", "sync").stdout
    assert "rows made or completed: none" in said
    assert store_as_text(story, "again.db") == after


def test_an_edited_text_and_an_edited_folder_of_weights_are_noticed(story: Story) -> None:
    repo = story.repo
    text = repo.folder / "data/text/03.txt"
    text.write_text(text.read_text("utf-8") + "One more sentence.\n", "utf-8")
    said = json.loads(repo.run(sys.executable, "-m", "dvc", "status", "--json").stdout)
    assert {"changed deps": {"data/text": "modified"}} in said["tokenize"]
    raw = OmegaConf.load(repo.folder / "params.yaml")
    raw.init.hf_watch = "data/text"
    OmegaConf.save(raw, repo.folder / "params.yaml")
    said = json.loads(repo.run(sys.executable, "-m", "dvc", "status", "--json").stdout)
    assert any("data/text" in str(change) for change in said["import_hf_weights"])
