"""Muon beside torch's own, and what it does to which parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.compute.precision import choose_precision
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.training import loop, training_step
from pipeline.training.muon import Muon, orthogonal
from pipeline.training.optimizers import build_optimizer

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def config(make_config):
    changes = {"optimizer": "muon", "steps": 30, "warmup_steps": 3, "lr": 0.01, "weight_decay": 0.1}
    return make_config(**{f"train__{name}": value for name, value in changes.items()})


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_a_matrix_moves_as_torchs_own_muon_moves_it(scale: str, shape: tuple[int, int]) -> None:
    """torch multiplies in bf16: five rounds of it leave differences of some 2% of a step."""
    ours, theirs = (nn.Parameter(drawn(*shape)) for _ in range(2))
    beside = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    optimizers = (
        Muon([{"params": [ours]}], beside, lr=0.02, weight_decay=0.3, scale=scale),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.3, adjust_lr_fn=scale),
    )
    moved = torch.zeros(shape)
    for step in range(4):
        before = theirs.detach().clone()
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = drawn(*shape, seed=step + 1)
            optimizer.step()
        moved += (theirs.detach() - before).abs()
    assert (ours - theirs).norm() < 0.03 * moved.norm()


def test_in_a_matrix_all_directions_come_out_alike() -> None:
    """Also of momentum in which some are a hundred times as strong as others."""
    uneven = drawn(3, 48, 16) @ torch.diag(torch.logspace(-2, 0, 16))
    for x in (uneven, uneven.mT):
        found = torch.linalg.svdvals(orthogonal(x))
        assert found.min() > 0.6 and found.max() < 1.3
    assert torch.linalg.svdvals(uneven / uneven.norm(dim=(1, 2), keepdim=True)).min() < 0.01
    assert torch.equal(orthogonal(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_each_parameter_has_one_optimizer_and_the_matrices_of_blocks_have_muon(config) -> None:
    model = GPT(SHAPE)
    optimizer = build_optimizer(model, config.train)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(map(id, owned)) == sorted(names)
    by_muon = {names[id(p)] for g in optimizer.param_groups if "scale" in g for p in g["params"]}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert by_muon == {f"transformer.h.{n}.{part}.weight" for n in range(2) for part in parts}


def test_queries_keys_and_values_are_made_orthogonal_each_by_itself(config) -> None:
    """In one matrix of three the values, with gradients a thousandth as large, would stand still
    while queries and keys move."""
    model = GPT(SHAPE)
    optimizer = build_optimizer(model, replace(config.train, weight_decay=0.0))
    weight = model.transformer.h[0].attn.c_attn.weight
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weight.grad = drawn(48, 16)
    weight.grad[32:] *= 1e-3
    before = weight.detach().clone()
    optimizer.step()
    q, _, v = (weight - before).detach().split(16)
    assert v.norm().item() == pytest.approx(q.norm().item(), rel=0.2)


def test_the_rate_of_the_matrices_is_its_share_of_the_schedules(config) -> None:
    moved = []
    for factor in (1.0, 3.0):
        model = GPT(SHAPE)
        initialize(model, config.init, torch.Generator().manual_seed(0))
        settings = replace(config.train, muon_lr_factor=factor, steps=1, warmup_steps=0)
        state = training_step.start(model, settings, choose_precision("fp32", CPU), narrowing=1.0)
        weights = [model.transformer.h[0].mlp.c_fc.weight, model.transformer.wte.weight]
        before = [w.detach().clone() for w in weights]
        list(loop.fit(state, settings, batches))
        moved.append([(w - b).norm().item() for w, b in zip(weights, before, strict=True)])
    assert moved[1][0] == pytest.approx(3 * moved[0][0], rel=0.01)
    assert moved[1][1] == moved[0][1]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_training_learns_with_it(config, precision: str) -> None:
    model = GPT(SHAPE)
    initialize(model, config.init, torch.Generator().manual_seed(0))
    state = training_step.start(
        model, config.train, choose_precision(precision, CPU), narrowing=1.0
    )
    losses = [report.loss for report in loop.fit(state, config.train, batches)]
    assert losses[0] - losses[-1] > 1


def batches(step: int) -> list[training_step.Batch]:
    """The same five words at every step: easy to learn."""
    ids = torch.randint(5, (4, 17), generator=torch.Generator().manual_seed(0))
    return [(ids[:, :-1], ids[:, 1:])]
