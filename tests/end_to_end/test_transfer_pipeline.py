"""A transfer check as a user gives it: trained once, taken up, and shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_pipeline

ASKED = ("--widths", "8,16", "--rates", "0.002,0.02,0.2", "--steps", "12", "--layers", "1")


@pytest.mark.slow
def test_a_transfer_check_trains_what_is_missing_and_says_whether_the_rate_moves(
    tmp_path: Path,
) -> None:
    made = tiny_pipeline(tmp_path)

    def transfer(*words: str) -> str:
        return made.run(sys.executable, "-m", "pipeline", "transfer", *ASKED, *words).stdout

    assert "6 trainings, 0 of them finished" in transfer("--seeds", "", "--dry-run")
    said = transfer("--seeds", "")
    assert said.count("Ran experiment(s): transfer-1x") == 6
    folder = tmp_path / "comparisons/transfer-gpt2-adamw"
    assert (folder / "transfer.md").exists() and (folder / "transfer.png").exists()
    again = transfer("--seeds", "")
    assert "6 trainings, 6 of them finished" in again and "Ran experiment(s)" not in again
    assert said.partition("init.scheme=")[2] == again.partition("init.scheme=")[2]
    shown = made.run(sys.executable, "-m", "pipeline", "show", COLUMNS="80").stdout
    assert "transfer-1x16-0.2" in shown
