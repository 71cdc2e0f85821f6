"""Records of every DVC experiment and of the workspace, read through DVC."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import paths, records
from pipeline.records import UPSTREAM, Event

log = logging.getLogger(__name__)

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Experiment:
    """The records of one experiment by stage, as far as they are there."""

    name: str
    rev: str  # of git; "" for the workspace
    records: dict[str, list[Event]]


def experiments(stages: tuple[str, ...] = tuple(UPSTREAM)) -> Iterator[Experiment]:
    """Every DVC experiment of this repository, on whatever commit, and then the workspace.

    Only the records of `stages` are read. A record that is in no cache any more is left out
    with a warning that names the experiment.
    """
    from dvc.repo import Repo

    root = paths.root()
    with Repo(str(root)) as repo:
        listed = repo.experiments.ls(all_commits=True)
    for name, rev in (one for found in listed.values() for one in found):
        yield Experiment(name, rev, dict(_of_revision(root, name, rev, stages)))
    kept = {stage: root / paths.record(stage) for stage in stages}
    here = {stage: records.read(path) for stage, path in kept.items() if path.exists()}
    yield Experiment(WORKSPACE, "", here)


def _of_revision(
    root: Path, name: str, rev: str, stages: tuple[str, ...]
) -> Iterator[tuple[str, list[Event]]]:
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(str(root), rev=rev)
    for stage in stages:
        path = paths.record(stage).as_posix()
        try:
            lines = files.read_text(path, encoding="utf-8").splitlines()
        except FileNotFoundError:
            log.warning("experiment %s: %s is in no cache any more; left out", name, path)
            continue
        yield stage, [json.loads(line) for line in lines]
