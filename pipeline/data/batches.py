"""Deterministic batches from token files: every one a pure function of (seed, step)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.published import IGNORE

if TYPE_CHECKING:
    from pipeline.data.token_files import Tokens


def check_length(tokens: Tokens, sequence_length: int) -> None:
    """Raise InputError where there is not one sequence and the token after it."""
    if len(tokens) <= sequence_length:
        raise InputError(
            f"{tokens.path}: {len(tokens)} tokens are too few for "
            f"train.sequence_length={sequence_length}: at least {sequence_length + 1} are needed; "
            "give the corpus more text or set a shorter length"
        )


def batch_at(
    tokens: Tokens,
    step: int,
    micro_step: int,
    *,
    batch_size: int,
    sequence_length: int,
    accumulate: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one micro-batch, both (B, T) int64 on the CPU; a pure function.

    An epoch visits every window of T inputs once, in an order drawn from (seed, epoch); where
    the windows begin is drawn as well, so that the tokens that fill no window change by epoch.
    A step takes the next batch_size * accumulate * world windows, the same ones however that
    product is factored, going on into the next epoch rather than dropping any.

    Of conversations only answers are targets, the others are IGNORE. A window without any gives
    its place to one that has some, so that no sequence is computed for nothing.
    """
    windows = (len(tokens) - 1) // sequence_length
    assert windows > 0, "check_length comes first"
    first = ((step * accumulate + micro_step) * world + rank) * batch_size
    starts, masked = [], tokens if tokens.answers is not None else None
    for sample in range(first, first + batch_size):
        epoch, place = divmod(sample, windows)
        offset, order = _epoch(len(tokens), sequence_length, seed, epoch, masked)
        starts.append(offset + int(order[place]) * sequence_length)
    return _gather(tokens, np.array(starts), sequence_length)


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def _epoch(
    count: int, length: int, seed: int, epoch: int, masked: Tokens | None = None
) -> tuple[int, np.ndarray]:
    """Where the first window begins, and the order of the windows: (windows,) uint32."""
    windows, slack = divmod(count - 1, length)
    assert windows < 1 << 32
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(slack + 1))
    order = generator.permutation(np.arange(windows, dtype=np.uint32))
    if masked is not None and masked.answers is not None:
        targets = masked.answers[offset + 1 : offset + 1 + windows * length]
        some = np.asarray(targets.reshape(windows, length).any(axis=1))  # (windows,)
        order = np.resize(order[some[order]], windows)  # again from its start, where it is shorter
    return offset, order


def _gather(tokens: Tokens, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    places = starts[:, None] + np.arange(length + 1)  # (B, T + 1)
    block = tokens.ids[places].astype(np.int64)
    x, y = np.ascontiguousarray(block[:, :-1]), np.ascontiguousarray(block[:, 1:])
    if tokens.answers is not None:
        y = np.where(tokens.answers[places[:, 1:]], y, IGNORE)  # not in place: y may be part of x
    return torch.from_numpy(x), torch.from_numpy(y)  # (B, T), (B, T)


def validation_windows(
    tokens: Tokens,
    *,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    alike: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Consecutive windows as inputs and targets, (B, T) int64 each, the ragged end as (1, t).

    Over all ranks every token but the first is a target exactly once, or with `limit` the first
    `limit` of those, whatever the batch size and `world`; of conversations all that are no
    answer's are IGNORE, and `limit` is stretched to the first that is. Ranks take windows in turn,
    so one may have a batch fewer, or none: add sums and counts over ranks, not means. `alike`
    gives each as many batches as the first: one without a target in the place of none.
    """
    targets = len(tokens) - 1 if limit is None else min(limit, len(tokens) - 1)
    if tokens.answers is not None:  # at least one of them is a target
        targets = max(targets, int(np.argmax(tokens.answers[1:])) + 1)
    full, ragged = divmod(targets, sequence_length)
    mine = np.arange(rank, full, world) * sequence_length
    nothing = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE)
    for first in range(0, -(-full // world) if alike else len(mine), batch_size):
        some = mine[first : first + batch_size]
        yield _gather(tokens, some, sequence_length) if len(some) else nothing
    if ragged and full % world == rank:
        yield _gather(tokens, np.array([full * sequence_length]), ragged)
    elif ragged and alike:
        yield nothing
