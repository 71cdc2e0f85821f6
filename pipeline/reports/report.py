"""The report: one self-contained HTML page for a run, or for several side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipeline import config as configuration
from pipeline import paths, tables, terminal
from pipeline.errors import InputError
from pipeline.experiments.comparison import Run, run_of, runs_of
from pipeline.experiments.contrast import Contrast, contrasts, differing
from pipeline.records.dvc_history import WORKSPACE, experiments, of_workspace
from pipeline.records.record_file import Event
from pipeline.records.run_data import Experiment
from pipeline.reports.curves import Picture, Style, overlaid, styles
from pipeline.reports.run_page import RunPage, Study, run_page, setting_text

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html.jinja")
RECIPE = Path("recipes/nano.yaml")  # the default, against which settings are marked
MOST_DRAWN = 16  # runs on one page, each with curves of its own: a figure takes 0.2 s and 30 KB
OUTCOMES = (
    *("run", "verdict", "outcome", "difference", "first apart at step", "largest gap"),
    *("train loss", "bits per byte", "choice accuracy", "tokens/s", "peak MiB", "skipped"),
)


@dataclass(frozen=True)
class Side:
    """Two runs or more side by side."""

    base: str
    settings: list[str]  # those that differ
    values: list[list[str]]  # (run, its value of each)
    judged_by: str
    outcomes: list[tuple[Any, ...]]  # of OUTCOMES, the best first
    words: list[tuple[str, str]]  # (run, what its difference from the base amounts to)
    noise: list[str]  # the sets of seeds that differences are held against
    notes: list[str]
    curves: list[Picture]


def page(runs: Sequence[RunPage], looks: dict[str, Style], side: Side | None = None) -> str:
    """The HTML; `side` where there are two runs or more. The same records give the same text."""
    jinja = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    jinja.filters["shown"] = shown
    template = jinja.from_string(TEMPLATE.read_text("utf-8"))
    html = template.render(runs=runs, looks=looks, side=side, columns=OUTCOMES).strip()
    return terminal.shown(html) + "\n"


def shown(value: Any) -> str:
    """A table's cell: numbers as in every other table, texts as they are."""
    return value if isinstance(value, str) else tables.cell(value)


def of_one(found: Experiment, workspace: Path, at_work: str = "") -> str:
    """The page of one run, whose files lie in `workspace` unless DVC keeps them."""
    name = found.name if found.rev else found.head["name"] or found.name
    (style,) = styles(1)
    return page([run_page(found, name, workspace, recipe(workspace), at_work)], {name: style})


def of_chain(chain: Iterable[list[Event]]) -> str:
    """The page of the records that a stage has before it, its own one, still open, the last."""
    found = Experiment(WORKSPACE, "", {record[0]["stage"]: record for record in chain})
    return of_one(found, Path(), at_work=list(found.records)[-1])


def of_several(
    found: Sequence[Experiment], everything: Sequence[Experiment], workspace: Path
) -> str:
    """The page of two runs or more; the noise of seeds is looked for among `everything`."""
    usual = recipe(workspace)
    draw, pages = len(found) <= MOST_DRAWN, {}
    for one in found:
        try:
            pages[one.name] = run_page(one, one.name, workspace, usual, draw=draw)
        except InputError as error:  # of another version of this project
            log.warning("%s: %s; left out", one.name, error)
    found = [one for one in found if one.name in pages]
    if not found:
        raise InputError("of these runs none can be shown, as the warnings say")
    runs = once(list(pages.values()))
    looks = dict(zip((one.name for one in found), styles(len(found)), strict=True))
    return page(runs, looks, side_by_side(found, runs, runs_of(everything), looks))


def once(runs: list[RunPage]) -> list[RunPage]:
    """Studies that several runs share are shown with the first of them."""
    owner: dict[str, str] = {}
    found = []
    for run in runs:
        kept = []
        for study in run.studies:
            first = owner.setdefault(f"{study.pages} {study.pictures}", run.name)
            same = Study(study.title, f"The same as of {first}.", [], [])
            kept.append(study if first == run.name else same)
        found.append(replace(run, studies=kept))
    return found


