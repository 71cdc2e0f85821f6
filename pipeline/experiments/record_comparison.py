"""What the records of two trainings say: in what they differ, and up to which step they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError, cut
from pipeline.records.run_data import RunData
from pipeline.resume.fork import Kept
from pipeline.training.fingerprint import METRIC, PARTS

NAMES = {"weights": "weights", "batch": "batch", "random": "random state"}
CURVES = {"train/loss": "loss", "train/grad_norm": "gradient norm"}
RATE = {"train/learning_rate": "learning rate"}
# Tags that say where and how a training was computed, or that it was not bit-equal to itself.
TAGS = ("env.", "device.", "precision.e", "distributed.", "digest.", "attention.", "resume.")
Both = tuple[Kept, Kept]


def circumstances(both: Both) -> str:
    """Settings, code, versions and machine, as far as they differ: a line each."""
    a, b = (_facts(kept) for kept in both)
    lines = [
        f"  {name}: {_shown(a, name)} in {both[0].name}, {_shown(b, name)} in {both[1].name}"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    ]
    head = f"{both[0].name} and {both[1].name}"
    if not lines:
        return f"{head} have the same settings, code, versions and machine."
    return "\n".join([f"{head} differ in", *lines])


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return cut(str(facts.get(name, "not known"))) or "nothing"


def _facts(kept: Kept) -> dict[str, Any]:
    head, tags = kept.record[0], RunData({"train": kept.record}).tags
    about = {f"machine.{name}": value for name, value in head["environment"].items()}
    about |= {name: value for name, value in tags.items() if name.startswith(TAGS)}
    about |= {name: value[:12] for name, value in about.items() if name.startswith("digest.")}
    code = {"code": head["code"][:12], "commit": head["git"].get("commit", "")[:12]}
    return {"distributed.processes": "1", **head["params"], **code, **about}


@dataclass(frozen=True)
class Compared:
    """The steps that two records have of some numbers, up to the first one in which they differ."""

    by: str  # by what they were compared
    equal: int | None  # the last step before that is equal
    differs: int | None
    parts: tuple[str, ...]  # that differ in it
    last: int  # common step

    def words(self) -> str:
        by = f"By {self.by}, which both records have"
        if self.differs is None:
            return f"{by}, they do not differ: compared were steps up to {self.last:,}."
        first = f"step {self.differs:,} is the first that differs, in {_listed(self.parts)}."
        if self.equal is None:
            return f"{by}, {first}"
        return f"{by}, step {self.equal:,} is the last that is equal, and {first}"


@dataclass(frozen=True)
class Recorded:
    """All comparisons of two records; that of fingerprints, where both have some, is the first."""

    compared: tuple[Compared, ...]
    ends: str  # a sentence where one record ends before the other, or ""

    @property
    def differs(self) -> int | None:
        """The first step that differs, by whichever numbers show it first."""
        found = [one.differs for one in self.compared if one.differs is not None]
        return min(found, default=None)

    @property
    def equal(self) -> int | None:
        """The last step before that is equal, to the bit where fingerprints tell."""
        known, differs = self.compared[0].equal, self.differs
        return known if known is None or differs is None else min(known, differs)

    @property
    def only_batch(self) -> bool:
        """Whether fingerprints show weights that are equal before the first other batch."""
        parts = self.compared[0].parts
        first = self.differs is not None and self.compared[0].differs == self.differs
        return first and NAMES["batch"] in parts and NAMES["weights"] not in parts

    def words(self) -> str:
        """What differs first; comparisons that show it later, or not at all, are left out."""
        said = self.compared[:1]
        for one in self.compared[1:]:
            before = said[0].differs
            if before is None or (one.differs is not None and one.differs < before):
                said += (one,)
        return " ".join([*(one.words() for one in said), *filter(None, [self.ends])])


def recorded(both: Both) -> Recorded:
    """The records compared by fingerprints, and by loss and gradient norm over all common steps.

    Where the plan goes by the clock by learning rate, too. A random state that nothing is drawn
    from is left aside. Raises InputError where there is no common step.
    """
    runs = [RunData({"train": kept.record}) for kept in both]
    parts = PARTS if drawn(both) else PARTS[:2]
    curves = CURVES | (RATE if by_clock(both) else {})
    found = (
        _compared(runs, "fingerprints", {METRIC + part: NAMES[part] for part in parts}),
        _compared(runs, f"{_listed(list(curves.values()))} to six digits", curves),
    )
    if there := tuple(filter(None, found)):
        return Recorded(there, _ends(both, runs))
    raise InputError(
        f"{both[0].name} and {both[1].name} have no step in common: the first has "
        f"{_span(runs[0])}, the second {_span(runs[1])}"
    )


def drawn(both: Both) -> bool:
    """Whether anything is drawn from the random state: else it decides nothing."""
    return any(kept.params.get("model.dropout") for kept in both)


def by_clock(both: Both) -> bool:
    """Whether the plan of either, and with it the learning rate, depends on the time it took."""
    return any(kept.params.get("train.time_budget") for kept in both)


def _compared(runs: Sequence[RunData], by: str, metrics: Mapping[str, str]) -> Compared | None:
    """By metrics with their names; None where no step of both has them."""
    a, b = ({name: dict(run.curves.get(name, [])) for name in metrics} for run in runs)
    steps = sorted({step for name in metrics for step in a[name].keys() & b[name].keys()})
    equal = None
    for step in steps:
        # A gradient norm that is not finite has no point: one alone has one.
        if parts := tuple(metrics[n] for n in metrics if a[n].get(step) != b[n].get(step)):
            return Compared(by, equal, step, parts, steps[-1])
        equal = step
    return Compared(by, equal, None, (), steps[-1]) if steps else None


def _ends(both: Both, runs: Sequence[RunData]) -> str:
    ends = [max((step for step, _ in run.curves.get("train/loss", [])), default=-1) for run in runs]
    if ends[0] == ends[1] or min(ends) < 0:
        return ""
    a, b = both
    return f"The record of {a.name} ends with step {ends[0]:,}, that of {b.name} with {ends[1]:,}."


def _span(run: RunData) -> str:
    steps = [step for step, _ in run.curves.get("train/loss", [])]
    return f"steps {min(steps):,} to {max(steps):,}" if steps else "none"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
