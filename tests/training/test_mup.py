"""Scheme mup: weights and rates that follow the width, in a model that stays an exact GPT-2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import config as configuration
from pipeline.compute.precision import choose_precision
from pipeline.config import InitConfig
from pipeline.errors import ConfigError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.hf_import import PARITY_BOUND, parity
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model
from pipeline.resume import fork
from pipeline.resume.snapshot import parts, read_facts, read_tensors, restore, save_snapshot
from pipeline.studies import tiny
from pipeline.training.loop import fit
from pipeline.training.optimizers import build_optimizer, parameter_groups, set_rate
from pipeline.training.training_step import TrainState, from_folder, start

BASE, HEAD, VOCAB, LAYERS = 32, 16, 64, 2
WIDTHS = (32, 64, 128, 256)
MUP = replace(tiny.INIT, scheme="mup", mup_base=BASE)
IDS = torch.randint(VOCAB, (8, 17), generator=torch.Generator().manual_seed(1))


def fresh(width: int, init: InitConfig = MUP, vocab: int = VOCAB) -> GPT:
    shape = GPTConfig(LAYERS, width // HEAD, width, 16, vocab_size=vocab, vocab_rows=vocab)
    model = GPT(shape)
    initialize(model, init, torch.Generator().manual_seed(0))
    return model


def begun(model: GPT, init: InitConfig = MUP, **settings: Any) -> TrainState:
    train = replace(tiny.TRAIN, **settings)
    narrowing = init.narrowing(model.config.n_embd)
    return start(model, train, choose_precision("fp32", torch.device("cpu")), narrowing)


def trained(model: GPT, init: InitConfig = MUP, steps: int = 4, **settings: Any) -> TrainState:
    settings = {"steps": steps, "lr": 0.005, "min_lr": 0.005} | settings
    state = begun(model, init, **settings)
    batch = IDS[:, :-1], IDS[:, 1:]
    assert len(list(fit(state, replace(tiny.TRAIN, **settings), lambda step: [batch]))) == steps
    return state


def names(model: GPT, members: list[Tensor]) -> set[str]:
    known = {id(p): name.removeprefix("transformer.") for name, p in model.named_parameters()}
    return {known[id(p)] for p in members}


# --- the coordinate check


def coordinates(model: GPT) -> dict[str, Tensor]:
    """The residual stream after each block, and the logits."""
    seen: dict[str, Tensor] = {}
    for n, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda _, __, y, n=n: seen.update({f"block {n}": y.detach()}))
    with torch.no_grad():
        return {"logits": model(IDS[:, :-1]), **seen}


def growth(scheme: str) -> dict[str, float]:
    """By how much changes after some steps grow at each doubling of the width, in log2."""
    sizes = []
    for width in WIDTHS:
        init = replace(MUP, scheme=scheme)
        model = fresh(width, init)
        before = coordinates(model)
        trained(model, init)
        after = coordinates(model)
        sizes.append({k: (after[k] - before[k]).square().mean().sqrt().item() for k in before})
    doublings = math.log2(WIDTHS[-1] / WIDTHS[0])
    return {k: math.log2(sizes[-1][k] / sizes[0][k]) / doublings for k in sizes[0]}


def test_what_steps_change_grows_with_the_width_by_gpt2_and_not_by_mup() -> None:
    """The coordinate check of Yang et al. 2022, appendix D.1."""
    gpt2, mup = growth("gpt2"), growth("mup")
    assert set(gpt2) == {"logits", "block 0", "block 1"}
    assert all(by > 0.5 for by in gpt2.values()), gpt2
    assert all(-0.3 < by < 0.05 for by in mup.values()), mup


# --- weights and rates


def test_at_its_base_width_it_is_gpt2_to_the_bit() -> None:
    mup, gpt2 = fresh(BASE), fresh(BASE, tiny.INIT)
    assert all(map(torch.equal, mup.parameters(), gpt2.parameters()))
    trained(mup), trained(gpt2, tiny.INIT)
    assert all(map(torch.equal, mup.parameters(), gpt2.parameters()))


def test_the_blocks_matrices_and_the_last_norm_alone_follow_the_width() -> None:
    wide, gpt2 = fresh(4 * BASE), fresh(4 * BASE, tiny.INIT)
    for (name, mine), theirs in zip(wide.named_parameters(), gpt2.parameters(), strict=True):
        factor = 0.5 if ".h." in name and mine.dim() == 2 else 1.0
        factor = 0.25 if name.endswith("ln_f.weight") else factor
        torch.testing.assert_close(mine, factor * theirs, rtol=1e-6, atol=0)


def test_their_rate_follows_the_width_and_what_a_step_takes_by_decay_does_not() -> None:
    model = fresh(4 * BASE)
    scaled, rest, last, vectors = parameter_groups(model, 0.1, 0.25)
    of_blocks = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    matrices = {f"h.{n}.{m}.weight" for n in range(LAYERS) for m in of_blocks}
    assert names(model, scaled["params"]) == matrices
    assert names(model, rest["params"]) == {"wte.weight", "wpe.weight"}
    assert names(model, last["params"]) == {"ln_f.weight", "ln_f.bias"}
    assert {g.get("rate_factor") for g in (rest, vectors)} == {None}
    assert scaled["rate_factor"] == last["rate_factor"] == 0.25
    every = [p for group in (scaled, rest, last, vectors) for p in group["params"]]
    assert {id(p) for p in every} == {id(p) for p in model.parameters()}
    assert len(every) == len(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = build_optimizer(model, replace(tiny.TRAIN, weight_decay=0.1), narrowing=0.25)
    set_rate(optimizer, 0.01)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = 1 - 0.01 * 0.1 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p, before[name] * kept, rtol=1e-6, atol=0)


def test_a_small_last_norm_goes_the_way_of_a_factor_on_the_logits() -> None:
    """Table 8 has the factor; what is here is the same by Adam's indifference to size."""
    narrowing, settings = 0.25, {"grad_clip": 0.0, "steps": 6, "lr": 0.002, "min_lr": 0.002}
    here, there = fresh(4 * BASE), fresh(4 * BASE)
    norm = there.transformer.ln_f
    with torch.no_grad():
        norm.weight.fill_(1.0)
    norm.register_forward_hook(lambda _, __, y: narrowing * y)
    state = begun(there, **settings)
    for group in state.optimizer.param_groups:
        if any(p is norm.weight for p in group["params"]):
            group["rate_factor"] = 1.0
    batch = IDS[:, :-1], IDS[:, 1:]
    losses = [one.loss for one in fit(state, replace(tiny.TRAIN, **settings), lambda _: [batch])]
    first = fresh(4 * BASE)
    trained(here, **settings)
    moved = (here.transformer.ln_f.weight / narrowing - 1).abs().max().item()
    assert losses[-1] < losses[0] and moved > 0.005
    with torch.no_grad():
        ours, theirs, before = (m(IDS[:, :-1]) for m in (here, there, first))
    assert (ours - theirs).abs().max() < 0.01 * (ours - before).abs().max()
    torch.testing.assert_close(
        here.transformer.ln_f.weight / narrowing, norm.weight, atol=2e-4, rtol=0
    )


