"""The pages' settings, file tree and blocks are those of the code and of a real run."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.conftest import ROOT
from tests.helpers.faults import COLLECTED
from tools import fault_table


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", ["settings", "tree", "faults", "speed"])
def test_the_readme_shows_what_the_code_says(tool, block: str) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    assert getattr(tool, block)() in page, "run `python tools/readme.py`"


@pytest.mark.parametrize("name", ["README.md", "docs/notes.md"])
def test_every_block_has_been_filled_by_a_run(tool, name: str) -> None:
    assert ROOT / name in tool.PAGES
    blocks = list(tool.BLOCK.finditer((ROOT / name).read_text("utf-8")))
    assert blocks
    for match in blocks:
        kind, argument, filled = match[2], match[3], match[4]
        assert filled.strip(), f"run `python tools/readme.py --run`: {argument}"
        if kind == "run":
            assert f"$ {argument}\n" in filled, f"run `python tools/readme.py --run`: {argument}"


def test_every_figure_of_a_page_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "notes.md"):
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text("utf-8")):
            assert (page.parent / name).is_file(), name


def test_every_row_of_the_fault_table_is_held_by_a_test_and_a_control() -> None:
    assert fault_table.gaps(fault_table.results()[1]) == [], "run `make faults`"


def test_the_fault_tables_results_are_of_the_tests_that_are_there(request) -> None:
    outcomes = fault_table.results()[1]
    known = {(line["row"], line["control"], line["test"]) for line in outcomes}
    assert request.config.stash[COLLECTED] <= known, "run `make faults`"
    for line in outcomes:
        path, _, name = line["test"].partition("::")
        assert f"def {name.rpartition('::')[2]}(" in (ROOT / path).read_text("utf-8"), line["test"]


def outcome(row: int, control: bool = False, slow: bool = False, **ends: int) -> fault_table.Line:
    return {"row": row, "control": control, "test": "test_x.py::test_x", "slow": slow} | ends


def test_a_row_that_is_not_held_says_so_in_the_table() -> None:
    known = fault_table.table()
    held = [outcome(row, control, passed=2) for row in known for control in (False, True)]
    run = {"selected": "fault", "seconds": 9, "machine": "m", "python": "3", "torch": "2"}
    runs = [run | {"date": "2026-01-01"}]
    assert fault_table.gaps(held) == []
    assert fault_table.page(runs, held).count("| 2     | 2        |") == len(known)

    assert (known[7]["where"], known[49]["where"]) == ("cheap", "distributed")
    spoilt = [line for line in held if line["row"] not in (5, 6, 7, 8, 9, 49)]
    spoilt += [outcome(5, passed=1, failed=1), outcome(5, control=True, passed=1)]
    spoilt += [outcome(6, passed=1), outcome(6, control=True, skipped=1)]
    spoilt += [outcome(8, slow=True, passed=1), outcome(8, control=True, passed=1)]
    spoilt += [outcome(9, passed=1)]
    expected = ["a test failed: 5", "no control that passed: 6, 7, 9"]
    expected += ["no test that passed: 7", "only slow tests: 8"]
    assert fault_table.gaps(spoilt) == expected
    page = fault_table.page(runs, spoilt)
    assert f"**Not held: {'; '.join(expected)}.**" in page
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[3:] for line in page.splitlines()}
    assert [text.strip(" |") for text in cells["5"]] == ["cheap", "1, **1 failed**", "1"]
    assert [text.strip(" |") for text in cells["6"]] == ["cheap", "1", "1 skipped"]
    assert [text.strip(" |") for text in cells["7"]] == ["cheap", "**none**", "**none**"]
    assert [text.strip(" |") for text in cells["8"]] == ["slow", "1", "1"]
    assert [text.strip(" |") for text in cells["49"]] == ["distributed", "-", "-"]
