"""Trainings compared with a baseline: outcomes, where curves part, the noise of seeds."""

from __future__ import annotations

import csv
import difflib
import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import config as configuration
from pipeline import paths
from pipeline.drawing import figures
from pipeline.errors import ConfigError, InputError
from pipeline.records import stage_graph
from pipeline.records.dvc_history import experiments
from pipeline.records.run_data import Experiment
from pipeline.storage.digests import digest_of
from pipeline.tables import markdown
from pipeline.terminal import in_markdown
from pipeline.tracking.mlflow_run import attach

log = logging.getLogger(__name__)

Settings = dict[str, Any]  # by dotted name

SEED = "train.seed"
TAIL = 0.05  # share of steps whose mean is the final training loss
APART = 0.01  # relative difference of two losses from which on curves count as apart
COLUMNS = (
    *("value", "runs", "train loss", "outcome", "difference", "in noise std"),
    *("largest gap", "apart from step", "tokens/s", "of base", "peak MiB", "skipped"),
)
SUMMARY = ("perf/tokens_per_second", "perf/peak_memory_mib", "train/skipped_steps")


@dataclass(frozen=True)
class Run:
    """One training, from its records."""

    name: str
    record: str  # the training record's id
    time: int
    params: Settings
    data: str  # digest of the training tokens
    code: str  # digest of the sources
    losses: list[float]  # nats/token, by step
    validation: list[float]  # while training, in order
    final: float | None  # nats/token over the whole validation split, by `evaluate`
    tokens_per_second: float
    peak_memory_mib: float
    skipped: int

    @property
    def seed(self) -> int:
        return self.params[SEED]

    def train_loss(self) -> float:
        """Mean of the last steps."""
        return statistics.fmean(self.losses[-max(1, round(TAIL * len(self.losses))) :])

    def outcome(self) -> float:
        """The loss that runs are judged by, nats/token; see `judged_by`."""
        if self.final is not None:
            return self.final
        return self.validation[-1] if self.validation else self.train_loss()

    def judged_by(self) -> str:
        if self.final is not None:
            return "validation loss"
        return "validation loss while training" if self.validation else "training loss"


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed alone, one for each seed: two or more."""

    runs: list[Run]

    @property
    def std(self) -> float:
        """Standard deviation of the outcome, nats/token."""
        return statistics.stdev(run.outcome() for run in self.runs)

    def include(self, run: Run) -> bool:
        """Whether a run is one of these, or would be with another seed."""
        return family(run) == family(self.runs[0])

    def words(self) -> str:
        names = ", ".join(run.name for run in self.runs)
        std = f"{self.std:.2g} nats/token"
        return f"{len(self.runs)} seeds ({names}) have outcomes with a std of {std}"


@dataclass(frozen=True)
class Pair:
    """A run beside the baseline, and the seeds whose noise their difference is compared with."""

    run: Run
    base: Run
    seeds: Seeds | None

    @property
    def difference(self) -> float:
        """The outcome minus the baseline's, nats/token."""
        return self.run.outcome() - self.base.outcome()

    @property
    def in_std(self) -> float | None:
        """The size of the difference in standard deviations of the seeds' outcome."""
        return abs(self.difference) / self.seeds.std if self.seeds and self.seeds.std else None

    @property
    def apart(self) -> int | None:
        """The first step at which the training losses are more than one percent apart."""
        steps = enumerate(self._losses())
        return next((step for step, (a, b) in steps if abs(a - b) > APART * abs(b)), None)

    @property
    def gap(self) -> float:
        """The largest distance of the training losses at one step, nats/token."""
        return max(abs(a - b) for a, b in self._losses())

    def _losses(self) -> Iterable[tuple[float, float]]:
        return zip(self.run.losses, self.base.losses, strict=False)

    def words(self) -> str:
        """One sentence on what the difference amounts to."""
        if self.run.record == self.base.record:
            return f"shares its training with {self.base.name}"
        if self.seeds is None:
            noise = "the noise of seeds unknown"
        elif self.seeds.include(self.run) and self.seeds.include(self.base):
            noise = "another seed of the same settings"
        else:
            where = "inside" if abs(self.difference) <= 2 * self.seeds.std else "beyond"
            noise = f"{where} two std of the noise of {len(self.seeds.runs)} seeds"
        curves = "never" if self.apart is None else "first"
        at = "" if self.apart is None else f" at step {self.apart}"
        return (
            f"{self.difference:+.2g} nats/token from {self.base.name}, {noise}; "
            f"the curves are {curves} more than {APART:.0%} apart{at}"
        )


