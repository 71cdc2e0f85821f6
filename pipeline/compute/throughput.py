"""How fast and how large: tokens/s, model FLOPs utilisation, peak memory."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.compute.precision import Precision

WARM_UP_STEPS = 3  # first steps pay for allocation, compilation and clocks that still rise

# Dense peaks in TFLOP/s as their makers state them, by a part of the device's name. Kept to what
# can be looked up: a device that is not here gets no utilisation rather than another card's.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H200": {"fp32": 67, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9},
    "H100 PCIe": {"fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756, "fp8": 1513},
    "H100": {"fp32": 67, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
    "L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362, "fp8": 733},
    "A10G": {"fp32": 31.2, "tf32": 35, "bf16": 70, "fp16": 70},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2},
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71, "fp16": 71},
    "V100": {"fp32": 15.7, "fp16": 125},
    "T4": {"fp32": 8.1, "fp16": 65},
}

SQUARE = {"cuda": 8192, "mps": 4096, "cpu": 1536}  # side of the product that gives the peak rate
ROUNDS = 5

OTHER_CARDS = ("Laptop", "Ti", "D", "NVL", "MIG", "Max", "SUPER")  # the name, another peak


def peak_flops(device_name: str, precision: str) -> float | None:
    """The device's stated peak in FLOP/s for products in `precision`; None where unknown."""
    words = f" {device_name.replace('-', ' ')} "
    for part, peaks in PEAK_TFLOPS.items():
        if f" {part} " in words and not any(f" {other} " in words for other in OTHER_CARDS):
            tflops = peaks.get(precision)
            return tflops * 1e12 if tflops else None
    return None


def utilisation(rate: float, flops_per_token: int, peak: float | None) -> float | None:
    """MFU (Chowdhery et al. 2022, appendix B) at `rate` tokens/s; None without a peak."""
    return rate * flops_per_token / peak if peak else None


def synchronize(device: torch.device) -> None:
    """Wait for the device: a kernel that was only launched has taken no time yet."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Times training steps alone: what happens between `stop` and `start` does not count."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        synchronize(self.device)
        self._began = time.perf_counter()

    def so_far(self) -> float:
        """Seconds of the host since the start; the device may still be at work."""
        return time.perf_counter() - self._began

    def stop(self) -> float:
        """Seconds of the step that ends here."""
        synchronize(self.device)
        return self.so_far()

    def lap(self) -> float:
        """Seconds since the start or the lap before, for a host that has just seen a step's end."""
        seconds = self.so_far()
        self._began += seconds
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        so_far = self.stop()
        try:
            yield
        finally:
            self.start()
            self._began -= so_far


def matrix_rate(precision: Precision) -> float:
    """FLOP/s of a large square product in this mode, here and now: the median of some."""
    device = precision.device
    side = SQUARE.get(device.type, 1024)
    multiply = precision.multiplication(*(torch.randn(side, side, device=device) for _ in range(2)))
    return 2.0 * side**3 / medians([multiply], device)[0]


def medians(calls: list[Callable[[], Any]], device: torch.device) -> list[float]:
    """Median seconds of each call, after one turn that does not count.

    The calls take turns, so that a machine that slows down slows all of them.
    """
    watch = Stopwatch(device)
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(ROUNDS + 1):
        for call, times in zip(calls, seconds, strict=True):
            watch.start()
            call()
            spent = watch.stop()
            if turn:
                times.append(spent)
    return [statistics.median(times) for times in seconds]


def tokens_per_second(step_seconds: list[float], tokens_per_step: int) -> float:
    """From the median step after warm-up; from all steps where there are no more."""
    return tokens_per_step / statistics.median(step_seconds[WARM_UP_STEPS:] or step_seconds)


def warm_up_seconds(step_seconds: list[float]) -> float:
    """What the first steps took longer than later ones: compilation, allocation, clocks."""
    usual = statistics.median(step_seconds[WARM_UP_STEPS:] or step_seconds)
    first = step_seconds[:WARM_UP_STEPS]
    return max(0.0, sum(first) - usual * len(first))


def forget_peak(device: torch.device) -> None:
    """Memory that was held so far shall not count, where the device can tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: the allocator's on CUDA, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":
        # getrusage would count what the parent held when it started this process.
        status = Path("/proc/self/status").read_text("ascii", errors="replace")
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
        return int(kilobytes) / 2**10
    elif sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    else:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
