"""Processes by number and time of start: which one this is, and whether another still runs."""

from __future__ import annotations

import contextlib
import os

import psutil


def this_process() -> str:
    """This process, told apart from a later one with the same number."""
    return f"{os.getpid()}-{psutil.Process().create_time():.2f}"


def is_alive(process: str) -> bool:
    """Whether the process that `this_process` named still runs on this machine."""
    pid, _, created = process.partition("-")
    with contextlib.suppress(psutil.Error, ValueError):
        # Two processes may see the same start some seconds apart after the clock was set.
        return abs(psutil.Process(int(pid)).create_time() - float(created)) < 5
    return False
