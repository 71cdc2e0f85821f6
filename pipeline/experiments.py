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
        for event in self.events("metrics"):
            for key, value in event["values"].items():
                found.setdefault(key, []).append((event["step"], value))
        return found

    @functools.cached_property
    def tags(self) -> dict[str, str]:
        """Every tag; of one written twice, the last value."""
        return {key: v for event in self.events("tags") for key, v in event["values"].items()}

    def values(self, key: str) -> list[float]:
        """The values of a metric, in the order of writing; none where there is no such metric."""
        return [value for _, value in self.curves.get(key, [])]

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return next(reversed(self.values(key)), None)

    def events(self, kind: str) -> Iterator[Event]:
        """Of one kind, in the order of the chain."""
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
        found = dict(_of_revision(root, name, rev, stages))
        yield Experiment(name, rev, _of_one_chain(name, found))
    yield of_workspace(root, stages)


def of_workspace(root: Path, stages: tuple[str, ...] = tuple(UPSTREAM)) -> Experiment:
    """What the records under `root` say; of the stage that failed or is at work, as far as it came.

    An unfinished record counts only where it is the newest: an older one is of another run.
    """
    kept = {stage: root / paths.record(stage) for stage in stages}
    here = {stage: records.read(path) for stage, path in kept.items() if path.exists()}
    newest = max((record[0]["time"] for record in here.values()), default=0)
    for stage, path in kept.items():
        part = path.with_suffix(".jsonl.part")
        if stage not in here and part.exists():
            events = _events(part.read_text("utf-8"))
            if events and events[0]["time"] >= newest:
                here[stage] = events
    return Experiment(WORKSPACE, "", _of_one_chain(WORKSPACE, here))


# The settings that the stages read on whose records others build; a test holds them to dvc.yaml.
READS = {
    "tokenize": ("corpus",),
    "import_hf_weights": ("init", "model"),
    "train": ("precision", "debug", "device", "model", "train"),
    "evaluate": ("device", "model", "train.sequence_length", "evaluate"),
    "numerics": (
        *("device", "model.n_embd", "model.n_head", "model.vocab_rows"),
        *("train.batch_size", "train.sequence_length"),
    ),
}


def _of_one_chain(name: str, found: dict[str, list[Event]]) -> dict[str, list[Event]]:
    """Without what a former run has left.

    `dvc repro train`, or a training that fails, leaves the evaluation of the model before.
    """
    kept = {
        stage: record
        for stage, record in found.items()
        if all(_builds_on(record, found[u]) for u in UPSTREAM[stage] if u in found)
    }
    for stage in found.keys() - kept.keys():
        log.warning("%s: %s is of a former run; left out", name, paths.record(stage).as_posix())
    return kept


def _builds_on(record: list[Event], upstream: list[Event]) -> bool:
    """Whether `upstream` came to its end, with the settings that `record` knows it by."""
    head, here = upstream[0], record[0]["params"]
    read = (
        name
        for name in head["params"]
        if any(name == r or name.startswith(f"{r}.") for r in READS[head["stage"]])
    )
    finished = upstream[-1].get("status") == "FINISHED"
    return finished and all(here.get(name) == head["params"][name] for name in read)


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
    files = _files(root, rev)
    for stage in stages:
        path = paths.record(stage).as_posix()
        try:
            text = files.read_text(path, encoding="utf-8")
        except FileNotFoundError:
            log.warning("experiment %s: %s is in no cache any more; left out", name, path)
            continue
        yield stage, _events(text)


def _events(text: str) -> list[Event]:
    """Of a record's whole lines; the last one may be cut short. `splitlines` would part texts."""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def read_file(found: Experiment, path: Path, workspace: Path) -> bytes | None:
    """A small file that a stage of this experiment wrote; None where nobody keeps it any more.

    Of the workspace it is the file that lies there now, whatever wrote it.
    """
    try:
        if found.rev:
            return _files(paths.root(), found.rev).read_bytes(path.as_posix())
        return (workspace / path).read_bytes()
    except FileNotFoundError:
        return None


@functools.cache
def _files(root: Path, rev: str) -> Any:
    from dvc.api import DVCFileSystem

    return DVCFileSystem(str(root), rev=rev)
