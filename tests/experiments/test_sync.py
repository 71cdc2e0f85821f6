"""What `sync` replays: each stage once, in order, beside what it met when it ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.experiments import sync
from pipeline.records.run_data import Event, Experiment


def record(
    stage: str, time: int, command: str = "one", status: str = "FINISHED"
) -> list[dict[str, Any]]:
    head = {"id": f"{stage}{time}", "stage": stage, "time": time, "invocation": command}
    head["checkpoints"] = "none"
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


def reading(monkeypatch, damaged: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What is read whole from now on, as (experiment, stage); the `damaged` ones cannot be."""
    asked: list[tuple[str, str]] = []

    def read(one: Experiment, stage: str) -> Sequence[Event]:
        asked.append((one.name, stage))
        if one.name in damaged:
            raise InputError("x")
        return one.records[stage]

    monkeypatch.setattr(sync.dvc_history, "reader", lambda found: read)
    return asked


def test_of_a_record_whose_one_copy_is_damaged_another_is_taken(monkeypatch) -> None:
    tokenize, train = record("tokenize", 1), record("train", 2)
    kept = [experiment(name, tokenize, train) for name in ("damaged", "good", "more")]
    edited = experiment("damaged", tokenize, record("train", 9))
    asked, problems = reading(monkeypatch, ["damaged"]), list[str]()
    copies = sync.Copies(sync.stages_that_ran(kept), [edited, *kept], problems)
    for _ in range(2):
        assert copies.whole(train[0]) == (train, kept[1])
    assert asked == [("damaged", "train"), ("good", "train"), ("good", "train")]
    assert problems == ["damaged: x"], "it is asked for once"


def test_a_record_without_a_whole_copy_makes_no_row(monkeypatch) -> None:
    kept = experiment("only", record("train", 2))
    problems: list[str] = []
    reading(monkeypatch, ["only"])
    monkeypatch.setattr(sync, "open_row", lambda *_, **__: pytest.fail("a row was made"))
    (stage,) = sync.stages_that_ran([kept])
    copies = sync.Copies([stage], [kept], problems)
    assert sync._replay(None, stage, copies, Path()) is None and problems == ["only: x"]


def test_a_record_that_arrived_is_not_read_again_and_one_at_work_is_not_shipped(
    monkeypatch,
) -> None:
    """Else a hundred trainings of many steps would be in memory at once."""
    tokenize, numerics = record("tokenize", 1), record("numerics", 2, status="FAILED")
    train, evaluate = record("train", 3), record("evaluate", 4)
    kept = experiment("x", tokenize, numerics, train, evaluate)
    asked, replayed = reading(monkeypatch), list[str]()
    row = SimpleNamespace(
        lacks=lambda head: head["stage"] != "train",
        replay=lambda found, *_: replayed.append(found[0]["stage"]),
    )
    monkeypatch.setattr(sync, "open_row", lambda *_, **__: row)
    stage = sync.stages_that_ran([kept])[-1]
    assert sync._replay(None, stage, sync.Copies([stage], [kept], []), Path()) is row
    assert [name for _, name in asked] == ["evaluate", "tokenize", "numerics"]
    assert replayed == ["tokenize", "evaluate"]
