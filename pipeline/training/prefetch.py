"""The next step's batches, made while the device works on this one's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.training.training_step import Batch


class Prefetch:
    """Calls `batches_of(step)`; on CUDA one step ahead, into pinned memory.

    What costs is the host's gathering, during which the device would stand idle. The copy is
    asynchronous and stays in the step's own stream: 1 MiB of tokens takes some 40 microseconds of
    a step of 100 ms. Every batch has memory of its own, which torch's host allocator gives to no
    other before that copy has been made. On the CPU nothing is ahead: whoever gathered would take
    time from the step.
    """

    def __init__(self, batches_of: Callable[[int], list[Batch]], device: torch.device) -> None:
        self.batches_of = batches_of
        self.device = device
        self._ready: tuple[int, list[Batch]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        """The batches of `step`, where `batches_of` made them: on the host, or on the device."""
        ready, self._ready = self._ready, None
        return ready[1] if ready and ready[0] == step else self._made(step)

    def prepare(self, step: int, steps: int) -> None:
        """Make those of `step`, if it is one of `steps`, while the device is at work."""
        if self.device.type == "cuda" and step < steps:
            # What is wrong with them is said when their own step begins and makes them again.
            with contextlib.suppress(InputError, OSError):
                self._ready = step, self._made(step)

    def _made(self, step: int) -> list[Batch]:
        batches = self.batches_of(step)
        if self.device.type != "cuda":
            return batches
        return [(_pinned(x), _pinned(y)) for x, y in batches]


def _pinned(x: Tensor) -> Tensor:
    """What already lies on the device needs no copy, and torch pins the host's tensors alone."""
    return x.pin_memory() if x.device.type == "cpu" else x
