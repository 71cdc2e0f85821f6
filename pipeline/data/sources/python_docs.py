"""Python's own documentation: one document a topic of the reference, and one a module."""

from __future__ import annotations

import ast
import functools
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.documents import Document, document, share
from pipeline.errors import InputError, Refuse

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

# Tests hold broken syntax and data rather than prose; idlelib documents a program's inside.
_LEFT_OUT = {"test", "tests", "idlelib"}


def documents(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    own = texts()
    for name in sorted(name for name, text in own.items() if text):
        yield from document(name, share(config), [own[name]])


def about(config: CorpusConfig) -> dict[str, str]:
    return {"python": platform.python_version()}


@functools.lru_cache(maxsize=1)  # the check reads them, and then the tokenizer
def texts() -> dict[str, str]:
    """{"topic assert": text, "module argparse": text, ...}: nothing of it is imported.

    Raises InputError where this Python comes without its documentation.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts_by_name = _topics(library / "pydoc_data" / "topics.py")
    for path in _modules(library):
        name = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        texts_by_name[f"module {name}"] = _module_text(name, _parsed(path))
    return texts_by_name


def _topics(path: Path) -> dict[str, str]:
    """The language reference: {"topic assert": text, ...}."""
    for node in _parsed(path).body if path.is_file() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            topics = ast.literal_eval(node.value)
            return {f"topic {name}": f"{_plain(topics[name])}\n" for name in topics}
    raise InputError(
        f"{path}: not there or without topics: this Python comes without its documentation; "
        "install one that has it, or set corpus.source to text, jsonl or parquet"
    )


def _modules(library: Path) -> list[Path]:
    """Sources of the modules that CPython lists as its own, without tests and idlelib."""
    tops = [library / name for name in sys.stdlib_module_names]
    paths = [path for top in tops for path in (top.with_suffix(".py"), *top.rglob("*.py"))]
    left_out = {path for path in paths if _LEFT_OUT.intersection(path.relative_to(library).parts)}
    return [path for path in paths if path.is_file() and path not in left_out]


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():  # the library's own invalid escapes are no concern here
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise InputError(f"{path}: not a Python source: {error}") from None


def _module_text(name: str, tree: ast.Module) -> str:
    """The docstrings of a module under headings that say what each describes; "" without any."""
    sections = list(_sections(tree, f"module {name}", ""))
    return "\n\n".join(sections) + "\n" if sections else ""


def _sections(node: ast.AST, heading: str, prefix: str) -> Iterator[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, kinds):
        text = _plain(ast.get_docstring(node) or "")
        if text:
            yield f"{heading}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            line = f"class {prefix}{child.name}" + (f"({bases})" if bases else "")
            yield from _sections(child, line, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            line = f"{prefix}{child.name}({ast.unparse(child.args)})"
            yield from _sections(child, line, f"{prefix}{child.name}.")
        elif not isinstance(child, ast.expr):  # `if` and `try` hold definitions, too
            yield from _sections(child, "", prefix)


def _plain(text: str) -> str:
    """Without outer whitespace, and with what is no text written as escapes."""
    return text.strip().encode("utf-8", "backslashreplace").decode().replace("\0", r"\x00")
