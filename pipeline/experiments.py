"""Records of every DVC experiment, of every commit and of the workspace, read through DVC."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths, records
from pipeline.records import UPSTREAM, Event

if TYPE_CHECKING:
    from dvc.repo import Repo

log = logging.getLogger(__name__)

WORKSPACE = "workspace"
LOCK = "dvc.lock"


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
    with a warning that names the experiment. Without git the workspace is all there is.
    """
    with _repository() as repo:
        if repo:
            reader = _Reader(repo)
            listed = repo.experiments.ls(all_commits=True)
            for name, rev in (one for found in listed.values() for one in found):
                found, gone = reader.read(rev, stages)
                for path in gone:
                    log.warning("experiment %s: %s is in no cache any more; left out", name, path)
                yield Experiment(name, rev, found)
    root = paths.root()
    kept = {stage: root / paths.record(stage) for stage in stages}
    here = {stage: records.read(path) for stage, path in kept.items() if path.exists()}
    yield Experiment(WORKSPACE, "", here)


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
            found, missing = reader.read(rev, tuple(UPSTREAM))
            gone |= {(path, reader.locked(rev)[path]) for path in missing}
            if found:
                yield Experiment(rev[:7], rev, found)
    if gone:
        log.warning("%d records of earlier commits are in no cache any more; left out", len(gone))


def copy_of(found: Experiment, path: str, folder: Path) -> Path | None:
    """A copy, in `folder`, of a file or folder as the experiment left it, out of DVC's cache.

    None where the cache has it no more.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    copy = Path(tempfile.mkdtemp(dir=folder)) / Path(path).name
    try:
        files = DVCFileSystem(str(paths.root()), rev=found.rev or None)
        files.get(path, str(copy), recursive=True)
    except (OSError, DvcException):
        return None
    return copy if copy.exists() else None


@contextlib.contextmanager
def _repository() -> Iterator[Repo | None]:
    """This repository in DVC's hands; None where there is no git, hence no experiment."""
    from dvc.repo import Repo
    from dvc.scm import NoSCM, SCMError

    try:
        repo = Repo(str(paths.root()))
    except SCMError:
        yield None
        return
    with repo:
        yield None if isinstance(repo.scm, NoSCM) else repo


class _Reader:
    """Records of revisions. Revisions share most of them; each is read once."""

    def __init__(self, repo: Repo):
        self._repo = repo
        self._records: dict[str, list[Event] | None] = {}  # by DVC's md5; None: in no cache
        self._locks: dict[str, dict[str, str]] = {}
        above = os.path.relpath(repo.root_dir, repo.scm.root_dir)
        self._lock = (Path(above) / LOCK).as_posix()

    def read(self, rev: str, stages: tuple[str, ...]) -> tuple[dict[str, list[Event]], list[str]]:
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
        from dvc.api import DVCFileSystem

        if md5 not in self._records:
            try:
                files = DVCFileSystem(str(paths.root()), rev=rev)
                lines = files.read_text(path, encoding="utf-8").split("\n")
                self._records[md5] = [json.loads(line) for line in lines if line]
            except FileNotFoundError:
                self._records[md5] = None
        return self._records[md5]
