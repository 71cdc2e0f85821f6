"""What a training says of itself at each validation."""

from __future__ import annotations

from types import SimpleNamespace

from pipeline.training.history import History
from pipeline.training.loop import StepReport


def report(step: int, loss: float, seconds: float) -> StepReport:
    return StepReport(
        loss=loss,
        grad_norm=1.0,
        loss_scale=1.0,
        skipped=False,
        step=step,
        learning_rate=0.002,
        seconds=seconds,
        data_seconds=0.0,
        tokens=512,
        steps=1000,
    )


def test_a_validation_is_a_line_about_the_steps_since_the_last_one(make_config) -> None:
    history = History(make_config().train, SimpleNamespace(metrics=lambda *_: None))
    history.curve = [report(0, 9.0, 3.0), report(1, 7.0, 1.0)]
    assert history.validated(8.5)
    assert history.line() == "step 2/1,000  train 8.000  val 8.500  lr 2.0e-03  256 tokens/s  best"
    history.curve += [report(2, 6.0, 0.25), report(3, 5.0, 0.25), report(4, 4.0, 0.5)]
    assert not history.validated(8.6)
    assert history.line() == "step 5/1,000  train 5.000  val 8.600  lr 2.0e-03  1,536 tokens/s"


def test_the_rate_of_all_steps_stands_beside_that_of_the_median_step(make_config) -> None:
    history = History(make_config().train, SimpleNamespace(metrics=lambda *_: None))
    history.curve = [report(step, 9.0, 10.0 if step == 5 else 1.0) for step in range(10)]
    summary = {"perf/tokens_per_second": 512.0, "perf/peak_memory_mib": 9.0}
    line = history.lines(summary | {"perf/warm_up_seconds": 0.0})[-1]
    assert "269 tokens/s over all steps, 512 in the median step" in line
