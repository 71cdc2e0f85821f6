"""Signals to end while training: noted for the end of the step; a second one ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

from pipeline.compute.ranks import here

Item = TypeVar("Item")
Handler = Callable[[int, FrameType | None], Any] | int | None  # as signal.getsignal gives it
# A closed terminal is a third way to say it, where the system has that signal.
SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Stopped(Exception):
    """Work that can be done again later was left in the middle, since the process is to end."""


class Interruption:
    """While entered, signals to end are taken over: `asked` is the one that came, if any.

    Of several processes each learns in its next step what came to another.
    """

    def __init__(self) -> None:
        self._ranks = here()
        self._ranks.asked = 0
        before = {number: signal.getsignal(number) for number in SIGNALS}
        # One that is ignored, as under nohup, was not to end this process.
        self._before = {n: kept for n, kept in before.items() if kept is not signal.SIG_IGN}

    def __enter__(self) -> Interruption:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._handle(self._before)

    @property
    def asked(self) -> signal.Signals | None:
        number = self._ranks.asked
        return signal.Signals(number) if number else None

    def going_on(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, as long as nobody asks to stop; then Stopped."""
        for item in items:
            if self.asked:
                raise Stopped
            yield item

    def leave(self) -> None:
        """End as the signal says: KeyboardInterrupt, or SystemExit with 128 + its number."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + int(self.asked or 0))

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Signals do inside what they did before: an interpreter has its own use for Ctrl-C."""
        self._handle(self._before)
        try:
            yield
        finally:
            self._listen()

    def _listen(self) -> None:
        self._handle(dict.fromkeys(self._before, self._note))

    def _note(self, number: int, _frame: object) -> None:
        self._ranks.asked = number
        # The system's own way to end needs no Python: it works in the middle of a long product.
        self._handle(dict.fromkeys(self._before, signal.SIG_DFL))
        name = signal.Signals(number).name
        words = f"\n{name}: this step and a checkpoint first; again ends at once\n"
        with contextlib.suppress(OSError):
            os.write(2, words.encode())  # a handler may come in the middle of another print

    def _handle(self, handlers: Mapping[signal.Signals, Handler]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
