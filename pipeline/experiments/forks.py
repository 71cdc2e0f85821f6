"""Forks as experiments: planned from a kept state of a training, and the tree of all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

from pipeline import paths
from pipeline.config import flatten, load
from pipeline.errors import ConfigError, InputError
from pipeline.experiments import sweep
from pipeline.records import dvc_history, git, provenance
from pipeline.records.run_data import Experiment
from pipeline.resume import fork
from pipeline.resume.snapshot import read_facts

log = logging.getLogger(__name__)


def parse(text: str) -> tuple[str, int]:
    """("lr-0.002", 100) of "lr-0.002@100"; raises InputError."""
    name, at, step = text.rpartition("@")
    if not at or not name or not (step.isascii() and step.isdigit()):
        raise InputError(f"{text}: expected RUN@STEP, as lr-0.002@100")
    return name, int(step)


def plan(kept: fork.Kept, step: int, name: str = "", changes: Sequence[str] = ()) -> sweep.Member:
    """A fork as an experiment that can be run, its state written below `data/forks`.

    Its settings are its parent's with the `changes`, each as "train.lr=0.001". Raises ConfigError
    naming every problem, InputError for a state that is not there.
    """
    params = paths.root() / paths.PARAMS
    place = fork.export(kept, step)
    config = load(params, [*changes, f"train.fork={place.as_posix()}"], kept.settings)
    problems = [fork.problem(config, read_facts(paths.root() / place))]
    if said := "\n".join(filter(None, problems + sweep.machine_problems(config))):
        raise ConfigError(said)
    if kept.record[0]["code"] != provenance.code_digest():
        log.warning(
            "%s was trained by other code than there is now: its own continuation may differ",
            kept.name,
        )
    here, flat = flatten(load(params)), flatten(config)
    name = sweep.new_name(sweep.dvc_name(name or f"{kept.name}-fork-{step}"), dvc_history.names())
    changed = {n: value for n, value in flat.items() if value != here[n]}
    return sweep.Member(name, changed, config, tuple(git.to_take_along(config)))


def run(member: sweep.Member) -> None:
    """Run a fork; raises InputError where it fails."""
    if code := sweep.run(member):
        raise InputError(f"{member.name}: failed (exit code {code}), see its output above")


def tree(shown: Sequence[Experiment], known: Iterable[Experiment]) -> list[str]:
    """The runs that the `shown` ones were forked from, and all their forks: a line each, indented.

    Nothing where none of them is a fork or has one. What is not known any more has its name alone.
    """
    words: dict[str, str] = {}  # by the id of the training's record
    parents: dict[str, tuple[str, int]] = {}  # the id, and the step
    for run in [*shown, *known]:
        if "train" in run.records:
            ids = [*(one["record"] for one in run.lineage), run.records["train"][0]["id"]]
            for parent, child in zip(run.lineage, ids[1:], strict=True):
                parents[child] = parent["record"], parent["step"]
                words.setdefault(parent["record"], parent["name"])
            if ":" not in words.get(ids[-1], ""):
                words[ids[-1]] = f"{run.name}: {_said(run)}"

    def root(id_: str) -> str:
        return root(parents[id_][0]) if id_ in parents else id_

    def below(id_: str, depth: int) -> Iterator[str]:
        at = f"@{parents[id_][1]:,} " if id_ in parents else ""
        yield f"{'    ' * depth}{at}{words[id_]}"
        for child in sorted(
            (c for c, (p, _) in parents.items() if p == id_), key=lambda c: parents[c][1]
        ):
            yield from below(child, depth + 1)

    try:
        trained = (run.records["train"][0]["id"] for run in shown if "train" in run.records)
        trees = [list(below(one, 0)) for one in dict.fromkeys(map(root, trained))]
    except RecursionError:  # records that were made up may go in a circle
        return []
    return [line for lines in trees if len(lines) > 1 for line in lines]


def _said(run: Experiment) -> str:
    loss = run.last("train/val_loss")  # which one has that was not evaluated, too
    steps = f"{run.params.get('train.steps'):,} steps"
    return steps if loss is None else f"{steps}, validation loss while training {loss:.3f}"
