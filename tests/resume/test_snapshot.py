"""A training state on disk: what comes back is what was there, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.errors import InputError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.resume import snapshot
from pipeline.storage import folders
from pipeline.training import loop, training_step

CPU = torch.device("cpu")
SHAPE = GPTConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128, dropout=0.2
)


@pytest.fixture
def config(make_config):
    return make_config(train__steps=6, train__warmup_steps=1)


def fresh(config, name: str, seed: int = 0) -> training_step.TrainState:
    model = GPT(SHAPE)
    initialize(model, config.init, torch.Generator().manual_seed(seed))
    return training_step.start(model, config.train, choose_precision(name, CPU), narrowing=1.0)


def batches(step: int) -> list[training_step.Batch]:
    ids = torch.randint(97, (3, 2, 17), generator=torch.Generator().manual_seed(step))
    return [(part[:, :-1], part[:, 1:]) for part in ids]


def weights(state: training_step.TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("fp32", "adamw"), ("fp16", "adamw"), ("fp8", "adamw"), ("fp16", "muon")],
)
def test_a_restored_step_and_those_after_it_are_done_again_to_the_bit(
    make_config, tmp_path: Path, name: str, optimizer: str
) -> None:
    config = make_config(train__steps=6, train__warmup_steps=1, train__optimizer=optimizer)
    torch.manual_seed(5)
    state = fresh(config, name)
    if name == "fp16":  # a scale that moves: it grows after every second step
        state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    kept = tmp_path / "kept"
    reports = loop.fit(
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
    snapshot.restore(other, snapshot.read_tensors(kept), facts)
    assert other.loss == numbers[3][0]
    assert other.norms == [norm for _, norm, _ in numbers[:3]]
    assert torch.equal(other.batches[2][1], batches(3)[2][1])
    torch.manual_seed(6)  # dropout draws from the state that the snapshot holds, not from this
    runtime.set_rng_state(other.rng, CPU)
    again = list(loop.fit(other, config.train, batches))
    assert [(r.loss, r.grad_norm, r.loss_scale) for r in again] == numbers[3:]
    assert torch.equal(weights(other), weights(state))


@pytest.mark.parametrize("missing", ["rng.cpu", "exp_avg."])
def test_without_chance_or_moments_the_run_would_differ(
    config, tmp_path: Path, missing: str
) -> None:
    torch.manual_seed(5)
    state = fresh(config, "fp32")
    look = lambda s: snapshot.save_snapshot(tmp_path / "kept", s, {})  # noqa: E731
    losses = [r.loss for r in loop.fit(state, config.train, batches, look=look, look_at=3)]
    tensors = snapshot.read_tensors(tmp_path / "kept")
    tensors = {name: t for name, t in tensors.items() if not name.startswith(missing)}
    facts = snapshot.read_facts(tmp_path / "kept")
    facts["optimizer"]["state"] = {} if missing == "exp_avg." else facts["optimizer"]["state"]
    other = fresh(config, "fp32", seed=9)
    snapshot.restore(other, tensors, facts)
    torch.manual_seed(6)
    if "cpu" in other.rng:
        runtime.set_rng_state(other.rng, CPU)
    again = [report.loss for report in loop.fit(other, config.train, batches)]
    assert again != losses[3:]


def test_weights_that_are_not_finite_come_back_as_they_were(config, tmp_path: Path) -> None:
    state = fresh(config, "fp32")
    with torch.no_grad():
        state.model.transformer.ln_f.weight[3] = torch.nan
    state.batches = batches(0)
    snapshot.save_snapshot(tmp_path / "kept", state, {})
    other = fresh(config, "fp32")
    snapshot.restore(
        other, snapshot.read_tensors(tmp_path / "kept"), snapshot.read_facts(tmp_path / "kept")
    )
    assert other.model.transformer.ln_f.weight[3].isnan()
    assert other.loss != other.loss  # no gradient was made yet


@pytest.mark.parametrize("kind", ["model", "exp_avg", "rest"])
def test_a_flipped_bit_is_refused_and_a_folder_without_facts_too(
    config, tmp_path: Path, kind: str
) -> None:
    state = fresh(config, "fp32")
    list(loop.fit(state, replace(config.train, steps=2), batches))
    kept = tmp_path / "kept"
    snapshot.save_snapshot(kept, state, {})
    raw = bytearray((kept / f"{kind}.safetensors").read_bytes())
    raw[-5] ^= 1
    (kept / f"{kind}.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match=rf"{kind}\.safetensors: damaged: SHA-256"):
        snapshot.read_tensors(kept)
    with pytest.raises(InputError, match="no snapshot of a training step is there"):
        snapshot.read_facts(tmp_path)


def test_a_snapshot_changes_nothing_in_the_state(config, tmp_path: Path) -> None:
    ends = []
    for keep in (False, True):
        torch.manual_seed(5)
        state = fresh(config, "fp32")
        look = lambda s: snapshot.save_snapshot(tmp_path / "kept", s, {})  # noqa: E731
        list(loop.fit(state, config.train, batches, look=look if keep else None, look_at=2))
        ends.append(weights(state))
    assert torch.equal(*ends)
    assert folders.problems(tmp_path / "kept") == []
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_training_on_never_writes_into_the_snapshot_it_came_from(config, tmp_path: Path) -> None:
    state = fresh(config, "fp32")
    list(loop.fit(state, replace(config.train, steps=3), batches))
    snapshot.save_snapshot(tmp_path / "kept", state, {})
    other = fresh(config, "fp32", seed=9)
    facts = snapshot.read_facts(tmp_path / "kept")
    snapshot.restore(other, snapshot.read_tensors(tmp_path / "kept"), facts)
    list(loop.fit(other, config.train, batches))
    assert folders.problems(tmp_path / "kept") == []


# Any optimizer


def matrices(model: GPT) -> list[torch.nn.Parameter]:
    return [p for p in model.transformer.h.parameters() if p.dim() == 2]


class Lion(torch.optim.Optimizer):
    """Signs of a running mean (Chen et al. 2023), with a state of every kind one might keep."""

    def __init__(self, parameters, lr=1e-3):
        super().__init__(
            parameters, {"lr": lr, "beta": 0.9, "schedule": [0.1, None, ("a", math.inf)]}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["beta"] = min(0.99, group["beta"] + 0.01)  # an option that changes
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    mean = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state |= {"mean": mean, "seen": torch.zeros(3, dtype=torch.int64), "count": 0}
                    state["past"] = {"norms": [], 3: (math.nan, -math.inf), "double": None}
                mean, count = state["mean"], state["count"] + 1
                mean.lerp_(parameter.grad.bfloat16(), 1 - group["beta"])
                state["count"] = count
                state["seen"][count % 3] += 2**40 + count
                state["past"]["norms"] = [*state["past"]["norms"], parameter.grad.norm()][-2:]
                state["past"]["double"] = mean.double().flatten()[::2]
                shrink = 1 / (1 + sum(state["past"]["norms"]))
                parameter.sub_(mean.sign() * shrink, alpha=group["lr"])


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "muon": lambda model: torch.optim.Muon(matrices(model), lr=0.1),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.1),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), centered=True, momentum=0.5),
    "lion": lambda model: Lion(model.parameters()),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True, amsgrad=True),
}


def trained_on(config, make, kept: Path | None, lossy: Callable | None = None):
    """Weights after six steps with an optimizer; with `kept` from a snapshot of step 3."""
    torch.manual_seed(5)
    state = fresh(config, "fp32")
    state.optimizer = make(state.model)
    look = None if kept is None else lambda s: snapshot.save_snapshot(kept, s, {})
    list(loop.fit(state, config.train, batches, look=look, look_at=3))
    if kept is None:
        return weights(state), state.optimizer
    other = fresh(config, "fp32", seed=9)
    other.optimizer = make(other.model)
    facts = snapshot.read_facts(kept)
    if lossy:
        lossy(facts["optimizer"])
    snapshot.restore(other, snapshot.read_tensors(kept), facts)
    runtime.set_rng_state(other.rng, CPU)
    list(loop.fit(other, config.train, batches))
    return weights(other), other.optimizer


def options(optimizer: torch.optim.Optimizer) -> str:
    return repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])


@pytest.mark.fault(67)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_with_any_optimizer_goes_on_to_the_bit(config, tmp_path: Path, name) -> None:
    unbroken, first = trained_on(config, OPTIMIZERS[name], None)
    resumed, second = trained_on(config, OPTIMIZERS[name], tmp_path / "kept")
    assert torch.equal(resumed, unbroken)
    assert options(first) == options(second)
    for mine, theirs in zip(first.state.values(), second.state.values(), strict=True):
        assert repr(mine) == repr(theirs)
        for one, other in zip(mine.values(), theirs.values(), strict=True):
            assert not isinstance(one, torch.Tensor) or one.dtype is other.dtype


@pytest.mark.fault(67, control=True)
@pytest.mark.parametrize("name", ["sgd", "muon", "lion"])
def test_without_its_state_a_training_would_go_another_way(config, tmp_path: Path, name) -> None:
    unbroken, _ = trained_on(config, OPTIMIZERS[name], None)
    lost = lambda facts: facts["state"].clear()  # noqa: E731
    resumed, _ = trained_on(config, OPTIMIZERS[name], tmp_path / "kept", lost)
    assert not torch.equal(resumed, unbroken)


class Opaque(torch.optim.SGD):
    """Keeps what no file holds."""

    kept: object = None
    key: object = "kept"

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][self.key] = self.kept


@pytest.mark.fault(67)
@pytest.mark.parametrize(
    ("kept", "key", "told"),
    [
        (object(), "kept", r"kept\.transformer\.wte\.weight is a object, which cannot be saved"),
        ({1, 2}, "kept", "is a set, which cannot be saved"),
        ([torch.ones(2).to_sparse()], "kept", "is not a plain dense tensor"),
        (1.0, "model", "'model' cannot be saved"),
        (1.0, "a/b", "'a/b' cannot be saved"),
        (1.0, 7, "7 cannot be saved"),
    ],
)
def test_a_state_that_no_file_holds_is_refused_and_nothing_is_written(
    config, tmp_path: Path, kept, key, told
) -> None:
    state = fresh(config, "fp32")
    state.optimizer = Opaque(state.model.parameters(), lr=0.1)
    state.optimizer.kept, state.optimizer.key = kept, key
    list(loop.fit(state, replace(config.train, steps=1), batches))
    with pytest.raises(InputError, match=told):
        snapshot.save_snapshot(tmp_path / "kept", state, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(67)
def test_a_snapshot_of_another_optimizer_is_refused(config, tmp_path: Path) -> None:
    state = fresh(config, "fp32")
    list(loop.fit(state, replace(config.train, steps=1), batches))
    snapshot.save_snapshot(tmp_path / "kept", state, {})
    facts, tensors = (
        snapshot.read_facts(tmp_path / "kept"),
        snapshot.read_tensors(tmp_path / "kept"),
    )
    state.optimizer = OPTIMIZERS["sgd"](state.model)
    with pytest.raises(InputError, match="another optimizer: AdamW then, SGD now"):
        snapshot.restore(state, tensors, facts)
    state.optimizer = OPTIMIZERS["adamw"](state.model)
    with pytest.raises(InputError, match="its groups hold other parameters"):
        snapshot.restore(state, tensors, facts)


def test_tensors_that_share_memory_and_options_that_are_tensors_come_back(
    config, tmp_path: Path
) -> None:
    state = fresh(config, "fp32")
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    both = torch.arange(8.0)
    first, second, *_ = state.model.parameters()
    state.optimizer.state[first] = {"momentum_buffer": None, "parts": [both[:4], both[2:]]}
    state.optimizer.state[second] = {"momentum_buffer": torch.zeros(0), "parts": [both]}
    snapshot.save_snapshot(tmp_path / "kept", state, {})
    other = fresh(config, "fp32", seed=9)
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.3, momentum=0.5)
    kept = snapshot.read_tensors(tmp_path / "kept")
    snapshot.restore(other, kept, snapshot.read_facts(tmp_path / "kept"))
    assert repr(list(other.optimizer.state.values())) == repr(list(state.optimizer.state.values()))
    assert options(other.optimizer) == options(state.optimizer)