@dataclass(frozen=True)
class Comparison:
    """Runs that are equal but for one setting, and for seeds."""

    setting: str
    base: Any  # the value of the baseline
    runs: dict[Any, list[Run]]  # by value, the base first; by seed within

    def main(self, value: Any) -> Run:
        """The run of a value with the seed that most values share."""
        seeds = [run.seed for runs in self.runs.values() for run in runs]
        common = max(set(seeds), key=lambda seed: (seeds.count(seed), -seed))
        runs = self.runs[value]
        return next((run for run in runs if run.seed == common), runs[0])

    @property
    def seeds(self) -> Seeds | None:
        """The base's seeds; None for a single one."""
        return Seeds(self.runs[self.base]) if len(self.runs[self.base]) > 1 else None

    def pair(self, value: Any) -> Pair | None:
        """The main run of a value beside the base's of its seed; None where there is none."""
        run = self.main(value)
        same = (base for base in self.runs[self.base] if base.seed == run.seed)
        return next((Pair(run, base, self.seeds) for base in same), None)

    def row(self, value: Any) -> tuple[Any, ...]:
        """One tuple of COLUMNS."""
        run, base, pair = self.main(value), self.main(self.base), self.pair(value)
        beside = (pair.difference, pair.in_std, pair.gap, pair.apart) if pair else (None,) * 4
        return (
            *(str(value), len(self.runs[value]), run.train_loss(), run.outcome(), *beside),
            *(run.tokens_per_second, run.tokens_per_second / base.tokens_per_second),
            *(run.peak_memory_mib, run.skipped),
        )

    def verdict(self) -> str:
        """A sentence for each value: is it further from the base than seeds from one another?"""
        if self.seeds is None:
            base = in_markdown(f"{self.setting}={self.base}")
            return (
                f"The noise of seeds is unknown, since {base} ran with one seed only; queue "
                f"others: `dvc exp run --queue -S {SEED}=1,2`."
            )
        said = [self.seeds.words()]
        for value in self.runs:
            pair = self.pair(value)
            if value != self.base:
                words = pair.words() if pair else f"no run of {self.base} has its seed"
                said.append(f"{value}: {words}")
        return " ".join(in_markdown(f"{sentence}.") for sentence in said)

    def page(self) -> str:
        """Markdown: the verdict and the table."""
        same, setting = self.main(self.base), in_markdown(self.setting)
        base = f"{setting}={in_markdown(str(self.base))}"
        head = (
            f"# {setting}\n\n{len(same.losses)} steps, seed {same.seed}, baseline {base}. Losses "
            f"are in nats/token; the outcome is the {same.judged_by()}, the difference that of the "
            "outcome at the same seed.\n\n"
        )
        codes = {run.code for runs in self.runs.values() for run in runs}
        if len(codes) > 1:
            head += f"These runs come from {len(codes)} versions of the code.\n\n"
        rows = [(in_markdown(value), *rest) for value, *rest in map(self.row, self.runs)]
        return f"{head}{self.verdict()}\n\n{markdown(COLUMNS, rows)}"


def runs_of(trained: Iterable[Experiment]) -> list[Run]:
    """Every training once: experiments may share one, and the workspace holds the last again."""
    runs: dict[str, Run] = {}
    for run in filter(None, map(run_of, trained)):
        runs.setdefault(run.record, run)
    return list(runs.values())


def run_of(experiment: Experiment) -> Run | None:
    """The training of an experiment; None where it has none that came to its end.

    Another version of this project may not have measured, or set, what runs are compared by.
    """
    summary = [experiment.last(key) for key in SUMMARY]
    measured = [value for value in summary if value is not None and math.isfinite(value)]
    if "train" not in experiment.records or len(measured) < len(SUMMARY):
        return None
    tokens_per_second, peak_memory_mib, skipped = measured
    training = experiment.records["train"][0]
    if SEED not in training["params"]:
        return None
    return Run(
        experiment.name,
        training["id"],
        training["time"],
        training["params"],
        experiment.tags.get("digest.train", ""),
        training["code"],
        experiment.values("train/loss"),
        experiment.values("train/val_loss"),
        experiment.last("val/loss"),
        tokens_per_second,
        peak_memory_mib,
        int(skipped),
    )


def cut(run: Run, steps: int) -> Run:
    """The first steps of a run alone, judged by their training loss."""
    return replace(run, losses=run.losses[:steps], validation=[], final=None)


def settings_beside(params: Settings, *settings: str) -> Settings:
    """What two runs must share for a comparison of `settings`."""
    rest = {k: v for k, v in params.items() if k not in (*settings, SEED)}
    return {k: v for k, v in rest.items() if stage_graph.changes_training(k)}


def family(run: Run, *settings: str) -> str:
    """The same for runs on the same tokens that differ in `settings` and the seed alone."""
    return digest_of([settings_beside(run.params, *settings), run.data])


