"""What each precision brings, machine beside machine: kept in results/machines.json.

A machine's column is filled by `python benchmarks/precision.py --machine`, there. A figure that was
not measured on a machine is missing from its entry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.tables import markdown

FILE = Path(__file__).resolve().parent / "results" / "machines.json"
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")


def fill(name: str, entry: dict[str, Any], file: Path = FILE) -> None:
    """Set the machine's entry; of one at the same commit its trainings of other kinds stay."""
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    before = known.get(name, {})
    if all(before.get(fact) == entry[fact] for fact in ("machine", "versions", "commit")):
        trained = before["tokens_per_second"] | entry["tokens_per_second"]
        both = f"{before['command']}, {entry['command']}"
        entry = entry | {"tokens_per_second": trained, "command": both}
    text = json.dumps(known | {name: entry}, indent=1)
    file.write_text(text + "\n", encoding="utf-8", newline="\n")


def table(file: Path = FILE) -> str:
    """Markdown: a row for each precision, and where the figures come from."""
    known = json.loads(file.read_text("utf-8"))
    columns, cells, origins = ["precision"], [], []
    for name, entry in known.items():
        kinds = entry["tokens_per_second"]
        columns += [f"{name}: GFLOP/s", *(f"tokens/s, {kind}" for kind in kinds)]
        cells += [{mode: rate / 1e9 for mode, rate in entry["rates"].items()}, *kinds.values()]
        origins.append(
            f"- {name}: {entry['machine']}; {entry['versions']}; memory "
            f"{entry['bandwidth'] / 1e9:,.4g} GB/s; {entry['date']} at {entry['commit']}: "
            f"{entry['command']}"
        )
    rows = [(mode, *(column.get(mode) for column in cells)) for mode in PRECISIONS]
    return markdown(columns, rows) + "\n" + "\n".join(origins)
