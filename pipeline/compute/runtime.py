"""The machine at hand: device, random generators."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises ConfigError for one that is not here."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, available in here.items() if available))
    if not here[name]:
        usable = ", ".join(kind for kind, available in here.items() if available)
        raise ConfigError(f"device={name}: not available here; this machine has {usable}")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else "mps"


class Transfer:
    """A tensor (n,) on its way to the host.

    `read` waits for what was launched before this was made, and for nothing launched since.
    """

    def __init__(self, values: Tensor):
        self._values = values
        self._there: torch.cuda.Event | None = None
        if self._values.device.type == "cuda":
            # Into pinned memory, which torch takes for a copy that nobody waits for.
            self._values = self._values.to("cpu", non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[Any]:
        """The numbers; here the host waits for the device."""
        if self._there:
            self._there.synchronize()
        return self._values.tolist()


class Numbers(Transfer):
    """0-dim tensors of one device on their way to the host, in one transfer."""

    def __init__(self, *numbers: Tensor):
        super().__init__(torch.stack([number.float() for number in numbers]))


@contextmanager
def one_thread() -> Iterator[None]:
    """For tiny tensors: they wait for a second thread, the more where that core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each purpose, so that no use of chance disturbs another."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose))


def derived_seed(seed: int, purpose: str) -> int:
    """63 bits from SHA-256 of purpose and seed: nearby seeds share nothing."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's global generators that a step on `device` may draw from, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put the generators back to where `rng_state` found them."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif "mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
