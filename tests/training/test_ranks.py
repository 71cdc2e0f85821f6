"""Several processes train as one does: the same batch, sums over all, and one mind."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import Ranks
from pipeline.data import batches
from pipeline.errors import InputError, NumericsError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import IGNORE
from pipeline.training import loop, training_step, validation
from pipeline.training.training_step import Batch, TrainState
from tests.helpers.ranks import needs_fork, together

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128)
CPU = torch.device("cpu")
ULP = 2.0**-24  # the largest relative error of one rounding to fp32
pytestmark = [
    needs_fork,
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # of fork
]


@pytest.fixture
def model(make_config) -> GPT:
    made = GPT(SHAPE)
    initialize(made, make_config().init, torch.Generator().manual_seed(0))
    return made


def settings(make_config, **changes: Any):
    given = {"steps": 6, "warmup_steps": 1, "batch_size": 1, "sequence_length": 16}
    given |= {"accumulate": 4, "val_tokens": 170} | changes
    return make_config(**{f"train__{name}": value for name, value in given.items()}).train


class Made:
    """400 tokens, in the place of a token file."""

    ids = np.random.default_rng(0).integers(0, 97, 400).astype(np.uint16)
    answers = None

    def __len__(self) -> int:
        return len(self.ids)


def tokens() -> Any:
    return Made()


def fit(state: TrainState, config: Any, batches: Any) -> list[loop.StepReport]:
    """Every step of the first rank, and the same ones as that orders them in another."""

    def steps_at(step: int) -> int:
        return state.ranks.told()[1] if state.ranks.rank and step < config.steps else config.steps

    return list(loop.fit(state, config, batches, steps_at=steps_at))


def start(model: GPT, config, ranks: Ranks, name: str = "fp32") -> TrainState:
    state = training_step.start(
        copy.deepcopy(model), config, choose_precision(name, CPU), narrowing=1.0
    )
    state.ranks = ranks
    return state


def ragged(batches: list[Batch], step: int, first: int) -> list[Batch]:
    """Masks that fall unevenly: of every step's micro-batches one has no target at all."""
    made = []
    for number, (x, y) in enumerate(batches, first):
        y = y.clone()
        y[:, : (16, 3, 0, 7)[(number + step) % 4]] = IGNORE
        made.append((x, y))
    return made


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def grads(state: TrainState) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in state.model.parameters()])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("sizes", [(4, 3), (3, 4), (12, 1), (1, 12), (6, 2)])
def test_ranks_share_a_step_evenly_and_together_have_the_sequences_of_one(
    make_config, world: int, sizes: tuple[int, int]
) -> None:
    config = settings(make_config, batch_size=sizes[0], accumulate=sizes[1])
    shares = [loop.micro_batches(tokens(), config, 5, Ranks(rank, world)) for rank in range(world)]
    shapes = [[tuple(x.shape) for x, _ in share] for share in shares]
    assert shapes == shapes[:1] * world and shapes[0][0][0] <= sizes[0]
    rows = [torch.cat([torch.cat([x, y], 1) for x, y in share]) for share in shares]
    whole = loop.micro_batches(tokens(), config, 5)
    expected = torch.cat([torch.cat([x, y], 1) for x, y in whole])
    assert sorted(torch.cat(rows).tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_equal_those_of_one_but_for_the_order_of_the_sum(
    model, make_config, world: int
) -> None:
    """Sums of n parts, each rounded alike, in another order: at most 2 (n - 1) ULP of |parts|."""
    config = settings(make_config)

    def share(ranks: Ranks) -> list[Batch]:
        """Micro-batch n goes to rank n % world."""
        whole = ragged(loop.micro_batches(tokens(), config, 0), 0, 0)
        return whole[ranks.rank :: ranks.world]

    def work(ranks: Ranks) -> tuple[float, torch.Tensor]:
        state = start(model, config, ranks)
        return training_step.gradients(state, share(ranks)).item(), grads(state)

    whole = share(Ranks())
    alone = start(model, config, Ranks())
    loss = training_step.gradients(alone, whole).item()
    valid = sum(int((y != IGNORE).sum()) for _, y in whole)
    parts = torch.zeros_like(weights(alone))
    for x, y in whole:
        state = start(model, config, Ranks())
        state.loss_function(x, y, torch.ones(()) / valid).backward()
        parts += grads(state).abs()
    found = together(world, work)
    bound = 2 * (len(whole) - 1) * ULP
    for found_loss, found_grads in found:
        assert abs(found_loss - loss) <= bound * loss
        # The look-up adds its rows one by one, to what is there: as many roundings more.
        assert ((found_grads - grads(alone)).abs() <= 8 * bound * parts + 1e-12).all()
        assert torch.equal(found_grads, found[0][1]), "every rank has the same bits"
    assert not torch.allclose(parts, grads(alone).abs()), "parts that cancel show the sum"


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_steps_of_two_ranks_equal_those_of_one_with_ragged_masks(
    model, make_config, name: str
) -> None:
    config = settings(make_config)

    def work(ranks: Ranks) -> tuple[list[float], list[float], torch.Tensor]:
        def batches(step: int) -> list[Batch]:
            return ragged(loop.micro_batches(tokens(), config, step), step, 0)[
                ranks.rank :: ranks.world
            ]

        state = start(model, config, ranks, name)
        reports = fit(state, config, batches)
        assert all(report.tokens == 64 for report in reports)
        return [r.loss for r in reports], [r.grad_norm for r in reports], weights(state)

    losses, norms, _ = work(Ranks())
    first, second = together(2, work)
    assert first[0] == second[0] and torch.equal(first[2], second[2])
    assert first[0] == pytest.approx(losses, rel=1e-5)
    assert first[1] == pytest.approx(norms, rel=1e-3)


@pytest.mark.fault(32)
def test_an_overflow_of_one_rank_is_skipped_by_all(model, make_config) -> None:
    config = settings(make_config)

    def work(ranks: Ranks) -> tuple[list[bool], list[float], torch.Tensor]:
        state = start(model, config, ranks, "fp16")
        if ranks.rank == ranks.world - 1:
            state.model.transformer.ln_f.bias.register_hook(
                lambda g: torch.full_like(g, math.inf) if state.step == 2 else g
            )
        batches = [loop.micro_batches(tokens(), config, step, ranks) for step in range(6)]
        reports = fit(state, config, batches.__getitem__)
        return [r.skipped for r in reports], [r.loss_scale for r in reports], weights(state)

    first, second = together(2, work)
    assert first[0] == second[0] == [step == 2 for step in range(6)]
    assert first[1] == second[1] == [65536.0] * 3 + [32768.0] * 3
    assert torch.equal(first[2], second[2])


@pytest.mark.fault(32)
def test_a_gradient_of_one_rank_that_is_not_finite_stops_all_before_the_update(
    model, make_config
) -> None:
    config = settings(make_config)

    def work(ranks: Ranks) -> tuple[str, torch.Tensor]:
        state = start(model, config, ranks)
        if ranks.rank == 1:
            state.model.transformer.ln_f.bias.register_hook(lambda g: g * math.nan)
        with pytest.raises(NumericsError) as caught:
            fit(state, config, lambda step: loop.micro_batches(tokens(), config, step, ranks))
        return str(caught.value), weights(state)

    first, second = together(2, work)
    assert first[0] == second[0] == "step 0: the gradient norm is nan; no update was made"
    assert torch.equal(first[1], weights(start(model, config, Ranks())))
    assert torch.equal(first[1], second[1])


def test_a_spike_that_one_rank_has_seen_is_skipped_by_all_and_no_target_is_one_error(
    model, make_config
) -> None:
    config = settings(make_config, skip_spikes=5.0)

    def work(ranks: Ranks) -> tuple[bool, str]:
        state = start(model, config, ranks)
        state.norms = [1e-3] * 30
        share = loop.micro_batches(tokens(), config, 0, ranks)
        skipped = training_step.train_step(state, share, 1e-3, config).skipped
        nothing = [(x, torch.full_like(y, IGNORE)) for x, y in share]
        with pytest.raises(InputError) as caught:
            training_step.gradients(state, nothing)
        return skipped, str(caught.value)

    first, second = together(2, work)
    assert first == second and first[0] and "all 64 targets" in first[1]


def test_dropout_differs_by_rank_and_step_and_comes_again(model, make_config) -> None:
    config = settings(make_config)
    dropped = GPT(replace(SHAPE, dropout=0.5))
    dropped.load_state_dict(model.state_dict())

    def work(ranks: Ranks, same: bool = False) -> list[float]:
        state = start(dropped, config, ranks)
        batch = loop.micro_batches(tokens(), config, 0)[:1]
        losses = []
        for step in (0, 1, 0):
            ranks.seed(7, step)
            x, y = batch[0]
            losses.append(state.loss_function(x, y, torch.ones(())).item())
        return losses

    first, second = together(2, work)
    assert first[0] == first[2] and second[0] == second[2]
    assert len({first[0], first[1], second[0], second[1]}) == 4
    before = torch.get_rng_state()
    Ranks().seed(7, 0)
    assert torch.equal(torch.get_rng_state(), before), "alone the generators run on"


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_in_order_every_bit_is_the_same_for_any_number_of_processes(
    model, make_config, name: str
) -> None:
    """Dropout, masks, overflows of fp16, clipping, validation; and without order they differ."""
    config = settings(make_config, batch_size=2, accumulate=6, grad_clip=0.5)
    dropped = GPT(replace(SHAPE, dropout=0.3))
    dropped.load_state_dict(model.state_dict())

    def work(ranks: Ranks) -> tuple[list[float], list[float], torch.Tensor, float]:
        def batches(step: int) -> list[Batch]:
            made = []
            for number, (x, y) in enumerate(loop.micro_batches(tokens(), config, step, ranks)):
                y, first = y.clone(), number * ranks.world + ranks.rank
                for row in range(len(y)):
                    y[row, : (15, 3, 0, 7)[(first + row + step) % 4]] = IGNORE
                made.append((x, y))
            return made

        state = start(dropped, config, ranks, name)
        reports = fit(state, config, batches)
        if ranks.rank:
            ranks.told()
        loss = validation.validate(state, tokens(), config)
        return [r.loss for r in reports], [r.grad_norm for r in reports], weights(state), loss

    torch.manual_seed(1)
    expected = work(Ranks(ordered=True))
    for world in (2, 4):
        for losses, norms, found, validated in together(world, work, ordered=True):
            assert (losses, norms, validated) == (expected[0], expected[1], expected[3])
            assert torch.equal(found, expected[2])
    assert not torch.equal(together(2, work)[0][2], expected[2])


def test_in_order_the_training_is_the_same_but_for_rounding(model, make_config) -> None:
    config = settings(make_config, batch_size=2, accumulate=3)

    def losses(ranks: Ranks) -> list[float]:
        share = [loop.micro_batches(tokens(), config, step, ranks) for step in range(6)]
        reports = loop.fit(start(model, config, ranks), config, share.__getitem__)
        return [report.loss for report in reports]

    found = losses(Ranks(ordered=True))
    assert found == pytest.approx(losses(Ranks()), rel=1e-5) and found != losses(Ranks())


@pytest.mark.parametrize("targets", [170, 31, 16, 5])
def test_validation_of_two_ranks_equals_that_of_one(model, make_config, targets: int) -> None:
    """A ragged end, ranks of unequal and of no batches; each batch rounds its sum to fp32."""
    config = settings(make_config, val_tokens=targets, batch_size=2)

    def work(ranks: Ranks) -> float:
        state = start(model, config, ranks)
        orders = [] if ranks.rank == 0 else [ranks.told()]
        loss = validation.validate(state, tokens(), config, lambda _: pytest.fail("one left"))
        assert orders in ([], [(2, 0)])
        return loss

    alone = validation.validate(start(model, config, Ranks()), tokens(), config)
    first, second = together(2, work)
    assert first == second and first == pytest.approx(alone, rel=2 * ULP * 16)


@pytest.mark.fault(52)
def test_a_signal_to_one_rank_is_known_to_all_in_their_next_step() -> None:
    def work(ranks: Ranks) -> list[int]:
        heard = []
        for step in range(3):
            if (step, ranks.rank) == (1, 1):
                ranks.asked = 15
            assert ranks.count(2 + ranks.rank) == 5
            heard.append(ranks.asked)
        return heard

    assert together(2, work) == [[0, 15, 15]] * 2


@pytest.mark.fault(52, control=True)
def test_a_sum_alone_would_leave_the_signal_with_the_rank_that_got_it() -> None:
    def work(ranks: Ranks) -> int:
        ranks.asked = 15 * ranks.rank
        ranks.sums([2.0])
        return ranks.asked

    assert together(2, work) == [0, 15]


@pytest.mark.fault(51, control=True)
def test_ranks_that_each_made_the_micro_batches_of_the_settings_would_train_on_twice_as_much(
    make_config,
) -> None:
    config = settings(make_config)
    naive = [
        batches.batch_at(
            tokens(), 3, n, batch_size=1, sequence_length=16, accumulate=4, seed=1, rank=r, world=2
        )
        for r in range(2)
        for n in range(4)
    ]
    assert len(naive) == 2 * len(loop.micro_batches(tokens(), config, 3))
