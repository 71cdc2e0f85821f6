"""The machine's load while a training runs, by the names of MLflow's page for system metrics."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

    from pipeline.records.record_file import Record

EVERY_SECONDS = 10.0
PATIENCE_SECONDS = 2.0  # with a driver that hangs
CPU = "system/cpu_utilization_percentage"


@contextlib.contextmanager
def watched(record: Record, device: torch.device) -> Iterator[None]:
    """Record the load every few seconds, from a thread that touches nothing of the training."""
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(record, _gpus(device), over), daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join(PATIENCE_SECONDS)


def _watch(record: Record, gpus: dict[int, Any], over: threading.Event) -> None:
    process = psutil.Process()
    for measured in (psutil, process):
        measured.cpu_percent()  # the next call tells the share of the time since this one
    for number in itertools.count(record.next_step(CPU)):
        if over.wait(EVERY_SECONDS):
            return
        values = _host(process)
        for index, handle in gpus.items():
            values |= {f"system/gpu_{index}_{name}": v for name, v in _card(handle).items()}
        if over.is_set():
            return
        try:
            record.metrics(values, number)
        except OSError:  # a full disk: the training meets it at its next step, and says so
            return


def _host(process: psutil.Process) -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        CPU: psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_cpu_utilization_percentage": process.cpu_percent(),  # 100 for each core
        "system/process_memory_usage_megabytes": process.memory_info().rss / 1e6,
    }


def _gpus(device: torch.device) -> dict[int, Any]:
    """NVML's handle of the card in use by CUDA's index, which counts other cards than NVML does."""
    if device.type != "cuda":
        return {}
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        index = torch.cuda.current_device() if device.index is None else device.index
        uuid = torch.cuda.get_device_properties(index).uuid
        return {index: pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")}
    except ImportError:
        return {}
    except pynvml.NVMLError:  # a card of another maker, or a slice of one
        return {}


def _card(handle: Any) -> dict[str, float]:
    """What a card tells: each is asked by itself, since not every card answers everything."""
    import pynvml as nvml

    def told(question: Callable[..., Any], *words: int) -> Any:
        with contextlib.suppress(nvml.NVMLError):
            return question(handle, *words)

    values: dict[str, float] = {}
    if busy := told(nvml.nvmlDeviceGetUtilizationRates):
        values["utilization_percentage"] = busy.gpu
    if memory := told(nvml.nvmlDeviceGetMemoryInfo):
        values["memory_usage_megabytes"] = memory.used / 1e6
        values["memory_usage_percentage"] = 100 * memory.used / memory.total
    if power := told(nvml.nvmlDeviceGetPowerUsage):  # milliwatts
        values["power_usage_watts"] = power / 1000
        if limit := told(nvml.nvmlDeviceGetEnforcedPowerLimit):
            values["power_usage_percentage"] = 100 * power / limit
    if heat := told(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU):
        values["temperature_celsius"] = heat
    if (reasons := told(nvml.nvmlDeviceGetCurrentClocksEventReasons)) is not None:
        slowed = nvml.nvmlClocksEventReasonHwSlowdown | nvml.nvmlClocksEventReasonSwThermalSlowdown
        values["throttled"] = float(bool(reasons & slowed))
    return values
