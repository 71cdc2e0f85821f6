"""A forecast on record: never changed, never written after its run, never left out."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.ladders import ladder, page, registered
from pipeline.ladders.ladder import Trained
from pipeline.ladders.registered import Forecast
from pipeline.records.run_data import Experiment
from pipeline.reports import report

EMPTY = dict.fromkeys(("notes", "tree", "curves", "samples"), [])
SETTINGS = {"model.n_embd": 128, "train.lr": 0.002}


def forecast(**changes: Any) -> Forecast:
    point = {
        "name": "rung",
        "record": "a",
        "size": "1x16",
        "parameters": 8,
        "tokens": 9,
        "loss": 6.0,
    }
    facts = {
        **{"run": "next-4x128-400", "time": 1000, "commit": "c", "code": "code", "data": "tokens"},
        **{"settings": SETTINGS, "parameters": 100, "tokens": 200, "points": [point]},
        **{"loss": 5.5, "low": 5.4, "high": 5.6, "noise": 0.05},
        **{"law": {"e": 1.0, "a": 2.0, "b": 3.0, "alpha": 0.1, "beta": 0.2}},
        **{"curve": [[100, 5.6, 5.5, 5.7], [200, 5.5, 5.4, 5.6]]},
    }
    return Forecast(**facts | changes)


def head(**changes: Any) -> dict[str, Any]:
    found = {"name": forecast().name, "time": 2000, "id": "r", "code": "code", "params": SETTINGS}
    return found | changes


def test_a_run_that_began_under_the_digest_counts_and_says_how_far_off_it_was() -> None:
    said = registered.outcome(forecast(), head(), 5.62, "tokens")
    assert said.problem == "" and not said.inside
    assert said.words() == (
        "5.620 came of a forecast of 5.500 [5.400, 5.600]: outside the band: the forecast was "
        "wrong, +0.120, 2.4 times the std of seeds. Registered before the run, as "
        f"{forecast().name} in the training's record shows."
    )
    assert registered.outcome(forecast(), head(), 5.45, "tokens").inside


@pytest.mark.parametrize(
    ("changes", "data", "problem"),
    [
        ({"name": "next-4x128-400"}, "tokens", "began under the name next-4x128-400"),
        ({"name": ""}, "tokens", "began without a name"),
        ({"name": forecast(loss=5.62).name}, "tokens", "which does not end in"),
        ({"time": 999}, "tokens", "began before the forecast"),
        ({"params": SETTINGS | {"train.lr": 0.1}}, "tokens", "has another train.lr"),
        ({}, "others", "other tokens"),
    ],
)
def test_a_run_without_the_digest_is_not_passed_off(changes, data: str, problem: str) -> None:
    said = registered.outcome(forecast(), head(**changes), 5.5, data)
    assert problem in said.problem
    assert "NOT registered before the run" in said.words() and "Registered" not in said.words()


def test_a_forecast_is_read_as_it_was_written() -> None:
    path = registered.write(forecast())
    assert path == Path.cwd() / "ladders" / f"{forecast().name}.json"
    assert registered.read(path) == forecast()
    before = path.read_bytes()
    registered.write(forecast())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"), [("loss", 5.61), ("low", 5.0), ("time", 5), ("noise", 9.0), ("commit", "d")]
)
def test_a_forecast_that_was_changed_is_refused_and_named(name: str, value: Any) -> None:
    path = registered.write(forecast())
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}), "utf-8")
    problems: list[str] = []
    assert registered.every(problems) == []
    assert "changed after it was written" in problems[0] and path.name in problems[0]


def test_a_changed_forecast_under_the_name_of_its_new_digest_is_not_that_of_the_run() -> None:
    better = replace(forecast(), loss=5.62, low=5.6, high=5.64)
    registered.write(better)
    (found,) = registered.every([])
    assert "does not end in" in registered.outcome(found, head(), 5.62, "tokens").problem


def test_what_is_no_forecast_is_one_error() -> None:
    path = registered.write(forecast())
    for text in ("{", "[]", "{}", '{"run": 1}'):
        path.write_text(text, "utf-8")
        with pytest.raises(InputError, match="not a forecast that `ladder` wrote"):
            registered.read(path)


def test_no_forecast_is_written_after_its_run() -> None:
    begun = head(name="lr-0.002")
    with pytest.raises(InputError, match=r"lr-0.002: this very training has begun already"):
        registered.seen_before(SETTINGS, [(head(params={}), True), (begun, True)])
    assert registered.seen_before(SETTINGS | {"train.lr": 0.1}, [(begun, True)]) == []


def test_what_was_seen_before_is_on_record_and_in_the_verdict() -> None:
    told = forecast(seen=["lr-0.002", "older"])
    assert registered.read(registered.write(told)).seen == ["lr-0.002", "older"]
    said = registered.outcome(told, head(name=told.name), 5.5, "tokens").words()
    assert "Seen before it, of other code, corpus or seeds: lr-0.002, older." in said


def test_the_first_forecast_of_a_run_is_the_one_that_counts() -> None:
    first, second = forecast(), forecast(time=1500, loss=5.6)
    other = forecast(time=10, settings=SETTINGS | {"train.lr": 0.1})
    assert registered.of_training([second, other, first], SETTINGS, "code") == first
    assert registered.of_training([other], SETTINGS, "code") is None


def test_the_first_run_decides_and_every_forecast_is_listed() -> None:
    def run(name: str, at: int, loss: float, code: str = "code") -> Trained:
        start = head(name=name, time=at) | {"kind": "start", "stage": "train"}
        tags = {"kind": "tags", "values": {"digest.train": "tokens"}}
        value = {"kind": "metrics", "step": 1, "time": 1, "values": {"train/val_loss": loss}}
        return Trained(Experiment(name, "rev", {"train": [start, tags, value]}), code)

    registered.write(forecast())
    registered.write(late := forecast(time=1500, loss=5.3))
    edited = run("next", 1, 5.9, "other code")
    known = [edited, run(late.name, 3000, 5.31), run(forecast().name, 2000, 5.5)]
    one, other = ladder.outcomes(known)
    assert one[1] and one[1].problem == "" and one[1].loss == 5.5
    assert other[1] and "does not end in" in other[1].problem, "the first run was another's"
    moved = [run(forecast().name, 2000, 5.5, "as dvc.yaml lists it now")]
    kept, _ = ladder.outcomes(moved)
    assert kept[1] and kept[1].problem == "", "a verdict outlives a refactoring"
    (blown, _) = ladder.outcomes([run(forecast().name, 2000, float("inf"))])
    assert blown[1] and not blown[1].inside and "inf came of a forecast" in blown[1].words()
    assert "<svg" in page.section([blown])[0]["image"]


def test_a_band_beside_its_forecast_is_drawn_all_the_same() -> None:
    (shown,) = page.section([(forecast(low=5.55), None)])
    assert "<svg" in shown["image"]


def test_the_report_shows_every_forecast_right_wrong_or_not_run_yet(monkeypatch) -> None:
    monkeypatch.setattr(ladder, "trained", lambda: [])
    assert report.forecasts() == []
    registered.write(forecast())
    (shown,) = report.forecasts()
    assert shown["name"] == forecast().name and "not run yet" in shown["words"]
    said = registered.outcome(forecast(), head(), 5.62, "tokens")
    (shown,) = page.section([(forecast(), said)])
    assert shown["words"] == said.words()
    assert shown["image"].startswith("<svg") and ">outcome<" in shown["image"]
    text = report.page([], {}, {"outcomes": [], "settings": []} | EMPTY, [shown])
    assert said.words() in html.unescape(text) and "Forecasts by a ladder" in text
