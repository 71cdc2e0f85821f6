"""Any runs held against the first of them: outcomes, where curves part, the noise of seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.experiments.comparison import APART, Run, evenly, family, first_apart, largest_gap
from pipeline.records.run_data import Experiment


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed alone, one for each seed: two or more."""

    runs: list[Run]

    @property
    def std(self) -> float:
        """Of the outcome, nats a token."""
        return statistics.stdev(run.outcome() for run in self.runs)

    def hold(self, run: Run) -> bool:
        return family(run) == family(self.runs[0])

    def words(self) -> str:
        names = ", ".join(run.name for run in self.runs)
        return f"{len(self.runs)} seeds ({names}) have outcomes with a std of {self.std:.2g} nats"


@dataclass(frozen=True)
class Contrast:
    """One run beside the base."""

    run: Run
    base: Run
    seeds: Seeds | None  # whose noise the difference is held against

    @property
    def difference(self) -> float:
        """Of the outcome from the base's, nats a token."""
        return self.run.outcome() - self.base.outcome()

    @property
    def apart(self) -> int | None:
        """The first step at which the training losses are more than one percent apart."""
        return first_apart(self.run.losses, self.base.losses)

    @property
    def gap(self) -> float:
        """The largest distance of the training losses at one step, nats a token."""
        return largest_gap(self.run.losses, self.base.losses)

    def words(self) -> str:
        """What the difference amounts to, in one sentence."""
        if self.run.record == self.base.record:
            return f"shares its training with {self.base.name}"
        said = f"{self.difference:+.2g} nats from {self.base.name}, {self._noise()}; "
        if self.apart is None:
            return said + f"the curves are never more than {APART:.0%} apart"
        return said + f"the curves are first more than {APART:.0%} apart at step {self.apart}"

    def _noise(self) -> str:
        if self.seeds is None:
            return "the noise of seeds unknown"
        if self.seeds.hold(self.run) and self.seeds.hold(self.base):
            return "another seed of the same settings"
        where = "inside" if abs(self.difference) <= 2 * self.seeds.std else "beyond"
        return f"{where} two std of the noise of {len(self.seeds.runs)} seeds"


def contrasts(shown: Sequence[Run], everyone: Iterable[Run]) -> list[Contrast]:
    """Every run of `shown` beside the first one, itself included, all judged alike.

    Seeds are looked for among `everyone`: the base's, else the run's own, else those of any
    other run shown.
    """
    families: dict[str, dict[int, Run]] = {}
    for run in [*shown, *sorted(everyone, key=lambda run: -run.time)]:
        families.setdefault(family(run), {}).setdefault(run.seed, run)
    near = {family(run) for run in shown}
    sets = [list(runs.values()) for key, runs in families.items() if key in near]
    alike, *sets = evenly(dict(enumerate([list(shown), *sets]))).values()
    known = [Seeds(runs) for runs in sets if len(runs) > 1]

    def noise(run: Run) -> Seeds | None:
        of = lambda other: next((seeds for seeds in known if seeds.hold(other)), None)  # noqa: E731
        return of(alike[0]) or of(run) or next(iter(known), None)

    return [Contrast(run, alike[0], noise(run)) for run in alike]


def differing(found: Sequence[Experiment]) -> dict[str, list[Any]]:
    """The settings in which runs differ, with each one's value; None where it has none."""
    names = dict.fromkeys(name for one in found for name in one.params)
    values = {name: [one.params.get(name) for one in found] for name in names}
    return {name: v for name, v in values.items() if any(other != v[0] for other in v)}
