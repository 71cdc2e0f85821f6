"""A training that may take so many minutes: how many steps, and where the rate arrives."""

from __future__ import annotations

import pytest
import torch

from pipeline.compute.precision import choose_precision
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.training import loop, training_step
from pipeline.training.optimizers import learning_rate
from pipeline.training.time_budget import Budget


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(config, seconds_of) -> tuple[list[int], float]:
    """Steps planned before each step that was done, and the seconds that they took."""
    clock, planned, step = Clock(), [], 0
    budget = Budget(config, clock)
    began = clock.now
    while step < (steps := budget.steps(step)):
        planned.append(steps)
        clock.now += seconds_of(step)
        step += 1
    return planned, clock.now - began


@pytest.fixture
def config(make_config):
    # A validation of 2 micro-batches takes two thirds of a step.
    return make_config(
        train__steps=1000, train__time_budget=10, train__val_tokens=2048, train__warmup_steps=100
    ).train


def test_no_budget_and_a_budget_that_suffices_leave_the_steps_alone(make_config, config) -> None:
    plain = make_config(train__steps=30, train__warmup_steps=2).train
    assert run(plain, lambda step: 60.0)[0] == [30] * 30
    assert run(config, lambda step: 0.5)[0] == [1000] * 1000


def test_the_steps_fit_the_budget_and_the_last_validation_too(config) -> None:
    planned, seconds = run(config, lambda step: 4.0 if step else 20.0)
    assert 600 - 2 * 4.0 < seconds + 4.0 * 2 / 3 <= 600
    assert planned[:6] == [1000] * 6 and set(planned[6:]) == {len(planned)}


@pytest.mark.parametrize("late", [1.0, 8.0])
def test_a_machine_that_changes_its_pace_still_ends_in_time(config, late: float) -> None:
    planned, seconds = run(config, lambda step: 4.0 if step < 50 else late)
    assert 560 < seconds < 605
    assert planned[-1] == len(planned)
    assert (len(planned) > 145) == (late < 4)


def test_what_lies_between_steps_counts(config) -> None:
    _, seconds = run(config, lambda step: 4.0 + (30.0 if step % 25 == 24 else 0.0))
    assert 540 < seconds < 640


def test_a_budget_of_a_moment_still_ends_at_the_minimum(make_config) -> None:
    config = make_config(train__steps=1000, train__time_budget=0.01).train
    planned, _ = run(config, lambda step: 4.0)
    assert planned[-1] == len(planned) == 7
    assert learning_rate(6, config, planned[-1]) == config.min_lr


def test_a_run_cut_short_keeps_the_schedules_shape(config) -> None:
    whole = [learning_rate(step, config) for step in range(1000)]
    short = [learning_rate(step, config, 100) for step in range(100)]
    assert short[:10] == pytest.approx(whole[9:100:10])
    assert short[-1] == config.min_lr
    assert max(abs(short[n] - whole[10 * n]) for n in range(10, 100)) < 0.02 * config.lr


def test_a_real_training_ends_with_its_budget_at_the_minimum_rate(make_config) -> None:
    config = make_config(train__steps=10_000, train__warmup_steps=0, train__time_budget=0.05).train
    shape = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=97, vocab_rows=97)
    model = GPT(shape)
    initialize(model, make_config().init, torch.Generator().manual_seed(0))
    state = training_step.start(
        model, config, choose_precision("fp32", torch.device("cpu")), narrowing=1.0
    )
    ids = torch.randint(97, (1, 9))
    reports = list(
        loop.fit(
            state,
            config,
            lambda step: [(ids[:, :-1], ids[:, 1:])],
            steps_at=Budget(config).steps,
        )
    )
    assert 7 <= len(reports) < 10_000
    assert [report.last for report in reports] == [False] * (len(reports) - 1) + [True]
    assert reports[-1].learning_rate == config.min_lr < reports[0].learning_rate
