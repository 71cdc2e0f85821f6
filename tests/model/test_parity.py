"""Parity with transformers: rounding passes, another function does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.model.gpt import GPT, GPTConfig, KVCache
from pipeline.model.hf_import import GREEDY_STEPS, PARITY_BOUND, _InFloat64, _reference, parity
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model

SHAPE = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=96)
PROBE = torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def made(make_config, tmp_path: Path):
    """A function of init.std that gives a fresh model and its exported folder."""

    def make(std: float = 0.3, seed: int = 0) -> tuple[GPT, Path]:
        model = GPT(SHAPE)
        settings = replace(make_config().init, std=std)
        initialize(model, settings, torch.Generator().manual_seed(seed))
        save_model(model, tmp_path / "model")
        return model, tmp_path / "model"

    return make


@pytest.mark.parametrize("std", [0.01, 0.02, 0.3, 0.7, 1.0, 2.0, 3.0, 10.0])
def test_parity_holds_at_every_std_that_settings_accept(made, std: float) -> None:
    found = parity(*made(std), PROBE)
    assert found["relative_logit_difference"] <= PARITY_BOUND / 100
    assert found["greedy_equal"] and found["greedy_steps"] == GREEDY_STEPS
    if std <= 0.3:
        assert found["greedy_decided"] > 0.9 * 2 * GREEDY_STEPS


def test_equal_rows_of_the_embedding_decide_no_greedy_token(made) -> None:
    model, folder = made()
    with torch.no_grad():
        model.transformer.wte.weight[:] = model.transformer.wte.weight[0].clone()
    save_model(model, folder)
    found = parity(model, folder, PROBE)
    assert found["relative_logit_difference"] <= PARITY_BOUND
    assert found["greedy_equal"] and found["greedy_decided"] == 0


def test_arithmetic_in_float64_is_that_of_models_in_float64(made) -> None:
    model, folder = made()
    reference = _reference(folder)
    with torch.no_grad(), _InFloat64():
        ours, theirs = model(PROBE), reference(PROBE).logits
    with torch.no_grad():
        expected_ours, expected_theirs = model.double()(PROBE), reference.double()(PROBE).logits
    for found, expected in ((ours, expected_ours), (theirs, expected_theirs)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    narrow = GPT(SHAPE)
    narrow.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    assert (narrow(PROBE) - expected_ours).abs().max() > 1e-7, "fp32 is told apart"


def other_eps(model: GPT) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def one_weight(model: GPT) -> None:
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] *= -1


@pytest.mark.parametrize("change", [other_eps, one_weight])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_a_small_mistake_is_far_beyond_the_bound(made, change, std: float) -> None:
    model, folder = made(std)
    change(model)
    assert parity(model, folder, PROBE)["relative_logit_difference"] > 10 * PARITY_BOUND


def test_a_cache_that_forgets_shows_in_the_greedy_tokens(made, monkeypatch) -> None:
    extend = KVCache.extend

    def forgetful(self, layer, k, v):
        keys, values = extend(self, layer, k, v)
        return keys[:, :, -8:], values[:, :, -8:]

    model, folder = made()
    assert parity(model, folder, PROBE)["greedy_equal"]
    monkeypatch.setattr(KVCache, "extend", forgetful)
    found = parity(model, folder, PROBE)
    assert found["relative_logit_difference"] <= PARITY_BOUND and not found["greedy_equal"]
