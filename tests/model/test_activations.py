"""Activation checkpointing: the same numbers from less memory, where gradients are made."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pipeline.compute.precision import choose_precision
from pipeline.compute.runtime import generator
from pipeline.diagnostics import nonfinite
from pipeline.errors import ConfigError, NumericsError
from pipeline.model import activations
from pipeline.model.gpt import GPT, Block
from pipeline.model.init import initialize
from pipeline.studies import tiny
from pipeline.training import compiling, loop, training_step
from tests.helpers import stand_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def state_of(checkpointed: bool, name: str = "fp32", device=CPU, **settings):
    """Three blocks before their first step, dropout's generator seeded."""
    compiled = settings.pop("compile", False)
    model = GPT(replace(tiny.SHAPE, n_layer=3, **settings))
    initialize(model, tiny.INIT, generator(0, "weights"))
    config = replace(tiny.TRAIN, checkpoint_activations=checkpointed, compile=compiled)
    torch.manual_seed(5)
    return training_step.start(
        model.to(device), config, choose_precision(name, device), narrowing=1.0
    )


def gradients(state) -> list[torch.Tensor]:
    """The loss and all gradients of two micro-batches, of which the second one is shorter."""
    (x, y), *_ = tiny.batches(0)
    loss = training_step.gradients(state, [(x, y), (x[:2], y[:2])])
    return [loss, *(p.grad for p in state.model.parameters())]


def kept(call) -> int:
    """Bytes of what autograd keeps for the backward pass while `call` runs, by storage."""
    storages = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16", "fp8"])
def test_losses_gradients_and_later_chance_are_equal_to_the_bit(name: str, attention: str) -> None:
    found = []
    for checkpointed in (False, True):
        state = state_of(checkpointed, name, dropout=0.2, attention=attention)
        found.append([*gradients(state), torch.get_rng_state()])
    assert all(map(torch.equal, *found)) and found[0][1].any()


def test_names_and_classes_are_those_of_any_model_once_it_is_off_again() -> None:
    plain, state = (state_of(checkpointed) for checkpointed in (False, True))
    assert list(plain.model.state_dict()) == list(state.model.state_dict())
    activations.mark(state.model, checkpointed=False)
    assert {type(block) for block in state.model.transformer.h} == {Block}


def test_only_inputs_are_kept_of_blocks_and_nothing_without_gradients() -> None:
    x, _ = tiny.batches(0)[0]
    models = [state_of(checkpointed).model for checkpointed in (False, True)]
    plain, less = (kept(lambda model=model: model.hidden(x)) for model in models)
    assert less < plain / 3
    calls, state = [], state_of(True)
    for block in state.model.transformer.h:
        block.ln_1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():  # as in validation and sampling
        assert kept(lambda: state.model(x)) == 0
    assert len(calls) == 3
    gradients(state)
    assert len(calls) == 3 + 2 * 2 * 3, "of two micro-batches, each forward and once again"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_compiled_step_stays_one_graph_and_keeps_less(monkeypatch, dropout: float) -> None:
    # Without the compiler's last stage, which takes a minute: graphs and what they keep are made.
    compiler = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(compiling, "why_not_compile", lambda precision: "")
    x, y = tiny.batches(0)[0]
    sizes, losses = [], []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        state = state_of(checkpointed, compile=True, dropout=dropout)
        state.eager_loss = None
        assert state.loss_function.__name__ == "loss"
        sizes.append(kept(lambda s=state: losses.append(s.loss_function(x, y, torch.ones(())))))
    assert sizes[1] < 0.9 * sizes[0]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6 if not dropout else 0.01)


def test_a_number_that_is_not_finite_is_found_in_the_same_place() -> None:
    said = []
    for checkpointed in (False, True):
        state = state_of(checkpointed, dropout=0.2)
        with torch.no_grad():
            state.model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.inf
        with pytest.raises(NumericsError) as told:
            next(loop.fit(state, tiny.TRAIN, tiny.batches))
        said.append(str(nonfinite.explain(told.value, state, lambda step, place: "")))
    assert said[0] == said[1] and "h.1.mlp.c_fc" in said[0]


def test_on_a_device_steps_are_those_of_the_whole_activations(monkeypatch) -> None:
    config, found = replace(tiny.TRAIN, steps=3), []
    with stand_in.gpu(monkeypatch):
        for checkpointed in (False, True):
            state = state_of(checkpointed, device=CUDA)
            found.append([report.loss for report in loop.fit(state, config, tiny.batches)])
    assert found[0] == found[1]


def test_dropout_that_cannot_be_drawn_again_is_refused() -> None:
    model = state_of(True, dropout=0.2).model
    weight = SimpleNamespace(weight=SimpleNamespace(device=torch.device("mps")))
    there = SimpleNamespace(config=model.config, transformer=SimpleNamespace(wte=weight))
    with pytest.raises(ConfigError, match=r"checkpoint_activations=true with model.dropout=0.2"):
        activations.mark(there, checkpointed=True)
