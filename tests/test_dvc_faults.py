"""Faults around DVC, as a person meets them: what it says, and the command that mends it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

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
    log = repo.folder.with_name("background.log")
    with open(log, "wb") as out:
        command = [sys.executable, "-m", "dvc", *words]
        started = subprocess.Popen(
            command, cwd=repo.folder, env=repo.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    return started, log


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


@pytest.fixture
def orphan(repo: Checkout) -> Iterator[Path]:
    """dvc was killed (SIGKILL) while its training ran, which goes on; the file with its pid."""
    repo.dvc("repro", "import_hf_weights")
    raw = OmegaConf.load(repo.folder / "params.yaml")
    raw.train.steps = 150
    OmegaConf.save(raw, repo.folder / "params.yaml")
    dvc, _ = background(repo, "repro", "-f", "-s", "train")
    wait_for(lambda: list((repo.folder / ".runs").glob("*.holder")))
    dvc.kill()
    dvc.wait()
    (holder,) = (repo.folder / ".runs").glob("*.holder")
    yield holder
    wait_for(lambda: not holder.exists(), 120)


@pytest.mark.fault(57)
@pytest.mark.fault(57, control=True)
def test_an_orphaned_training_is_waited_for_and_its_result_adopted(
    repo: Checkout, orphan: Path
) -> None:
    from mlflow import MlflowClient

    pid = orphan.read_text("utf-8")
    # The control: DVC's own lock died with dvc, it lets another command in.
    assert "busy" not in repo.dvc("repro", "-s", "-f", "tokenize")
    said = repo.dvc("repro", "-s", "train")
    assert f"process {pid} trains this very configuration: waiting for its result" in said
    assert "train: this very training has been done; its checked result is taken" in said
    client = MlflowClient(f"sqlite:///{(repo.folder / 'mlflow.db').as_posix()}")
    found = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    trained = [run for run in found if "record.train" in run.data.tags]
    (row,) = trained
    history = client.get_metric_history(row.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(150))
