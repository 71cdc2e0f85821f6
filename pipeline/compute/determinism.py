"""train.deterministic: the same numbers at every run, on a GPU as on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")  # with which cuBLAS adds up in one order, in all streams


@contextmanager
def deterministic(asked: bool, device: torch.device) -> Iterator[None]:
    """Inside, if `asked`, torch adds up in one order, or raises a RuntimeError; then as before.

    On CUDA it then sorts where it would add in the order of arrival, and its compiler tries out
    nothing that would change numbers. Of attention it takes the flash kernel, with a backward pass
    in one order (bf16, fp16, fp8), and the memory-efficient one, unsplit (fp32, tf32); cuDNN's,
    which it prefers elsewhere, has no such form. AdamW, clipping and norms have one order anyhow.

    cuBLAS is told by a variable of the environment, which it reads as it starts and which stays.
    Raises ConfigError where that is too late or says otherwise, and on MPS, which promises nothing.
    """
    if not asked:
        yield
        return
    if device.type == "mps":
        raise ConfigError("train.deterministic=true: expected device=cpu or cuda, got mps")
    if device.type == "cuda":
        _tell_cublas()
    before = torch.are_deterministic_algorithms_enabled()
    memory, filled = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a pass over each new tensor; none is read unwritten
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled


def _tell_cublas() -> None:
    said = os.environ.get(WORKSPACE)
    # Before the first tensor there was no product that could have started it.
    late = torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0
    if said not in FIXED and (said or late):
        raise ConfigError(
            f"train.deterministic=true: {WORKSPACE}={said or ''}: expected one of "
            f"{', '.join(FIXED)} before CUDA starts"
        )
    os.environ.setdefault(WORKSPACE, FIXED[0])
