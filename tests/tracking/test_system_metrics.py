"""The load of the machine: whole, by MLflow's names, and nothing that a training would feel."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pipeline import paths
from pipeline.compute import ranks
from pipeline.records import record_file
from pipeline.tracking import system_metrics
from tests.conftest import wait_for

CPU = torch.device("cpu")
HOST = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
    "system/process_cpu_utilization_percentage",
    "system/process_memory_usage_megabytes",
}


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(system_metrics, "EVERY_SECONDS", 0.02)


@pytest.fixture
def record(make_config, _quick: None) -> Iterator[record_file.Record]:
    made = record_file.Record("train", make_config())
    yield made
    made.close("FINISHED")


def loads(record: record_file.Record) -> list[record_file.Event]:
    return [e for e in record.so_far().of_kind("metrics") if system_metrics.CPU in e["values"]]


def watching() -> list[str]:
    """The threads that record the load; other tests may have left some of their own."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if system_metrics._watch.__name__ in name]


def test_the_load_is_recorded_while_the_work_goes_on_and_a_resumed_one_counts_on(
    make_config, tmp_path: Path
) -> None:
    for session in (1, 2):
        record = record_file.Record("train", make_config(), tmp_path / "journal.jsonl")
        before = len(loads(record))
        with system_metrics.watched(record, CPU):
            wait_for(lambda record=record, before=before: len(loads(record)) >= before + 3)
            assert watching()
        at_the_end = len(loads(record))
        assert not watching()
        assert len(loads(record)) == at_the_end > 3 * (session - 1)
        record.close("KILLED" if session == 1 else "FINISHED")
    events = [e for e in record_file.read(paths.record("train")) if e["kind"] == "metrics"]
    events = [e for e in events if system_metrics.CPU in e["values"]]
    assert [e["step"] for e in events] == list(range(len(events)))
    assert all(e["values"].keys() == HOST for e in events)
    assert all(value >= 0 for e in events for value in e["values"].values())


def test_lines_of_two_threads_do_not_mix(record) -> None:
    with system_metrics.watched(record, CPU):
        for step in range(3000):
            record.metrics({"train/loss": step / 3}, step)
    assert len(record.so_far().curves["train/loss"]) == 3000


def test_a_disk_that_is_full_is_the_training_s_to_tell(record, monkeypatch, recwarn) -> None:
    asked = threading.Event()

    def full(*_: object) -> None:
        asked.set()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(record, "metrics", full)
        with system_metrics.watched(record, CPU):
            assert asked.wait(60)
    assert not recwarn.list  # pytest warns of a thread that an exception ended


class NVMLError(Exception):
    """As pynvml's: all of its refusals are of this class."""


UUID = "1b8c6d2e-0000-4c3b-9f11-5a6b7c8d9e0f"


def nvml(driver: bool = True, refuses: tuple[str, ...] = ()) -> ModuleType:
    """Stands in for pynvml and a driver with one card; asked before its start, it refuses all."""
    module = ModuleType("pynvml")
    started = []

    def init() -> None:
        if not driver:
            raise NVMLError("NVML Shared Library Not Found")
        started.append(True)

    def by_uuid(uuid: str) -> str:
        if not started or uuid != f"GPU-{UUID}":
            raise NVMLError("Not Found")
        return "the card"

    def answers(name: str, answer: object, *expected: object) -> None:
        def function(card: object, *given: object) -> object:
            if not started or card != "the card" or given != expected or name in refuses:
                raise NVMLError("Not Supported")
            return answer

        setattr(module, name, function)

    module.NVMLError, module.nvmlInit, module.nvmlDeviceGetHandleByUUID = NVMLError, init, by_uuid
    module.NVML_TEMPERATURE_GPU = 0
    module.nvmlClocksEventReasonHwSlowdown = 0x8
    module.nvmlClocksEventReasonSwThermalSlowdown = 0x20
    answers("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=97, memory=40))
    answers("nvmlDeviceGetMemoryInfo", SimpleNamespace(total=80e9, used=20e9, free=60e9))
    answers("nvmlDeviceGetPowerUsage", 350_000)
    answers("nvmlDeviceGetEnforcedPowerLimit", 700_000)
    answers("nvmlDeviceGetTemperature", 61, 0)
    answers("nvmlDeviceGetCurrentClocksEventReasons", 0x24)  # too hot, and at its power's limit
    return module


CARD = {
    "utilization_percentage": 97,
    "memory_usage_megabytes": 20e3,
    "memory_usage_percentage": 25.0,
    "power_usage_watts": 350.0,
    "power_usage_percentage": 50.0,
    "temperature_celsius": 61,
    "throttled": 1.0,
}


@pytest.mark.parametrize(
    ("refused", "left"),
    [
        ((), CARD.keys()),
        (("nvmlDeviceGetEnforcedPowerLimit",), CARD.keys() - {"power_usage_percentage"}),
        (
            ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetCurrentClocksEventReasons"),
            CARD.keys() - {"utilization_percentage", "throttled"},
        ),
    ],
    ids=["all", "no limit", "virtual"],
)
def test_the_card_in_use_is_asked_by_cuda_s_number_for_what_it_tells(
    record, monkeypatch, refused: tuple[str, ...], left: set[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(refuses=refused))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = {1: SimpleNamespace(uuid=UUID)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    with system_metrics.watched(record, torch.device("cuda")):
        wait_for(lambda: loads(record))
    values = loads(record)[0]["values"]
    assert values.items() >= {f"system/gpu_1_{name}": CARD[name] for name in left}.items()
    assert len(values) == len(HOST) + len(left)


def test_of_several_processes_all_cards_of_the_machine_are_asked(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(ranks, "_here", ranks.Ranks(0, 8))
    ranks.here().beside = 3  # the others are on another machine
    assert [*system_metrics._gpus(torch.device("cuda"))] == [0, 1, 2]


@pytest.mark.parametrize("missing", ["card", "library", "driver"])
def test_without_a_card_there_is_no_line_and_no_word(monkeypatch, caplog, missing: str) -> None:
    library = {"library": None, "driver": nvml(driver=False)}.get(missing, nvml())
    monkeypatch.setitem(sys.modules, "pynvml", library)
    device = CPU if missing == "card" else torch.device("cuda", 0)
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert system_metrics._gpus(device) == {}
    assert not caplog.messages
