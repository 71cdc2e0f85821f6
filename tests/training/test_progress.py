"""What a person sees while a training is at work: a bar, or whole lines in a log."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator

import pytest

from pipeline.training.loop import StepReport
from stages import common


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless its one number is changed."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def steps(clock: list[float], seconds: float, count: int, first: int = 0) -> Iterator[StepReport]:
    for step in range(first, count):
        clock[0] += seconds
        yield StepReport(
            step=step,
            loss=5.0,
            grad_norm=1.0,
            skipped=False,
            loss_scale=1.0,
            learning_rate=1e-3,
            seconds=1.0,
            data_seconds=0.0,
            tokens=512,
            steps=count,
        )


def test_a_log_gets_whole_lines_with_the_time_left(clock, capsys) -> None:
    list(common.progress(steps(clock, 4.0, 60, first=40), 60, 40))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "train: step 48/60, loss 5.000, 128 tokens/s, 00:48 left",
        "train: step 56/60, loss 5.000, 128 tokens/s, 00:16 left",
    ]
    assert err == ""


def test_a_quick_training_says_nothing_between_its_validations(clock, capsys) -> None:
    list(common.progress(steps(clock, 0.1, 100), 100, 0))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_no_lines(clock, monkeypatch, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    list(common.progress(steps(clock, 40.0, 3), 3, 0))
    assert "3/3" in sys.stderr.getvalue() and "loss 5.000, 512 tokens/s" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""
