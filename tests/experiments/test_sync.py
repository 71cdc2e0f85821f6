"""What `sync` replays: each stage once, in order, beside what it met when it ran."""

from __future__ import annotations

from typing import Any

from pipeline.experiments import sync
from pipeline.records.run_data import Experiment


def record(
    stage: str, time: int, command: str = "one", status: str = "FINISHED"
) -> list[dict[str, Any]]:
    head = {"id": f"{stage}{time}", "stage": stage, "time": time, "invocation": command}
    return [{"kind": "start"} | head, {"kind": "end", "status": status}]


def experiment(name: str, *found: list[dict[str, Any]]) -> Experiment:
    return Experiment(name, name, {r[0]["stage"]: r for r in found})


def replayed(*found: Experiment) -> list[tuple[str, list[str], str]]:
    return [
        (step.head["id"], [other[0]["id"] for other in step.others], step.where.name)
        for step in sync.stages_that_ran(found)
    ]


def test_stages_come_oldest_first_and_each_once() -> None:
    tokenize, train = record("tokenize", 1), record("train", 2)
    first, second = record("sample", 3), record("sample", 4, "two")
    found = replayed(
        experiment("b", tokenize, train, second), experiment("a", tokenize, train, first)
    )
    assert found == [
        ("tokenize1", [], "b"),
        ("train2", ["tokenize1"], "b"),
        ("sample3", ["tokenize1", "train2"], "a"),
        ("sample4", ["tokenize1", "train2"], "b"),
    ]


def test_a_stage_stands_beside_what_it_met_and_not_beside_what_came_later() -> None:
    train = record("train", 2)
    forced = experiment("forced", record("tokenize", 5, "two"), train)
    own = experiment("own", record("tokenize", 1), train)
    expected = [("tokenize1", [], "own"), ("train2", ["tokenize1"], "own")]
    assert replayed(forced, own) == replayed(own, forced)
    assert replayed(forced, own)[:2] == expected


def test_stages_of_one_command_stand_together_without_depending_on_each_other() -> None:
    numerics, evaluate = record("numerics", 1), record("evaluate", 2)
    assert replayed(experiment("x", numerics, evaluate))[1] == ("evaluate2", ["numerics1"], "x")
    other = record("numerics", 1, "before")
    assert replayed(experiment("x", other, evaluate))[1] == ("evaluate2", [], "x")


def test_what_is_at_work_or_has_failed_is_left_to_its_own_process() -> None:
    tokenize, failed = record("tokenize", 1), record("train", 2, status="FAILED")
    at_work = record("train", 3)[:1]
    for unfinished in (failed, at_work):
        assert replayed(experiment("x", tokenize, unfinished)) == [("tokenize1", [], "x")]
