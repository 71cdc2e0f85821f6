"""Weight initialisation: the distribution, what is zero, and what it may not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.studies import tiny


def fresh(
    seed: int = 42,
    std: float = 0.02,
    residual_scale: bool = True,
    vocab_rows: int = 50304,
    n_layer: int = 3,
    scheme: str = "gpt2",
) -> GPT:
    config = GPTConfig(n_layer, n_head=2, n_embd=64, block_size=128, vocab_rows=vocab_rows)
    gpt = GPT(config)
    settings = replace(tiny.INIT, std=std, residual_scale=residual_scale, scheme=scheme)
    initialize(gpt, settings, torch.Generator().manual_seed(seed))
    return gpt


@pytest.mark.parametrize("std", [0.02, 0.1])
@pytest.mark.parametrize("residual_scale", [True, False])
def test_weights_are_normal_with_std_and_residual_projections_scaled(
    std: float, residual_scale: bool
) -> None:
    for name, weight in fresh(std=std, residual_scale=residual_scale).named_parameters():
        if weight.dim() < 2:
            continue
        scaled = residual_scale and name.endswith("c_proj.weight")
        expected = std / math.sqrt(2 * 3) if scaled else std
        drawn = weight[:50257]
        noise = 5 / math.sqrt(drawn.numel())
        assert drawn.std().item() == pytest.approx(expected, rel=noise), name
        assert abs(drawn.mean().item()) < noise * expected, name
        beyond = (drawn.abs() > 2 * expected).float().mean().item()
        assert beyond == pytest.approx(0.0455, abs=0.2 * noise), name  # normal, not uniform


def test_both_projections_of_every_block_and_nothing_else_are_scaled() -> None:
    plain, scaled = fresh(residual_scale=False).state_dict(), fresh().state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], scaled[name])}
    blocks = range(3)
    expected = {f"transformer.h.{i}.{m}.c_proj.weight" for i in blocks for m in ("attn", "mlp")}
    assert changed == expected


def test_projections_at_zero_leave_all_other_weights_as_they_are_drawn() -> None:
    gpt2, zero = fresh(), fresh(scheme="zero_projections")
    for (name, drawn), parameter in zip(gpt2.named_parameters(), zero.parameters(), strict=True):
        if name.endswith("c_proj.weight"):
            assert parameter.eq(0).all() and not drawn.eq(0).any(), name
        else:
            assert torch.equal(parameter, drawn), name
    idx = torch.arange(20)[None]
    embedded = zero.transformer.wte(idx) + zero.transformer.wpe(torch.arange(20))
    torch.testing.assert_close(zero.hidden(idx), zero.transformer.ln_f(embedded))


def test_biases_are_zero_and_layer_norms_are_one_and_zero() -> None:
    for name, parameter in fresh().named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif ".ln_" in name:
            assert parameter.eq(1).all(), name


def test_no_torch_default_survives() -> None:
    gpt = fresh()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(math.nan)
    initialize(gpt, tiny.INIT, torch.Generator().manual_seed(42))
    for (name, again), first in zip(gpt.named_parameters(), fresh().parameters(), strict=True):
        assert torch.equal(again, first), name


def test_weights_depend_on_the_seed_and_not_on_global_randomness() -> None:
    torch.manual_seed(1)
    first = fresh(seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    gpt = GPT(GPTConfig(3, 2, 64, 128))
    after_construction = torch.get_rng_state()
    initialize(gpt, tiny.INIT, torch.Generator().manual_seed(5))
    assert torch.equal(after_construction, torch.get_rng_state())
    assert not torch.equal(before, after_construction)  # torch's own defaults did draw
    assert all(torch.equal(first[name], value) for name, value in gpt.state_dict().items())
    assert not torch.equal(
        first["transformer.wte.weight"], fresh(seed=6).transformer.wte.weight.detach()
    )


def test_padding_changes_no_weight_and_padded_rows_are_zero() -> None:
    padded, bare = fresh(vocab_rows=50304).state_dict(), fresh(vocab_rows=50257).state_dict()
    wte = padded.pop("transformer.wte.weight")
    assert torch.equal(wte[:50257], bare.pop("transformer.wte.weight"))
    assert wte[50257:].eq(0).all()
    assert all(torch.equal(padded[name], bare[name]) for name in bare)


def test_a_long_position_embedding_has_no_zero_rows() -> None:
    assert fresh().transformer.wpe.weight.abs().sum(1).gt(0).all()


@torch.no_grad()
def test_loss_at_step_0_is_near_the_uniform_10_82() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 50257, (2, 2, 64), generator=generator)
    loss = F.cross_entropy(fresh()(x).flatten(0, 1), y.flatten())
    assert loss.item() == pytest.approx(math.log(50257), abs=0.1)
    assert math.log(50257) == pytest.approx(10.82, abs=0.01)
