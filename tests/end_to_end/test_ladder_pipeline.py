"""A ladder as a user gives it: small runs, a forecast on record, its run, what is shown of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_pipeline

ASKED = ("--sizes", "1x8,1x16,2x16", "--horizons", "10,20,30", "--seeds", "", "--next", "1x16:40")


@pytest.mark.slow
def test_a_forecast_is_registered_before_its_run_and_at_no_other_time(tmp_path: Path) -> None:
    made = tiny_pipeline(tmp_path)

    def ladder(*words: str, expect: int = 0) -> str:
        command = sys.executable, "-m", "pipeline", "ladder", *ASKED, *words
        done = made.run(*command, expect=expect)
        return done.stdout + done.stderr

    said = ladder("--register-only")
    assert "0 of the 9 finished" in said and "forecast registered: ladders" in said
    assert said.count("Ran experiment(s): rung-") == 9
    (kept,) = (tmp_path / "ladders").glob("next-1x16-40-*.json")
    before = kept.read_bytes()
    said = ladder()
    assert "9 of the 9 finished" in said and "Ran experiment(s): rung-" not in said
    assert f"Registered before the run, as {kept.stem} in the training's record shows" in said
    assert kept.read_bytes() == before
    kept.unlink()  # and a new one, now that the outcome is known
    assert "has begun already, without a forecast" in ladder(expect=3)
    assert not kept.exists()
    kept.write_bytes(before)
    made.run(sys.executable, "-m", "pipeline", "report", kept.stem)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Forecasts by a ladder" in page and "Registered before the run" in page
