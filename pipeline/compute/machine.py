"""The machine as one stage uses it: a precision that is in effect here, and its speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.compute.determinism import deterministic
from pipeline.compute.precision import Precision, choose_precision
from pipeline.compute.runtime import choose_device
from pipeline.compute.throughput import matrix_rate


@dataclass(frozen=True)
class Machine:
    """How a training computes, and how fast products are here."""

    precision: Precision
    matrix_rate: float  # FLOP/s


@contextmanager
def measured(precision: str, device: str, always_alike: bool) -> Iterator[Machine]:
    """The machine for the first two settings, as `train.deterministic` says while this is open.

    It is measured at the start, when nothing else may compute.
    """
    place = choose_device(device)
    with deterministic(always_alike, place):  # before CUDA starts
        chosen = choose_precision(precision, place)
        yield Machine(chosen, matrix_rate(chosen))
