"""Weights in parts over processes (FSDP): the same training, of which each has its share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # once here, not in every fork

from pipeline.compute import sharding
from pipeline.compute.ranks import Ranks
from pipeline.errors import NumericsError
from pipeline.model.gpt import GPT
from pipeline.model.init import initialize
from pipeline.model.loss import IGNORE
from pipeline.resume import gathering, snapshot
from pipeline.storage.tensor_files import read_file
from pipeline.training import loop, training_step, validation
from pipeline.training.training_step import Batch, TrainState
from tests.helpers.ranks import together
from tests.training import test_ranks
from tests.training.test_ranks import SHAPE, ULP, fit, ragged, settings, start, tokens

pytestmark = test_ranks.pytestmark


@pytest.fixture
def model(make_config) -> GPT:
    made = GPT(SHAPE)
    initialize(made, make_config().init, torch.Generator().manual_seed(0))
    return made


def gathered(state: TrainState, of: str = "grad") -> torch.Tensor:
    """All numbers of weights or gradients, wherever they lie."""
    found = [p if of == "data" else p.grad for p in state.model.parameters()]
    return torch.cat([sharding.whole(p.detach()).flatten() for p in found])


def spoil(state: TrainState, when: Callable[[], bool], factor: float) -> None:
    """Multiply every gradient of this rank's micro-batches."""
    original = state.loss_function

    def loss(*given: torch.Tensor) -> torch.Tensor:
        made = original(*given)
        if when():
            made.register_hook(lambda grad: grad * factor)
        return made

    state.loss_function = loss


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_those_of_one_but_for_the_order_of_the_sum(
    model, make_config, world: int
) -> None:
    """As for processes that have all weights; the look-up adds its rows in an order of its own."""
    config = settings(make_config)
    whole = ragged(loop.micro_batches(tokens(), config, 0), 0, 0)

    def work(ranks: Ranks) -> tuple[float, torch.Tensor]:
        state = start(model, config, ranks)
        loss = training_step.gradients(state, whole[ranks.rank :: ranks.world])
        return loss.item(), gathered(state)

    loss, expected = work(Ranks())
    valid = sum(int((y != IGNORE).sum()) for _, y in whole)
    parts = torch.zeros_like(expected)
    for x, y in whole:
        state = start(model, config, Ranks())
        state.loss_function(x, y, torch.ones(()) / valid).backward()
        parts += gathered(state).abs()
    bound = 2 * (len(whole) - 1) * ULP
    for found_loss, found in together(world, work, sharded=True):
        assert abs(found_loss - loss) <= bound * loss
        assert ((found - expected).abs() <= 8 * bound * parts + 1e-12).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fp32", {}),
        ("bf16", {"checkpoint_activations": True}),
        ("fp16", {"skip_spikes": 100.0}),
        ("fp8", {}),
    ],
)
def test_steps_are_those_of_one_with_ragged_masks(model, make_config, name: str, changes) -> None:
    config = settings(make_config, **changes)

    def work(ranks: Ranks) -> tuple[list[float], list[float]]:
        def batches(step: int) -> list[Batch]:
            whole = ragged(loop.micro_batches(tokens(), config, step), step, 0)
            return whole[ranks.rank :: ranks.world]

        reports = fit(start(model, config, ranks, name), config, batches)
        return [r.loss for r in reports], [r.grad_norm for r in reports]

    losses, norms = work(Ranks())
    first, second = together(2, work, sharded=True)
    assert first == second
    assert first[0] == pytest.approx(losses, rel=1e-5)
    assert first[1] == pytest.approx(norms, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which torch hides
def test_compiled_blocks_are_one_graph_and_give_the_losses_of_eager_ones(make_config) -> None:
    deep = GPT(replace(SHAPE, n_layer=10))  # more blocks than a function may have graphs
    initialize(deep, make_config().init, torch.Generator().manual_seed(0))

    def work(ranks: Ranks) -> tuple[list[float], int, list[str]]:
        torch._dynamo.utils.counters.clear()  # of what other tests have compiled
        found = []
        for compiled in (False, True):
            config = settings(make_config, compile=compiled, steps=3, val_tokens=40)
            state = start(deep, config, ranks)
            share = [loop.micro_batches(tokens(), config, step, ranks) for step in range(3)]
            found.append([report.loss for report in fit(state, config, share.__getitem__)])
            if ranks.rank:
                ranks.told()
            found[-1].append(validation.validate(state, tokens(), config))
        assert found[0] == pytest.approx(found[1], rel=1e-6)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return found[1], graphs, list(state.model.state_dict())

    first, second = together(2, work, sharded=True, minutes=10)
    assert first == second
    assert first[1:] == [1, list(deep.state_dict())]


def test_dropout_draws_as_it_does_where_each_has_all_weights(model, make_config) -> None:
    config = settings(make_config)
    dropped = GPT(replace(SHAPE, dropout=0.5))
    dropped.load_state_dict(model.state_dict())

    def work(ranks: Ranks) -> list[float]:
        state = start(dropped, config, ranks)
        share = [loop.micro_batches(tokens(), config, step, ranks) for step in range(6)]
        return [report.loss for report in fit(state, config, share.__getitem__)]

    losses = together(2, work)[0]
    assert together(2, work, sharded=True)[0] == pytest.approx(losses, rel=1e-5)
    assert losses != pytest.approx(work(Ranks()), rel=1e-3)


def test_weights_gradients_and_moments_are_there_in_parts(model, make_config) -> None:
    config, count = settings(make_config), model.parameter_count()

    def held(tensors: Any) -> int:
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        return sum(storage.nbytes() for storage in kept.values())

    def work(ranks: Ranks) -> list[int]:
        state = start(model, config, ranks)
        assert state.model.parameter_count() == count
        fit(state, config, lambda step: loop.micro_batches(tokens(), config, step, ranks))
        training_step.gradients(state, loop.micro_batches(tokens(), config, 6, ranks))
        if ranks.rank:
            ranks.told()
        validation.validate(state, tokens(), config)
        parameters = list(state.model.parameters())
        assert state.model.transformer.wte.weight.grad is parameters[0].grad  # the head is tied
        moments = [state.optimizer.state[p]["exp_avg"] for p in parameters]
        return [
            held(map(sharding.own, own))
            for own in (parameters, [p.grad for p in parameters], moments)
        ]

    padding = 4 * len(list(model.parameters())) * SHAPE.n_embd
    for sizes in together(3, work, sharded=True):
        assert all(size <= 4 * count / 3 + padding for size in sizes), (sizes, 4 * count)


@pytest.mark.fault(32)
def test_an_overflow_of_one_rank_is_skipped_by_all_and_nan_stops_all_before_the_update(
    model, make_config
) -> None:
    config = settings(make_config)

    def work(ranks: Ranks) -> tuple[list[bool], list[float], str, torch.Tensor]:
        state = start(model, config, ranks, "fp16")
        spoil(state, lambda: ranks.rank == 1 and state.step == 2, math.inf)
        share = [loop.micro_batches(tokens(), config, step, ranks) for step in range(6)]
        reports = fit(state, config, share.__getitem__)
        bad = start(model, config, ranks)
        spoil(bad, lambda: ranks.rank == 1, math.nan)
        with pytest.raises(NumericsError) as caught:
            fit(bad, config, share.__getitem__)
        scales = [r.loss_scale for r in reports]
        return [r.skipped for r in reports], scales, str(caught.value), gathered(bad, "data")

    first, second = together(2, work, sharded=True)
    assert first[:3] == second[:3]
    assert first[0] == [step == 2 for step in range(6)]
    assert first[1] == [65536.0] * 3 + [32768.0] * 3
    assert first[2] == "step 0: the gradient norm is nan; no update was made"
    assert torch.equal(first[3], torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.mark.parametrize("targets", [170, 97, 31, 16, 5])
def test_validation_equals_that_of_one_though_all_take_part_in_each_batch(
    model, make_config, targets: int
) -> None:
    config = settings(make_config, val_tokens=targets, batch_size=2)

    def work(ranks: Ranks) -> list[float]:
        state, losses = start(model, config, ranks), []
        for _ in range(2):
            if ranks.rank:
                ranks.told()
            losses.append(validation.validate(state, tokens(), config))
        return losses

    alone = validation.validate(start(model, config, Ranks()), tokens(), config)
    for found in together(3, work, sharded=True):
        assert found == [pytest.approx(alone, rel=2 * ULP * 16)] * 2


def test_a_snapshot_goes_through_parts_and_comes_out_byte_for_byte(
    model, make_config, tmp_path: Path
) -> None:
    """The files of one process, restored by three in parts, saved by them, restored by one."""
    config = settings(make_config)
    alone = start(model, config, Ranks())
    share = [loop.micro_batches(tokens(), config, step) for step in range(7)]
    list(loop.fit(alone, config, share.__getitem__))
    alone.begin([])
    snapshot.save_snapshot(tmp_path / "one", alone, {})
    one = snapshot.read_tensors(tmp_path / "one"), snapshot.read_facts(tmp_path / "one")

    def work(ranks: Ranks) -> float:
        state = start(model, config, ranks)
        snapshot.restore(state, *one)
        state.rng = {name.removeprefix("rng."): t for name, t in one[0].items() if "rng." in name}
        if ranks.rank:
            assert gathering.on_host(ranks, {}) == {}
            snapshot.take_part(state, ranks.told()[1])
            snapshot.take_part(state, ranks.told()[1])
        else:
            snapshot.save_snapshot(tmp_path / "three", state, {})
            made = gathering.model_of(state).state_dict()
            assert all(torch.equal(made[n], t) for n, t in alone.model.state_dict().items())
        return training_step.gradients(state, [share[6][ranks.rank]]).item()

    assert len(set(together(3, work, sharded=True))) == 1
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "three").iterdir())
    for name in names:
        first, second = tmp_path / "one" / name, tmp_path / "three" / name
        if name.endswith(".safetensors"):
            assert first.read_bytes() == second.read_bytes(), name
    assert len(read_file(tmp_path / "three" / "exp_avg.safetensors")) == len(alone.optimizer.state)
