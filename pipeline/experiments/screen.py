"""What a person looks at in a terminal: tables that fit its width, and text that is redrawn."""

from __future__ import annotations

import io
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from pipeline import terminal

log = logging.getLogger(__name__)

WIDTH, MOST = 100, 160  # columns: where no terminal says how many it has, and of any
INDENT = "  "  # of a row below its name
REDRAWN, REPEATED = 2.0, 30.0  # seconds between two texts: on a terminal, and elsewhere


def has_terminal() -> bool:
    return bool(sys.stdout and sys.stdout.isatty())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Aligned lines of at most the terminal's width; the first `left` columns are text, and wrap.

    Other columns are numbers, to the right. Names and settings are shown as `terminal.line` does.
    A word is broken only where the table fits in no other way, and one of the first column never,
    since names are copied: where they leave too little room, each has a line of its own, of any
    length, and the rest of its row stands below.
    """
    lines = [columns, *([terminal.line(cell) for cell in row] for row in rows)]
    room = min(shutil.get_terminal_size((WIDTH, 24)).columns, MOST)
    widths, gap = _widths([*zip(*lines, strict=True)], left, room)
    if widths[0] >= _longest_word([line[0] for line in lines]):
        return "\n".join(part for line in lines for part in _drawn(line, widths, gap, left))
    aside = len(INDENT)
    rest = [line[1:] for line in lines]
    widths, gap = _widths([*zip(*rest, strict=True)], left - 1, room - aside)
    below = (_drawn(row, widths, gap, left - 1) for row in rest)
    pairs = zip(lines, below, strict=True)
    return "\n".join(
        "\n".join([name, *(INDENT + part for part in row)]) for (name, *_), row in pairs
    )


def _drawn(row: Sequence[str], widths: Sequence[int], gap: int, left: int) -> list[str]:
    """The lines of one row; text wraps."""
    drawn = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=False)
    for number, width in enumerate(widths):
        text = number < left
        justify: Literal["left", "right"] = "left" if text else "right"
        drawn.add_column(justify=justify, no_wrap=not text, overflow="fold", width=width)
    drawn.add_row(*map(Text, row))
    page = io.StringIO()
    Console(file=page, width=MOST, color_system=None).print(drawn)
    return [line.rstrip() for line in page.getvalue().splitlines()]


def _longest_word(column: Iterable[str]) -> int:
    return max(cell_len(word) for word in " ".join(column).split())


def _widths(columns: Sequence[Sequence[str]], left: int, room: int) -> tuple[list[int], int]:
    """Those of the columns and of the gap between two; the gap gives way, then the widest text."""
    widths = [max(map(cell_len, column)) for column in columns]
    words = [_longest_word(column) for column in columns[:left]]
    gaps = len(columns) - 1
    gap = 2 if sum(widths) + 2 * gaps <= room else 1
    while left and sum(widths) + gap * gaps > room:
        whole = [number for number in range(left) if widths[number] > words[number]]
        widest = max(whole or range(left), key=widths.__getitem__)
        if widths[widest] == 1:
            break
        widths[widest] -= 1
    return widths, gap


def show(
    draw: Callable[[], str], more: Callable[[float], bool], beside: IO[str] | None = None
) -> None:
    """Show what `draw` says, again and again while `more` says so, which waits the seconds given.

    On a terminal each text takes the place of the one before, and the lines of `beside` appear
    above it as they come.
    """
    if not has_terminal():
        while True:
            if text := draw():
                log.info("%s", text)
            if not more(REPEATED):
                return
    with terminal.unguarded():
        console, one_at_a_time = Console(file=sys.stdout, color_system=None), threading.Lock()
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def pass_on(lines: IO[str]) -> None:
                for line in lines:
                    with one_at_a_time:
                        console.print(Text(terminal.shown(line.rstrip("\n"))), soft_wrap=True)

            reader = threading.Thread(target=pass_on, args=(beside or io.StringIO(),), daemon=True)
            reader.start()
            while True:
                text = Text(draw())
                with one_at_a_time:
                    live.update(text, refresh=True)
                if not more(REDRAWN):
                    break
            reader.join(1)  # processes that go on, as MLflow's courier, hold the pipe


def number(value: float | None, shape: str = ",.0f") -> str:
    return "-" if value is None else format(value, shape)


def count(value: float | None) -> str:
    """ "51.2k", "1.50M"."""
    return "-" if value is None else tqdm.format_sizeof(value)


def duration(seconds: float | None) -> str:
    """ "00:41", "1:02:03"."""
    return "-" if seconds is None else tqdm.format_interval(seconds)


def moment(seconds: float) -> str:
    """ "2026-11-28 19:05", of this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
