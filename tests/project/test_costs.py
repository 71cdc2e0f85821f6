"""The benchmarks of costs around training and of growth: their sums, on figures made up."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from benchmarks import growth, overhead
from benchmarks.side_by_side import Result


def test_a_label_is_not_charged_for_those_that_it_calls(monkeypatch) -> None:
    def save() -> None:
        now[0] += 2
        module.hashes()

    def hashes() -> None:
        now[0] += 5

    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    module = SimpleNamespace(save=save, hashes=hashes)
    parts = {"checkpoints": ((module, "save"),), "verification": ((module, "hashes"),)}
    monkeypatch.setattr(overhead, "PARTS", parts)
    clock = overhead.Clock()
    with clock.watching():
        module.save()
        module.save()
    assert clock.calls == {"checkpoints": [2, 2], "verification": [5, 5]}
    assert module.save is save and module.hashes is hashes


METRICS = "record: metrics"


def turn(
    step: float, whole: float, count: int = 10, **seconds: float
) -> tuple[float, overhead.Seconds]:
    calls = {overhead.STEPS: [step] * count} | {name: [value] for name, value in seconds.items()}
    return whole, calls


def test_costs_are_what_the_stage_takes_beyond_the_bare_loop_and_validation() -> None:
    bare = [turn(1.0, 11.0, batches=0.5)] * 3
    stages = [turn(1.1, 20.0, batches=0.5, validation=4.0, **{METRICS: 1.5})] * 3
    trained, costs = overhead.costs_of(bare, stages, every_minutes=0)
    assert trained == 15.0
    assert costs[overhead.SLOWER] == pytest.approx(1.0)
    assert costs[METRICS] == 1.5 and costs["batches"] == 0
    assert costs["the rest of the stage"] == pytest.approx(20 - 11 - 0.5 - 4 - 1.5)


def test_over_an_hour_steps_and_checkpoints_recur_and_a_forecast_does_not() -> None:
    begun, saved = overhead.UNDISTURBED.start, overhead.UNDISTURBED.stop
    count = saved + 2
    bare = [turn(1.0, 1.0 + count, count)]
    stages = [turn(1.0, 30.0, count, forecast=3.0, checkpoints=8.0, **{METRICS: 0.1})]
    steps = stages[0][1][overhead.STEPS]
    steps[:begun] = [1.5] * begun
    steps[saved:] = [1.25] * 2  # while the checkpoint goes to the disk
    trained, costs = overhead.costs_of(bare, stages, every_minutes=10)
    assert trained == 3600
    assert costs[METRICS] == pytest.approx(3600 / count * 0.1)
    assert costs[overhead.SLOWER] == 0
    assert costs["first steps slower than later ones"] == pytest.approx(begun * 0.5)
    assert costs["checkpoints"] == pytest.approx(6 * (8 + 2 * 0.25))
    assert costs["forecast"] == 3.0


def test_growth_is_measured_against_that_of_the_work() -> None:
    axis = growth.Axis("x", (1, 2, 4), lambda x: list, growth.linear, growth.constant, "")
    found = [
        Result("1", "", [1.0], 150.0),
        Result("2", "", [2.0], 150.0),
        Result("4", "", [16.0], 250.0),
    ]
    table = growth.growth(axis, found, idle_mib=100.0)
    assert [row["time over"] for row in table] == [1, 1, 4]
    assert [row["memory over"] for row in table] == [1, 1, 3]
    with pytest.raises(RuntimeError, match="x 2: out of memory"):
        growth.growth(axis, [found[0], Result("2", "", refused="out of memory")] * 2, 100.0)


def test_every_axis_starts_and_its_laws_are_numbers() -> None:
    for name, axis in growth.AXES.items():
        assert axis.points == tuple(sorted(axis.points)), name
        assert all(law(axis.points[-1]) > 0 for law in (axis.time, axis.memory))
    for name in ("batches", "steps"):
        growth.AXES[name].start(100_000 if name == "batches" else 60)()


def test_every_timed_part_is_one_that_the_train_stage_has() -> None:
    with overhead.Clock().watching():
        assert overhead.loop.launch.__wrapped__
    assert not hasattr(overhead.loop.launch, "__wrapped__")
