"""Records of every DVC experiment, of every commit and of the workspace, read through DVC."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline import paths, regular
from pipeline.errors import InputError, StorageError
from pipeline.records import git, record_reader, stage_graph
from pipeline.records.run_data import Experiment, Log, Unread
from pipeline.storage.digests import dvc_md5

if TYPE_CHECKING:
    from dvc.repo import Repo

log = logging.getLogger(__name__)

WORKSPACE = "workspace"
LARGEST = 64 << 20  # bytes of a file that is shown
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
NO_GIT = (
    "{}: no git repository here, as in an unpacked ZIP, or core.no_scm is set; DVC keeps "
    "experiments in git: clone the project instead, or say `git init && git add --all && "
    "git commit -m start`"
)


def experiments(stages: Iterable[str] | None = None, brief: bool = False) -> Iterator[Experiment]:
    """Every DVC experiment of this repository, on whatever commit, and then the workspace.

    Only the records of `stages`, by default all, are read, and each experiment's when they are
    first looked at; with `brief`, the `ends` of long ones. A record that is in no cache any more,
    or is not to be read, is left out with a warning that names experiment, file and reason.
    Without git the workspace is all there is.
    Raises InputError where git refuses the folder, since another user owns it.
    """
    with _repository() as repo:
        found = _listed(repo) if repo else []
        kept = Kept(repo, [rev for _, rev in found], brief) if repo else None
    if kept:
        for name, rev in found:
            unreadable: list[str] = []
            read = functools.partial(_of_experiment, kept, name, rev, stages, unreadable)
            place = functools.partial(kept.place, rev)
            yield Experiment(name, rev, Unread(read), unreadable, place)
    yield of_workspace(paths.root(), stages, brief)


def _of_experiment(
    kept: Kept, name: str, rev: str, stages: Iterable[str] | None, unreadable: list[str]
) -> dict[str, Log]:
    found, gone = kept.records(rev, stages or stage_graph.stages(), unreadable)
    for path in gone:
        log.warning("experiment %s: %s is in no cache any more; left out", name, path)
    for problem in unreadable:
        log.warning("experiment %s: %s; left out", name, problem)
    return _of_one_chain(name, found, lambda: kept.fitting(rev))


def of_workspace(
    root: Path, stages: Iterable[str] | None = None, brief: bool = False
) -> Experiment:
    """What the records under `root` say; of the stage that failed or is at work, as far as it came.

    An unfinished record counts only where it is the newest: an older one is of another run. One
    that is not to be read is left out with a warning.
    """
    here, unreadable = {}, []
    reader = record_reader.ends if brief else record_reader.read

    def read(stage: str, path: Path, whole: bool) -> Log | None:
        try:
            return reader(path, stage, whole) if path.exists() else None
        except (InputError, OSError) as error:
            unreadable.append(f"{path}: {error}")
            log.warning("%s; left out", unreadable[-1])
            return None

    kept = {stage: root / paths.record(stage) for stage in stages or stage_graph.stages()}
    for stage, path in kept.items():
        if finished := read(stage, path, True):
            here[stage] = finished
    newest = max((record[0]["time"] for record in here.values()), default=0)
    for stage, path in kept.items():
        if stage in here or not (part := read(stage, path.with_suffix(".jsonl.part"), False)):
            continue
        if max(event["time"] for event in part.of_kind("start", "resume")) >= newest:
            here[stage] = part
    chain = _of_one_chain(WORKSPACE, here, lambda: fitting(root))
    return Experiment(WORKSPACE, "", chain, unreadable)


def fitting(root: Path) -> set[str]:
    """The stages of the workspace whose records are those that its dvc.lock vouches for.

    `stage_graph.fitting` says what a lock vouches for.
    """
    try:
        text = (root / "dvc.lock").read_bytes()
    except OSError:
        return set()
    locked = stage_graph.locked(text)

    @functools.cache
    def own(stage: str) -> bool:
        path = paths.record(stage)
        file = root / path
        return file.is_file() and dvc_md5(file) == locked.get(path.as_posix())

    found = stage_graph.fitting(text)
    return {one for one in found if all(map(own, (*stage_graph.upstream(one), one)))}


def _of_one_chain(
    name: str, found: dict[str, Log], fitting: Callable[[], set[str]]
) -> dict[str, Log]:
    """Without what a former run has left.

    `dvc repro train`, or a training that fails, leaves the evaluation of the model before.
    `fitting` gives the stages that DVC vouches for; it is asked where the settings differ.
    """

    def of_this(stage: str, vouched: bool = False) -> bool:
        above = (found[one] for one in stage_graph.upstream(stage) if one in found)
        return all(_builds_on(found[stage], one, vouched) for one in above)

    former = {stage for stage in found if not of_this(stage)}
    former -= {stage for stage in former and fitting() if stage in found and of_this(stage, True)}
    kept = {stage: record for stage, record in found.items() if stage not in former}
    for stage in former:
        log.warning("%s: %s is of a former run; left out", name, paths.record(stage).as_posix())
    return kept


def _builds_on(record: Log, upstream: Log, vouched: bool) -> bool:
    """Whether `upstream` came to its end, with the settings that `record` knows it by.

    Where DVC vouches for its outputs, with those of them that the stage of `record` reads itself.
    A fork of unchanged settings has its parent's model, and DVC gives it that one's evaluation.
    """
    head, here = upstream[0], record[0]["params"]
    read = stage_graph.settings_of(head["stage"], head["params"])
    own = stage_graph.stages()[record[0]["stage"]]
    deciding = (
        name
        for name in read
        if name != "train.fork"
        and not name.startswith("checkpoint.")
        and (own.reads(name) or not vouched)
    )
    finished = upstream[-1].get("status") == "FINISHED"
    return finished and all(here.get(name) == read[name] for name in deciding)


def names() -> set[str]:
    """Names of every experiment; raises InputError without git."""
    with _repository() as repo:
        if not repo:
            raise InputError(NO_GIT.format(paths.root()))
        return {name for name, _ in _listed(repo)}


def _listed(repo: Repo) -> list[tuple[str, str]]:
    """Name and revision of every experiment."""
    by_commit = repo.experiments.ls(all_commits=True)
    return [one for on_commit in by_commit.values() for one in on_commit]


def read_file(found: Experiment, path: Path, workspace: Path) -> bytes | None:
    """A small file that a stage of this experiment wrote; None where nobody keeps it any more.

    Of the workspace it is the file that lies there now, whatever wrote it. Raises InputError for
    one of more than LARGEST bytes.
    """
    try:
        file = found.place(path.as_posix()) if found.rev else workspace / path
        return regular.read(file, LARGEST) if file else None
    except FileNotFoundError:
        return None


def commits(brief: bool = False) -> Iterator[Experiment]:
    """The records in every commit of every branch and tag, named after the commit.

    With `brief`, the `ends` of long ones. Those that are in no cache any more are left out, with
    one line for all of them; so are those that are not to be read.
    """
    with _repository() as repo:
        if not repo:
            return
        revs = repo.scm.list_all_commits()
        kept = Kept(repo, revs, brief)
    gone: set[tuple[str, str]] = set()
    for rev in revs:
        unreadable: list[str] = []
        found, missing = kept.records(rev, stage_graph.stages(), unreadable)
        gone |= {(path, kept.locked[rev][path]) for path in missing}
        if found or unreadable:
            yield Experiment(rev[:7], rev, found, unreadable)
    if gone:
        log.info("%d records of earlier commits were made elsewhere or cleared: no rows", len(gone))


def whole(found: Experiment) -> Experiment:
    """The same, read `brief`, with every point of its records.

    One in which such a point is damaged is left out with a warning.
    """
    read, records, unreadable = reader([found]), {}, []
    for stage in found.records:
        try:
            records[stage] = read(found, stage)
        except InputError as error:
            unreadable.append(str(error))
            log.warning("%s: %s; left out", found.name, error)
    return replace(found, records=records, unreadable=unreadable)


def reader(found: Iterable[Experiment]) -> Callable[[Experiment, str], Log]:
    """A function that reads a stage's record of one of them, known by its ends, with every point.

    It keeps nothing. It raises InputError where the record is damaged, or in no cache any more.
    """
    with _repository() as repo:
        kept = Kept(repo, [one.rev for one in found if one.rev]) if repo else None

    def read(one: Experiment, stage: str) -> Log:
        if not kept or not one.rev:
            return _again(one, stage)
        path = paths.record(stage).as_posix()
        record = kept.read(one.rev, path, stage)
        if isinstance(record, Log):
            return record
        raise InputError(record or f"{path}: in no cache any more")

    return read


def _again(workspace: Experiment, stage: str) -> Log:
    ended = workspace.records[stage][-1]["kind"] == "end"
    path = paths.root() / paths.record(stage)
    part = path.with_suffix(".jsonl.part")  # of a stage at work, which may have ended meanwhile
    file = next(filter(Path.exists, (path, part) if ended else (part, path)), path)
    try:
        return record_reader.read(file, stage, whole=ended)
    except (InputError, OSError) as error:
        raise InputError(f"{path}: {error}") from error


def copy_of(rev: str, path: str, folder: str | Path) -> Path | None:
    """A copy, in `folder`, of a file or folder as a revision left it, or the workspace's dvc.lock.

    None where neither DVC's cache nor a remote has it.
    """
    from dvc.exceptions import DvcException

    copy = Path(tempfile.mkdtemp(dir=folder)) / Path(path).name
    try:
        _files(paths.root(), rev).get(path, str(copy), recursive=True)
    except (OSError, DvcException, RecursionError) as error:  # the last: a list leads out of itself
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise StorageError(f"{folder}: no room for a copy of {path}") from error
        return None
    return copy if copy.exists() else None


@functools.lru_cache(4)
def _files(root: Path, rev: str) -> Any:
    from dvc.api import DVCFileSystem

    return DVCFileSystem(str(root), rev=rev or None)


def cache_folder() -> Path:
    """Where DVC keeps files by their MD5: in this repository, or where `dvc cache dir` says."""
    from dvc.config import Config

    own = paths.root() / ".dvc"
    return Path(Config(str(own))["cache"].get("dir", own / "cache")) / "files" / "md5"


@contextlib.contextmanager
def _repository() -> Iterator[Repo | None]:
    """This repository in DVC's hands; None where there is no git, hence no experiment.

    Raises InputError where git, and so DVC, refuses the folder of another owner.
    """
    from dvc.repo import Repo
    from dvc.scm import SCM, NoSCM, SCMError

    if problem := git.refused():
        raise InputError(problem)
    try:
        # First: DVC itself asks when it has opened its databases, and leaves them open then.
        SCM(str(paths.root())).close()
        repo = Repo(str(paths.root()))
    except SCMError:
        yield None
        return
    with repo:
        yield None if isinstance(repo.scm, NoSCM) else repo


class Kept:
    """What DVC's cache keeps of the outputs of revisions, found by their dvc.lock.

    DVC's own reader takes a third of a second for each revision, as it reads dvc.yaml, dvc.lock
    and params.yaml in pure Python. It is asked where a remote may have what the cache has not.
    """

    def __init__(self, repo: Repo, revs: Sequence[str], brief: bool = False):
        self._reader = record_reader.ends if brief else record_reader.read
        self._in_cache = repo.cache.local.oid_to_path
        self._has_remotes = bool(repo.config.get("remote"))
        texts = git.contents("dvc.lock", revs)
        self._locks = {rev: texts.get(rev, b"") for rev in revs}
        # DVC's MD5 by path of what each revision's dvc.lock lists.
        self.locked = {rev: stage_graph.locked(text) for rev, text in self._locks.items()}
        # Revisions share most of their records: by stage and MD5, or what is wrong with one.
        self._records: dict[tuple[str, str], Log | str | None] = {}

    def fitting(self, rev: str) -> set[str]:
        """The stages of a revision that fit together, by its dvc.lock."""
        return stage_graph.fitting(self._locks[rev])

    def records(
        self, rev: str, stages: Iterable[str], unreadable: list[str]
    ) -> tuple[dict[str, Log], list[str]]:
        """A revision's records by stage, and the paths of those that are in no cache.

        To `unreadable` goes a phrase for each that is there and is not to be read.
        """
        found, gone = {}, []
        for stage in stages:
            path = paths.record(stage).as_posix()
            if path not in self.locked[rev]:  # this stage had not run there
                continue
            key = stage, self.locked[rev][path]
            if key not in self._records:
                self._records[key] = self.read(rev, path, stage)
            record = self._records[key]
            if record is None:
                gone.append(path)
            elif isinstance(record, str):
                unreadable.append(record)
            else:
                found[stage] = record
        return found, gone

    def read(self, rev: str, path: str, stage: str) -> Log | str | None:
        """A record, or what is wrong with it; None where it is in no cache."""
        try:
            file = self.place(rev, path)
            return self._reader(file, stage) if file else None
        except (InputError, OSError) as error:
            return f"{path}: {error}"

    def place(self, rev: str, path: str) -> Path | None:
        """Where a file of a revision's outputs lies; None where it is in no cache any more."""
        locked, file = self.locked[rev], PurePosixPath(path)
        out = next((p for p in (file, *file.parents) if p.as_posix() in locked), None)
        if out is None:
            return None
        md5 = locked[out.as_posix()]
        if md5.endswith(".dir"):
            md5 = self._listing(md5).get(file.relative_to(out).as_posix(), "")
        if (cached := self._cached(md5)) or not self._has_remotes:
            return cached
        return copy_of(rev, path, self._from_remotes.name)

    @functools.cached_property
    def _from_remotes(self) -> tempfile.TemporaryDirectory[str]:
        """For what came from a remote; gone with this process."""
        return tempfile.TemporaryDirectory()

    def _listing(self, md5: str) -> dict[str, str]:
        """MD5 by name of the files in a folder, as far as the cache has a list that can be read."""
        if not (file := self._cached(md5)):
            return {}
        try:
            return {one["relpath"]: one["md5"] for one in json.loads(regular.read(file, LARGEST))}
        except (ValueError, TypeError, KeyError, RecursionError):  # InputError, too
            return {}

    def _cached(self, md5: str) -> Path | None:
        """A file of the cache; the name comes out of a file that anybody may have written."""
        path = Path(self._in_cache(md5)) if _MD5.fullmatch(md5) else None
        return path if path and path.is_file() else None
