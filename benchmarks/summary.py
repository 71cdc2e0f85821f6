"""The pages' lines on speed, from the results that the other benchmarks left.

python benchmarks/summary.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import outcomes
from benchmarks.outcomes import OURS, RESULTS, Case
from benchmarks.side_by_side import Result
from pipeline.tables import markdown

BENCHMARKS = ("train", "sample", "tokenizing")
COLUMNS = ("benchmark", "case", "ours", "times as fast as", "memory of theirs")


def summary(folder: Path = RESULTS) -> str:
    """A Markdown table: one row for each case and each of our ways that took part in it."""
    rows, places = [], []
    for benchmark in BENCHMARKS:
        path = folder / f"{benchmark}.json"
        for case, run in (outcomes.read(path) if path.is_file() else {}).values():
            mine = [result for result in case.results if result.name.startswith(OURS)]
            rows += [(benchmark, case.name, *_cells(case, result)) for result in mine]
            places.append(f"{run['date']}, {run['machine']}")
    where = "".join(f"{place}\n" for place in dict.fromkeys(places))
    return markdown(COLUMNS, rows) + "\n" + where


def _cells(case: Case, ours: Result) -> tuple[str, str, str]:
    others = [r for r in case.results if r.seconds and not r.name.startswith(OURS)]
    if not ours.seconds:
        return f"no time counts: {ours.refused}", "-", "-"
    own = ours.name.removeprefix(OURS).removeprefix(", ")
    rate = f"{own} {case.work / ours.median:,.4g} {case.unit}/s".strip()
    speeds, memory = [], []
    for other in others:
        middle, low, high = ours.speed(other)
        speeds.append(f"{other.name} {middle:.2f} ({low:.2f} to {high:.2f})")
        if ours.memory_mib and other.memory_mib:
            memory.append(f"{other.name} {ours.memory_mib / other.memory_mib:.2f}")
    return rate, "; ".join(speeds), "; ".join(memory)


if __name__ == "__main__":
    print(summary())