def side_by_side(
    found: Sequence[Experiment],
    runs: Sequence[RunPage],
    everyone: Sequence[Run],
    looks: dict[str, Style],
) -> Side:
    settings = differing(found)
    trained = {one.name: run for one in found if (run := run_of(one))}
    held = contrasts(list(trained.values()), everyone) if trained else []
    verdicts = {run.name: run.verdict for run in runs}
    by_name = {one.name: one for one in found}
    ranked = sorted(held, key=lambda one: one.run.outcome())
    drawn = [(by_name[name], style) for name, style in looks.items() if name in trained]
    return Side(
        base=held[0].base.name if held else "",
        settings=list(settings),
        values=[
            [one.name, *(setting_text(values[n]) for values in settings.values())]
            for n, one in enumerate(found)
        ],
        judged_by=held[0].base.judged_by() if held else "",
        outcomes=[outcome(one, by_name[one.run.name], verdicts) for one in ranked],
        words=[(one.run.name, one.words()) for one in ranked if one.run is not one.base],
        noise=list(dict.fromkeys(one.seeds.words() for one in held if one.seeds)),
        notes=list(cautions(found, trained)),
        curves=overlaid(drawn, [(one, looks[one.run.name]) for one in held]),
    )


def outcome(held: Contrast, found: Experiment, verdicts: dict[str, str]) -> tuple[Any, ...]:
    """One row of OUTCOMES."""
    run, base = held.run, held.run is held.base
    return (
        run.name,
        verdicts[run.name],
        run.outcome(),
        None if base else held.difference,
        None if base else held.apart,
        None if base else held.gap,
        run.train_loss(),
        found.last("val/bits_per_byte"),
        found.last("val/choice_acc"),
        run.tokens_per_second,
        run.peak_memory_mib,
        run.skipped,
    )


def cautions(found: Sequence[Experiment], trained: dict[str, Run]) -> Iterator[str]:
    """What makes runs less comparable than their settings say."""
    left_out = [one.name for one in found if one.name not in trained]
    if left_out:
        yield f"Without a finished training, and so not compared: {', '.join(left_out)}."
    for what, values in (
        ("versions of the code", {run.code for run in trained.values()}),
        ("sets of training tokens", {run.data for run in trained.values()}),
    ):
        if len(values) > 1:
            yield f"These runs come from {len(values)} {what}."
    if len(found) > MOST_DRAWN:
        yield (
            f"Of more than {MOST_DRAWN} runs the curves are drawn together only; "
            "python -m pipeline report NAME draws those of one by themselves."
        )


def recipe(workspace: Path) -> dict[str, Any]:
    """The default recipe's settings; none in a checkout without it."""
    path = workspace / RECIPE
    return configuration.flatten(configuration.load(path)) if path.exists() else {}


def choose(everything: Sequence[Experiment], names: Sequence[str]) -> list[Experiment]:
    """Those of these names, in this order; of several of one name the newest.

    Raises InputError that lists the unknown ones and those that there are.
    """
    kept = [one for one in everything if one.records]
    known = {one.name: one for one in sorted(kept, key=lambda one: one.head["time"])}
    if unknown := [name for name in names if name not in known]:
        if not known:
            raise InputError("nothing trained yet: `dvc repro` or `make repro` trains")
        there = ", ".join(known)
        raise InputError(f"{', '.join(unknown)}: no run of that name; there are: {there}")
    return [known[name] for name in dict.fromkeys(names)]


def all_of(everything: Sequence[Experiment]) -> list[str]:
    """Every name, the workspace first; an experiment that the workspace holds stands for it."""
    ids = {one.name: {r[0]["id"] for r in one.records.values()} for one in everything}
    here = ids.pop(WORKSPACE, set())
    twins = [name for name, theirs in ids.items() if theirs == here]
    first = (twins[:1] or [WORKSPACE]) if here else []
    by_age = sorted((one for one in everything if one.records), key=lambda one: one.head["time"])
    return list(dict.fromkeys([*first, *(one.name for one in by_age if one.name in ids)]))


def report(names: Sequence[str], everyone: bool) -> str:
    """The page for these names; for none of them, that of the workspace's run."""
    root = paths.root()
    if not names and not everyone:
        found = choose([of_workspace(root)], [WORKSPACE])
        return of_one(found[0], root)
    everything = list(experiments())
    found = choose(everything, (all_of(everything) or [WORKSPACE]) if everyone else names)
    return of_several(found, everything, root) if len(found) > 1 else of_one(found[0], root)