# --- an exact GPT-2


def test_a_trained_model_of_the_scheme_is_transformers_gpt2(tmp_path: Path) -> None:
    shape = GPTConfig(LAYERS, 4, 64, 16, vocab_rows=50304)
    model = GPT(shape)
    initialize(model, MUP, torch.Generator().manual_seed(0))
    assert model.transformer.ln_f.weight.eq(0.5).all()
    trained(model)
    save_model(model, tmp_path / "model")
    found = parity(model, tmp_path / "model", IDS[:2, :12])
    assert found["relative_logit_difference"] <= PARITY_BOUND / 100 and found["greedy_equal"]


# --- resume, fork, and what is refused


def test_a_training_that_begins_with_a_folder_has_the_rates_of_its_scheme(
    make_config, tmp_path: Path
) -> None:
    sizes = {"n_layer": LAYERS, "n_head": 4, "n_embd": 64}
    config = make_config(
        init__scheme="mup",
        init__mup_base=BASE,
        **{f"model__{n}": size for n, size in sizes.items()},
    )
    save_model(GPT(GPTConfig(**sizes, block_size=config.model.block_size)), tmp_path / "model")
    precision = choose_precision("fp32", torch.device("cpu"))
    told = config.model, config.train, precision, config.init
    state = from_folder(tmp_path / "model", *told)
    set_rate(state.optimizer, 0.01)
    rates = [group["lr"] for group in state.optimizer.param_groups]
    assert rates == [0.005, 0.01, 0.005, 0.01]


def test_a_resumed_training_keeps_its_rates(tmp_path: Path) -> None:
    state = trained(fresh(2 * BASE), weight_decay=0.1)
    save_snapshot(tmp_path / "kept", state, {})
    other = begun(fresh(2 * BASE), weight_decay=0.1)
    facts = read_facts(tmp_path / "kept")
    assert restore(other, read_tensors(tmp_path / "kept"), facts) == []
    factors = [group.get("rate_factor") for group in other.optimizer.param_groups]
    assert factors == [0.5, None, 0.5, None]
    mine, theirs = parts(state)[1], parts(other)[1]
    for kind in mine:
        assert all(torch.equal(mine[kind][name], theirs[kind][name]) for name in mine[kind])


def facts_of(state: TrainState, width: int) -> dict[str, Any]:
    return {"shape": {"n_embd": width}, "step": 4, "optimizer": parts(state)[0]}


def test_a_fork_keeps_the_scheme_of_its_weights(make_config) -> None:
    def settings(**changes: Any) -> configuration.Config:
        return make_config(model__n_embd=64, init__mup_base=BASE, train__steps=99, **changes)

    ours, theirs = settings(init__scheme="mup"), settings()
    mup = facts_of(trained(fresh(64)), 64)
    gpt2 = facts_of(trained(fresh(64, tiny.INIT), tiny.INIT), 64)
    muon = facts_of(
        trained(fresh(64, tiny.INIT), tiny.INIT, optimizer="muon", muon_lr_factor=3.0), 64
    )
    assert [fork.problem(*one) for one in ((ours, mup), (theirs, gpt2), (theirs, muon))] == [""] * 3
    assert "times 1, in the forked state times 0.5" in fork.problem(theirs, mup)
    for facts in (gpt2, muon):
        assert "init.scheme=mup init.mup_base=32: the matrices' rate times 0.5" in fork.problem(
            ours, facts
        )


def refused(make_config, **changes: Any) -> Iterator[str]:
    with pytest.raises(ConfigError) as error:
        make_config(init__scheme="mup", **changes)
    yield from str(error.value).splitlines()


def test_other_optimizers_and_imported_weights_are_refused(make_config) -> None:
    (line,) = refused(make_config, train__optimizer="muon")
    assert "init.scheme=mup: expected train.optimizer=adamw, got muon" in line
    (line,) = refused(make_config, init__source="hf", init__hf_model="my/gpt2")
    assert "init.scheme=mup: expected init.source=random, got hf" in line
