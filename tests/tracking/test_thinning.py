"""Curves in MLflow: light for long trainings, whole for short ones, spikes and ends kept."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.records import record_file
from pipeline.tracking import mlflow_run, mlflow_store, recording
from pipeline.tracking.thinning import MOST, Thinning
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


@dataclass(frozen=True)
class Point:
    """As one of MLflow's."""

    key: str
    step: int
    value: float


def history(run_id: str, key: str) -> list[tuple[int, float]]:
    points = mlflow_store.connect().get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def train(config, steps: range, journal: Path | None = None) -> None:
    """A session of a training; one that ends before STEPS is stopped."""
    with recording.record("train", config, journal) as record:
        for step in steps:
            record.metrics(values(step), step)
            if step % 100 == 99:
                record.metrics({"train/val_loss": 5.5}, step)
            record.metrics({"system/cpu_utilization_percentage": float(step == SPIKE)}, step)
        if steps.stop < STEPS:
            raise KeyboardInterrupt


@pytest.fixture
def shipped(make_config, monkeypatch):
    """shipped(setting=value) -> the row of a long training, made by `sync`."""
    monkeypatch.setattr(recording, "Courier", NoCourier)

    def made(**settings: object):
        train(make_config(**{"train.steps": STEPS} | settings), range(STEPS))
        return synced()

    return made


def synced():
    command(["sync"])
    client = mlflow_store.connect()
    (experiment,) = client.search_experiments(filter_string="name = 'gpt2'")
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def write_again(row, events: list[dict[str, Any]], at_once: int) -> None:
    again = mlflow_run.Row(mlflow_store.connect(), row.info.run_id, row.info.experiment_id)
    for at in range(0, len(events), at_once):
        again.write(events[at : at + at_once], "none", mlflow_run.from_workspace)


def test_a_long_training_has_a_thousand_points_a_curve_however_it_is_shipped(
    shipped,
) -> None:
    row = shipped()
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
    write_again(row, events, 997)  # no end of a window
    assert history(row.info.run_id, "train/loss") == before


def test_a_training_of_unknown_length_has_its_first_thousand_steps_whole_then_ever_fewer() -> None:
    chance, spikes = random.Random(0), {1000: 9.0, 1777: -9.0, 77_777: 9.0, 149_999: -9.0}
    points = [Point("a", n, spikes.get(n) or chance.random()) for n in range(150_000)]

    def kept(count: int, first: int = 0) -> list[int]:
        thinning, steps = Thinning(), []
        for point in points[:count]:
            steps += thinning.of_step([replace(point, step=first + point.step)])
        return [point.step - first for point in steps + thinning.rest()]

    assert kept(MOST) == list(range(MOST))
    last = kept(150_000)
    assert last[:MOST] == list(range(MOST)) and set(spikes) <= set(last)
    assert len(last) <= MOST + MOST / 4 * math.log2(150) + 2
    for begins, width in ((1000, 8), (1992, 8), (2000, 16), (99_840, 512)):
        window = points[begins : begins + width]
        ends = {f(window, key=lambda point: point.value).step for f in (min, max)}
        assert ends == {step for step in last if begins <= step < begins + width}
    shorter = kept(60_000)
    assert set(shorter[:-3]) <= set(last), "what came later takes nothing back"
    assert kept(60_000, first=123) == shorter, "a fork is thinned as any other"


def test_a_training_with_a_budget_is_thinned_by_its_record_alone_and_so_is_the_load(
    shipped,
) -> None:
    row = shipped(**{"train.time_budget": 5})
    for key in ("train/loss", "train/grad_norm", "system/cpu_utilization_percentage"):
        kept = history(row.info.run_id, key)
        assert MOST < len(kept) <= MOST + MOST // 4 * math.log2(STEPS / MOST) + 2
        assert kept[-1][0] == LAST and (SPIKE in dict(kept) or key == "train/loss")
    before = history(row.info.run_id, "train/loss")
    write_again(row, list(record_file.read(paths.record("train"))), 997)
    assert history(row.info.run_id, "train/loss") == before


def test_what_was_shipped_of_a_stopped_training_is_a_part_of_what_its_record_makes_later(
    make_config, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(recording, "Courier", NoCourier)
    config = make_config(**{"train.steps": STEPS, "train.time_budget": 5})
    with pytest.raises(KeyboardInterrupt):
        train(config, range(1805), tmp_path / "journal")
    stopped = list(record_file.read(record_file.part(paths.record("train")), whole=False))
    train(config, range(1805, STEPS), tmp_path / "journal")
    row = synced()
    before = history(row.info.run_id, "train/loss")
    write_again(row, stopped, len(stopped))
    assert history(row.info.run_id, "train/loss") == before
