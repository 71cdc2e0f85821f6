"""Claims about the batches that are made from token files."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.batches import _epoch, batch_at, check_length, validation_windows
from pipeline.data.token_files import Tokens
from pipeline.errors import InputError


def made_of(ids):
    ids = np.asarray(ids, dtype=np.uint16)
    return Tokens(ids, len(ids), "", 1, Path("made.bin"))


@pytest.mark.fault(7)
def test_data_shorter_than_one_sequence_is_refused():
    check_length(made_of(range(9)), 8)
    with pytest.raises(InputError, match="train.sequence_length=8: at least 9 are needed"):
        check_length(made_of(range(8)), 8)


@pytest.mark.fault(7, control=True)
def test_a_slice_beyond_the_tokens_is_shorter_without_a_word():
    assert len(made_of(range(8)).ids[0:9]) == 8


def batches(tokens, steps, *, batch_size, accumulate=1, world=1, **options):
    """The inputs of every micro-batch of `steps`, each with (step, micro_step, rank)."""
    for step, micro_step, rank in product(range(steps), range(accumulate), range(world)):
        x, _ = batch_at(
            tokens,
            step,
            micro_step,
            batch_size=batch_size,
            accumulate=accumulate,
            rank=rank,
            world=world,
            **options,
        )
        yield (step, micro_step, rank), x


def test_targets_are_the_inputs_one_token_later():
    tokens = made_of(np.random.default_rng(0).integers(50257, size=999))
    x, y = batch_at(tokens, 3, 1, batch_size=4, sequence_length=16, accumulate=2, seed=1)
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1])
    whole = tokens.ids.tolist()
    for row, last in zip(x.tolist(), y[:, -1].tolist(), strict=True):
        assert any(whole[i : i + 17] == [*row, last] for i in range(len(whole)))


def test_a_batch_depends_on_its_place_alone():
    tokens = made_of(range(5000))
    options = {"batch_size": 4, "sequence_length": 16, "accumulate": 2}
    asked = [batch_at(tokens, step, 0, seed=1, **options)[0] for step in range(200)]
    _epoch.cache_clear()
    for step in (199, 3, 77):
        assert torch.equal(asked[step], batch_at(tokens, step, 0, seed=1, **options)[0])
    assert not torch.equal(asked[0], batch_at(tokens, 0, 0, seed=2, **options)[0])


@pytest.mark.parametrize("count", [161, 170, 176])
def test_an_epoch_visits_every_window_exactly_once(count):
    tokens = made_of(range(count))
    for epoch in range(5):
        steps = range(epoch * 10, epoch * 10 + 10)
        x = torch.cat(
            [
                batch_at(tokens, s, 0, batch_size=1, sequence_length=16, accumulate=1, seed=3)[0]
                for s in steps
            ]
        )
        seen = sorted(x.flatten().tolist())
        assert seen == list(range(seen[0], seen[0] + 160))
        assert seen[0] <= count - 161


def test_no_usable_tail_is_dropped():
    tokens = made_of(range(176))
    used = set()
    for step in range(400):
        _, y = batch_at(tokens, step, 0, batch_size=1, sequence_length=16, accumulate=1, seed=3)
        used |= set(y.flatten().tolist())
    assert used == set(range(1, 176))


def test_an_incomplete_batch_goes_on_into_the_next_epoch():
    tokens = made_of(range(161))  # 10 windows, taken 4 at a time
    rows = torch.cat([x for _, x in batches(tokens, 5, batch_size=4, sequence_length=16, seed=3)])
    assert rows.shape == (20, 16)
    for epoch in (rows[:10], rows[10:]):
        assert sorted(epoch.flatten().tolist()) == list(range(160))
    assert not torch.equal(rows[:10], rows[10:])


def test_ranks_and_micro_steps_are_disjoint():
    tokens = made_of(range(64 * 16 + 1))
    found = list(
        batches(tokens, 4, batch_size=2, accumulate=2, world=4, sequence_length=16, seed=5)
    )
    firsts = [first for _, x in found for first in x[:, 0].tolist()]
    assert len(firsts) == len(set(firsts)) == 64


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_takes_the_same_windows_however_the_global_batch_is_factored(world, accumulate):
    tokens = made_of(range(3001))
    options = {"sequence_length": 16, "seed": 7}

    def windows(step, **factors):
        found = [x for place, x in batches(tokens, 20, **factors, **options) if place[0] == step]
        return sorted(torch.cat(found)[:, 0].tolist())

    factors = {"batch_size": 24 // world // accumulate, "world": world, "accumulate": accumulate}
    for step in (0, 7, 8, 19):  # 187 windows: step 7 reaches into the second epoch
        assert windows(step, **factors) == windows(step, batch_size=24)


# --- validation


def validation(tokens, world=1, **options):
    """(input, target) pairs that all ranks see, sorted."""
    pairs = []
    for rank in range(world):
        for x, y in validation_windows(tokens, rank=rank, world=world, **options):
            assert x.shape == y.shape and x.dtype == torch.int64
            pairs += zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
    return sorted(pairs)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize(
    ("limit", "count"), [(None, 999), (500, 500), (5, 5), (16, 16), (9999, 999)]
)
def test_every_validation_target_is_seen_once_for_any_batch_size_and_world(
    world, batch_size, limit, count
):
    tokens = made_of(range(1000))
    pairs = validation(tokens, world, batch_size=batch_size, sequence_length=16, limit=limit)
    assert pairs == [(i, i + 1) for i in range(count)]


def test_windows_are_the_same_for_any_batch_size_so_contexts_are_too():
    tokens = made_of(range(1000))
    rows = [
        [
            row
            for x, _ in validation_windows(tokens, batch_size=b, sequence_length=16)
            for row in x.tolist()
        ]
        for b in (1, 8)
    ]
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == list(range(0, 999, 16)) and len(rows[0][-1]) == 7


def test_two_tokens_are_one_validation_target():
    [(x, y)] = validation_windows(made_of([3, 4]), batch_size=8, sequence_length=16)
    assert (x.tolist(), y.tolist()) == ([[3]], [[4]])
