"""The processes that train one model together, seen from one of them: its share, sums over all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.compute.runtime import derived_seed
from pipeline.errors import PeerError, out_of_memory

START, STEP, VALIDATE, GATHER, LEAVE = range(5)  # what the first process has the others do
LARGE = 1 << 20  # numbers of a gradient that is summed by itself; smaller ones go together


class Ranks:
    """A process's place among `world` of them.

    Each method that talks to the others is called by all of them, in the same order; alone it does
    nothing. What is summed comes out the same in all of them, to the bit. Raises PeerError where
    another process has failed, is gone or stays silent for longer than distributed.timeout.
    """

    def __init__(self, rank: int = 0, world: int = 1, sharded: bool = False):
        self.rank, self.world = rank, world
        self.sharded = sharded  # parameters lie in parts over all: see `sharding`
        self.beside = world  # processes on this machine, with this one
        self.asked = 0  # a signal to end that came to this process, or to one that it has met

    def share(self, batch_size: int, accumulate: int) -> tuple[int, int]:
        """Of a step's batch_size * accumulate sequences: (sequences a micro-batch, micro-batches).

        The same for each process, and no micro-batch is larger than `batch_size`.
        """
        sequences = batch_size * accumulate // self.world
        fewest = -(-sequences // batch_size)
        count = next(n for n in range(fewest, sequences + 1) if sequences % n == 0)
        return sequences // count, count

    def seed(self, seed: int, step: int) -> None:
        """Have torch's generators begin a step: dropout differs from process to process.

        Alone they run on from step to step, and a checkpoint keeps them; of several processes
        nothing is to be kept.
        """
        if self.world > 1:
            torch.manual_seed(derived_seed(seed, f"dropout of step {step}, rank {self.rank}"))

    def add_up(self, total: Tensor, parameters: Iterable[Tensor]) -> None:
        """Replace a 0-dim tensor and every parameter's gradient by their sums over all processes.

        Gradients in parts are sums already.
        Not while the backward pass runs: the look-up adds to the tied gradient after autograd has,
        and a compiled backward pass hands out all gradients at its end.
        """
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None and not self.sharded]
        alone = [g for g in grads if g.numel() >= LARGE and g.is_contiguous()]
        chosen = {id(grad) for grad in alone}
        together = [total, *(grad for grad in grads if id(grad) not in chosen)]
        flat = torch.cat([tensor.flatten() for tensor in together])
        for work in [_do(dist.all_reduce, t, async_op=True) for t in (*alone, flat)]:
            _do(work.wait)
        for tensor, part in zip(together, flat.split([t.numel() for t in together]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number, in double precision."""
        if self.world == 1:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64)
        _do(dist.all_reduce, own)
        return own.tolist()

    def count(self, number: int) -> int:
        """The sum of a whole number; from then on all know of a signal that came to one."""
        if self.world == 1:
            return number
        both = [torch.zeros(2, dtype=torch.int64) for _ in range(self.world)]
        _do(dist.all_gather, both, torch.tensor([number, self.asked]))
        counts, asked = torch.stack(both).unbind(1)
        self.asked = max(self.asked, int(asked.max()))  # another may have come just now
        return int(counts.sum())

    def lead(self, order: int, value: int = 0) -> None:
        """What the others do next; said by the first process alone, heard by `told`."""
        if self.world > 1 and self.rank == 0:
            _do(dist.broadcast, torch.tensor([order, value]), 0)

    def told(self) -> tuple[int, int]:
        """The next order of the first process, and its value."""
        order = torch.zeros(2, dtype=torch.int64)
        _do(dist.broadcast, order, 0)
        return int(order[0]), int(order[1])


_here = Ranks()


def here() -> Ranks:
    """This process's place: alone, unless it has joined others."""
    return _here


def join(ranks: Ranks) -> None:
    """From now on this process has a place among others."""
    global _here
    _here = ranks


def lost(error: Exception) -> bool:
    """Whether it is another process that is gone, also where FSDP has met it by itself."""
    by_torch = isinstance(error, RuntimeError) and not out_of_memory(error)
    talking = isinstance(error, dist.DistError) or "gloo" in str(error)  # where gloo failed
    return isinstance(error, PeerError) or (by_torch and talking)


def _do(call: Callable[..., Any], *given: Any, **more: Any) -> Any:
    try:
        return call(*given, **more)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise PeerError(f"another process of this training does not answer: {error}") from error
