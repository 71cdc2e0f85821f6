"""The machine's load while a training runs, by the names of MLflow's page for system metrics."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
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
    _host(process)  # a share of CPU time is one of the time since it was last asked for
    with contextlib.suppress(OSError):  # a full disk: the training's own points meet it, too
        for number in itertools.count(record.next_step(CPU)):
            over.wait(EVERY_SECONDS)
            values = _host(process)
            for index, card in gpus.items():
                values |= {f"system/gpu_{index}_{name}": v for name, v in _card(card).items()}
            if over.is_set():  # perhaps while a driver hung
                return
            record.metrics(values, number)


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
    """NVML's handles of the cards in use by CUDA's index: NVML counts in another order.

    Of several processes these are the cards of all on this machine.
    """
    try:
        import pynvml
        import torch

        from pipeline.compute.ranks import here

        if device.type != "cuda":
            return {}
        pynvml.nvmlInit()
        if (beside := here().beside) > 1:
            used = [*range(min(beside, torch.cuda.device_count()))]
        else:
            used = [torch.cuda.current_device() if device.index is None else device.index]
        uuids = {n: torch.cuda.get_device_properties(n).uuid for n in used}
        return {n: pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{u}") for n, u in uuids.items()}
    except ImportError:
        return {}
    except pynvml.NVMLError:  # a card of another maker, or a slice of one
        return {}


def _card(card: Any) -> dict[str, float]:
    """What a card tells: not every card answers everything."""
    import pynvml as nvml

    slowed = nvml.nvmlClocksEventReasonHwSlowdown | nvml.nvmlClocksEventReasonSwThermalSlowdown
    values: dict[str, float] = {}
    with contextlib.suppress(nvml.NVMLError):
        values["utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(card).gpu
    with contextlib.suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(card)
        values["memory_usage_megabytes"] = memory.used / 1e6
        values["memory_usage_percentage"] = 100 * memory.used / memory.total
    with contextlib.suppress(nvml.NVMLError):
        power = nvml.nvmlDeviceGetPowerUsage(card)  # milliwatts
        values["power_usage_watts"] = power / 1000
        limit = nvml.nvmlDeviceGetEnforcedPowerLimit(card)
        values["power_usage_percentage"] = 100 * power / limit
    with contextlib.suppress(nvml.NVMLError):
        heat = nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)
        values["temperature_celsius"] = heat
    with contextlib.suppress(nvml.NVMLError):
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(card)
        values["throttled"] = float(bool(reasons & slowed))
    return values
