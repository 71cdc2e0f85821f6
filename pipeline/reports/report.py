"""The report: one self-contained HTML page for a run, or for several side by side."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipeline import config as configuration
from pipeline import paths, tables, terminal
from pipeline.errors import InputError
from pipeline.experiments import forks
from pipeline.experiments.comparison import Pair, Run, pairs, run_of, runs_of
from pipeline.records.dvc_history import WORKSPACE, experiments, of_workspace, whole
from pipeline.records.record_file import Event
from pipeline.records.run_data import Experiment, row_name
from pipeline.reports.curves import Style, charts, distances, styles
from pipeline.reports.run_page import RunPage, Study, compact, setting_text

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html.jinja")
RECIPE = Path("recipes/nano.yaml")  # the default, against which settings are marked
MOST_DRAWN = 16  # runs on one page, each with curves of its own: a figure takes 0.2 s and 30 KB
OUTCOMES = (
    *("run", "verdict", "outcome", "difference", "first apart at step", "largest gap"),
    *("train loss", "bits per byte", "choice accuracy", "tokens/s", "peak MiB", "skipped"),
)


def report(names: Sequence[str], everyone: bool) -> str:
    """The page for these names; for none of them, that of the workspace's run."""
    root = paths.root()
    if not names and not everyone:
        (run,) = choose([of_workspace(root)], [WORKSPACE])
        may_fork = run.lineage or run.params.get("checkpoint.keep_every")
        others = experiments(("train", "evaluate"), brief=True) if may_fork else ()
        return of_one(run, root, known=list(others))
    if len(set(names)) == 1 and not everyone:  # the others are known by name and parent alone
        known = list(experiments(brief=True))
        (run,) = choose(known, names)
        return of_one(whole(run), root, known=known)
    known = list(experiments())
    runs = choose(known, (all_of(known) or [WORKSPACE]) if everyone else names)
    return of_several(runs, known, root) if len(runs) > 1 else of_one(runs[0], root, known=known)


def of_one(
    run: Experiment, workspace: Path, at_work: str = "", known: Sequence[Experiment] = ()
) -> str:
    """The page of one run, whose files lie in `workspace` unless DVC keeps them."""
    run = titled(run)
    tree = forks.tree([run], known)
    pages = [RunPage(run, workspace, recipe(workspace), at_work, tree=tree)]
    return page(pages, {}, ladders=[] if at_work else forecasts())


def of_chain(chain: Iterable[Sequence[Event]]) -> str:
    """The page of the records that a stage has before it, its own one, still open, the last."""
    run = Experiment(WORKSPACE, "", {record[0]["stage"]: record for record in chain})
    return of_one(run, Path(), at_work=list(run.records)[-1])


def titled(run: Experiment, beside: str = "") -> Experiment:
    """The workspace's run under its row's name, any other as it is."""
    return run if run.rev or not run.records else replace(run, name=row_name(run.head) + beside)


def of_several(runs: Sequence[Experiment], known: Sequence[Experiment], workspace: Path) -> str:
    """The page of two runs or more; the noise of seeds is looked for among all that are `known`."""
    runs, known = ([titled(run, " (workspace)") for run in some] for some in (runs, known))
    usual, draw = recipe(workspace), len(runs) <= MOST_DRAWN
    pages: dict[str, RunPage] = {}
    for run in runs:
        try:
            pages[run.name] = RunPage(run, workspace, usual, draw=draw)
        except InputError as error:  # of another version of this project
            log.warning("%s: %s; left out", run.name, error)
    if not pages:
        raise InputError("of these runs none can be shown, as the warnings say")
    shown = [run for run in runs if run.name in pages]
    looks = dict(zip(pages, styles(len(pages)), strict=True))
    side = side_by_side(shown, pages, known, looks)
    show_once(pages.values())
    return page(list(pages.values()), looks, side, forecasts())


def forecasts() -> Sequence[Mapping[str, Any]]:
    """Every forecast that was registered here, right or wrong, with what came of it."""
    from pipeline.ladders import registered  # scipy, which a stage's page has no use for

    if not any((paths.root() / registered.FOLDER).glob("*.json")):
        return []
    from pipeline.ladders import ladder
    from pipeline.ladders import page as ladder_page

    return ladder_page.section(ladder.outcomes(ladder.trained()))


