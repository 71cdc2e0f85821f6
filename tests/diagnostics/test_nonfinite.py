"""Steps that leave the finite numbers: nothing is updated, and the layer and text are named."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipeline.compute.precision import choose_precision
from pipeline.data.token_files import Tokens
from pipeline.diagnostics import nonfinite, token_spans
from pipeline.errors import NumericsError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.training import compiling, loop, training_step, validation
from pipeline.training.optimizers import parameter_groups
from pipeline.training.training_step import Batch, TrainState

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128)
CPU = torch.device("cpu")


@pytest.fixture
def settings(make_config) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        changes = {"train__steps": 4, "train__warmup_steps": 0} | changes
        return make_config(train__batch_size=2, train__sequence_length=16, **changes)

    return make


def made(config: Any, precision: str = "fp32", **shape: Any) -> TrainState:
    model = GPT(replace(SHAPE, **shape))
    initialize(model, config.init, torch.Generator().manual_seed(0))
    return training_step.start(model, config.train, choose_precision(precision, CPU), narrowing=1.0)


def batches(step: int, count: int = 2) -> list[Batch]:
    ids = torch.randint(97, (count, 2, 17), generator=torch.Generator().manual_seed(step))
    return [(part[:, :-1], part[:, 1:]) for part in ids]


def nan_weight(state: TrainState) -> None:
    state.model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = math.nan


def inf_norm_weight(state: TrainState) -> None:
    state.model.transformer.h[0].ln_2.weight.data[3] = math.inf


def nan_attention(state: TrainState) -> None:
    state.model.transformer.h[0].attn.attend = lambda q, *_: q * math.nan


def nan_unseen_token(state: TrainState) -> None:
    state.model.transformer.wte.weight.data[96] = math.nan  # batches below hold no 96


def nan_token(state: TrainState) -> None:
    """Token 96 reads as nan; the head, which is the same weight, is left alone."""

    def spoil(_: object, ids: tuple[Tensor], read: Tensor) -> Tensor:
        return read.masked_fill((ids[0] == 96).unsqueeze(-1), math.nan)

    state.model.transformer.wte.register_forward_hook(spoil)


def large_logits(state: TrainState) -> None:
    """Too large for fp16 alone."""
    state.model.transformer.ln_f.weight.data.fill_(1e4)
    state.model.transformer.wte.weight.data.mul_(50)


def gradient(value: float) -> Callable[[TrainState], None]:
    def inject(state: TrainState) -> None:
        weight = state.model.transformer.h[1].attn.c_proj.weight
        weight.register_hook(lambda g: torch.full_like(g, value))

    return inject


FORWARD = {
    nan_weight: "the output of transformer.h.1.mlp.c_fc (32 nan of 2,048 numbers; "
    "transformer.h.1.mlp.c_fc.weight holds 1 nan of 1,024 numbers)",
    inf_norm_weight: "the output of transformer.h.0.ln_2 (32 inf of 512 numbers; "
    "transformer.h.0.ln_2.weight holds 1 inf of 16 numbers)",
    nan_attention: "the input of transformer.h.0.attn.c_proj (512 nan of 512 numbers)",
    nan_unseen_token: "the logits (16 nan of 1,552 numbers; "
    "transformer.wte.weight holds 16 nan of 2,048 numbers)",
}


def small_ids(step: int) -> list[Batch]:
    return [(x.clamp(max=95), y.clamp(max=95)) for x, y in batches(step)]


def message(state: TrainState, config: Any, given: Callable[[int], list[Batch]]) -> str:
    with pytest.raises(NumericsError) as stopped:
        list(loop.fit(state, config.train, given))
    error = nonfinite.explain(stopped.value, state, lambda step, place: f"text of step {step}")
    assert error.exit_code == 4
    return str(error)


def broken(*_: object) -> str:
    raise OSError("the token file is gone")


def everything(state: TrainState) -> list[Tensor]:
    """Weights, moments and counts, to be compared bit by bit."""
    moments = tree_leaves(state.optimizer.state_dict()["state"])
    held = [*state.model.state_dict().values(), *(m for m in moments if isinstance(m, Tensor))]
    return [value.clone().view(torch.int32) for value in held]


def same(before: list[Tensor], state: TrainState) -> bool:
    return all(map(torch.equal, before, everything(state)))


def after_one_step(config: Any, precision: str, fused: bool) -> TrainState:
    state = made(config, precision)
    groups = parameter_groups(state.model, 0.1)
    state.optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=fused)
    list(loop.fit(state, replace(config.train, steps=1), small_ids))
    assert state.optimizer.state and state.skipped == 0
    return state


@pytest.mark.fault(31)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("inject", FORWARD)
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_layer(
    settings, inject: Callable[[TrainState], None], precision: str, fused: bool
) -> None:
    config = settings(train__accumulate=2)
    state = after_one_step(config, precision, fused)
    inject(state)
    before = everything(state)
    said = message(state, config, small_ids)
    if precision == "fp8":  # one scale a tensor, so that one NaN is all of them
        said = said.replace("(2,048 nan of 2,048", "(32 nan of 2,048")
    assert said == (
        "step 1: the loss is nan; no update was made\nFirst not finite: "
        f"{FORWARD[inject]} in micro-batch 1 of 2\ntext of step 1"
    )
    assert same(before, state)


@pytest.mark.fault(31)
def test_logits_that_overflow_in_fp16_alone_are_named_there_alone(settings) -> None:
    for precision in ("fp32", "bf16", "fp16"):
        config = settings(train__max_skipped=1)
        state = made(config, precision)
        large_logits(state)
        steps = loop.fit(state, replace(config.train, steps=1), batches)
        if precision != "fp16":
            assert len(list(steps)) == 1
            continue
        assert re.search(
            r"the loss is nan; no update was made\nFirst not finite: the logits "
            r"\([\d,]+ inf of 1,552 numbers\)",
            message(state, config, batches),
        )


@pytest.mark.fault(32)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_parameter(
    settings, value: float, precision: str, fused: bool
) -> None:
    config = settings()
    state = after_one_step(config, precision, fused)
    gradient(value)(state)
    before = everything(state)
    assert message(state, config, batches) == (
        f"step 1: the gradient norm is {value}; no update was made\nFirst not finite: going "
        "backward, the gradient of transformer.h.1.attn.c_proj.weight "
        f"(256 {value} of 256 numbers) in micro-batch 1 of 2\ntext of step 1"
    )
    assert same(before, state)


@pytest.mark.fault(33)
def test_a_collapsed_loss_scale_names_the_gradient_that_overflowed_and_changes_nothing(
    settings,
) -> None:
    config = settings(train__steps=9, train__max_skipped=4)
    state = after_one_step(config, "fp16", True)
    gradient(math.inf)(state)
    before = everything(state)
    assert message(state, config, batches).startswith(
        "step 4: 4 steps skipped in a row (train.max_skipped), the loss scale is down to 4096; "
        "try precision=bf16 or a lower train.lr\nFirst not finite: going backward, the gradient "
        "of transformer.h.1.attn.c_proj.weight (256 inf of 256 numbers) in micro-batch 1 of 2"
    )
    assert same(before, state)


@pytest.mark.fault(33)
def test_an_overflow_is_looked_for_at_the_scale_that_it_happened_at(settings) -> None:
    config = settings(train__max_skipped=1)
    for exponent in range(10, 40):  # the first scale that is too large by itself: half of it is not
        state = made(config, "fp16")
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent)
        try:
            list(loop.fit(state, replace(config.train, steps=1), batches))
        except NumericsError:
            break
    assert state.scaler.get_scale() == 2.0 ** (exponent - 1)
    assert "the gradient of transformer." in nonfinite.trace(state).what
    state.scaler_before = state.scaler
    assert nonfinite.trace(state) is None


def test_gradients_whose_norm_alone_overflows_are_told_as_that(settings) -> None:
    state = made(settings())
    gradient(3e38)(state)
    said = message(state, settings(), lambda step: batches(step, 1))
    assert "the gradient norm is inf" in said
    assert (
        "First not finite: the norm of all gradients, each of which is finite; "
        "transformer.h.1.attn.c_proj.weight's is the largest" in said
    )


def test_the_micro_batch_and_the_sequence_at_fault_are_told_apart(settings) -> None:
    def given(step: int) -> list[Batch]:
        (x, y), *_ = small_ids(0)
        odd = x.clone()
        odd[1, 5] = 96
        return [(x, y), (x, y), (odd, y)]

    state = made(settings())
    nan_token(state)
    assert (
        "First not finite: the output of transformer.wte (16 nan of 512 numbers), in sequence 2 "
        "of micro-batch 3 of 3"
    ) in message(state, settings(), given)


def test_the_step_done_again_draws_the_same_dropout(settings) -> None:
    seen: list[Tensor] = []
    state = made(settings(), dropout=0.5)
    drop = state.model.transformer.drop
    drop.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    nan_weight(state)
    state.model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = 0.0
    poisoned = state.model.transformer.ln_f.bias
    poisoned.register_hook(lambda g: g * math.nan if len(seen) % 2 == 0 else g)
    assert "ln_f.bias (16 nan of 16 numbers) in micro-batch 2 of 2" in message(
        state, settings(), batches
    )
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_a_compiled_step_is_looked_into_without_the_compiler(settings, monkeypatch) -> None:
    monkeypatch.setattr(compiling, "why_not_compile", lambda precision: "")
    monkeypatch.setattr(
        torch, "compile", lambda plain, **_: lambda *given: plain(*given) * math.nan
    )
    config = settings(train__compile=True)
    state = made(config)
    assert nonfinite.AGAIN in message(state, config, batches)
    nan_weight(state)
    assert "First not finite: the output of transformer.h.1.mlp.c_fc" in message(
        state, config, batches
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_a_really_compiled_step_names_its_layer(settings) -> None:
    config = settings(train__compile=True)
    state = made(config)
    nan_weight(state)
    assert "First not finite: the output of transformer.h.1.mlp.c_fc" in message(
        state, config, batches
    )


def test_trouble_in_the_search_does_not_hide_the_error(settings) -> None:
    state = made(settings())
    nan_weight(state)
    with pytest.raises(NumericsError) as stopped:
        list(loop.fit(state, settings().train, batches))
    assert str(nonfinite.explain(stopped.value, state, broken)) == (
        "step 0: the loss is nan; no update was made\nWhere that began could not be found: "
        "the token file is gone"
    )


def test_the_search_leaves_no_hook_behind(settings) -> None:
    state = made(settings())
    nan_weight(state)
    message(state, settings(), batches)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in state.model.modules()]
    assert not any(hooks)


# --- with the real batches of real tokens


@pytest.fixture
def tokens() -> Tokens:
    ids = np.random.default_rng(0).integers(0, 96, 400).astype(np.uint16)
    return Tokens(ids, 400, "", 1, Path("train.bin"))


def test_the_error_says_where_the_tokens_lie(settings, tokens: Tokens) -> None:
    config = settings(train__accumulate=2)
    state = made(config)
    nan_weight(state)
    steps = loop.fit(
        state, config.train, functools.partial(loop.micro_batches, tokens, config.train)
    )
    text = functools.partial(token_spans.of_step, tokens, config.train)
    with pytest.raises(NumericsError) as stopped:
        list(steps)
    said = str(nonfinite.explain(stopped.value, state, text))
    first, _, second, third, *rest = said.splitlines()
    assert second == "The step's tokens in train.bin:"
    spans = re.findall(r"(\d+)-(\d+) \(document 0 of 1\)", "\n".join([third, *rest]))
    read = [tokens.ids[int(a) : int(b) + 1].tolist() for a, b in spans]
    fed = [
        [*x.tolist(), int(y[-1])] for xs, ys in state.batches for x, y in zip(xs, ys, strict=True)
    ]
    assert read == fed and len(read) == 4


@pytest.mark.fault(31)
def test_a_validation_loss_that_is_not_finite_names_the_layer_and_the_batch(
    settings, tokens: Tokens
) -> None:
    config = settings(train__val_tokens=128)
    tokens.ids[70] = 96
    state = made(config, dropout=0.5)
    nan_token(state)
    with pytest.raises(validation.ValidationError) as stopped:
        validation.validate(state, tokens, config.train)
    told = nonfinite.explain_validation(stopped.value, state, tokens, config.train)
    assert told.exit_code == 4
    assert str(told) == (
        "the validation loss is nan: this model is not kept\nFirst not finite: the output of "
        "transformer.wte (16 nan of 512 numbers), in sequence 1 of validation batch 3\n"
        "Its tokens in train.bin: 64-80 (document 0 of 1)\n"
        "Read them with `python -m pipeline text --split val 64-80`."
    )
    assert state.batches[0][0][0].tolist() == tokens.ids[64:80].tolist()


# --- controls: what the same faults do to a step that nobody guards


def naive_step(state: TrainState, batch: Batch) -> None:
    """The usual loop: loss, backward, step."""
    x, y = batch
    loss = torch.nn.functional.cross_entropy(state.model(x).flatten(0, 1), y.flatten())
    loss.backward()
    state.optimizer.step()


def spoilt(state: TrainState) -> float:
    """The share of weights that are not finite."""
    odd = [~p.isfinite() for p in state.model.parameters()]
    return sum(int(o.sum()) for o in odd) / sum(o.numel() for o in odd)


@pytest.mark.fault(31, control=True)
@pytest.mark.fault(32, control=True)
@pytest.mark.parametrize("inject", [*FORWARD, gradient(math.inf), gradient(math.nan)])
def test_an_unguarded_step_spoils_the_weights(settings, inject) -> None:
    state = made(settings())
    inject(state)
    before = spoilt(state)
    naive_step(state, small_ids(0)[0])
    whole = inject in FORWARD
    assert spoilt(state) > (0.5 if whole else before + 0.01)


@pytest.mark.fault(33, control=True)
def test_an_unguarded_scaler_skips_for_ever(settings) -> None:
    state = after_one_step(settings(), "fp16", True)
    gradient(math.inf)(state)
    before = everything(state)
    for _ in range(40):
        training_step.gradients(state, batches(0))
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
    assert same(before, state) and state.scaler.get_scale() == 2.0**-24
