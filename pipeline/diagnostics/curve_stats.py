"""What the run doctor's rules look at: medians, growth and leaps in the curves of a run."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from pipeline.records.run_data import Experiment

FEW = 10  # steps that a median is taken over
TAIL = 0.1  # share of steps that speak for a run's end
CUT_TO = 3.0  # a gradient of this many times its limit is cut to a fraction
BEFORE_SPIKE = 20  # steps that say what is usual
NORM_LEAP = 10.0  # times the usual norm ...
STAYS = 5  # ... which is no leap but growth if most of so many later norms are like it


@dataclass(frozen=True)
class Finding:
    """What a rule found wrong."""

    rule: str  # its short name
    verdict: str  # one sentence in plain words
    evidence: str  # the numbers behind it
    advice: str  # the setting to change


def largest_leap(found: Experiment) -> tuple[int, float, float]:
    """(step, norm, usual norm) of the longest gradient that stands out; zeros where none does."""
    points, worst = found.curves.get("train/grad_norm", []), (0, 0.0, 0.0)
    norms = [norm for _, norm in points]
    for at in range(max(BEFORE_SPIKE, found.params["train.warmup_steps"]), len(points)):
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
    """The last tenth, five at least."""
    return values[-max(5, round(TAIL * len(values))) :]


def smoothed(losses: list[float]) -> list[float]:
    """Running means over a twentieth of the run, five steps at least."""
    width = max(5, len(losses) // 20)
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(sums[i + width] - sums[i]) / width for i in range(len(losses) - width + 1)]


def largest_rise(losses: list[float]) -> tuple[float, int, int]:
    """(rise, step of the low, step of the high after it), of all pairs the furthest apart."""
    low, best = 0, (0.0, 0, 0)
    for step, loss in enumerate(losses):
        if loss < losses[low]:
            low = step
        best = max(best, (loss - losses[low], low, step))
    return best


def noise_of(losses: list[float]) -> float:
    """Standard deviation around the course, whatever the course: from neighbours' differences.

    A normal variable's differences have a median size of 0.954 times its standard deviation.
    """
    differences = [abs(b - a) for a, b in zip(losses, losses[1:], strict=False)]
    return statistics.median(differences) / 0.954


def growth_of_norm(found: Experiment) -> float | None:
    """The median norm at the end by that of the quietest ten steps; None for a run too short."""
    norms = found.values("train/grad_norm")
    if len(norms) < 2 * FEW:
        return None
    quietest = min(statistics.median(norms[i : i + FEW]) for i in range(0, len(norms), FEW))
    return statistics.median(tail(norms)) / quietest if quietest else math.inf


def cut_share(found: Experiment) -> float | None:
    """Share of the second half's steps whose gradient is CUT_TO times its limit or more."""
    norms, limit = found.values("train/grad_norm"), found.params["train.grad_clip"]
    half = norms[len(norms) // 2 :]
    if not limit or len(half) < FEW:
        return None
    return sum(norm >= CUT_TO * limit for norm in half) / len(half)
