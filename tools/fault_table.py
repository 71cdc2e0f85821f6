"""The table of docs/faults.md: the rows, and what came of the tests that inject them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.tables import markdown
from tests.helpers.faults import EXCUSED, RESULTS, table

ROOT = Path(__file__).resolve().parent.parent
ENDS = ("passed", "failed", "skipped")
COLUMNS = ["#", "fault", "what happens", "when", "tests", "controls"]

Line = dict[str, Any]  # of the results: a run of pytest, or what came of one claim in it


def run() -> bool:
    """Run the marked tests, the quick ones and the slow ones, for `results`; False if one fails."""
    texts, codes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, chosen in enumerate(("fault and not slow", "fault and slow")):
            part = Path(folder) / f"{number}.jsonl"
            words = ["-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "8", "-m", chosen]
            words += ["--faults", str(part)]
            codes.append(subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode)
            if codes[-1] not in (0, 1, 5):  # passed, failed, none chosen
                sys.exit(f"pytest -m {chosen!r}: exit {codes[-1]}: the table stays as it was")
            texts.append(part.read_text("utf-8"))
    RESULTS.write_text("".join(texts), "utf-8", newline="\n")
    return 1 not in codes


def results() -> tuple[list[Line], list[Line]]:
    """The last runs of the tests, and what came of each claim."""
    lines = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    return [x for x in lines if "selected" in x], [x for x in lines if "row" in x]


def page(runs: list[Line], outcomes: list[Line]) -> str:
    """The table, what it lacks, and where its figures are from."""
    rows = []
    for row, about in table().items():
        own = [line for line in outcomes if line["row"] == row]
        when = [word for word, slow in (("cheap", False), ("slow", True)) if slow in speeds(own)]
        found = [cell(counts, about["where"]) for counts in by_kind(own)]
        texts = [about["fault"], about["then"], ", ".join(when) or about["where"]]
        rows.append([str(row), *texts, *found])
    lacking = gaps(outcomes)
    verdict = f"**Not held: {'; '.join(lacking)}.**" if lacking else "Nothing failed or is missing."
    return f"{markdown(COLUMNS, rows)}\n{verdict}\n\n{circumstances(runs)}"


def gaps(outcomes: list[Line]) -> list[str]:
    """What keeps rows from being held, each with the rows that it is said of."""
    found: dict[str, list[str]] = {}
    for row, about in table().items():
        own = [line for line in outcomes if line["row"] == row]
        for kind, counts in zip(("test", "control"), by_kind(own), strict=True):
            if counts["failed"]:
                found.setdefault(f"a {kind} failed", []).append(str(row))
            elif not counts["passed"] and (counts.total() or about["where"] not in EXCUSED):
                found.setdefault(f"no {kind} that passed", []).append(str(row))
        if about["where"] == "cheap" and speeds(own) == {True}:
            found.setdefault("only slow tests", []).append(str(row))
    return [f"{problem}: {', '.join(rows)}" for problem, rows in found.items()]


def speeds(own: list[Line]) -> set[bool]:
    """False where a row has quick tests, True where it has slow ones."""
    return {line["slow"] for line in own if not line["control"]}


def by_kind(own: list[Line]) -> tuple[Counter[str], Counter[str]]:
    """How many passed, failed and were skipped: of a row's tests, and of its controls."""
    counts = Counter[str](), Counter[str]()
    for line in own:
        counts[line["control"]].update({end: line.get(end, 0) for end in ENDS})
    return counts


def cell(counts: Counter[str], where: str) -> str:
    """`3`, `2, **1 failed**`, **none**; a dash for a row that says why it has none."""
    if not counts.total():
        return "-" if where in EXCUSED else "**none**"
    texts = zip(ENDS, ("{}", "**{} failed**", "{} skipped"), strict=True)
    return ", ".join(text.format(counts[end]) for end, text in texts if counts[end])


def circumstances(runs: list[Line]) -> str:
    """Which commands made the table, how long they took, and where."""
    parts = [f'`pytest -m "{run["selected"]}"` took {run["seconds"]} s' for run in runs]
    last = runs[-1]
    where = f"{last['machine']}, Python {last['python']}, torch {last['torch']}"
    return f"{', '.join(parts)} ({where}; {last['date']})."
