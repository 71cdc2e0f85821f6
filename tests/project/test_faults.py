"""The fault table's plugin: what came of each marked test is what the results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.faults import EXCUSED, table

MADE_UP = """
import pytest

@pytest.fixture
def broken():
    yield
    raise OSError("in tear-down")

@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.parametrize("value", [1, 2, 3])
def test_mixed(value):
    if value == 2:
        pytest.skip("not here")
    assert value != 3

@pytest.mark.fault(1, control=True)
def test_naive(): pass

@pytest.mark.slow
@pytest.mark.fault(2)
def test_spoilt_at_the_end(broken): pass

@pytest.mark.fault(3)
def test_never_begins(no_such_fixture): pass

def test_unmarked(): pass
"""


def results_of(pytester: pytest.Pytester, source: str, *words: str) -> tuple[int, str]:
    pytester.makepyfile(test_x=source)
    words = (
        "-p",
        "tests.helpers.faults",
        "-p",
        "no:cacheprovider",
        "--faults",
        "out.jsonl",
        *words,
    )
    done = pytester.runpytest_inprocess(*words)
    return int(done.ret), done.stdout.str() + done.stderr.str()


def test_the_table_numbers_every_row_once_and_says_where_it_is_held() -> None:
    assert list(table()) == list(range(1, 76))
    for row, about in table().items():
        assert set(about) == {"where", "fault", "then"}, row
        assert about["where"] in ("cheap", "slow", *EXCUSED), row


@pytest.mark.parametrize("words", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_the_results_count_what_came_of_every_marked_test(
    pytester: pytest.Pytester, words: tuple[str, ...]
) -> None:
    code, shown = results_of(pytester, MADE_UP, *words)
    assert code == 1
    assert "faults: 3 rows by 4 tests and 1 controls" in shown
    run, *lines = map(json.loads, Path("out.jsonl").read_text("utf-8").splitlines())
    assert set(run) == {"selected", "seconds", "date", "machine", "python", "torch"}
    mixed = {"test": "test_x.py::test_mixed", "control": False, "slow": False}
    mixed |= {"passed": 1, "failed": 1, "skipped": 1}
    end = {"test": "test_x.py::test_spoilt_at_the_end", "control": False, "slow": True}
    never = {"test": "test_x.py::test_never_begins", "control": False, "slow": False}
    naive = {"test": "test_x.py::test_naive", "control": True, "slow": False, "passed": 1}
    assert lines == [
        {"row": 1} | mixed,
        {"row": 1} | naive,
        {"row": 2} | mixed,
        {"row": 2} | end | {"failed": 1},
        {"row": 3} | never | {"failed": 1},
    ]


@pytest.mark.parametrize("mark", ["fault", "fault(99)", "fault(1, 2)", "fault(1, controls=True)"])
def test_a_mark_that_names_no_row_stops_the_tests(pytester: pytest.Pytester, mark: str) -> None:
    source = f"import pytest\n\n@pytest.mark.{mark}\ndef test_it(): pass\n"
    code, shown = results_of(pytester, source)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "test_x.py::test_it" in shown and "expected fault(ROW)" in shown


def test_only_what_was_chosen_is_in_the_results(pytester: pytest.Pytester) -> None:
    results_of(pytester, MADE_UP, "-m", "fault and slow")
    run, *lines = map(json.loads, Path("out.jsonl").read_text("utf-8").splitlines())
    assert run["selected"] == "fault and slow"
    assert [line["test"] for line in lines] == ["test_x.py::test_spoilt_at_the_end"]
