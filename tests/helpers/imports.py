"""What the sources import and read, taken from their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The packages of pipeline/, each of which imports only from those before it and from the files
# at the root. The first make results; an edit in the others re-runs no stage.
MAKES = ("storage", "compute", "data", "model", "training", "inference", "studies")
LOOKS = (
    *("records", "drawing", "resume", "distributed", "diagnostics", "tracking", "experiments"),
    *("ladders", "reports", "export", "commands"),
)


def module_of(path: Path) -> str:
    """ROOT/"pipeline/model/gpt.py" -> "pipeline.model.gpt"."""
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def room_of(module: str) -> str:
    """The package of a module of pipeline; "" for a file at the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else ""


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


def makes_results(module: str) -> bool:
    return room_of(module) in MAKES


def closure(path: Path) -> set[str]:
    """Modules of packages that make results, which `path` reaches by imports among such alone."""
    found: set[str] = set()
    todo = [path]
    while todo:
        for name in imports(todo.pop()):
            if makes_results(name) and name not in found and source(name).is_file():
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