def evenly(groups: dict[Any, list[Run]]) -> dict[Any, list[Run]]:
    """The runs, judged by what every one of them has: a run may have had no evaluation."""
    everyone = [run for runs in groups.values() for run in runs]
    lacking: dict[str, Any] = {}
    if any(run.final is None for run in everyone):
        lacking["final"] = None
    if any(not run.validation for run in everyone):
        lacking["validation"] = []
    return {key: [replace(run, **lacking) for run in runs] for key, runs in groups.items()}


def pairs(shown: Sequence[Run], everyone: Iterable[Run]) -> list[Pair]:
    """Every run of `shown` beside the first one, itself included, all judged alike.

    Seeds are looked for among `everyone`: the base's, else the run's own, else those of any
    other run shown.
    """
    families: dict[str, dict[int, Run]] = {family(run): {} for run in shown}
    for run in [*shown, *sorted(everyone, key=lambda run: -run.time)]:
        families.get(family(run), {}).setdefault(run.seed, run)
    sets = [list(runs.values()) for runs in families.values()]
    alike, *sets = evenly(dict(enumerate([list(shown), *sets]))).values()
    known = [Seeds(runs) for runs in sets if len(runs) > 1]

    def noise(run: Run) -> Seeds | None:
        own = (seeds for one in (alike[0], run) for seeds in known if seeds.include(one))
        return next(own, known[0] if known else None)

    return [Pair(run, alike[0], noise(run)) for run in alike]


def groups(runs: Iterable[Run], setting: str) -> list[dict[Any, list[Run]]]:
    """Runs on the same tokens that differ in `setting` and seed alone, by value.

    The group of the newest run comes first; of runs that are equal in everything the newest
    stays. A group has two values or more.
    """
    families: dict[str, dict[tuple[int, Any], Run]] = {}
    for run in sorted(runs, key=lambda run: run.time):
        if setting in run.params:
            key = family(run, setting)
            relatives = families.pop(key, {})  # to the end: the newest so far
            families[key] = relatives | {(run.seed, run.params[setting]): run}
    several = []
    for relatives in reversed(families.values()):
        by_value: dict[Any, list[Run]] = {}
        for (_, value), run in sorted(relatives.items(), key=lambda item: item[0][0]):
            by_value.setdefault(value, []).append(run)
        if len(by_value) > 1:
            several.append(by_value)
    return several


def in_order(values: Iterable[Any], usual: Any) -> list[Any]:
    """The values, the base first: the usual one where it is among them."""
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    base = usual if usual in ordered else ordered[0]
    return [base, *(value for value in ordered if value != base)]


def compare(
    runs: Iterable[Run], setting: str, usual: Any, steps: int = 0, like: Settings | None = None
) -> Comparison:
    """The newest set of runs that differ in `setting`; `usual` is the base where it ran.

    With `like`, of the runs that have these settings beside. Raises InputError where there is
    no such set.
    """
    kept = [cut(run, steps) if steps else run for run in runs]
    if like is not None:
        beside = settings_beside(like, setting)
        kept = [run for run in kept if settings_beside(run.params, setting) == beside]
    sets = groups(kept, setting)
    if not sets:
        raise InputError(
            f"no two runs differ in {setting} alone (seeds aside); run some: "
            f"`python -m pipeline sweep {setting}=A,B`"
        )
    if len(sets) > 1:
        log.info("%d sets of runs differ in %s; this is the newest one", len(sets), setting)
    base, *others = in_order(sets[0], usual)
    return Comparison(setting, base, evenly({v: sets[0][v] for v in (base, *others)}))


def check_setting(name: str) -> None:
    """Raises ConfigError for a name that is no setting, or one that cannot be compared."""
    known = [known for known, *_ in configuration.describe()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name}: unknown setting{hint}")
    if name == SEED:
        raise ConfigError(f"{name}: seeds are the noise that other settings are compared with")
    if not stage_graph.changes_training(name):
        raise ConfigError(f"{name}: only later stages read it, so it does not change the training")


def conclude(setting: str, steps: int = 0, like: Settings | None = None) -> None:
    """Compare what has run: to the log, to a folder, and to the rows; see `compare`."""
    runs = runs_of(experiments(("train", "evaluate")))
    compared = compare(runs, setting, usual_value(setting), steps, like)
    folder = paths.root() / "comparisons" / setting
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(compared.page(), "utf-8")
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        rows = [COLUMNS, *map(compared.row, compared.runs)]
        csv.writer(file, lineterminator="\n").writerows(rows)
    figures.save(figures.comparison(compared), folder / "comparison.png")
    log.info("%s", compared.page())
    log.info("figure: %s", folder / "comparison.png")
    ids = [run.record for runs in compared.runs.values() for run in runs]
    attach(ids, folder, f"comparison/{setting}")


def usual_value(setting: str) -> Any:
    """The baseline's value of a setting: fp32 of precisions, else the one in params.yaml."""
    settings = configuration.flatten(configuration.load(paths.root() / paths.PARAMS))
    return "fp32" if setting == "precision" else settings[setting]