def page(
    runs: Sequence[RunPage],
    looks: dict[str, Style],
    side: dict[str, Any] | None = None,
    ladders: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The HTML; `side` where there are two runs or more. The same records give the same text."""
    jinja = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    jinja.filters["shown"] = lambda value: value if isinstance(value, str) else tables.cell(value)
    jinja.filters["compact"] = compact
    template = jinja.from_string(TEMPLATE.read_text("utf-8"))
    script = TEMPLATE.with_name("report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = template.render(
        runs=runs,
        looks=looks,
        side=side,
        ladders=ladders,
        columns=OUTCOMES,
        script=Markup(script),
        digest=digest,
    ).strip()
    return terminal.shown(html) + "\n"


def show_once(runs: Iterable[RunPage]) -> None:
    """Leave the studies that several runs share with the first of them alone."""
    owner: dict[str, str] = {}
    for run in runs:
        for n, study in enumerate(run.studies):
            first = owner.setdefault(f"{study.pages} {study.pictures}", run.name)
            if first != run.name:
                run.studies[n] = Study(study.title, f"The same as of {first}.", [], [])


def side_by_side(
    runs: Sequence[Experiment],
    pages: dict[str, RunPage],
    known: Sequence[Experiment],
    looks: dict[str, Style],
) -> dict[str, Any]:
    """What the page says of two runs or more together."""
    settings = differing(runs)
    by_name = {run.name: run for run in runs}
    trained = {name: training for name, run in by_name.items() if (training := run_of(run))}
    compared = pairs(list(trained.values()), runs_of(known)) if trained else []
    ranked = sorted(compared, key=lambda pair: pair.run.outcome())
    return {
        "base": compared[0].base.name if compared else "",
        "drawn": list(trained),
        "samples": {  # (run, its first text after training) by prompt
            prompt: [(n, p.samples[prompt][0][1]) for n, p in pages.items() if prompt in p.samples]
            for prompt in dict.fromkeys(prompt for p in pages.values() for prompt in p.samples)
        },
        "settings": list(settings),
        "rows": [  # (run, its value of each)
            [run.name, *(setting_text(values[n]) for values in settings.values())]
            for n, run in enumerate(runs)
        ],
        "judged_by": compared[0].base.judged_by() if compared else "",
        "outcomes": [outcome(p, by_name[p.run.name], pages[p.run.name].verdict) for p in ranked],
        "words": [(pair.run.name, pair.words()) for pair in ranked if pair.run is not pair.base],
        "noise": list(dict.fromkeys(pair.seeds.words() for pair in compared if pair.seeds)),
        "notes": list(cautions(runs, trained)),
        "tree": forks.tree(runs, known),
        "curves": charts([(by_name[name], looks[name]) for name in trained])
        + ([distances([(p, looks[p.run.name]) for p in compared])] if len(compared) > 1 else []),
    }


def differing(runs: Sequence[Experiment]) -> dict[str, list[Any]]:
    """The settings in which runs differ, with each one's value; None where it has none."""
    names = dict.fromkeys(name for run in runs for name in run.params)
    values = {name: [run.params.get(name) for run in runs] for name in names}
    return {name: v for name, v in values.items() if any(other != v[0] for other in v)}


def outcome(pair: Pair, experiment: Experiment, verdict: str) -> tuple[Any, ...]:
    """One row of OUTCOMES."""
    run = pair.run
    beside = (None, None, None) if run is pair.base else (pair.difference, pair.apart, pair.gap)
    return (
        *(run.name, verdict, run.outcome(), *beside, run.train_loss()),
        *(experiment.last("val/bits_per_byte"), experiment.last("val/choice_acc_norm")),
        *(run.tokens_per_second, run.peak_memory_mib, run.skipped),
    )


def cautions(runs: Sequence[Experiment], trained: dict[str, Run]) -> Iterator[str]:
    """What makes runs less comparable than their settings say."""
    left_out = [run.name for run in runs if run.name not in trained]
    if left_out:
        yield f"Without a finished training, and so not compared: {', '.join(left_out)}."
    for what, values in (
        ("versions of the code", {run.code for run in trained.values()}),
        ("sets of training tokens", {run.data for run in trained.values()}),
    ):
        if len(values) > 1:
            yield f"These runs come from {len(values)} {what}."
    if len(runs) > MOST_DRAWN:
        yield (
            f"Of more than {MOST_DRAWN} runs the curves are drawn together only; "
            "python -m pipeline report NAME draws those of one by themselves."
        )


def recipe(workspace: Path) -> dict[str, Any]:
    """The default recipe's settings; none in a checkout without it."""
    path = workspace / RECIPE
    return configuration.flatten(configuration.load(path)) if path.exists() else {}


def choose(known: Sequence[Experiment], names: Sequence[str]) -> list[Experiment]:
    """Those of these names, in this order; of several of one name the newest.

    Raises InputError that lists the unknown ones and those that there are.
    """
    by_name = {run.name: run for run in _by_age(known)}
    if unknown := [name for name in names if name not in by_name]:
        if not by_name:
            raise InputError("nothing trained yet: `dvc repro` or `make repro` trains")
        there = ", ".join(by_name)
        raise InputError(f"{', '.join(unknown)}: no run of that name; there are: {there}")
    return [by_name[name] for name in dict.fromkeys(names)]


def all_of(known: Sequence[Experiment]) -> list[str]:
    """Every name, that of the newest run with its commit's settings first, then the workspace's.

    An experiment that the workspace holds stands for it.
    """
    ids = {run.name: {record[0]["id"] for record in run.records.values()} for run in known}
    here = ids.pop(WORKSPACE, set())
    twins = [name for name, theirs in ids.items() if theirs == here]
    first = (twins[:1] or [WORKSPACE]) if here else []
    names = [*first, *(run.name for run in _by_age(known) if run.name in ids)]
    parents = [(run.name, run.head.get("parent") or {}) for run in _by_age(known)]
    usual = [name for name, parent in parents if parent.get("changed") == {} and name in names]
    return list(dict.fromkeys([*usual[-1:], *names]))


def _by_age(known: Sequence[Experiment]) -> list[Experiment]:
    return sorted((run for run in known if run.records), key=lambda run: run.head["time"])
