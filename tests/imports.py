"""What the sources import and read, taken from their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of imported modules; what only type checkers see does not count."""
    found: set[str] = set()
    for node in _runtime_nodes(tree(path), top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if source(name).is_file()}
            found |= modules | ({node.module} if len(modules) < len(names) else set())
    return found


def _runtime_nodes(node: ast.AST, top_level_only: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        yield from _runtime_nodes(child, top_level_only)


def source(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def closure(path: Path, stop: frozenset[str]) -> set[str]:
    """pipeline modules that `path` reaches through imports, not looking into those in `stop`."""
    found: set[str] = set()
    todo = [path]
    while todo:
        for name in imports(todo.pop()):
            if name.startswith("pipeline.") and name not in found | stop and source(name).is_file():
                found.add(name)
                todo.append(source(name))
    return found


def config_sections(path: Path) -> set[str]:
    """Names read as `config.NAME` anywhere in a file."""
    return {
        node.attr
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "config"
    }
