"""The run doctor: rules over what a run recorded, a verdict in plain words, the setting to change.

python -m pipeline.doctor             the run of this workspace
python -m pipeline.doctor NAME ...    finished DVC experiments
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.experiments import Experiment

GROWS = 10.0  # times the norm after warm-up: a norm that has left its place
TAIL = 0.1  # share of steps that speak for a run's end


@dataclass(frozen=True)
class Finding:
    """What a rule found wrong."""

    rule: str  # its short name
    verdict: str  # one sentence in plain words
    evidence: str  # the numbers behind it
    advice: str  # the setting to change


def examine(found: Experiment) -> list[Finding]:
    """Every rule's finding on this run, in the order of RULES; none for a healthy run."""
    return [finding for rule in RULES for finding in [rule(found)] if finding]


def headline(findings: list[Finding]) -> str:
    """One line: the rules that found something, or that none did."""
    return ", ".join(finding.rule for finding in findings) or "healthy"


def gradient_norm_grows(found: Experiment) -> Finding | None:
    norms = found.values("train/grad_norm")
    warm = found.params["train.warmup_steps"]
    if len(norms) < warm + 20:
        return None
    tail = statistics.median(norms[-max(5, round(TAIL * len(norms))) :])
    base = statistics.median(norms[warm : warm + 10])
    if tail < GROWS * base:
        return None
    return Finding(
        "gradient norm grows",
        f"The gradient norm grew {tail / base:,.0f}-fold after warm-up.",
        f"median {base:,.3g} in the ten steps after warm-up, {tail:,.3g} at the end",
        "lower train.lr, or raise train.warmup_steps",
    )


RULES: tuple[Callable[[Experiment], Finding | None], ...] = (gradient_norm_grows,)
