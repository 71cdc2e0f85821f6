"""The machine as one stage uses it: a precision that is in effect here, and its speed."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.compute.precision import Precision, choose_precision
from pipeline.compute.runtime import choose_device
from pipeline.compute.throughput import matrix_rate


@dataclass(frozen=True)
class Machine:
    """How a stage computes, and how fast products are here."""

    precision: Precision
    matrix_rate: float  # FLOP/s


def measure(precision: str, device: str) -> Machine:
    """The machine for these two settings. Nothing else may compute meanwhile."""
    chosen = choose_precision(precision, choose_device(device))
    return Machine(chosen, matrix_rate(chosen))
