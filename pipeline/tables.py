"""Markdown tables, aligned so that they also read well as plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


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
    rule = [
        "-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric, strict=True)
    ]
    lines = [
        [
            text.rjust(w) if right else text.ljust(w)
            for text, w, right in zip(line, widths, numeric, strict=True)
        ]
        for line in (list(columns), rule, *cells)
    ]
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
