"""Faults around DVC, as a person meets them: what it says, and the command that mends it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from pipeline.tracking import mlflow_run
from tests.conftest import Checkout, tiny_pipeline, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

CONFLICT = "<<<<<<< HEAD\nschema: '2.0'\n=======\nschema: '2.1'\n>>>>>>> other\n"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A tiny pipeline, tokenized and committed."""
    made = tiny_pipeline(tmp_path_factory.mktemp("faults"))
    made.dvc("repro", "tokenize")
    made.run("git", "add", "--all")
    made.run("git", "commit", "--quiet", "--message", "tokens")
    return made


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    ("text", "said"),
    [("", "validation failed"), (CONFLICT, "invalid (possible merge conflicts)")],
)
def test_a_damaged_lock_file_is_named_and_is_made_again_without_work(
    repo: Checkout, text: str, said: str
) -> None:
    lock = repo.folder / "dvc.lock"
    lock.write_text(text, "utf-8")
    message = repo.dvc("repro", "tokenize", expect=255)
    assert "dvc.lock" in message and said in message
    lock.unlink()
    assert "is cached - skipping run" in repo.dvc("repro", "tokenize")
    assert repo.run("git", "status", "--porcelain", "dvc.lock").stdout == ""


@pytest.mark.fault(53)
def test_a_lock_file_that_lost_its_stages_gets_them_back_without_work(repo: Checkout) -> None:
    (repo.folder / "dvc.lock").write_text("schema: '2.0'\n", "utf-8")
    assert "is cached - skipping run" in repo.dvc("repro", "tokenize")
    assert repo.run("git", "status", "--porcelain", "dvc.lock").stdout == ""


