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

    def __init__(self, rank: int = 0, world: int = 1, sharded: bool = False, ordered: bool = False):
        self.rank, self.world = rank, world
        self.sharded = sharded  # parameters lie in parts over all: see `sharding`
        self.ordered = ordered  # sums go sequence by sequence, to the same bits for any `world`
        self._draws = 0, 0  # seed and step
        self._sum: Tensor | None = None  # in order: of the step's loss and gradients so far
        self.beside = world  # processes on this machine, with this one
        self.asked = 0  # a signal to end that came to this process, or to one that it has met

    def share(self, batch_size: int, accumulate: int) -> tuple[int, int]:
        """Of a step's batch_size * accumulate sequences: (sequences a micro-batch, micro-batches).

        The same for each process, and no micro-batch is larger than `batch_size`; in order each
        is one sequence, since a product of more of them rounds otherwise.
        """
        sequences = batch_size * accumulate // self.world
        if self.ordered:
            return 1, sequences
        fewest = -(-sequences // batch_size)
        count = next(n for n in range(fewest, sequences + 1) if sequences % n == 0)
        return sequences // count, count

    def seed(self, seed: int, step: int) -> None:
        """Have torch's generators begin a step: dropout differs from process to process.

        Alone they run on from step to step, and a checkpoint keeps them; of several processes
        nothing is to be kept. In order it differs from sequence to sequence: see `next_draws`.
        """
        self._draws = seed, step
        if self.world > 1:
            self.draw_as(self.rank)

    def draw_as(self, rank: int) -> None:
        """Have torch's generators begin the step as process `rank` of several does."""
        seed, step = self._draws
        torch.manual_seed(derived_seed(seed, f"dropout of step {step}, rank {rank}"))

    def next_draws(self, number: int) -> None:
        """In order, before this process's micro-batch `number`: each sequence has its dropout."""
        if self.ordered:
            self._sum = self._sum if number else None  # what a step that failed has left
            (seed, step), sequence = self._draws, number * self.world + self.rank
            torch.manual_seed(derived_seed(seed, f"dropout of step {step}, sequence {sequence}"))

    def add_in_order(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """In order, after a micro-batch: take the loss and gradients of each process, in turn.

        Micro-batch n of rank r is sequence n * world + r of the step, so any number of processes
        adds up the same numbers in the same order. The gradients are gone then, until `add_up`.
        """
        if not self.ordered:
            return
        owners = list(parameters)
        own = torch.cat([loss.flatten(), *(p.grad.flatten() for p in owners if p.grad is not None)])
        for parameter in owners:
            parameter.grad = None
        self._sum = torch.zeros_like(own) if self._sum is None else self._sum
        for rank in range(self.world):
            part = own if rank == self.rank else torch.empty_like(own)
            if self.world > 1:
                _do(dist.broadcast, part, rank)
            self._sum += part

    def add_up(self, total: Tensor, parameters: Iterable[Tensor]) -> None:
        """Replace a 0-dim tensor and every parameter's gradient by their sums over all processes.

        Gradients in parts are sums already.
        Not while the backward pass runs: the look-up adds to the tied gradient after autograd has,
        and a compiled backward pass hands out all gradients at its end.
        """
        if self._sum is not None:
            owners = list(parameters)
            first, *parts = self._sum.split([1, *(p.numel() for p in owners)])
            total.copy_(first[0])
            for parameter, part in zip(owners, parts, strict=True):
                parameter.grad = part.view_as(parameter)
            self._sum = None
        if self.world == 1 or self.ordered:
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

    def alone(self) -> Ranks:
        """A process that does by itself, and draws, what all have done."""
        made = Ranks(ordered=self.ordered)
        made._draws = self._draws
        return made

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

    def add_whole(self, numbers: Tensor) -> None:
        """Replace whole numbers of a device by their sums over all processes, modulo 2^64."""
        if self.world > 1:
            _do(dist.all_reduce, numbers)

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
