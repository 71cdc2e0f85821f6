"""Checkouts of other projects, named on the command line: what a file of theirs defines.

Their scripts start to work when imported, so only their definitions are executed, and the imports
of what is installed. None of their code is here, nor a way to get it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.outcomes import commit_of

NANOGPT, BUILD_NANOGPT = "nanoGPT", "build-nanogpt"
DEFINITIONS = (ast.ClassDef, ast.FunctionDef)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--nanogpt and --build-nanogpt."""
    for name in (NANOGPT, BUILD_NANOGPT):
        parser.add_argument(
            f"--{name.lower()}", metavar="CHECKOUT", help=f"a checkout of {name} to run beside us"
        )


def part_in(name: str, folder: str | None) -> dict[str, str]:
    """A contestant's `version`, the checkout's commit; or `missing`, why there is none."""
    if folder is None:
        return {"missing": f"no checkout named: --{name.lower()} CHECKOUT"}
    if not Path(folder).is_dir():
        return {"missing": f"--{name.lower()}: no such folder"}
    return {"version": commit_of(Path(folder))}


@functools.lru_cache
def definitions(path: Path, names: tuple[str, ...]) -> ModuleType:
    """A module with the classes and functions of the file at `path`, under `if` as well.

    `names` are variables of the script that these read: set them before a call. Raises OSError,
    and SyntaxError for a file that is no Python source.
    """
    tree = ast.parse(path.read_bytes(), str(path))
    tree.body = [node for node in _statements(tree) if _wanted(node)]
    module = ModuleType(f"definitions_of_{path.stem}")
    vars(module).update(dict.fromkeys(names))
    sys.modules[module.__name__] = module  # where dataclasses and pickle look it up
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        if isinstance(node, ast.If):
            yield from node.body
        yield node


def _wanted(node: Any) -> bool:
    """Definitions, and imports of what is installed rather than beside the script."""
    if isinstance(node, ast.Import):
        return all(_installed(alias.name) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return _installed(node.module or "")
    return isinstance(node, DEFINITIONS)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None
