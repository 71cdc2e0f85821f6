"""The soak notices what was lost, doubled or changed, and its table says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.storage.folders import writing
from tools import soak, soak_check
from tools.soak_check import Outcome, differences

LOSSES = [("train/loss", step, 3.0 - step / 10) for step in range(4)]
TIMES = [("perf/step_tokens_per_second", step, 0.5) for step in range(4)]
REFERENCE = Outcome(
    models={"last": "a1", "model": "b2"},
    points=LOSSES + TIMES,
    rows=[("FINISHED", LOSSES + TIMES)],
    unfit=[],
)


def with_points(points: list[soak_check.Point]) -> Outcome:
    return dataclasses.replace(REFERENCE, points=points, rows=[("FINISHED", points)])


def test_a_training_that_only_took_other_times_has_lost_nothing() -> None:
    slower = [("perf/step_tokens_per_second", step, 0.9) for step in range(4)]
    assert differences(with_points(LOSSES + slower), REFERENCE) == []


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (LOSSES + LOSSES[2:3], "the record: train/loss too often at 2"),
        (LOSSES[:1] + LOSSES[2:], "the record: train/loss missing at 1"),
        (LOSSES[:3] + [("train/loss", 3, 2.70001)], "the record: train/loss of another value at 3"),
        (LOSSES + [("train/loss", 4, 2.6)], "the record: train/loss too often at 4"),
        ([], "the record: train/loss missing at 0, 1, 2, 3"),
    ],
)
def test_a_step_that_is_missing_doubled_or_changed_is_noticed(points, said: str) -> None:
    assert differences(with_points(points), REFERENCE) == [said]


def test_a_changed_weight_is_noticed() -> None:
    found = dataclasses.replace(REFERENCE, models={"last": "a1", "model": "b3"})
    assert differences(found, REFERENCE) == ["artifacts/model: other weights"]
    gone = dataclasses.replace(REFERENCE, models={"model": "b2"})
    assert differences(gone, REFERENCE) == ["artifacts/last: other weights"]


def test_rows_that_lack_double_or_split_the_record_are_noticed() -> None:
    full = REFERENCE.points
    for rows, said in [
        ([("FINISHED", full[:-1])], ["MLflow's row: perf/step_tokens_per_second missing at 3"]),
        ([("FINISHED", full + full[:1])], ["MLflow's row: train/loss too often at 0"]),
        ([], ["MLflow: one row that is FINISHED expected, got none"]),
        ([("RUNNING", full)], ["MLflow: one row that is FINISHED expected, got RUNNING"]),
        (
            [("KILLED", full), ("FINISHED", full)],
            ["MLflow: one row that is FINISHED expected, got KILLED, FINISHED"],
        ),
    ]:
        assert differences(dataclasses.replace(REFERENCE, rows=rows), REFERENCE) == said


def test_leftovers_and_damaged_checkpoints_are_found(tmp_path: Path) -> None:
    saved = tmp_path / ".runs" / "f" / "checkpoints" / "step-00000050"
    with writing(saved, 9) as partial:
        (partial / "model.safetensors").write_bytes(b"weights")
    assert soak_check.checkpoints(tmp_path) == [saved]
    assert soak_check.unfit(tmp_path) == []
    (saved / "model.safetensors").write_bytes(b"wejghts")
    (tmp_path / "artifacts" / ".last.ab12.partial").mkdir(parents=True)
    (tmp_path / "train.jsonl.part").touch()
    found = [".runs/f/checkpoints/step-00000050", "artifacts/.last.ab12.partial"]
    assert soak_check.unfit(tmp_path) == [*found, "train.jsonl.part"]
    (saved / "sha256.json").unlink()
    assert found[0] in soak_check.unfit(tmp_path)


def test_the_table_counts_a_fault_as_survived_only_in_rounds_that_lost_nothing() -> None:
    rounds = [
        soak.Played(["SIGKILL to the trainer", "disk full during a save"], [], 3),
        soak.Played(["SIGKILL to the trainer"], ["artifacts/last: other weights"], 2),
    ]
    lines = [line.split(" | ") for line in soak.table(rounds).splitlines()]
    cells = {
        line[0].strip("| "): [int(cell.strip(" |")) for cell in line[1:]] for line in lines[2:]
    }
    assert cells["SIGKILL to the trainer"] == [2, 1, 1]
    assert cells["disk full during a save"] == [1, 1, 0]
    assert cells["all"] == [3, 2, 1]
    assert set(cells) == {*soak.FAULTS, "all"}