@pytest.mark.fault(53, control=True)
def test_a_yaml_reader_takes_the_empty_lock_file_for_one_without_stages(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text("", "utf-8")
    assert OmegaConf.load(tmp_path / "dvc.lock") == {}


def background(repo: Checkout, *words: str) -> tuple[subprocess.Popen, Path]:
    """`dvc` that runs on its own, and the file that it writes into."""
    fd, log = tempfile.mkstemp(".log", dir=repo.folder.parent)
    with open(fd, "wb") as out:
        command = [sys.executable, "-m", "dvc", *words]
        started = subprocess.Popen(
            command, cwd=repo.folder, env=repo.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    return started, Path(log)


@pytest.mark.fault(55)
@pytest.mark.fault(55, control=True)
def test_a_second_repro_is_told_that_the_first_is_busy(repo: Checkout) -> None:
    first, log = background(repo, "repro", "-f", "import_hf_weights")
    wait_for(lambda: "Running stage 'import_hf_weights'" in log.read_text("utf-8", "replace"))
    said = repo.dvc("repro", "import_hf_weights", expect=255)
    assert "is busy, it is being blocked by" in said and f"(PID {first.pid})" in said
    # The control: a stage without dvc is not held up by DVC's lock.
    repo.run(sys.executable, "-m", "stages.tokenize_corpus")
    assert first.wait(120) == 0, log.read_text("utf-8", "replace")


@pytest.fixture
def small_disk(repo: Checkout, tmp_path: Path) -> Iterator[Path]:
    """DVC's cache on a disk of one megabyte."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no mounting here")
    repo.dvc("cache", "dir", "--local", str(tmp_path))
    yield tmp_path
    repo.dvc("cache", "dir", "--local", "--unset")
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.fault(56)
@pytest.mark.fault(56, control=True)
def test_a_full_cache_loses_no_work_and_commit_takes_it_in(
    repo: Checkout, small_disk: Path
) -> None:
    said = repo.dvc("repro", "-s", "-f", "import_hf_weights", expect=255)
    assert "No space left on device" in said
    record = repo.folder / "records" / "import_hf_weights.jsonl"
    assert '"status": "FINISHED"' in record.read_text("utf-8")
    # The control: a plain copy fails there, too.
    with pytest.raises(OSError, match="No space left"):
        weights = repo.folder / "artifacts" / "init" / "model.safetensors"
        shutil.copyfile(weights, small_disk / "copy")
    (small_disk / "copy").unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    repo.dvc("commit", "-f", "import_hf_weights")
    assert "didn't change" in repo.dvc("repro", "-s", "import_hf_weights")


def ended(status: Path) -> bool:
    return "exit_code" in json.loads(status.read_text("utf-8"))


@pytest.fixture
def orphan(repo: Checkout) -> Iterator[Path]:
    """dvc was killed (SIGKILL) while its training ran, which goes on; the file with its status."""
    repo.dvc("repro", "import_hf_weights")
    raw = OmegaConf.load(repo.folder / "params.yaml")
    raw.train.steps = 150
    OmegaConf.save(raw, repo.folder / "params.yaml")
    dvc, _ = background(repo, "repro", "-f", "-s", "train")
    wait_for(lambda: list(repo.folder.glob(".runs/*/run_status.json")))
    dvc.kill()
    dvc.wait()
    (status,) = repo.folder.glob(".runs/*/run_status.json")
    yield status
    wait_for(lambda: ended(status), 120)


@pytest.mark.fault(57)
@pytest.mark.fault(57, control=True)
def test_an_orphaned_training_is_named_and_its_result_reused_once_it_has_ended(
    repo: Checkout, orphan: Path
) -> None:
    from mlflow import MlflowClient

    training = psutil.Process(json.loads(orphan.read_text("utf-8"))["pid"])
    training.suspend()  # so that it is at work while another one starts
    try:
        # The control: DVC's own lock died with dvc, it lets another command in.
        assert "busy" not in repo.dvc("repro", "-s", "-f", "tokenize")
        said = repo.dvc("repro", "-s", "train", expect=255)
        assert f"error: process {training.pid} trains this very configuration" in said
    finally:
        training.resume()
    wait_for(lambda: ended(orphan), 120)
    said = repo.dvc("repro", "-s", "train")
    assert "train: identical training already finished; reusing its verified result" in said
    client = MlflowClient(f"sqlite:///{(repo.folder / 'mlflow.db').as_posix()}")
    found = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    trained = [run for run in found if "train" in mlflow_run.ids(run.data.tags)]
    (row,) = trained
    history = client.get_metric_history(row.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(150))


@pytest.fixture
def long_training(tmp_path: Path) -> Checkout:
    """A tiny pipeline, ready for a training of a few seconds."""
    made = tiny_pipeline(tmp_path)
    set_to(made, "train.steps", 150)
    set_to(made, "train.val_every", 50)
    made.dvc("repro", "import_hf_weights", "tokenize")
    return made


def set_to(repo: Checkout, name: str, value: object) -> None:
    raw = OmegaConf.load(repo.folder / "params.yaml")
    OmegaConf.update(raw, name, value)
    OmegaConf.save(raw, repo.folder / "params.yaml")


def edited_while_it_trains(repo: Checkout, edit: Callable[[], None]) -> str:
    """What `dvc repro train` says when `edit` comes after a step has been done."""
    dvc, log = background(repo, "repro", "train")
    part = repo.folder / "records" / "train.jsonl.part"
    wait_for(lambda: part.exists() and "train/loss" in part.read_text("utf-8"))
    edit()
    assert dvc.wait(300) == 255, log.read_text("utf-8", "replace")
    return log.read_text("utf-8", "replace")


@pytest.mark.fault(59)
@pytest.mark.fault(59, control=True)
def test_a_setting_edited_while_it_trains_is_filed_nowhere(long_training: Checkout) -> None:
    repo = long_training
    old, new = 0.1, 0.3
    said = edited_while_it_trains(repo, lambda: set_to(repo, "train.weight_decay", new))
    assert "train.weight_decay: 0.1 then, 0.3 now" in said
    assert "edited while train is at work: train.weight_decay" in said  # hours before
    lock = repo.folder / "dvc.lock"
    assert "weight_decay" not in lock.read_text("utf-8")
    assert "weight_decay" not in repo.dvc("status", "tokenize")

    set_to(repo, "train.weight_decay", old)
    assert "reusing its verified result" in repo.dvc("repro", "train")
    assert "weight_decay: 0.1" in lock.read_text("utf-8")

    set_to(repo, "train.weight_decay", new)  # the run cache has nothing of this name
    said = repo.dvc("repro", "train")
    assert "is cached" not in said and "loss 10." in said
    assert "weight_decay: 0.3" in lock.read_text("utf-8")
    # The control: DVC itself hashes settings after the command.
    stage = "cmd: sleep 3\n    params: [x]\n"
    (repo.folder / "plain").mkdir()
    (repo.folder / "plain/dvc.yaml").write_text(f"stages:\n  plain:\n    {stage}", "utf-8")
    (repo.folder / "plain/params.yaml").write_text("x: 1\n", "utf-8")
    dvc, log = background(repo, "repro", "plain/dvc.yaml")
    wait_for(lambda: "sleep 3" in log.read_text("utf-8"))
    (repo.folder / "plain/params.yaml").write_text("x: 2\n", "utf-8")
    assert dvc.wait(60) == 0
    assert "x: 2" in (repo.folder / "plain/dvc.lock").read_text("utf-8")


@pytest.mark.fault(60)
def test_code_edited_while_it_trains_is_filed_nowhere(long_training: Checkout) -> None:
    repo = long_training
    file = repo.folder / "pipeline/training/optimizers.py"
    before = file.read_text("utf-8")
    said = edited_while_it_trains(repo, lambda: file.write_text(before + "\nX = 1\n", "utf-8"))
    assert "pipeline/training/optimizers.py: edited" in said
    assert "optimizers.py" not in (repo.folder / "dvc.lock").read_text("utf-8")
    file.write_text(before, "utf-8")
    assert "reusing its verified result" in repo.dvc("repro", "train")


@pytest.mark.fault(59)
def test_an_edit_before_a_later_stage_leaves_one_row(long_training: Checkout) -> None:
    from mlflow import MlflowClient

    repo = long_training
    dvc, log = background(repo, "repro")
    part = repo.folder / "records" / "train.jsonl.part"
    wait_for(lambda: part.exists() and "train/loss" in part.read_text("utf-8"))
    set_to(repo, "evaluate.choice_items", 2)
    assert dvc.wait(300) == 255
    said = log.read_text("utf-8", "replace")
    assert "evaluate.choice_items: 4 then, 2 now" in said and "train stage had begun" in said
    set_to(repo, "evaluate.choice_items", 4)
    repo.dvc("repro", "evaluate")
    client = MlflowClient(f"sqlite:///{(repo.folder / 'mlflow.db').as_posix()}")
    rows = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    trained = [row for row in rows if "train" in mlflow_run.ids(row.data.tags)]
    (row,) = trained
    assert "evaluate" in mlflow_run.ids(row.data.tags)


@pytest.mark.fault(44)
def test_an_edit_of_the_sampling_code_does_not_begin_an_interrupted_training_anew(
    long_training: Checkout,
) -> None:
    repo = long_training
    dvc, log = background(repo, "repro", "train")
    part = repo.folder / "records" / "train.jsonl.part"
    wait_for(lambda: part.exists() and "train/loss" in part.read_text("utf-8"))
    (status,) = repo.folder.glob(".runs/*/run_status.json")
    os.kill(json.loads(status.read_text("utf-8"))["pid"], signal.SIGTERM)
    assert dvc.wait(300) == 255, log.read_text("utf-8", "replace")
    file = repo.folder / "pipeline/inference/generation.py"
    file.write_text(file.read_text("utf-8") + "\nX = 1\n", "utf-8")
    assert "train: resuming from step" in repo.dvc("repro", "train")
