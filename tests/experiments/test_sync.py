"""What `sync` replays: each stage once, in order, beside what it met when it ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
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


def test_of_a_record_whose_one_copy_is_damaged_another_is_taken(monkeypatch) -> None:
    tokenize, train = record("tokenize", 1), record("train", 2)
    kept = [experiment(name, tokenize, train) for name in ("damaged", "good", "more")]
    asked: list[list[str]] = []

    def whole(found: Iterable[Experiment]) -> list[Experiment]:
        found = list(found)
        asked.append([one.name for one in found])
        bad = [replace(one, records={"tokenize": tokenize}, unreadable=["x"]) for one in found[:1]]
        return found if "good" in asked[-1] else bad

    monkeypatch.setattr(sync.dvc_history, "whole", whole)
    problems: list[str] = []
    found = sync._read_whole(sync.stages_that_ran(kept), kept, problems)
    assert [(ran.head["id"], ran.where.name) for ran in found] == [
        ("tokenize1", "damaged"),
        ("train2", "good"),
    ]
    assert asked == [["damaged"], ["good", "more"]] and problems == ["damaged: x"]
