"""The run doctor: what is wrong with a run, in sentences, as a verdict and as numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from pipeline import paths
from pipeline.diagnostics import rules
from pipeline.diagnostics.rules import RULES, URGENT, Finding, Rule
from pipeline.errors import InputError
from pipeline.records import record_file
from pipeline.records.dvc_history import WORKSPACE, experiments, of_workspace
from pipeline.records.record_file import Record
from pipeline.records.run_data import Event, Experiment, RunData

WAITS = 0.05  # of the steps so far, between two looks at a training under way
HEALTHY = "no problems found"


def examine(run: RunData, asked: Iterable[Rule] = RULES) -> list[Finding]:
    """What the rules find in a run, in their order; nothing in a healthy one."""
    return [finding for rule in asked if (finding := rule(run))]


def headline(findings: Sequence[Finding]) -> str:
    """One line: the names of the rules that found something, or HEALTHY."""
    return ", ".join(finding.rule for finding in findings) or HEALTHY


def lines(findings: Sequence[Finding]) -> list[str]:
    """The whole verdict for a terminal."""
    return [*map(str, findings)] or [f"{HEALTHY} ({len(RULES)} checks)"]


def judge(record: Record, step: int) -> tuple[dict[str, float], list[str]]:
    """The doctor's verdict as a stage ends, put on its record: (numbers, lines to print).

    Stages after training print only what training did not report. Where the workspace has no
    training there is nothing to judge, and both are empty.
    """
    stage = record.stage
    before = RunData({log[0]["stage"]: log for log in record_file.upstream(stage)})
    run = RunData({**before.records, stage: record.so_far()})
    if "train" not in run.records:
        return {}, []
    findings = examine(run)
    tags = {"health.verdict": headline(findings)}
    if stage == "train":
        numbers, said = health(run, findings), lines(findings)
        tags["health.grad_norm"] = norm_words(run)
    else:
        reported = before.tags.get("health.verdict", "").split(", ")
        numbers = {"health/findings": float(len(findings))}
        said = [str(finding) for finding in findings if finding.rule not in reported]
    record.metrics(numbers, step)
    record.tags(tags)
    return numbers, said


def health(run: RunData, findings: Sequence[Finding]) -> dict[str, float]:
    """Numbers for the table of runs."""
    norms, ratios = run.values("train/grad_norm"), run.values("train/update_ratio")
    numbers = {"health/findings": float(len(findings))}
    if norms:
        numbers["health/grad_norm_max"] = max(norms)
        numbers["health/grad_norm_last"] = statistics.median(rules.tail(norms))
    limit = run.params["train.grad_clip"]
    if norms and limit:
        numbers["health/clipped_share"] = sum(norm > limit for norm in norms) / len(norms)
    if ratios:
        numbers["health/update_ratio"] = statistics.median(ratios)
    return numbers


def norm_words(run: RunData) -> str:
    """What became of the gradient norm, short enough for a table's cell."""
    growth, cut = rules.growth_of_norm(run), rules.cut_share(run)
    if growth >= rules.NORM_GROWS:
        return f"grows {growth:,.0f}x"
    if cut > rules.ALWAYS:
        return f"clipped {cut:.0%}"
    _, norm, usual = rules.largest_leap(run)
    return f"spike {norm / usual:,.0f}x" if norm else "fine"


class Rounds:
    """The doctor's looks at a training under way: each urgent problem is reported once.

    A look reads all steps so far. The next one waits until these have grown by a twentieth, so
    that all looks of a run together read some twenty times its steps, however often it validates.
    """

    def __init__(self) -> None:
        self._reported: set[str] = set()
        self._next = 0.0

    def look(self, steps: int, events: Callable[[], Sequence[Event]]) -> list[Finding]:
        """Problems not reported before, after so many steps; `events` reads the record."""
        if steps < self._next:
            return []
        self._next = (1 + WAITS) * steps
        findings = examine(RunData({"train": events()}), URGENT)
        new = [finding for finding in findings if finding.rule not in self._reported]
        self._reported |= {finding.rule for finding in new}
        return new


def asked(names: list[str]) -> list[Experiment]:
    """The experiments of these names; raises InputError where one is not there or not trained."""
    everything = [of_workspace(paths.root())] if set(names) == {WORKSPACE} else experiments()
    known = {experiment.name: experiment for experiment in everything}
    for name in names:
        if name not in known:
            raise InputError(f"{name}: no such experiment; known: {', '.join(known)}")
        if "train" not in known[name].records:
            raise InputError(f"{name}: nothing trained yet: `dvc repro` or `make repro` trains")
    return [known[name] for name in names]
