"""Fingerprints of what a step begins with: its weights, its batch, its random state."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.compute.ranks import Ranks
from pipeline.compute.runtime import Transfer
from pipeline.compute.sharding import is_shared, own, own_rows

if TYPE_CHECKING:
    from pipeline.training.training_step import Batch, TrainState

CHUNK = 1 << 20  # numbers of a parameter that have one sum
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes a number
BYTES = 6  # of a fingerprint: a record's numbers hold 53 bits
PARTS = ("weights", "batch", "random")
METRIC = "fingerprint/"  # what their names in a record begin with
Scratch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Fingerprint:
    """Three numbers of 48 bits, each equal for equal bits.

    `weights` are those before the step's update, and `batch` is of the sequences of all processes
    in any order: neither depends on the device, the number of processes or how a step is cut into
    micro-batches, where the bits do not. `random` is of the generator that dropout draws from, of
    several processes the first one's: another one on another device or by other processes.

    None is chained to those before: a difference in weights stays in all later weights.
    """

    weights: int
    batch: int
    random: int

    def metrics(self) -> dict[str, float]:
        """As a record has them."""
        return {METRIC + part: float(getattr(self, part)) for part in PARTS}


class Taken:
    """A fingerprint whose sums are on their way from the device; `read` waits for them."""

    def __init__(self, state: TrainState, seed: int):
        """Of the step that has begun, whose batches lie on the host; all processes call it."""
        self._sums = Transfer(weight_sums(state.model.parameters(), state.ranks))
        marks = sum(mark for batch in state.batches for mark in sequence_marks(batch))
        self._batch = state.ranks.count(_signed(marks))
        self._random = _random(state, seed)

    def read(self) -> Fingerprint:
        return Fingerprint(_joined(self._sums.read()), _digest(_bytes(self._batch)), self._random)


def weight_sums(parameters: Iterable[Tensor], ranks: Ranks) -> Tensor:
    """One sum for each CHUNK of every parameter: (chunks,) int64, on their device.

    It adds up the bits of number i of a chunk, as an integer, times 2 i + 1, modulo 2^64. So one
    changed bit, or two numbers in each other's place, always change a sum; and integers come to
    the same in any order. Takes 16 MiB for the moment. Where these lie in parts over
    processes each adds up its own, and the sums of all are added.
    """
    owners, made, shared = list(parameters), [], False
    scratch = _scratch(max(owners, key=torch.numel))
    for parameter in owners:
        part, shared = own(parameter), shared or is_shared(parameter)
        first = 0
        if is_shared(parameter) and len(part):
            row = torch.arange(len(parameter))  # which rows are this process's
            first = int(own_rows(row, parameter)[0]) * (parameter.numel() // len(parameter))
        made += _sums(part, first, parameter.numel(), scratch)
    sums = torch.stack(made)
    if shared:
        ranks.add_whole(sums)
    return sums


def mark_of(values: Tensor) -> int:
    """A number of 48 bits for a tensor, of all its bits and their places; here the host waits."""
    sums = _sums(values, 0, values.numel(), _scratch(values))
    return _joined(torch.stack(sums).tolist()) if sums else 0


def _sums(part: Tensor, first: int, whole: int, scratch: Scratch) -> list[Tensor]:
    """The sums of a tensor of `whole` numbers, of which `part` holds those from `first` on."""
    odd, products = scratch
    bits = part.detach().reshape(-1).view(BITS[part.element_size()])
    made = []
    for start in range(0, whole, CHUNK):
        low, high = max(start, first), min(start + CHUNK, first + len(bits))
        if low >= high:  # a chunk of which this part has nothing
            made.append(torch.zeros((), dtype=torch.int64, device=part.device))
            continue
        # One for all chunks: of fresh memory the system would clear every page.
        product = products[: high - low].copy_(bits[low - first : high - first])
        made.append(product.mul_(odd[low - start : high - start]).sum())
    return made


def _scratch(largest: Tensor) -> Scratch:
    """For the chunks of a tensor of this size: what they are multiplied by, and room for that."""
    size = min(CHUNK, largest.numel())
    odd = torch.arange(size, device=largest.device).mul_(2).add_(1)
    return odd, torch.empty_like(odd)


def sequence_marks(batch: Batch) -> list[int]:
    """A number of 64 bits for each sequence of a batch (B, T), by its inputs and targets."""
    rows = torch.cat(batch, 1).cpu().numpy()
    return [_number(row.tobytes(), 8) for row in rows]


def _random(state: TrainState, seed: int) -> int:
    if state.ranks.ordered:  # each sequence draws by itself: see `Ranks.next_draws`
        return _digest(f"{seed}:{state.step}".encode())
    return _digest(state.rng[state.precision.device.type].numpy().tobytes())


def _digest(content: bytes) -> int:
    return _number(content, BYTES)


def _joined(numbers: Iterable[int]) -> int:
    return _digest(b"".join(map(_bytes, numbers)))


def _number(content: bytes, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=size).digest(), "little")


def _signed(number: int) -> int:
    """The whole number of 64 bits that is equal modulo 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _bytes(number: int) -> bytes:
    return struct.pack("<q", _signed(number))
