"""The fault table's plugin: which rows a test injects, and `--faults FILE` for what came of it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

TABLE = Path(__file__).with_name("faults.yaml")
RESULTS = Path(__file__).with_name("fault_results.jsonl")
EXCUSED = ("documented",)  # rows that say why they may have no test

Claim = tuple[int, bool, str]  # row, whether a control, the test without its parameters
COLLECTED = pytest.StashKey[set[Claim]]()  # before -m and -k have chosen


def table() -> dict[int, dict[str, str]]:
    """The rows by number: where, fault, then."""
    return OmegaConf.to_container(OmegaConf.load(TABLE))  # type: ignore[return-value]


def claims(item: pytest.Item) -> set[Claim]:
    """The rows that a test is marked with. Raises UsageError for a mark that names none."""
    found = set()
    name = item.nodeid.partition("[")[0]
    for mark in item.iter_markers("fault"):
        if len(mark.args) != 1 or mark.args[0] not in table() or set(mark.kwargs) - {"control"}:
            raise pytest.UsageError(
                f"{name}: {mark}: expected fault(ROW) or fault(ROW, control=True)"
            )
        found.add((mark.args[0], mark.kwargs.get("control", False), name))
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    # Text, not a Path: pytest-xdist sends every option to its workers.
    parser.addoption("--faults", metavar="FILE", help="write what came of fault tests")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--faults")
    if path and not hasattr(config, "workerinput"):  # a worker's reports go to the one that has it
        config.pluginmanager.register(Results(Path(path), config.option.markexpr))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = {claim for item in items for claim in claims(item)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Give every report what the table needs, in the plain values that travel between processes."""
    report = yield
    report.claims = sorted(claims(item))
    report.slow = item.get_closest_marker("slow") is not None
    return report


class Results:
    """Counts what came of every marked test; a line for the run and one for each claim."""

    def __init__(self, path: Path, selected: str):
        self.path = path
        self.selected = selected
        self.outcomes: dict[str, str] = {}  # a test with its parameters: passed, failed, skipped
        self.claims: dict[str, set[Claim]] = {}
        self.slow: set[str] = set()
        self.run: dict[str, object] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":
            self.claims[report.nodeid] = {tuple(claim) for claim in report.claims}
            self.slow |= {report.nodeid} if report.slow else set()
        if report.when == "call" or not report.passed:  # set-up and tear-down can only spoil it
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.run = {
            "selected": self.selected,
            "seconds": round(time.time() - psutil.Process().create_time()),
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": version("torch"),
        }
        lines = [self.run, *self.counted()]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.path.write_text(text, "utf-8", newline="\n")

    def counted(self) -> list[dict[str, object]]:
        """One entry a claim, in the order of the rows."""
        counts: dict[tuple[Claim, bool], Counter[str]] = {}
        for test, outcome in self.outcomes.items():
            for claim in self.claims[test]:
                counts.setdefault((claim, test in self.slow), Counter())[outcome] += 1
        return [
            {"row": row, "control": control, "test": name, "slow": slow} | counts[key]
            for key in sorted(counts)
            for (row, control, name), slow in [key]
        ]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        found = self.counted()
        rows = {line["row"] for line in found}
        tests = sum(not line["control"] for line in found)
        terminalreporter.write_line(
            f"faults: {len(rows)} rows by {tests} tests and {len(found) - tests} controls "
            f"in {self.run['seconds']} s, written to {self.path}"
        )
