"""Experiments that differ in one setting, side by side: curves, differences, the noise of seeds."""

from __future__ import annotations

import csv
import difflib
import logging
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
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

# What training does not read: two runs that differ in these trained the same.
SEED = "train.seed"
TAIL = 0.05  # share of steps whose mean is the final training loss
APART = 0.01  # relative difference of two losses from which on curves count as apart
COLUMNS = (
    *("value", "runs", "train loss", "outcome", "difference", "in noise std"),
    *("largest gap", "apart from step", "tokens/s", "of base", "peak MiB", "skipped"),
)


AT_ITS_END = ("perf/tokens_per_second", "perf/peak_memory_mib", "train/skipped_steps")


@dataclass(frozen=True)
class Run:
    """One training, from its records."""

    name: str
    record: str  # the training record's id
    time: int
    params: dict[str, Any]
    data: str  # digest of the training tokens
    code: str  # digest of the sources
    losses: list[float]  # nats a token, by step
    validation: list[float]  # while training, in order
    final: float | None  # nats a token over the whole validation split, by `evaluate`
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
        """What runs are judged by, nats a token; see `judged_by`."""
        if self.final is not None:
            return self.final
        return self.validation[-1] if self.validation else self.train_loss()

    def judged_by(self) -> str:
        if self.final is not None:
            return "validation loss"
        return "validation loss while training" if self.validation else "training loss"


@dataclass(frozen=True)
class Comparison:
    """Runs that are equal but for one setting, and for seeds."""

    setting: str
    base: Any  # the value that the others are held against
    runs: dict[Any, list[Run]]  # by value, the base first; by seed within

    def main(self, value: Any) -> Run:
        """The run of a value with the seed that most values share."""
        seeds = [run.seed for runs in self.runs.values() for run in runs]
        common = max(set(seeds), key=lambda seed: (seeds.count(seed), -seed))
        runs = self.runs[value]
        return next((run for run in runs if run.seed == common), runs[0])

    def partner(self, run: Run) -> Run | None:
        """The base's run with the same seed."""
        return next((b for b in self.runs[self.base] if b.seed == run.seed), None)

    def difference(self, run: Run) -> float | None:
        """Of the outcome, from the base's at the same seed; None where there is no such run."""
        partner = self.partner(run)
        return None if partner is None else run.outcome() - partner.outcome()

    def noise(self) -> float | None:
        """Standard deviation of the base's outcome over its seeds; None for a single one."""
        outcomes = [run.outcome() for run in self.runs[self.base]]
        return statistics.stdev(outcomes) if len(outcomes) > 1 else None

    def row(self, value: Any) -> tuple[Any, ...]:
        """One tuple of COLUMNS."""
        run, base = self.main(value), self.main(self.base)
        difference, noise = self.difference(run), self.noise()
        partner = self.partner(run)
        return (
            str(value),
            len(self.runs[value]),
            run.train_loss(),
            run.outcome(),
            difference,
            None if difference is None or not noise else abs(difference) / noise,
            None if partner is None else largest_gap(run.losses, partner.losses),
            None if partner is None else first_apart(run.losses, partner.losses),
            run.tokens_per_second,
            run.tokens_per_second / base.tokens_per_second,
            run.peak_memory_mib,
            run.skipped,
        )

    def verdict(self) -> str:
        """One sentence a value: is it further from the base than seeds are from one another?"""
        noise, seeds = self.noise(), len(self.runs[self.base])
        base = in_markdown(str(self.base))
        if noise is None:
            return (
                f"The noise of seeds is unknown, since {in_markdown(self.setting)}={base} ran with "
                f"one seed only; queue others: `dvc exp run --queue -S {SEED}=1,2`."
            )
        parts = [f"Over {seeds} seeds the outcome of {base} has a std of {noise:.4f} nats."]
        for value in self.runs:
            difference = self.difference(self.main(value))
            name = in_markdown(str(value))
            if value == self.base:
                continue
            if difference is None:
                parts.append(f"{name}: no run of {base} has its seed.")
                continue
            where = "inside" if abs(difference) <= 2 * noise else "beyond"
            parts.append(f"{name}: {difference:+.4f}, {where} two std of that noise.")
        return " ".join(parts)

    def page(self) -> str:
        """Markdown: the verdict and the table."""
        same, setting = self.main(self.base), in_markdown(self.setting)
        head = (
            f"# {setting}\n\n{len(same.losses)} steps, seed {same.seed}, against "
            f"{setting}={in_markdown(str(self.base))}. Losses are nats a token; the outcome is the "
            f"{same.judged_by()}, the difference that of the outcome at the same seed.\n\n"
        )
        codes = {run.code for runs in self.runs.values() for run in runs}
        if len(codes) > 1:
            head += f"These runs come from {len(codes)} versions of the code.\n\n"
        rows = [(in_markdown(value), *rest) for value, *rest in map(self.row, self.runs)]
        return f"{head}{self.verdict()}\n\n{markdown(COLUMNS, rows)}"


def largest_gap(losses: list[float], others: list[float]) -> float:
    """Largest distance of two training curves at one step, nats."""
    return max(abs(a - b) for a, b in zip(losses, others, strict=False))


def first_apart(losses: list[float], others: list[float]) -> int | None:
    """The first step at which two training losses differ by more than one percent, if any."""
    pairs = enumerate(zip(losses, others, strict=False))
    return next((step for step, (a, b) in pairs if abs(a - b) > APART * abs(b)), None)


def runs_of(found: Iterable[Experiment]) -> list[Run]:
    """Every training once: experiments may share one, and the workspace holds the last again."""
    runs: dict[str, Run] = {}
    for run in filter(None, map(run_of, found)):
        runs.setdefault(run.record, run)
    return list(runs.values())


