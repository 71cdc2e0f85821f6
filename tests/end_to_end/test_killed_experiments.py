"""Killed in every way of running it, an experiment goes on in its one MLflow row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from omegaconf import OmegaConf

from tests.conftest import Checkout, tiny_pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="SIGKILL"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
STEPS = 400
WAYS = {
    "repro": ["repro"],
    "exp run": ["exp", "run", "-n", "fast", "-S", "train.lr=0.003"],
    "temp": ["exp", "run", "--temp", "-n", "aside", "-S", "train.lr=0.004"],
    "queue": ["exp", "run", "--queue", "-n", "later", "-S", "train.lr=0.005"],
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    made = tiny_pipeline(tmp_path_factory.mktemp("killed"))
    raw = OmegaConf.load(made.folder / "params.yaml")
    for name, value in {
        "train.steps": STEPS,
        "train.val_every": 100,
        "model.dropout": 0.2,
        "checkpoint.every_steps": 20,
    }.items():
        OmegaConf.update(raw, name, value)
    OmegaConf.save(raw, made.folder / "params.yaml")
    made.run("git", "commit", "--quiet", "--all", "--message", "longer")
    made.dvc("repro", "import_hf_weights")
    return made


def start(repo: Checkout, way: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dvc", *WAYS[way]]
    if way == "queue":
        repo.run(*command)
        command = [sys.executable, "-m", "dvc", "queue", "start"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=repo.folder, env=repo.env, **quiet)


def status(repo: Checkout) -> dict[str, object]:
    """Of the training that was at work last."""
    found = []
    for path in repo.folder.glob(".runs/*/run_status.json"):
        with_time = json.loads(path.read_text())
        found.append(with_time)
    return max(found, key=lambda said: said["time"], default={})


def killed_at(repo: Checkout, step: int) -> int:
    """SIGKILL to the training once it has saved after `step`; the step that it had saved."""
    for _ in range(1200):
        said = status(repo)
        if said.get("state") == "running" and said.get("step", 0) >= step:
            os.kill(said["pid"], signal.SIGKILL)
            return said["step"]
        time.sleep(0.05)
    raise AssertionError("no training came so far")


def finish(repo: Checkout, way: str) -> None:
    process = start(repo, way)
    process.wait(240)
    if way == "queue":
        repo.wait_for_queue(2)
        assert "Success" in repo.dvc("queue", "status")
    assert process.returncode == 0


@pytest.mark.fault(38)
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_experiment_goes_on_in_its_row(repo: Checkout, way: str) -> None:
    from mlflow import MlflowClient

    first = start(repo, way)
    saved = killed_at(repo, 60)
    first.wait(120)
    if way == "queue":
        repo.wait_for_queue(1)
    finish(repo, way)
    client = MlflowClient(f"sqlite:///{repo.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("gpt2")
    rate = {"repro": "0.002"}.get(way, WAYS[way][-1].partition("=")[2])
    rows = client.search_runs([experiment.experiment_id], f"params.`train.lr` = '{rate}'")
    (row,) = rows
    assert row.info.status == "FINISHED"
    for key in ("train/loss", "train/val_loss", "train/tokens"):
        steps = Counter(m.step for m in client.get_metric_history(row.info.run_id, key))
        assert set(steps.values()) == {1}, key
    steps = {m.step for m in client.get_metric_history(row.info.run_id, "train/loss")}
    assert steps == set(range(STEPS)) and saved < STEPS
    assert "val/loss" in row.data.metrics


def test_nothing_is_left_in_the_scratch_folder(repo: Checkout) -> None:
    left = [path.name for path in (repo.folder / ".runs").glob("*") if path.is_dir()]
    assert left == []
