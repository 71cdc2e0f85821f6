"""Medians, growth and leaps in the curves of a run, which the doctor's rules judge."""

from __future__ import annotations

import math
import statistics

from pipeline.records.run_data import RunData

FEW = 10  # steps that a median is taken over
TAIL = 0.1  # share of steps that speak for a run's end
CUT_TO = 3.0  # a gradient of this many times its limit is cut to a fraction
BEFORE_SPIKE = 20  # steps that say what is usual
NORM_LEAP = 10.0  # times the usual norm ...
STAYS = 5  # ... which is no leap but growth if most of so many later norms are like it


def largest_leap(run: RunData) -> tuple[int, float, float]:
    """(step, norm, usual norm) of the largest gradient that stands out; zeros where none does."""
    points, worst = run.curves.get("train/grad_norm", []), (0, 0.0, 0.0)
    norms = [norm for _, norm in points]
    for at in range(max(BEFORE_SPIKE, run.params["train.warmup_steps"]), len(points)):
        step, norm = points[at]
        before = norms[at - BEFORE_SPIKE : at]
        if norm <= worst[1] or norm <= NORM_LEAP * min(before):  # no median is below the least
            continue
        usual = statistics.median(before)
        later = norms[at + 1 : at + 1 + STAYS]
        stays = len(later) == STAYS and statistics.median(later) > NORM_LEAP * usual
        if norm > NORM_LEAP * usual > 0 and not stays:
            worst = step, norm, usual
    return worst


def tail(values: list[float]) -> list[float]:
    """The last tenth of the values, at least five."""
    return values[-max(5, round(TAIL * len(values))) :]


def smoothed(losses: list[float]) -> list[float]:
    """Running means over a twentieth of the run, at least five steps."""
    width = max(5, len(losses) // 20)
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(sums[i + width] - sums[i]) / width for i in range(len(losses) - width + 1)]


def largest_rise(losses: list[float]) -> tuple[float, int, int]:
    """(rise, step of the low, step of the high after it) of the pair furthest apart."""
    low, best = 0, (0.0, 0, 0)
    for step, loss in enumerate(losses):
        if loss < losses[low]:
            low = step
        best = max(best, (loss - losses[low], low, step))
    return best


def noise_of(losses: list[float]) -> float:
    """Standard deviation of the losses around their trend, from the differences of neighbours.

    The differences of a normal variable have a median size of 0.954 times its standard deviation.
    """
    differences = [abs(b - a) for a, b in zip(losses, losses[1:], strict=False)]
    return statistics.median(differences) / 0.954


def growth_of_norm(run: RunData) -> float | None:
    """The median norm at the end over that of the quietest FEW steps; None for a short run."""
    norms = run.values("train/grad_norm")
    if len(norms) < 2 * FEW:
        return None
    quietest = min(statistics.median(norms[i : i + FEW]) for i in range(0, len(norms), FEW))
    return statistics.median(tail(norms)) / quietest if quietest else math.inf


def cut_share(run: RunData) -> float | None:
    """Share of the second half's steps whose gradient is CUT_TO times its limit or more."""
    norms, limit = run.values("train/grad_norm"), run.params["train.grad_clip"]
    half = norms[len(norms) // 2 :]
    if not limit or len(half) < FEW:
        return None
    return sum(norm >= CUT_TO * limit for norm in half) / len(half)
