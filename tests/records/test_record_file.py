"""Records: complete, rounded, partial until they end; keys that tell experiments apart."""

from __future__ import annotations

import math
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import paths
from pipeline.errors import ChangedError
from pipeline.records import record_file
from pipeline.records.record_file import Record
from pipeline.storage import digests
from tests.conftest import recipe


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)


def test_a_record_carries_its_final_name_only_after_success(make_config) -> None:
    record = Record("tokenize", make_config())
    assert not paths.record("tokenize").exists()
    record.close("FAILED")
    assert not paths.record("tokenize").exists()
    Record("tokenize", make_config()).close("FINISHED")
    kinds = [event["kind"] for event in record_file.read(paths.record("tokenize"))]
    assert kinds == ["start", "metrics", "end"]


def test_values_are_rounded_to_six_digits_and_nan_survives(make_config) -> None:
    record = Record("train", make_config())
    record.metrics({"a": 1 / 3, "b": math.nan, "c": 123456789.0}, step=7)
    record.close("FINISHED")
    (read,) = [
        e
        for e in record_file.read(paths.record("train"))
        if e["step" if "step" in e else "kind"] == 7
    ]
    assert read["values"]["a"] == 0.333333
    assert math.isnan(read["values"]["b"])
    assert read["values"]["c"] == 123457000.0
    kinds = [e["kind"] for e in record_file.read(paths.record("train"))]
    assert kinds == ["start", "metrics", "metrics", "end"]


def test_rates_and_times_have_four_digits(make_config) -> None:
    record = Record("train", make_config())
    values = {"perf/tokens_per_second": 2198.7654, "time/x": 1.23456, "train/loss": 1.2345678}
    record.metrics(values)
    record.close("FINISHED")
    rounded = {"perf/tokens_per_second": 2199.0, "time/x": 1.235, "train/loss": 1.23457}
    assert record_file.read(paths.record("train"))[1]["values"] == rounded


@pytest.mark.fault(75)
def test_no_time_is_negative_whatever_becomes_of_the_clock(
    make_config, monkeypatch, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    monkeypatch.setattr(time, "time", lambda: 2e9)
    first = Record("train", make_config(), journal=journal)
    monkeypatch.setattr(time, "time", lambda: 1e9)  # set back while the first session is at work
    first.metrics({"a": 1.0})
    for file in first._files:  # as a kill does
        file.close()
    monkeypatch.setattr(time, "time", lambda: -1e9)  # and to before 1970
    second = Record("train", make_config(), journal=journal)
    second.close("FINISHED")
    events = record_file.read(paths.record("train"))
    times = [event["time"] for event in events if "time" in event]
    assert times == [2 * 10**12, 10**12, 1, 1, 1]
    (spent,) = [e["values"]["time/train_seconds"] for e in events if "time/" in str(e)]
    assert 0 <= spent < 60


@pytest.mark.fault(75, control=True)
def test_wall_clocks_would_have_given_a_negative_duration(monkeypatch) -> None:
    clock = iter([2e9, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    assert -time.time() + time.time() < 0


def git(*words: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *who, *words], check=True, capture_output=True)


def parent_of(make_config, text: str, **changes) -> dict[str, Any]:
    """What a start event says of a commit with this params.yaml."""
    Path("params.yaml").write_text(text, "utf-8")
    git("init", "--quiet")
    git("add", "params.yaml")
    git("commit", "--quiet", "--allow-empty", "-m", "settings")
    return record_file.start_event("tokenize", make_config(**changes))["parent"]


def test_the_parent_is_the_commits_settings_and_only_what_differs_is_kept(make_config) -> None:
    nano = recipe()
    own = record_file.start_event("tokenize", make_config())
    same = parent_of(make_config, nano)
    assert same == {"settings": own["settings"], "changed": {}}
    changed = parent_of(make_config, nano, train__lr=0.001, tracking__checkpoints="none")
    assert changed == {"settings": own["settings"], "changed": {"train.lr": [0.002, 0.001]}}


def test_a_commit_of_an_older_schema_differs_by_name(make_config) -> None:
    older = recipe().replace("  lr: 0.002", "  peak_lr: 3")
    found = parent_of(make_config, older)
    assert found["changed"] == {"train.lr": [None, 0.002], "train.peak_lr": [3, None]}


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "", "3"])
def test_a_commit_whose_settings_nobody_can_read_is_no_parent(make_config, text: str) -> None:
    assert parent_of(make_config, text) == {}


