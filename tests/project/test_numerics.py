"""The table in NUMERICS.md names a test, or a reason, for every detail; this holds the table."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.imports import ROOT, tree

LINES = (ROOT / "tests/NUMERICS.md").read_text("utf-8").splitlines()
ROWS = [
    tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
    for line in LINES
    if line.startswith("|") and not line.startswith(("|---", "| what correct"))
]


def names_in(module: str) -> set[str]:
    (path,) = (ROOT / "tests").rglob(f"{module}.py")
    body = tree(path).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_not_been_emptied() -> None:
    assert len(ROWS) >= 37


@pytest.mark.parametrize(("claim", "held_by"), ROWS, ids=[claim[:40] for claim, _ in ROWS])
def test_every_line_names_tests_that_exist_or_gives_a_reason(claim: str, held_by: str) -> None:
    if held_by.startswith("reason: "):
        assert len(held_by) > 30
        return
    for name in held_by.split(", "):
        module, _, test = name.partition("::")
        assert test in names_in(module), f"{claim}: no {name}"
