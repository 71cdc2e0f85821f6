"""Curves in MLflow: light for long trainings, whole for short ones, spikes and ends kept."""

from __future__ import annotations

import math
import random

import pytest

from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.records import record_file
from pipeline.tracking import mlflow_run, mlflow_store, recording
from pipeline.tracking.thinning import MOST, is_sampled
from tests.conftest import NoCourier

pytestmark = [
    pytest.mark.usefixtures("own_store"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
STEPS = 2300
SPIKE, LAST = 1777, STEPS - 1


def values(step: int) -> dict[str, float]:
    chance = random.Random(step)
    norm = 91_000.0 if step == SPIKE else chance.uniform(0.5, 2)
    return {"train/loss": 5 + chance.random(), "train/grad_norm": norm}


def history(run_id: str, key: str) -> list[tuple[int, float]]:
    points = mlflow_store.connect().get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


@pytest.fixture
def row(make_config, monkeypatch):
    """A row of a long training, shipped by `sync`."""
    monkeypatch.setattr(recording, "Courier", NoCourier)
    with recording.record("train", make_config(**{"train.steps": STEPS})) as record:
        for step in range(STEPS):
            record.metrics(values(step), step)
            if step % 100 == 99:
                record.metrics({"train/val_loss": 5.5}, step)
    command(["sync"])
    client = mlflow_store.connect()
    (experiment,) = client.search_experiments(filter_string="name = 'gpt2'")
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def test_a_long_training_has_a_thousand_points_a_curve_however_it_is_shipped(row) -> None:
    width = 2 * math.ceil(STEPS / MOST)
    for key in ("train/loss", "train/grad_norm"):
        true = {step: float(f"{values(step)[key]:.6g}") for step in range(STEPS)}
        kept = history(row.info.run_id, key)
        assert len(kept) <= MOST + 1
        assert all(true[step] == value for step, value in kept)
        for start in range(0, STEPS, width):
            part = [true[step] for step in range(start, min(STEPS, start + width))]
            shown = [value for step, value in kept if start <= step < start + width]
            assert {min(part), max(part)} <= set(shown)
        assert kept[-1] == (LAST, true[LAST])  # the table of runs shows the last one
    assert (SPIKE, 91_000.0) in history(row.info.run_id, "train/grad_norm")
    assert len(history(row.info.run_id, "train/val_loss")) == STEPS // 100
    events = list(record_file.read(paths.record("train")))
    assert sum("train/loss" in e.get("values", {}) for e in events) == STEPS  # the record has all
    before = history(row.info.run_id, "train/loss")
    again = mlflow_run.Row(mlflow_store.connect(), row.info.run_id, row.info.experiment_id)
    for at in range(0, len(events), 997):  # no end of a window
        again.write(events[at : at + 997], "none", mlflow_run.from_workspace)
    assert history(row.info.run_id, "train/loss") == before


def test_what_is_measured_for_as_long_as_a_training_takes_grows_ever_slower() -> None:
    kept = [number for number in range(100_000) if is_sampled(number)]
    assert kept[:MOST] == list(range(MOST))
    assert len(kept) < 5 * MOST
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert max(gaps) == 128 and gaps == sorted(gaps)