def run_of(found: Experiment) -> Run | None:
    """The training of an experiment; None where it has none that came to its end.

    Another version of this project may not have measured, or set, what runs are compared by.
    """
    ends = [found.last(key) for key in AT_ITS_END]
    if "train" not in found.records or not all(v is not None and math.isfinite(v) for v in ends):
        return None
    training = found.records["train"][0]
    if SEED not in training["params"]:
        return None
    return Run(
        found.name,
        training["id"],
        training["time"],
        training["params"],
        found.tags.get("digest.train", ""),
        training["code"],
        found.values("train/loss"),
        found.values("train/val_loss"),
        found.last("val/loss"),
        *ends[:2],
        int(ends[2]),
    )


def cut(run: Run, steps: int) -> Run:
    """The first steps of a run alone, judged by their training loss."""
    return replace(run, losses=run.losses[:steps], validation=[], final=None)


def family(run: Run, *settings: str) -> str:
    """The same for runs on the same tokens that differ in `settings` and the seed alone."""
    return digest_of([settings_beside(run.params, *settings), run.data])


def groups(runs: Iterable[Run], setting: str) -> list[dict[Any, list[Run]]]:
    """Runs on the same tokens that differ in `setting` and seed alone, by value.

    The group of the newest run comes first; of runs that are equal in everything the newest
    stays. A group has two values or more.
    """
    found: dict[str, dict[tuple[Any, int], Run]] = {}
    for run in sorted(runs, key=lambda run: run.time):
        if setting in run.params:
            relatives = found.setdefault(family(run, setting), {})
            relatives[run.params[setting], run.seed] = run
    several = []
    for members in found.values():
        by_value: dict[Any, list[Run]] = {}
        for (value, _), run in sorted(members.items(), key=lambda item: item[0][1]):
            by_value.setdefault(value, []).append(run)
        if len(by_value) > 1:
            several.append(by_value)
    newest = lambda group: max(run.time for runs in group.values() for run in runs)  # noqa: E731
    return sorted(several, key=newest, reverse=True)


def settings_beside(params: dict[str, Any], *settings: str) -> dict[str, Any]:
    """What two runs must share for a comparison of `settings`."""
    rest = {k: v for k, v in params.items() if k not in (*settings, SEED)}
    return {k: v for k, v in rest.items() if stage_graph.changes_training(k)}


def base_of(values: Iterable[Any], usual: Any) -> Any:
    """The value that the others are held against: the usual one where it is among them."""
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    return usual if usual in ordered else ordered[0]


def compare(
    runs: Iterable[Run],
    setting: str,
    usual: Any,
    steps: int = 0,
    like: dict[str, Any] | None = None,
) -> Comparison:
    """The newest set of runs that differ in `setting`; `usual` is the base where it ran.

    With `like`, of the runs that have these settings beside. Raises InputError where there is
    no such set.
    """
    kept = [cut(run, steps) if steps else run for run in runs]
    if like is not None:
        beside = settings_beside(like, setting)
        kept = [run for run in kept if settings_beside(run.params, setting) == beside]
    found = groups(kept, setting)
    if not found:
        raise InputError(
            f"no two runs differ in {setting} alone (seeds aside); queue some: "
            f"`dvc exp run --queue -S {setting}=A,B` and `dvc queue start`"
        )
    if len(found) > 1:
        log.info("%d sets of runs differ in %s; this is the newest one", len(found), setting)
    group = found[0]
    base = base_of(group, usual)
    values = sorted(group, key=lambda value: (isinstance(value, str), value))
    ordered = [base, *(value for value in values if value != base)]
    return Comparison(setting, base, evenly({value: group[value] for value in ordered}))


def evenly(group: dict[Any, list[Run]]) -> dict[Any, list[Run]]:
    """The runs, judged by what every one of them has: a run may have had no evaluation."""
    everyone = [run for runs in group.values() for run in runs]
    lacking: dict[str, Any] = {}
    if any(run.final is None for run in everyone):
        lacking["final"] = None
    if any(not run.validation for run in everyone):
        lacking["validation"] = []
    return {value: [replace(run, **lacking) for run in runs] for value, runs in group.items()}


def write(found: Comparison, folder: Path) -> None:
    """comparison.md, .csv and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(found.page(), "utf-8")
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [COLUMNS, *(found.row(value) for value in found.runs)]
        )
    figures.save(figures.comparison(found), folder / "comparison.png")


def check_setting(name: str) -> None:
    """Raises ConfigError for a name that is no setting, or one that cannot be compared."""
    known = [known for known, *_ in configuration.describe()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name}: unknown setting{hint}")
    if name == SEED or not stage_graph.changes_training(name):
        raise ConfigError(
            f"{name}: seeds are the noise that other settings are held against, and those that "
            "only later stages read, as of evaluate and sample, do not change the training"
        )


def conclude(
    setting: str,
    *,
    steps: int = 0,
    out: Path | None = None,
    like: dict[str, Any] | None = None,
) -> None:
    """Compare what has run: to the log, to a folder, and to the rows; see `compare`."""
    usual = configuration.flatten(configuration.load(paths.root() / "params.yaml"))
    runs = runs_of(experiments(("train", "evaluate")))
    found = compare(runs, setting, usual_value(setting, usual), steps, like)
    folder = out or paths.root() / "comparisons" / setting
    write(found, folder)
    log.info("%s", found.page())
    log.info("figure: %s", folder / "comparison.png")
    ids = [run.record for runs in found.runs.values() for run in runs]
    attach(ids, folder, f"comparison/{setting}")


def usual_value(setting: str, params: dict[str, Any]) -> Any:
    """What a setting's other values are held against: fp32, else the one in params.yaml."""
    return "fp32" if setting == "precision" else params[setting]
