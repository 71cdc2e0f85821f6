"""References into the code, `path:line`, which follow the symbol that they name.

A page writes [`x`](../pipeline/model/gpt.py "GPT.forward"): a link whose title is a symbol. The
rest is filled in. A symbol that has moved to another file is found if that alone defines it.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = re.compile(r'\[`[^`\n]+`\]\(((?:\.\./)?)([\w./]+\.py)(?:#L\d+)? "([\w.]+)"\)')


@functools.cache
def symbols(path: Path) -> dict[str, int]:
    """{name: line} of a file's functions, classes, their methods, and its top-level names."""
    lines: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            lines.update({prefix + t.id: t.lineno for t in targets if isinstance(t, ast.Name)})

    visit(ast.parse(path.read_text("utf-8")).body, "")
    return lines


def locate(name: str, symbol: str) -> tuple[str, int]:
    """The file and the line of a symbol. Raises LookupError where no single file defines it."""
    path = ROOT / name
    if path.is_file() and symbol in symbols(path):
        return name, symbols(path)[symbol]
    files = [file for folder in ("pipeline", "stages") for file in (ROOT / folder).rglob("*.py")]
    places = [file for file in files if symbol in symbols(file)]
    if len(places) != 1:
        known = ", ".join(str(file.relative_to(ROOT)) for file in places) or "no file"
        raise LookupError(f"{symbol}: not in {name}; defined in {known}: edit the page")
    return places[0].relative_to(ROOT).as_posix(), symbols(places[0])[symbol]


def follow(text: str) -> str:
    """A page with every reference at its symbol's present file and line."""

    def now(match: re.Match[str]) -> str:
        name, line = locate(match[2], match[3])
        return f'[`{name}:{line}`]({match[1]}{name}#L{line} "{match[3]}")'

    return REFERENCE.sub(now, text)


def files(text: str) -> list[str]:
    """The files that a text refers to, in the order of first mention."""
    return list(dict.fromkeys(match[2] for match in REFERENCE.finditer(text)))