def test_without_git_there_is_no_parent(make_config, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    head = record_file.start_event("tokenize", make_config())
    assert head["parent"] == {}
    assert head["git"] == {"commit": "", "branch": "", "dirty": ""}


def test_what_every_experiment_changes_is_no_dirt_and_a_source_is(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.lock", "source.py"):
        (tmp_path / name).write_text("a: 1\n")
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    for words in (("init", "-q"), ("add", "--all"), (*who, "commit", "-qm", "one")):
        subprocess.run(["git", *words], check=True)

    def dirty() -> str:
        return record_file.start_event("tokenize", make_config())["git"]["dirty"]

    (tmp_path / "params.yaml").write_text("a: 2\n")
    (tmp_path / "dvc.lock").unlink()
    assert dirty() == "false"
    (tmp_path / "source.py").write_text("a: 2\n")
    assert dirty() == "true"


def test_the_key_follows_params_and_code_but_not_tracking(make_config, monkeypatch) -> None:
    def key(**changes) -> str:
        return record_file.start_event("tokenize", make_config(**changes))["key"]

    assert key() == key(tracking__checkpoints="none") == key(tracking__experiment="other")
    assert key() != key(sample__seed=1)
    before = key()
    monkeypatch.setattr(record_file, "code_digest", lambda: "other code")
    assert key() != before


def test_stages_of_one_command_share_the_code_digest_taken_first(make_config, monkeypatch) -> None:
    monkeypatch.setattr(record_file, "_invocation", lambda: "one dvc repro")
    Record("tokenize", make_config()).close("FINISHED")
    monkeypatch.setattr(record_file, "code_digest", lambda: "edited while the chain runs")
    tokenize = record_file.read(paths.record("tokenize"))[0]
    assert record_file.start_event("train", make_config())["key"] == tokenize["key"]
    monkeypatch.setattr(record_file, "_invocation", lambda: "the next one")
    assert record_file.start_event("train", make_config())["key"] != tokenize["key"]


@pytest.mark.fault(59)
def test_settings_edited_between_the_stages_of_one_command_split_no_row(
    make_config, monkeypatch
) -> None:
    monkeypatch.setattr(record_file, "_invocation", lambda: "one dvc repro")
    Record("tokenize", make_config()).close("FINISHED")
    for later in ("train", "evaluate", "sample"):
        with pytest.raises(ChangedError, match=r"tokenize stage had begun:\n  sample.seed: 1234 t"):
            Record(later, make_config(sample__seed=1))
        assert not paths.record(later).with_suffix(".jsonl.part").exists()
    Record("train", make_config(tracking__checkpoints="none")).close("FAILED")  # decides nothing
    monkeypatch.setattr(record_file, "_invocation", lambda: "the next one")
    Record("train", make_config(sample__seed=1)).close("FAILED")


@pytest.mark.fault(59)
def test_settings_are_held_to_those_of_a_training_that_was_resumed(
    make_config, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record_file, "_invocation", lambda: "one dvc repro")
    Record("train", make_config(), journal=tmp_path / "journal").close("KILLED")
    monkeypatch.setattr(record_file, "_invocation", lambda: "the next one")
    Record("train", make_config(), journal=tmp_path / "journal").close("FINISHED")
    with pytest.raises(ChangedError, match="sample.seed: 1234 then, 1 now"):
        Record("evaluate", make_config(sample__seed=1))


def test_no_environment_value_reaches_a_record(make_config, monkeypatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-value")
    Record("tokenize", make_config()).close("FINISHED")
    assert "canary-value" not in paths.record("tokenize").read_text("utf-8")


def test_digest_notices_names_contents_and_boundaries(tmp_path: Path) -> None:
    seen = set()
    for number, files in enumerate(
        [{"a": "xy", "b": ""}, {"a": "x", "b": "y"}, {"a": "xy", "c": ""}, {"a": "xy"}]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        seen.add(digests.tree_digest(folder))
    assert len(seen) == 4


@pytest.mark.parametrize("temporary", ["/.dvc/tmp/exps/tmpabc", "/.dvc/tmp/exps/standalone/x", ""])
def test_the_main_root_is_found_from_every_workspace(
    tmp_path: Path, monkeypatch, temporary
) -> None:
    workspace = Path(f"{tmp_path}{temporary}")
    (workspace / ".dvc").mkdir(parents=True)
    (tmp_path / ".dvc").mkdir(exist_ok=True)
    monkeypatch.chdir(workspace)
    assert paths.root() == tmp_path
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert paths.root() == tmp_path
