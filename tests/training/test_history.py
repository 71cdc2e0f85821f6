"""What a training says of itself at each validation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.compute.precision import choose_precision
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.training import loop, training_step
from pipeline.training.history import History
from pipeline.training.loop import StepReport

SHAPE = GPTConfig(n_layer=2, n_head=1, n_embd=8, block_size=8, vocab_size=16, vocab_rows=16)


def report(step: int, loss: float, seconds: float) -> StepReport:
    return StepReport(
        loss=loss,
        grad_norm=1.0,
        loss_scale=1.0,
        skipped=False,
        step=step,
        learning_rate=0.002,
        seconds=seconds,
        data_seconds=0.0,
        tokens=512,
        steps=1000,
    )


def test_a_validation_is_a_line_about_the_steps_since_the_last_one(make_config) -> None:
    history = History(make_config().train, SimpleNamespace(metrics=lambda *_: None), GPT(SHAPE))
    history.curve = [report(0, 9.0, 3.0), report(1, 7.0, 1.0)]
    assert history.validated(8.5)
    assert history.line() == "step 2/1,000  train 8.000  val 8.500  lr 2.0e-03  256 tokens/s  best"
    history.curve += [report(2, 6.0, 0.25), report(3, 5.0, 0.25), report(4, 4.0, 0.5)]
    assert not history.validated(8.6)
    assert history.line() == "step 5/1,000  train 5.000  val 8.600  lr 2.0e-03  1,536 tokens/s"


def test_the_rate_of_all_steps_stands_beside_that_of_the_median_step(make_config) -> None:
    history = History(make_config().train, SimpleNamespace(metrics=lambda *_: None), GPT(SHAPE))
    history.curve = [report(step, 9.0, 10.0 if step == 5 else 1.0) for step in range(10)]
    summary = {"perf/tokens_per_second": 512.0, "perf/peak_memory_mib": 9.0}
    line = history.lines(summary | {"perf/warm_up_seconds": 0.0})[-1]
    assert "269 tokens/s over all steps, 512 in the median step" in line


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_ratio_of_an_update_is_measured_whatever_makes_it(make_config, optimizer: str) -> None:
    config = make_config(
        train__steps=3, train__warmup_steps=0, train__optimizer=optimizer, train__val_every=9
    ).train
    noted: list[float] = []
    record = SimpleNamespace(metrics=lambda values, _: noted.append(values["train/update_ratio"]))
    state = training_step.start(
        GPT(SHAPE), config, choose_precision("fp32", torch.device("cpu")), narrowing=1.0
    )
    history, weight = History(config, record, state.model), state.model.transformer.h[1].mlp.c_fc
    ids = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))
    before = weight.weight.detach().double()
    for step in loop.fit(state, config, lambda step: [(ids[:, :-1], ids[:, 1:])]):
        history.add(step)
        after = weight.weight.detach().double()
        assert noted[-1] == pytest.approx(
            ((after - before).norm() / before.norm()).item(), rel=1e-5
        )
        before = after.clone()
    assert len(noted) == 3 and min(noted) > 1e-4
