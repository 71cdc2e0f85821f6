"""A text at each validation: it is the model's as it stands, and takes nothing from training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import Ranks
from pipeline.diagnostics import glimpse
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=50257, dropout=0.5)


@pytest.fixture
def model(make_config) -> GPT:
    made = GPT(SHAPE)
    initialize(made, make_config().init, torch.Generator().manual_seed(1))
    return made.train()


def test_a_glimpse_is_one_line_and_the_same_each_time(model: GPT, make_config) -> None:
    config = make_config(sample__prompts=["HAMLET:\nI am"])
    said = glimpse.text(model, config)
    assert said.startswith("HAMLET: / I am") and "\n" not in said
    assert glimpse.text(model, config) == said
    assert glimpse.text(model, make_config(sample__prompts=["My lord,"])) != said


def test_a_glimpse_leaves_the_model_and_the_random_state_as_they_were(
    model: GPT, make_config
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    glimpse.text(model, make_config())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_glimpse_is_of_the_weights_as_they_are_now(model: GPT, make_config) -> None:
    config = make_config(sample__temperature=0.0)
    said = glimpse.text(model, config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(-1)
    assert glimpse.text(model, config) != said


def test_a_glimpse_is_a_line_that_a_setting_turns_off(model: GPT, make_config) -> None:
    class Kept:
        def text(self, step: int, text: str) -> None:
            kept.append((step, text))

    kept: list[tuple[int, str]] = []
    text = glimpse.text(model, make_config())
    state = SimpleNamespace(model=model, step=100, ranks=Ranks())
    assert glimpse.lines(state, make_config(sample__while_training=False), Kept()) == []
    assert kept == []
    assert glimpse.lines(state, make_config(), Kept()) == [f"  {text}"]
    assert kept == [(100, text)]


def test_a_model_that_trains_in_fp8_is_looked_at_all_the_same(model: GPT, make_config) -> None:
    plain = glimpse.text(model, make_config(sample__temperature=0.0))
    choose_precision("fp8", torch.device("cpu")).prepare(model)
    assert glimpse.text(model, make_config(sample__temperature=0.0)) == plain
