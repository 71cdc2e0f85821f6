"""Tables and curves as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

CURVE_POINTS = 2000  # DVC's page holds the table of a curve once for every chart


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a heading; numbers are right-aligned and shown with four significant digits.

    None and NaN are shown as a dash: a value that was not measured.
    """
    rows = [tuple(row) for row in rows]
    cells = [[cell(value) for value in row] for row in rows]
    numeric = [
        any(_is_number(row[i]) for row in rows)
        and all(_is_number(row[i]) or row[i] is None for row in rows)
        for i in range(len(columns))
    ]
    widths = [max(3, len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(columns)]
    shapes = list(zip(widths, numeric, strict=True))
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in shapes]
    places = [f"{'>' if right else '<'}{width}" for width, right in shapes]
    lines = (map(format, line, places) for line in (columns, rule, *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: object) -> str:
    """A value as every table here shows it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        size = abs(value)
        if value == 0:
            return "0"
        if 1000 <= size < 1e7:
            return f"{value:,.0f}"
        return f"{value:.4g}" if 1e-3 <= size < 1e7 else f"{value:.2e}"
    return str(value).replace("|", "\\|")


def write_json(path: Path, values: dict[str, float]) -> None:
    """Numbers of six digits, grouped by the part of their names before the slash."""
    groups: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, _, key = name.partition("/")
        value = float(f"{value:.6g}")
        groups.setdefault(group, {})[key] = int(value) if value.is_integer() else value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # DVC may have linked it to its cache
    path.write_text(json.dumps(groups, indent=2) + "\n", "utf-8")


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Iterable[float | str | None]]
) -> None:
    """A table or a curve, for DVC's plots and other programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        # An empty field is a gap: a skipped step has no gradient norm.
        writer.writerows([_csv_cell(value) for value in row] for row in rows)


def write_curve(path: Path, columns: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """A curve for DVC's plots: of a long one every n-th point and the last. The record has all."""
    every = -(-len(rows) // CURVE_POINTS)
    last = len(rows) - 1
    kept = (row for number, row in enumerate(rows) if number % every == 0 or number == last)
    write_csv(path, columns, kept)


def _csv_cell(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.6g}" if math.isfinite(value) else ""
