"""The machine as one stage uses it: a precision that is in effect here, and its speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.compute.determinism import deterministic
from pipeline.compute.precision import Precision, choose_precision
from pipeline.compute.runtime import choose_device
from pipeline.compute.throughput import matrix_rate

if TYPE_CHECKING:
    from pipeline.config import Config


@dataclass(frozen=True)
class Machine:
    """How a training computes, and how fast products are here."""

    precision: Precision
    matrix_rate: float  # FLOP/s


@contextmanager
def measured(config: Config) -> Iterator[Machine]:
    """The machine for these settings, which computes as `train.deterministic` says meanwhile.

    It is measured at the start, when nothing else may compute.
    """
    device = choose_device(config.device)
    with deterministic(config.train.deterministic, device):  # before CUDA starts
        chosen = choose_precision(config.precision, device)
        yield Machine(chosen, matrix_rate(chosen))
