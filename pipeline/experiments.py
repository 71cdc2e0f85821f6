"""Records of every DVC experiment, of every commit and of the workspace, read through DVC."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import git, paths, records, stage_graph
from pipeline.errors import InputError
from pipeline.records import Event

if TYPE_CHECKING:
    from dvc.repo import Repo

log = logging.getLogger(__name__)

WORKSPACE = "workspace"
LOCK = "dvc.lock"
LOOKS = 5
NO_GIT = (
    "{}: no git repository here, as in an unpacked ZIP, or core.no_scm is set; DVC keeps "
    "experiments in git: clone the project instead, or say `git init && git add --all && "
    "git commit -m start`"
)


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
        order = [stage for stage in stage_graph.stages() if stage in self.records]
        return (e for stage in order for e in self.records[stage] if e["kind"] == kind)


def experiments(stages: Iterable[str] | None = None) -> Iterator[Experiment]:
    """Every DVC experiment of this repository, on whatever commit, and then the workspace.

    Only the records of `stages` are read, by default all. A record that is in no cache any more
    is left out with a warning that names the experiment. Without git the workspace is all there is.
    Raises InputError where git refuses the folder, since another user owns it.
    """
    with _repository() as repo:
        if repo:
            reader = _Reader(repo)
            listed = repo.experiments.ls(all_commits=True)
            for name, rev in (one for found in listed.values() for one in found):
                found, gone = reader.read(rev, stages or stage_graph.stages())
                for path in gone:
                    log.warning("experiment %s: %s is in no cache any more; left out", name, path)
                yield Experiment(name, rev, _of_one_chain(name, found))
    yield of_workspace(paths.root(), stages)


def of_workspace(root: Path, stages: Iterable[str] | None = None) -> Experiment:
    """What the records under `root` say; of the stage that failed or is at work, as far as it came.

    An unfinished record counts only where it is the newest: an older one is of another run.
    """
    kept = {stage: root / paths.record(stage) for stage in stages or stage_graph.stages()}
    here = {stage: records.read(path) for stage, path in kept.items() if path.exists()}
    newest = max((record[0]["time"] for record in here.values()), default=0)
    for stage, path in kept.items():
        part = path.with_suffix(".jsonl.part")
        if stage not in here and part.exists():
            events = _events(part.read_text("utf-8"))
            began = (e["time"] for e in events if e["kind"] in ("start", "resume"))
            if max(began, default=-1) >= newest:
                here[stage] = events
    return Experiment(WORKSPACE, "", _of_one_chain(WORKSPACE, here))


def _of_one_chain(name: str, found: dict[str, list[Event]]) -> dict[str, list[Event]]:
    """Without what a former run has left.

    `dvc repro train`, or a training that fails, leaves the evaluation of the model before.
    """
    kept = {
        stage: record
        for stage, record in found.items()
        if all(_builds_on(record, found[u]) for u in stage_graph.upstream(stage) if u in found)
    }
    for stage in found.keys() - kept.keys():
        log.warning("%s: %s is of a former run; left out", name, paths.record(stage).as_posix())
    return kept


def _builds_on(record: list[Event], upstream: list[Event]) -> bool:
    """Whether `upstream` came to its end, with the settings that `record` knows it by."""
    head, here = upstream[0], record[0]["params"]
    read = stage_graph.settings_of(head["stage"], head["params"])
    finished = upstream[-1].get("status") == "FINISHED"
    return finished and all(here.get(name) == value for name, value in read.items())


@dataclass(frozen=True)
class Task:
    """An entry of DVC's queue."""

    name: str
    rev: str  # of git's stash: no two tasks share it, as they may a name
    state: str  # queued | running | failed | success


def names() -> set[str]:
    """Of every experiment and of every task of the queue; raises InputError without git."""
    with _repository() as repo:
        if not repo:
            raise InputError(NO_GIT.format(paths.root()))
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

    def now() -> Any:
        with _opened() as repo:
            return look(repo.experiments.celery_queue)

    logging.getLogger("kombu.connection").setLevel(logging.ERROR)  # files need no host
    for _ in range(LOOKS - 1):
        try:
            return now()
        except Exception:  # of DVC, celery, kombu, json and the system
            time.sleep(1)
    return now()


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

    return DVCFileSystem(str(root), rev=rev or None)


