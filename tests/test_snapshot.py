"""A training state on disk: what comes back is what was there, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import folders, runtime, snapshot, training
from pipeline.errors import InputError
from pipeline.init import initialize
from pipeline.model import GPT, GPTConfig
from pipeline.precision import choose_precision

CPU = torch.device("cpu")
SHAPE = GPTConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128, dropout=0.2
)


@pytest.fixture
def config(make_config):
    return make_config(train__steps=6, train__warmup_steps=1)


def fresh(config, name: str, seed: int = 0) -> training.TrainState:
    model = GPT(SHAPE)
    initialize(model, config.init, torch.Generator().manual_seed(seed))
    return training.start(model, config.train, choose_precision(name, CPU))


def batches(step: int) -> list[training.Batch]:
    ids = torch.randint(97, (3, 2, 17), generator=torch.Generator().manual_seed(step))
    return [(part[:, :-1], part[:, 1:]) for part in ids]


def weights(state: training.TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.mark.parametrize("name", ["fp32", "fp16", "fp8"])
def test_a_restored_step_and_those_after_it_are_done_again_to_the_bit(
    config, tmp_path: Path, name: str
) -> None:
    torch.manual_seed(5)
    state = fresh(config, name)
    if name == "fp16":  # a scale that moves: it grows after every second step
        state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    kept = tmp_path / "kept"
    reports = training.fit(
        state,
        config.train,
        batches,
        look=lambda s: snapshot.save_snapshot(kept, s, {"why": "test"}),
        look_at=3,
    )
    numbers = [(report.loss, report.grad_norm, report.loss_scale) for report in reports]
    other = fresh(config, name, seed=9)
    facts = snapshot.read_facts(kept)
    assert facts["why"] == "test" and facts["step"] == 3
    snapshot.restore(other, snapshot.Tensors(kept), facts)
    assert other.loss == numbers[3][0]
    assert other.norms == [norm for _, norm, _ in numbers[:3]]
    assert torch.equal(other.batches[2][1], batches(3)[2][1])
    torch.manual_seed(6)  # dropout draws from the state that the snapshot holds, not from this
    runtime.set_rng_state(other.rng, CPU)
    again = list(training.fit(other, config.train, batches))
    assert [(r.loss, r.grad_norm, r.loss_scale) for r in again] == numbers[3:]
    assert torch.equal(weights(other), weights(state))


@pytest.mark.parametrize("missing", ["rng.cpu", "exp_avg."])
def test_without_chance_or_moments_the_run_would_differ(
    config, tmp_path: Path, missing: str
) -> None:
    torch.manual_seed(5)
    state = fresh(config, "fp32")
    look = lambda s: snapshot.save_snapshot(tmp_path / "kept", s, {})  # noqa: E731
    losses = [r.loss for r in training.fit(state, config.train, batches, look=look, look_at=3)]
    tensors = snapshot.Tensors(tmp_path / "kept")
    tensors = {name: t for name, t in tensors.items() if not name.startswith(missing)}
    other = fresh(config, "fp32", seed=9)
    snapshot.restore(other, tensors, snapshot.read_facts(tmp_path / "kept"))
    torch.manual_seed(6)
    if "cpu" in other.rng:
        runtime.set_rng_state(other.rng, CPU)
    again = [report.loss for report in training.fit(other, config.train, batches)]
    assert again != losses[3:]


def test_weights_that_are_not_finite_come_back_as_they_were(config, tmp_path: Path) -> None:
    state = fresh(config, "fp32")
    with torch.no_grad():
        state.model.transformer.ln_f.weight[3] = torch.nan
    state.batches = batches(0)
    snapshot.save_snapshot(tmp_path / "kept", state, {})
    other = fresh(config, "fp32")
    snapshot.restore(
        other, snapshot.Tensors(tmp_path / "kept"), snapshot.read_facts(tmp_path / "kept")
    )
    assert other.model.transformer.ln_f.weight[3].isnan()
    assert other.loss != other.loss  # no gradient was made yet


@pytest.mark.parametrize("kind", ["model", "exp_avg", "rest"])
def test_a_flipped_bit_is_refused_and_a_folder_without_facts_too(
    config, tmp_path: Path, kind: str
) -> None:
    state = fresh(config, "fp32")
    list(training.fit(state, replace(config.train, steps=2), batches))
    kept = tmp_path / "kept"
    snapshot.save_snapshot(kept, state, {})
    raw = bytearray((kept / f"{kind}.safetensors").read_bytes())
    raw[-5] ^= 1
    (kept / f"{kind}.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match=rf"{kind}\.safetensors: damaged: SHA-256"):
        snapshot.Tensors(kept)
    with pytest.raises(InputError, match="no snapshot of a training step is there"):
        snapshot.read_facts(tmp_path)


def test_a_snapshot_changes_nothing_in_the_state(config, tmp_path: Path) -> None:
    ends = []
    for keep in (False, True):
        torch.manual_seed(5)
        state = fresh(config, "fp32")
        look = lambda s: snapshot.save_snapshot(tmp_path / "kept", s, {})  # noqa: E731
        list(training.fit(state, config.train, batches, look=look if keep else None, look_at=2))
        ends.append(weights(state))
    assert torch.equal(*ends)
    assert folders.problems(tmp_path / "kept") == []
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_training_on_never_writes_into_the_snapshot_it_came_from(config, tmp_path: Path) -> None:
    state = fresh(config, "fp32")
    list(training.fit(state, replace(config.train, steps=3), batches))
    snapshot.save_snapshot(tmp_path / "kept", state, {})
    other = fresh(config, "fp32", seed=9)
    facts = snapshot.read_facts(tmp_path / "kept")
    snapshot.restore(other, snapshot.Tensors(tmp_path / "kept"), facts)
    list(training.fit(other, config.train, batches))
    assert folders.problems(tmp_path / "kept") == []
