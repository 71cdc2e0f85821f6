"""Text from elsewhere on its way to a person: control characters are shown, Markdown is not obeyed.

A tensor's name, a setting or a sampled text may hold an escape sequence that sets a terminal's
title, or a mark that turns a line of text around.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of a text
    "\u2028\u2029\ud800-\udfff]"  # line ends that only some programs know, lone surrogates
)
# What Markdown's readers obey inside a line: emphasis, code, links, HTML, addresses.
MARKS = re.compile(r"[\\`*~\[\]<]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|@(?=\w)")
ENTITIES = {"<": "&lt;", "&": "&amp;", "@": "&#64;"}  # not every reader knows a backslash there


def shown(text: str) -> str:
    """The text with an escape, such as `\\x1b`, for each character that a terminal would obey."""
    return HIDDEN.sub(lambda found: escape(ord(found[0])), text)


def escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def line(text: str) -> str:
    """The same in one line: of a name, which has no business with tabs and line ends."""
    return shown(text).replace("\n", "\\n").replace("\t", "\\t")


def in_json(text: str) -> str:
    """JSON that says the same without a hidden character in it."""
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def in_markdown(text: str) -> str:
    """One line of Markdown that shows the text: no code, image, link or HTML comes out of it."""
    one = shown(" ".join(text.split("\n")))
    return MARKS.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), one)


def as_code(text: str) -> str:
    """A block of Markdown that shows the text as it is, whatever fences are in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown(text)}\n{fence}\n"


class Guarded:
    """A stream that writes what is `shown`; in all else the stream itself.

    A carriage return may come first in a write: progress bars begin so.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        start = text[:1] if text[:1] == "\r" else ""
        self.stream.write(start + shown(text[len(start) :]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard() -> None:
    """Guard this process's output and errors, once; to call before anything is written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Guarded):
            setattr(sys, name, Guarded(stream))
    sys.excepthook = traceback.print_exception  # Python 3.13's own one writes colours


@contextmanager
def unguarded() -> Iterator[None]:
    """The streams themselves meanwhile: for a prompt that draws with escape sequences."""
    guarded = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (getattr(stream, "stream", stream) for stream in guarded)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = guarded
