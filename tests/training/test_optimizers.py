"""Who decays, and the learning rate as a table of values."""

from __future__ import annotations

import pytest
import torch

from pipeline.compute.precision import choose_precision
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.studies import loss_scaling
from pipeline.training import loop, optimizers, training_step
from pipeline.training.optimizers import (
    build_optimizer,
    learning_rate,
    parameter_groups,
)


def test_matrices_decay_and_the_tied_weight_once_at_124m() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024))
    decayed, rest = parameter_groups(model, 0.1)
    assert (len(decayed["params"]), len(rest["params"])) == (50, 98)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert sum(p is model.transformer.wte.weight for p in decayed["params"]) == 1


def test_a_tensor_without_gradient_signal_shrinks_only_where_it_decays(make_config) -> None:
    config = make_config().train
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=8, vocab_rows=8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    build_optimizer(model, config).step()
    for name, p in model.named_parameters():
        factor = 1 - config.lr * config.weight_decay if p.dim() >= 2 else 1.0
        torch.testing.assert_close(p, before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_kernel_that_would_not_heed_the_scaler_is_not_given_its_steps(
    make_config, monkeypatch, precision: str
) -> None:
    assert "mps" in optimizers.FUSED and "mps" not in optimizers.SKIPPING
    monkeypatch.setattr(optimizers, "SKIPPING", ())  # as if this device were like that
    config = make_config(train__steps=1, train__warmup_steps=0, train__max_skipped=2).train
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=8, vocab_rows=8))
    state = training_step.start(
        model, config, choose_precision(precision, torch.device("cpu")), narrowing=1.0
    )
    assert state.optimizer.defaults["fused"] == (precision == "fp32")
    if precision == "fp16":
        model.transformer.ln_f.bias.register_hook(lambda g: torch.full_like(g, torch.inf))
        before = [p.detach().clone() for p in model.parameters()]
        ids = torch.zeros(1, 4, dtype=torch.int64)
        (report,) = loop.fit(state, config, lambda step: [(ids, ids)])
        assert report.skipped and all(map(torch.equal, before, model.parameters()))
        first = loss_scaling.demonstrate(torch.device("cpu")).points[0]
        assert first.skipped and first.unchanged


def test_the_schedule_equals_its_golden_table(make_config) -> None:
    config = make_config(train__steps=11, train__warmup_steps=2, train__lr=1.0, train__min_lr=0.1)
    found = [learning_rate(step, config.train) for step in range(11)]
    # Warm-up 1/2, 2/2; then 0.1 + 0.45 (1 + cos(pi k / 8)) for k = 0 .. 8.
    table = [0.5, 1.0, 1.0, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254, 0.1]
    assert found == pytest.approx(table, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        # Warm-up 1/2, 2/2; from 1.0 in eight equal steps to 0.1.
        ("linear", [0.5, 1.0, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1]),
        # The last 0.4 of 11 steps: four of them, from 1.0 in equal steps to 0.1.
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]),
    ],
)
def test_other_schedules_equal_theirs(make_config, schedule: str, table: list[float]) -> None:
    changes = {"steps": 11, "warmup_steps": 2, "lr": 1.0, "min_lr": 0.1, "cooldown": 0.4}
    config = make_config(train__schedule=schedule, **{f"train__{k}": v for k, v in changes.items()})
    assert [learning_rate(step, config.train) for step in range(11)] == pytest.approx(table)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("cooldown", [0.01, 1.0])
@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(s, w) for s in (1, 2, 3, 200) for w in (0, 1, 199) if w < s],  # the schema refuses the rest
)
def test_the_first_rate_is_not_zero_and_the_last_is_exactly_the_minimum(
    make_config, steps: int, warmup: int, schedule: str, cooldown: float
) -> None:
    config = make_config(
        train__steps=steps,
        train__warmup_steps=warmup,
        train__schedule=schedule,
        train__cooldown=cooldown,
    ).train
    assert learning_rate(0, config) > 0
    assert learning_rate(steps - 1, config) == config.min_lr
    assert max(learning_rate(step, config) for step in range(steps)) <= config.lr
