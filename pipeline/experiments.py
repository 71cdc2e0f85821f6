"""Records of every DVC experiment and of the workspace, read through DVC."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import paths, records
from pipeline.records import UPSTREAM, Event

log = logging.getLogger(__name__)

WORKSPACE = "workspace"
LOOKS = 5


@dataclass(frozen=True)
class Experiment:
    """The records of one experiment by stage, as far as they are there, and what they say."""

    name: str
    rev: str  # of git; "" for the workspace
    records: dict[str, list[Event]]

    @property
    def head(self) -> Event:
        """The start event of the stage that started last: the settings in force are its."""
        return max((record[0] for record in self.records.values()), key=lambda e: e["time"])

    @property
    def params(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return self.head["params"]

    @functools.cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) by metric, in the order of writing."""
        found: dict[str, list[tuple[int, float]]] = {}
        for event in self._events("metrics"):
            for key, value in event["values"].items():
                found.setdefault(key, []).append((event["step"], value))
        return found

    @functools.cached_property
    def tags(self) -> dict[str, str]:
        """Every tag; of one written twice, the last value."""
        return {key: v for event in self._events("tags") for key, v in event["values"].items()}

    def values(self, key: str) -> list[float]:
        """The values of a metric, in the order of writing; none where there is no such metric."""
        return [value for _, value in self.curves.get(key, [])]

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return next(reversed(self.values(key)), None)

    def _events(self, kind: str) -> Iterator[Event]:
        order = [stage for stage in UPSTREAM if stage in self.records]
        return (e for stage in order for e in self.records[stage] if e["kind"] == kind)


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


@dataclass(frozen=True)
class Task:
    """An entry of DVC's queue."""

    name: str
    rev: str  # of git's stash: no two tasks share it, as they may a name
    state: str  # queued | running | failed | success


def names() -> set[str]:
    """Of every experiment and of every task of the queue."""
    from dvc.repo import Repo

    with Repo(str(paths.root())) as repo:
        listed = repo.experiments.ls(all_commits=True)
    found = {name for on_commit in listed.values() for name, _ in on_commit}
    return found | {task.name for task in queue()}


def queue() -> list[Task]:
    """DVC's queue, with what has ended in it."""
    listed = _of_queue(lambda tasks: tasks.status())
    return [Task(task["name"] or "", task["rev"], task["status"].lower()) for task in listed]


def workers() -> int:
    """How many workers of the queue answer; takes a second."""
    return len(_of_queue(lambda tasks: tasks.worker_status()))


def _of_queue(look: Callable[[Any], Any]) -> Any:
    """A look at DVC's queue: files that workers move away under a reader's eyes, so look again.

    Raises what the last of several looks raised.
    """
    from dvc.repo import Repo

    def now() -> Any:
        with Repo(str(paths.root())) as repo:
            return look(repo.experiments.celery_queue)

    logging.getLogger("kombu.connection").setLevel(logging.ERROR)  # files need no host
    for _ in range(LOOKS - 1):
        try:
            return now()
        except Exception:  # of DVC, celery, kombu, json and the system
            time.sleep(1)
    return now()


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
