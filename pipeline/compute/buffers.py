"""Memory that is used again: large buffers whose contents nobody needs between two calls."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

# One set of buffers a thread: a buffer is filled and used up within one call, so calls of one
# thread can share it, and threads never meet in it. It goes with its thread.
_kept = threading.local()
_spare = threading.local()  # what was handed back, until somebody takes it


def reused(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of `shape` with arbitrary contents, valid until the next call by `name`.

    On the CPU the memory is kept and only grows: the system would map and clear every page of a
    fresh 200 MB tensor again. Other devices have caching allocators, which also know streams.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    buffers: dict[Any, Tensor] = _kept.__dict__  # by name and format
    size, key = math.prod(shape), (name, dtype)
    if key not in buffers or buffers[key].numel() < size:
        buffers.pop(key, None)  # before the larger one comes, so that both never exist
        # A tensor made in inference mode could not be written by a later training step.
        with torch.inference_mode(False):
            buffers[key] = torch.empty(size, dtype=dtype)
    return buffers[key][:size].view(shape)


def taken(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of `shape` with arbitrary contents, the caller's own.

    The one handed back by `name` last, where it fits: see `hand_back`.
    """
    spare = _spare.__dict__.pop(name, None)
    if spare is not None and (spare.shape, spare.dtype, spare.device) == (shape, dtype, device):
        return spare
    return torch.empty(shape, dtype=dtype, device=device)


def hand_back(name: str, tensor: Tensor | None) -> None:
    """Let the next `taken` by `name` have this tensor's memory: nobody may read it any more.

    For the CPU alone, as in `reused`; elsewhere, and for what is not dense, nothing happens.
    """
    if tensor is not None and tensor.device.type == "cpu" and tensor.layout is torch.strided:
        _spare.__dict__[name] = tensor.detach()
