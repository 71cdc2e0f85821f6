"""Markdown tables: alignment, digits, and what was not measured."""

from __future__ import annotations

from pipeline.tables import markdown


def test_numbers_are_right_aligned_and_texts_left() -> None:
    table = markdown(("name", "value"), [("a", 1), ("long name", 20)])
    assert table == (
        "| name      | value |\n"
        "| --------- | ----: |\n"
        "| a         |     1 |\n"
        "| long name |    20 |\n"
    )


def test_numbers_have_four_digits_and_large_ones_commas() -> None:
    values = (1 / 3, 1234567.0, 12.0, 0.000123456, 0.0, 1e9, 1234567, True)
    cells = [markdown(("x",), [(v,)]).splitlines()[-1].strip("| ") for v in values]
    assert cells == ["0.3333", "1,234,567", "12", "1.23e-04", "0", "1.00e+09", "1,234,567", "yes"]


def test_what_was_not_measured_is_a_dash_and_does_not_change_the_alignment() -> None:
    table = markdown(("x",), [(None,), (1.5,), (float("nan"),)])
    assert table.splitlines()[1:] == ["| --: |", "|   - |", "| 1.5 |", "|   - |"]


def test_a_bar_in_a_text_does_not_end_its_cell() -> None:
    assert r"a \| b" in markdown(("x",), [("a | b",)])


def test_rows_may_come_from_a_generator() -> None:
    assert markdown(("x",), ((n,) for n in range(3))).count("\n") == 5
