"""Documents kept apart: every token's loss is that of its document run alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.compute.precision import choose_precision
from pipeline.compute.runtime import generator
from pipeline.data.token_files import Tokens
from pipeline.errors import ConfigError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import token_losses
from pipeline.published import EOT
from pipeline.studies import tiny
from pipeline.training import training_step, validation

CPU, LENGTH = torch.device("cpu"), 24
# Where documents begin in each row of 25 tokens: at its very start, twice in a row, at its end.
BORDERS = ([0, 9, 17], [6, 7, 22], [24], [])


def tokens() -> torch.Tensor:
    """(4, 25) ids; every end-of-text is followed by the same token, so that context must tell."""
    ids = torch.randint(1000, (len(BORDERS), LENGTH + 1), generator=generator(0, "ids"))
    for row, places in zip(ids, BORDERS, strict=True):
        for place in places:
            row[place + 1 : place + 2] = 7
        row[places] = EOT
    return ids


def state_of(apart: bool, name: str = "fp32", attention: str = "sdpa", device=CPU, **settings):
    model = GPT(GPTConfig(2, 2, 32, LENGTH, attention=attention))
    initialize(model, replace(tiny.INIT, std=0.2), generator(0, "weights"))
    config = replace(tiny.TRAIN, mask_documents=apart, sequence_length=LENGTH, **settings)
    return training_step.start(
        model.to(device), config, choose_precision(name, device), narrowing=1.0
    )


def alone(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """(T,) losses of a row, each document in a pass of its own; its last target is a border."""
    starts = [0, *(place for place in range(1, LENGTH) if ids[place] == EOT), LENGTH]
    return torch.cat(
        [
            token_losses(model(ids[None, first:last])[0], ids[first + 1 : last + 1])
            for first, last in zip(starts, starts[1:], strict=False)
        ]
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_losses_and_gradients_are_those_of_documents_run_alone(
    attention: str, checkpointed: bool
) -> None:
    ids = tokens()
    plain, state = (
        state_of(apart, attention=attention, checkpoint_activations=checkpointed)
        for apart in (False, True)
    )
    wanted = torch.stack([alone(plain.model, row) for row in ids])  # (4, T)
    found, crossing = (token_losses(s.model(ids[:, :-1]), ids[:, 1:]) for s in (state, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (crossing - wanted).abs().max() > 0.1, "the borders make no difference here"
    wanted.mean().backward()
    training_step.gradients(state, [(ids[:2, :-1], ids[:2, 1:]), (ids[2:, :-1], ids[2:, 1:])])
    pairs = zip(state.model.parameters(), plain.model.parameters(), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_sequence_without_borders_and_a_cached_one_are_as_ever() -> None:
    from pipeline.model.gpt import KVCache

    ids = tokens()
    plain, state = state_of(False).model, state_of(True).model
    with torch.no_grad():
        torch.testing.assert_close(state(ids[3:, :-1]), plain(ids[3:, :-1]), rtol=1e-5, atol=1e-5)
        caches = (KVCache(plain.config, 4), KVCache(plain.config, 4))
        assert torch.equal(state(ids[:, :-1], caches[0]), plain(ids[:, :-1], caches[1]))


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16", "fp8"])
def test_low_precisions_take_the_mask(name: str) -> None:
    ids, losses = tokens(), []
    for mode in ("fp32", name):
        state = state_of(True, mode)
        losses.append(training_step.gradients(state, [(ids[:, :-1], ids[:, 1:])]).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_validation_while_training_keeps_documents_apart_over_the_same_targets() -> None:
    ids = tokens()[:2].flatten()[: 2 * LENGTH + 1]
    held_out = Tokens(ids.numpy().astype(np.uint16), 1, "", 1, Path("val.bin"))
    settings = replace(tiny.TRAIN, sequence_length=LENGTH, batch_size=2, val_tokens=2 * LENGTH)
    plain, state = state_of(False), state_of(True)
    rows = [ids[at : at + LENGTH + 1] for at in (0, LENGTH)]
    wanted = torch.cat([alone(plain.model, row) for row in rows]).mean().item()
    assert validation.validate(state, held_out, settings) == pytest.approx(wanted, rel=1e-5)
    assert validation.validate(plain, held_out, settings) != pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_a_compiled_step_takes_the_mask() -> None:
    ids, losses = tokens(), []
    for compiled in (False, True):
        state = state_of(True, compile=compiled)
        losses.append(training_step.gradients(state, [(ids[:, :-1], ids[:, 1:])]).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "near"), [("fp32", 1e-4), ("bf16", 0.02), ("fp16", 0.02)])
def test_a_card_takes_the_mask(name: str, near: float, compiled: bool) -> None:
    ids, card = tokens(), torch.device("cuda")
    states = state_of(True), state_of(True, name, device=card, compile=compiled)
    losses = [training_step.gradients(s, [(ids[:, :-1], ids[:, 1:])]).item() for s in states]
    assert losses[1] == pytest.approx(losses[0], rel=near)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__attention": "flash"}, "expected model.attention=sdpa or naive, got flash"),
        ({"model__attention": "cudnn"}, "expected model.attention=sdpa or naive, got cudnn"),
        ({"corpus__source": "chat"}, "expected false with corpus.source=chat"),
    ],
)
def test_what_cannot_keep_documents_apart_is_refused(make_config, changes, said: str) -> None:
    with pytest.raises(ConfigError, match=f"train.mask_documents=true: {said}"):
        make_config(train__mask_documents=True, **changes)
