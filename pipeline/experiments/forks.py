"""Forks as experiments: planned from a kept state of a training, and the tree of all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline import paths
from pipeline.config import Config, flatten, load
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
    here = flatten(load(params))
    theirs = kept.settings
    config = _checked(changes, theirs)
    place = fork.export(kept, step)
    config = _checked([*changes, f"train.fork={place.as_posix()}"], theirs)
    if said := fork.problem(config, read_facts(paths.root() / place)):
        raise ConfigError(said)
    if said := "\n".join(sweep.machine_problems(config)):
        raise ConfigError(said)
    if kept.record[0]["code"] != provenance.code_digest():
        log.warning(
            "%s was trained by other code than there is now: its own continuation may differ",
            kept.name,
        )
    flat = flatten(config)
    name = sweep.new_name(sweep.dvc_name(name or f"{kept.name}-fork-{step}"), dvc_history.names())
    changed = {n: value for n, value in flat.items() if value != here[n]}
    return sweep.Member(name, changed, config, tuple(git.to_take_along(config)))


def _checked(changes: Iterable[str], theirs: dict[str, Any]) -> Config:
    params = paths.root() / paths.PARAMS
    try:
        return load(params, changes, theirs)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{params}: ", "")) from None


def run(member: sweep.Member) -> None:
    """Run a fork; raises InputError where it fails."""
    if code := sweep.run(member):
        raise InputError(f"{member.name}: failed (exit code {code}), see its output above")


def tree(shown: Sequence[Experiment], known: Iterable[Experiment]) -> list[str]:
    """The runs that the `shown` ones were forked from, and all their forks: a line each, indented.

    Nothing where none of them is a fork or has one. What is not known any more has its name alone.
    """
    names: dict[str, str] = {}  # by the id of the training's record
    lines: dict[str, str] = {}
    parents: dict[str, tuple[str, int]] = {}
    for run in [*shown, *known]:
        if "train" in run.records and (own := run.records["train"][0]["id"]) not in lines:
            chain = run.lineage
            names |= {one["record"]: names.get(one["record"], one["name"]) for one in chain}
            names[own], lines[own] = run.name, _line(run)
            ids = [*(one["record"] for one in chain), own]
            steps = (one["step"] for one in chain)
            parents |= dict(zip(ids[1:], zip(ids, steps, strict=False), strict=False))
    family = {id_ for id_ in names if id_ in parents or id_ in {p for p, _ in parents.values()}}
    roots = {_root(run.records["train"][0]["id"], parents) for run in shown if run.records}
    return [
        line for root in roots if root in family for line in _below(root, names, lines, parents)
    ]


def _root(id_: str, parents: Mapping[str, tuple[str, int]]) -> str:
    return _root(parents[id_][0], parents) if id_ in parents else id_


def _below(
    id_: str,
    names: Mapping[str, str],
    lines: Mapping[str, str],
    parents: Mapping[str, tuple[str, int]],
    depth: int = 0,
) -> Iterator[str]:
    at = f"@{parents[id_][1]:,} " if id_ in parents else ""
    yield f"{'    ' * depth}{at}{names[id_]}{lines.get(id_, '')}"
    children = [(step, child) for child, (parent, step) in parents.items() if parent == id_]
    for _, child in sorted(children):
        yield from _below(child, names, lines, parents, depth + 1)


def _line(run: Experiment) -> str:
    loss = run.last("val/loss") or run.last("train/val_loss")
    steps = run.params.get("train.steps")
    return f": {steps:,} steps" + ("" if loss is None else f", validation loss {loss:.3f}")
