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

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from pipeline import terminal

log = logging.getLogger(__name__)

WIDTH = 100  # columns where no terminal says how many it has
REDRAWN, REPEATED = 2.0, 30.0  # seconds between two texts: on a terminal, and elsewhere


def has_terminal() -> bool:
    return bool(sys.stdout and sys.stdout.isatty())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Aligned lines of at most the terminal's width; the first `left` columns are text, and wrap.

    Other columns are numbers, to the right. Names and settings are shown as `terminal.line` does.
    """
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        text = number < left
        justify: Literal["left", "right"] = "left" if text else "right"
        drawn.add_column(Text(name), justify=justify, no_wrap=not text, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(terminal.line(cell)) for cell in row))
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    page = io.StringIO()
    Console(file=page, width=min(width, 160), color_system=None).print(drawn)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


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