def commits() -> Iterator[Experiment]:
    """The records in every commit of every branch and tag, named after the commit.

    Those that are in no cache any more are left out, with one warning for all of them.
    """
    gone: set[tuple[str, str]] = set()
    with _repository() as repo:
        if not repo:
            return
        reader = _Reader(repo)
        for rev in repo.scm.list_all_commits():
            found, missing = reader.read(rev, stage_graph.stages())
            gone |= {(path, reader.locked(rev)[path]) for path in missing}
            if found:
                yield Experiment(rev[:7], rev, found)
    if gone:
        log.warning("%d records of earlier commits are in no cache here; left out", len(gone))


def copy_of(found: Experiment, path: str, folder: Path) -> Path | None:
    """A copy, in `folder`, of a file or folder as the experiment left it, out of DVC's cache.

    None where the cache has it no more.
    """
    from dvc.exceptions import DvcException

    copy = Path(tempfile.mkdtemp(dir=folder)) / Path(path).name
    try:
        _files(paths.root(), found.rev).get(path, str(copy), recursive=True)
    except (OSError, DvcException):
        return None
    return copy if copy.exists() else None


@contextlib.contextmanager
def _repository() -> Iterator[Repo | None]:
    """This repository in DVC's hands; None where there is no git, hence no experiment."""
    from dvc.scm import NoSCM, SCMError

    try:
        repo = _opened()
    except SCMError:
        yield None
        return
    with repo:
        yield None if isinstance(repo.scm, NoSCM) else repo


def _opened() -> Repo:
    """This repository in DVC's hands, for `with`. Raises SCMError where there is no git.

    That is asked first: DVC asks when it has opened its databases, and leaves them open then.
    Raises InputError where git, and so DVC, refuses the folder of another owner.
    """
    from dvc.repo import Repo
    from dvc.scm import SCM

    if problem := git.refused():
        raise InputError(problem)
    SCM(str(paths.root())).close()
    return Repo(str(paths.root()))


class _Reader:
    """Records of revisions. Revisions share most of them; each is read once."""

    def __init__(self, repo: Repo):
        self._repo = repo
        self._records: dict[str, list[Event] | None] = {}  # by DVC's md5; None: in no cache
        self._locks: dict[str, dict[str, str]] = {}
        above = os.path.relpath(repo.root_dir, repo.scm.root_dir)
        self._lock = (Path(above) / LOCK).as_posix()

    def read(self, rev: str, stages: Iterable[str]) -> tuple[dict[str, list[Event]], list[str]]:
        """A revision's records by stage, and the paths of those that are in no cache."""
        found, gone = {}, []
        locked = self.locked(rev)
        for stage in stages:
            path = paths.record(stage).as_posix()
            if path not in locked:  # this stage had not run there
                continue
            if record := self._record(rev, path, locked[path]):
                found[stage] = record
            else:
                gone.append(path)
        return found, gone

    def locked(self, rev: str) -> dict[str, str]:
        """DVC's md5 by path of what the dvc.lock of a revision lists."""
        if rev not in self._locks:
            self._locks[rev] = self._read_lock(rev)
        return self._locks[rev]

    def _read_lock(self, rev: str) -> dict[str, str]:
        from dvc.utils.serialize import YAMLFileCorruptedError, parse_yaml

        try:
            with self._repo.scm.get_fs(rev).open(self._lock, "r", encoding="utf-8") as file:
                lock = parse_yaml(file.read(), self._lock)
            outs = [out for stage in lock["stages"].values() for out in stage.get("outs", [])]
            return {out["path"]: out["md5"] for out in outs if "md5" in out}
        except (FileNotFoundError, YAMLFileCorruptedError, KeyError, TypeError, AttributeError):
            return {}  # a commit without a dvc.lock, or one with a broken one

    def _record(self, rev: str, path: str, md5: str) -> list[Event] | None:
        if md5 not in self._records:
            try:
                text = _files(paths.root(), rev).read_text(path, encoding="utf-8")
                self._records[md5] = _events(text)
            except FileNotFoundError:
                self._records[md5] = None
        return self._records[md5]
