"""The demonstration of loss scaling: what it shows is what the real step did."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.drawing import figures
from pipeline.studies import loss_scaling
from pipeline.studies.loss_scaling import (
    FROM_THEN_ON,
    GROWTH_INTERVAL,
    INJECTED,
    MAX_SKIPPED,
    demonstrate,
)
from pipeline.training import loop
from pipeline.training.optimizers import Update

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shown() -> loss_scaling.Demonstration:
    return demonstrate(CPU)


def test_a_step_is_skipped_if_and_only_if_its_gradient_is_not_finite(shown) -> None:
    assert [p.skipped for p in shown.points] == [p.found_inf for p in shown.points]
    injected = {p.step for p in shown.points if p.injected}
    assert injected == {*INJECTED, *range(FROM_THEN_ON, FROM_THEN_ON + MAX_SKIPPED)}
    assert all(p.skipped for p in shown.points if p.injected)


def test_a_skipped_step_leaves_the_parameters_and_any_other_changes_them(shown) -> None:
    assert [p.unchanged for p in shown.points] == [p.skipped for p in shown.points]


def test_it_keeps_to_one_thread_and_leaves_the_training_all_of_them(monkeypatch) -> None:
    seen = []
    fit = loop.fit
    monkeypatch.setattr(
        loop, "fit", lambda *a, **k: seen.append(torch.get_num_threads()) or fit(*a, **k)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        demonstrate(CPU)
        assert torch.get_num_threads() == 2 and set(seen) == {1}
    finally:
        torch.set_num_threads(before)


def test_the_scale_halves_after_a_skip_and_doubles_after_good_steps(shown) -> None:
    good = 0
    for point, following in zip(shown.points, shown.points[1:], strict=False):
        good = 0 if point.skipped else good + 1
        factor = 0.5 if point.skipped else 2.0 if good == GROWTH_INTERVAL else 1.0
        good %= GROWTH_INTERVAL
        assert following.scale == point.scale * factor, point


def test_gradients_overflow_by_themselves_where_the_scale_is_too_large(shown) -> None:
    natural = [p for p in shown.points if p.skipped and not p.injected]
    assert natural and natural[0].step == 0
    fitting = min(p.scale for p in natural)
    assert any(not p.skipped and p.scale == fitting / 2 for p in shown.points)


def test_a_collapsing_scale_stops_the_run_with_its_reason(shown) -> None:
    last = shown.points[-1]
    assert last.step == FROM_THEN_ON + MAX_SKIPPED - 1
    assert f"step {last.step}: {MAX_SKIPPED} steps skipped in a row" in shown.stop
    assert f"down to {last.scale / 2:g}" in shown.stop


def test_a_scaler_that_does_not_skip_would_be_seen(monkeypatch) -> None:
    monkeypatch.setattr(Update, "launch", lambda self, allowed: self._optimizer.step())
    first = demonstrate(CPU).points[0]
    assert first.found_inf and not first.unchanged


def test_the_demonstration_uses_no_global_randomness() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert demonstrate(CPU).points == demonstrate(CPU).points
    assert torch.equal(torch.get_rng_state(), before)


def test_the_page_counts_what_happened(shown) -> None:
    page = shown.page()
    skipped = sum(p.skipped for p in shown.points)
    assert f"Of the {skipped} skipped steps {skipped} left every parameter as it was" in page
    assert shown.stop in page and page.count("\n|") == len(shown.points) + 2


def test_the_figure_draws_every_scale_of_the_demonstration(shown) -> None:
    (axes,) = figures.loss_scale(shown).axes
    drawn = axes.lines[0].get_ydata()
    assert [math.log2(y) for y in drawn] == [math.log2(p.scale) for p in shown.points]
