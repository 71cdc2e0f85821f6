"""The initialisation study: growth with the square root, no growth, and nothing left behind."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from pipeline.drawing import figures
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import token_losses
from pipeline.studies import init_study
from pipeline.studies.init_study import ADDS, depths, growth, measure, random_adds, study

SHAPE = GPTConfig(n_layer=4, n_head=2, n_embd=64, block_size=64, vocab_size=199, vocab_rows=256)


@pytest.fixture(scope="module")
def config():
    from pipeline import config as configuration
    from tests.conftest import params

    return configuration.from_dict(params()).init


def made(config, residual_scale: bool = True, n_layer: int = 4) -> GPT:
    model = GPT(replace(SHAPE, n_layer=n_layer))
    settings = replace(config, residual_scale=residual_scale)
    initialize(model, settings, torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def found(config) -> init_study.InitStudy:
    return study(made(config), config)


def test_random_adds_grow_with_the_square_root_and_end_at_one_when_scaled() -> None:
    adds = random_adds(ADDS, 20_000, torch.Generator().manual_seed(1))
    for k in (1, 4, 25, 100):
        assert adds.plain[k - 1] == pytest.approx(math.sqrt(k), rel=0.03)
        assert adds.scaled[k - 1] == pytest.approx(math.sqrt(k / 100), rel=0.03)


def test_without_the_scale_the_stream_grows_with_the_square_root_of_depth(found) -> None:
    assert depths(4) == [1, 2, 4, 8, 16]
    assert growth(found.twins, residual_scale=False) == pytest.approx(0.5, abs=0.08)
    deepest = next(t for t in found.twins if t.n_layer == 16 and not t.residual_scale)
    variance = [std**2 - deepest.stream_std[0] ** 2 for std in deepest.stream_std]
    assert variance[16] / variance[4] == pytest.approx(4, rel=0.25)  # linear in depth


def test_with_the_scale_it_does_not_grow(found) -> None:
    assert growth(found.twins, residual_scale=True) == pytest.approx(0, abs=0.06)


def test_a_scale_on_one_projection_only_would_be_seen(found, config, monkeypatch) -> None:
    def half(model, settings, chance) -> None:
        initialize(model, settings, chance)
        if settings.residual_scale:
            with torch.no_grad():
                for block in model.transformer.h:
                    block.mlp.c_proj.weight.mul_((2 * model.config.n_layer) ** 0.5)

    monkeypatch.setattr(init_study, "initialize", half)
    assert growth(study(made(config), config).twins, residual_scale=True) > 0.2


def test_the_scale_is_that_of_two_adds_a_block(config) -> None:
    """After all 2 L scaled adds the added variance is that of one plain block's mean add."""
    plain, scaled = (measure(made(config, on), "", on, 0).stream_std for on in (False, True))
    added = [s[-1] ** 2 - s[0] ** 2 for s in (plain, scaled)]
    assert added[0] / added[1] == pytest.approx(2 * 4, rel=0.25)


def test_gradient_norms_are_those_of_a_plain_backward_pass(config) -> None:
    model = made(config)
    seen = measure(model, "", True, 5)
    twin = copy.deepcopy(model)
    ids = torch.randint(
        199, (2, 65), generator=init_study.generator(5, "init study")
    )  # the same probe
    token_losses(twin(ids[:, :-1]), ids[:, 1:]).mean().backward()
    for layer, block in enumerate(twin.transformer.h):
        norm = torch.stack([p.grad.norm() for p in block.parameters()]).norm().item()
        assert seen.grad_norm[layer + 1] == pytest.approx(norm, rel=1e-4)
    both = [twin.transformer.wte.weight.grad.norm(), twin.transformer.wpe.weight.grad.norm()]
    assert seen.grad_norm[0] == pytest.approx(torch.stack(both).norm().item(), rel=1e-4)


def test_the_stream_is_what_a_forward_pass_holds_after_each_block(config) -> None:
    model = made(config)
    seen = measure(model, "", True, 5)
    ids = torch.randint(199, (2, 65), generator=init_study.generator(5, "init study"))[:, :-1]
    with torch.no_grad():
        t = model.transformer
        x = t.wte(ids) + t.wpe(torch.arange(64))
        expected = [x.std().item()]
        for layer, block in enumerate(t.h):
            x = block(x, layer, None)
            expected.append(x.std().item())
    assert seen.stream_std == pytest.approx(expected, rel=1e-6)


def test_the_model_and_global_randomness_are_left_as_they_were(config) -> None:
    model = made(config).train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(4)
    chance = torch.get_rng_state()
    first = study(model, config)
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert study(model, config) == first


def test_twins_that_would_be_too_large_are_left_out(config, monkeypatch) -> None:
    a_block = sum(p.numel() for p in made(config).transformer.h[0].parameters())
    monkeypatch.setattr(init_study, "LARGEST_TWIN", 4 * a_block)
    found = study(made(config), config)
    assert {t.n_layer for t in found.twins} == {1, 2, 4}
    assert found.as_is.n_layer == 4


def test_the_page_says_what_was_measured(found) -> None:
    page = init_study.page(found)
    assert f"std {found.adds.plain[-1]:.3f} at the end, sqrt(100) is 10.000" in page
    assert f"to the power {growth(found.twins, False):.2f} without" in page
    assert page.count("\n|") == 2 + 1 + len(found.twins)
    rows = init_study.stream_rows(found)
    assert len(rows) == sum(m.n_layer + 1 for m in (found.as_is, *found.twins))


def test_the_figure_draws_every_model(found) -> None:
    _, stream, gradient = figures.init_study(found).axes
    assert len(stream.lines) == len(gradient.lines) == len(found.twins) + 1
    for m, streams, gradients in zip(
        (*found.twins, found.as_is), stream.lines, gradient.lines, strict=True
    ):
        blocks = list(range(1, m.n_layer + 1))
        assert (list(streams.get_xdata()), list(streams.get_ydata())) == (
            [0, *blocks],
            m.stream_std,
        )
        assert list(gradients.get_xdata()) == blocks
        assert list(gradients.get_ydata()) == m.grad_norm[1:] != m.stream_std[1:]
