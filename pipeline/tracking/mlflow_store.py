"""MLflow's store: where it is, a client for it, and its errors in one line without secrets."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import psutil
from filelock import FileLock

from pipeline import paths
from pipeline.errors import StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

LOCK_SECONDS = 30.0
ANSWER_SECONDS = 5.0  # for a database that another process writes into
LARGEST_ANSWER = 1 << 30  # bytes that the client's memory may grow by
LONGEST = 300  # characters of an error's message

_SECRET = r"token|secret|passw|pwd|credential|signature|key"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
# Behind a scheme and before the host; `http://host:1/a@b` and `sqlite:////a@b` have no user.
_USER = re.compile(r"(?<=:)//(?!/)(?!(?:(?<=https://)|(?<=http://))[^/\s:@]+(?::\d+)?[/?#])\S*@")
_ASSIGNED = re.compile(rf"((?:(?:{_SECRET})[\w-]*|\bsig)=)[^\s&]+", re.IGNORECASE)
_HEADER = re.compile(r"(?i:\b(Bearer)\s+|\b(Basic)\s+(?-i:(?=[a-z]*[^\sa-z,])))[\w.~+/-]{6,}=*")
# Tokens by the prefixes of their issuers; the last is a signed JSON web token.
_TOKEN = re.compile(
    r"\b(?:(?:hf|gh[pousr])_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
    r"|sk-(?=[\w-]*\d)[\w-]{16,}|A[KS]IA[A-Z0-9]{16}\b|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)"
)

# Where MLflow's client looks for things, as a URI or as a file.
_URIS = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_FILES = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
_NO_PATHS = ("databricks", "databricks-uc", "uc")  # MLflow's names for servers

# Where MLflow's client carries artifacts over the network. All else that it knows is a folder of
# this machine, or may lead to one (`runs:`, `models:`, what a plug-in brought).
_ELSEWHERE = {"mlflow-artifacts", "http", "https", "s3", "gs", "r2", "b2", "wasbs", "abfss"}
_ELSEWHERE |= {"ftp", "sftp", "hdfs", "viewfs"}

# File systems on which SQLite's write-ahead log works: all who share it have to share memory.
_OWN_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs"}
_OWN_DISKS |= {"overlay", "apfs", "hfs", "ufs", "ntfs", "ntfs3", "refs"}

ARTIFACTS = "mlartifacts"
# What MLflow's schema keeps as absolute places.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else one sqlite file; a relative path starts at the main root."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return at_root(given) if given else sqlite_uri(paths.root() / "mlflow.db")


def at_root(uri: str) -> str:
    """A store's URI with its path, if it is relative, taken from the main repository root.

    A stage's own folder may be DVC's temporary workspace, which goes with all that lies in it.
    """
    scheme = _scheme(uri)
    if scheme.startswith("sqlite"):
        path = sqlite_path(uri)
        if path is None or path.is_absolute():
            return uri
        _, options, values = uri.partition("?")
        return sqlite_uri(paths.root() / path) + options + values
    if uri in _NO_PATHS or (scheme != "file" and len(scheme) > 1):  # one letter is a drive
        return uri
    path = _as_path(uri) if scheme == "file" else Path(uri)
    return uri if path.is_absolute() else (paths.root() / path).as_uri()


def _scheme(uri: str) -> str:
    """The part of a URI before the colon, "" without one; a malformed URI fails when opened."""
    return uri.partition(":")[0] if ":" in uri else ""


def sqlite_uri(path: Path) -> str:
    """A database file as SQLAlchemy writes and reads it: `#`, `%` and `?` are encoded."""
    from sqlalchemy.engine import URL

    uri = URL.create("sqlite", database=path.as_posix()).render_as_string(hide_password=False)
    # MLflow makes the folder of what stands behind `sqlite:///`, without decoding it.
    return uri if uri.endswith(path.as_posix()) else uri.replace("sqlite", "sqlite+pysqlite", 1)


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite URI; None for any other store and for one in memory."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    database = None
    if uri.startswith("sqlite"):
        with contextlib.suppress(ArgumentError):  # opening it raises the error again
            database = make_url(uri).database
    if not database or database == ":memory:" or database.startswith("file:"):
        return None
    return Path(database)


def connect() -> MlflowClient:
    """A client for the store, which is created under a lock if it does not exist.

    The environment is set before the import, at which MLflow reads it; its own defaults wait
    minutes for a server that is gone. Raises one of `store_errors`.
    """
    _set_environment()
    from mlflow import MlflowClient

    uri = store_uri()
    path = sqlite_path(uri)
    # The caller reports a failure once; MLflow would log a traceback at every attempt.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    if path:
        with lock():
            _create_sqlite(path)
        _check_sqlite(path)
    if _is_server(uri):
        _hold_artifacts_elsewhere()
        _bound_memory()
    try:
        return MlflowClient(tracking_uri=uri)
    except ImportError as error:  # SQLAlchemy looks for a database's driver at last
        place = without_secrets(uri)
        raise StorageError(f"{place} lacks its database driver: {error}") from error


def _set_environment() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    for name in _URIS:
        if given := os.environ.get(name):
            os.environ[name] = at_root(given)
    for name in _FILES:
        if given := os.environ.get(name):
            os.environ[name] = str(paths.root() / given)
    if sqlite_path(store_uri()):
        # A pooled connection would still read and write a file that somebody has deleted.
        os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")


def store_errors() -> tuple[type[Exception], ...]:
    """The errors of a store that is missing or does not answer."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, sqlite3.Error, OSError, MemoryError


def _is_server(uri: str) -> bool:
    return _scheme(uri).lower() in ("http", "https")


def hold_elsewhere(store: str, place: str) -> None:
    """Raise StorageError where a server says that artifacts lie on its client's own machine.

    MLflow's client believes every server and would write into that folder.
    `store` is the store's URI, `place` where an experiment, a run or a model is said to lie.
    """
    from mlflow.utils.uri import get_uri_scheme  # as the client reads it

    if _is_server(store) and get_uri_scheme(place) not in _ELSEWHERE:
        raise StorageError(
            f"the server at {without_secrets(store)} says that artifacts lie at {place[:80]!r}, on "
            "this machine: refused. Start it with --serve-artifacts (its default) and name a new "
            "tracking.experiment"
        )


def _hold_artifacts_elsewhere() -> None:
    """Check it again wherever MLflow's client opens a place: a server may change its answer."""
    from mlflow.store.artifact.artifact_repository_registry import (
        get_registered_artifact_repositories,
    )

    known = get_registered_artifact_repositories()
    for scheme in known.keys() - _ELSEWHERE:
        if not isinstance(known[scheme], functools.partial):
            known[scheme] = functools.partial(_held_repository, known[scheme])


def _bound_memory() -> None:
    """Limit memory, so that an endless answer is a MemoryError and the machine keeps its memory."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = psutil.Process().memory_info().vms + LARGEST_ANSWER
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _held_repository(made: Any, place: str, tracking_uri: str | None = None, **options: Any) -> Any:
    hold_elsewhere(tracking_uri or "", place)
    return made(place, tracking_uri=tracking_uri, **options)


def artifact_root() -> str:
    return (paths.root() / ARTIFACTS).as_uri()


def artifact_location(experiment: str) -> str | None:
    """Where a new experiment's artifacts belong; None where the store itself decides.

    A database would put them into the current folder, which may be a temporary workspace.
    """
    scheme = _scheme(store_uri())
    known = scheme in ("", "file", "http", "https", *_NO_PATHS)
    # A name may begin with a slash, which would lead out of the folder.
    return None if known else (paths.root() / ARTIFACTS / experiment.lstrip("/")).as_uri()


def lock() -> FileLock:
    """The lock that is held while rows are found and opened: several stages may start at once.

    All who share a database share the lock, from whatever checkout: it lies beside the database.
    """
    path = sqlite_path(store_uri())
    place = path.resolve() if path else paths.runs() / "tracking"
    place.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{place}.lock", timeout=LOCK_SECONDS)


def _create_sqlite(path: Path) -> None:
    """Build the schema in a temporary file and rename it: a reader never meets half a database.

    An empty file counts as none: a client leaves one where its database was deleted.
    """
    path = path.resolve()  # the file that a link names
    if _is_something(path):
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        store = SqlAlchemyStore(sqlite_uri(temporary), artifact_root())
        store.engine.dispose()
        if not _is_something(path):  # somebody without our lock may have made one
            # SQLite would read an older database's log into the new one.
            for left in ("", "-wal", "-shm", "-journal"):
                path.with_name(path.name + left).unlink(missing_ok=True)
        _give_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_something(path: Path) -> bool:
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


def _give_name(temporary: Path, path: Path) -> None:
    """Rename a file, but never over an existing one: somebody may have made it without our lock."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            os.rename(temporary, path)


def _check_sqlite(path: Path) -> None:
    """Raise at once where a database cannot be written: MLflow would retry for minutes.

    Also correct the places in a database that was moved here with its repository.
    """
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=ANSWER_SECONDS)) as database:
        _log_ahead(database, path.resolve())
        database.execute("BEGIN IMMEDIATE")
        ours = path.resolve().is_relative_to(paths.root().resolve())  # else others may share it
        if ours and (former := _former_roots(database)):
            for root in former:
                _move(database, root)
            database.commit()  # which waits for readers, also where it has nothing to write


def _log_ahead(database: sqlite3.Connection, path: Path) -> None:
    """Set SQLite's write-ahead log, for good: readers do not keep a stage's points waiting.

    Nothing is lost where it cannot be set: the database is in use, or on a network disk, where
    only one computer could write.
    """
    with contextlib.suppress(sqlite3.OperationalError, OSError):
        if database.execute("PRAGMA journal_mode").fetchone() != ("wal",) and _on_own_disk(path):
            database.execute("PRAGMA busy_timeout = 0")
            database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA busy_timeout = {int(ANSWER_SECONDS * 1000)}")


def _on_own_disk(path: Path) -> bool:
    disks = {Path(d.mountpoint): d.fstype.lower() for d in psutil.disk_partitions(all=True)}
    return next((disks[p] for p in path.parents if p in disks), "") in _OWN_DISKS


def _former_roots(database: sqlite3.Connection) -> set[str]:
    """URIs of the folders for which this database was made and which are not this repository."""
    if not _has(database, "experiments", "artifact_location"):
        return set()
    query = "SELECT artifact_location FROM experiments WHERE artifact_location LIKE ?"
    places = database.execute(query, [f"file:%/{ARTIFACTS}/%"])
    roots = {place.rpartition(f"/{ARTIFACTS}/")[0] for (place,) in places}
    return {root for root in roots if not _is_here(_as_path(root))}


def _has(database: sqlite3.Connection, table: str, column: str) -> bool:
    """Whether this version of MLflow's schema has the column."""
    known = database.execute("SELECT name FROM pragma_table_info(?)", [table])
    return (column,) in known.fetchall()


def _is_here(folder: Path) -> bool:
    """Whether a folder is this repository, possibly by another name."""
    with contextlib.suppress(OSError):
        return folder.samefile(paths.root())
    return False


def _as_path(uri: str) -> Path:
    return Path(url2pathname(urlsplit(uri).path))


def _move(database: sqlite3.Connection, former: str) -> None:
    """Replace a former root by this one in all stored places; other places stay as they are."""
    root = paths.root()
    pairs = [(former, root.as_uri()), (_as_path(former).as_posix(), root.as_posix())]
    for old, new in ((f"{old}/", f"{new}/") for old, new in pairs):
        for table, column in _PLACES:
            if _has(database, table, column):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column}, 1, ?) = ?",
                    [new, len(old) + 1, len(old), old],
                )
    log.info(
        "MLflow's store was made in %s: its artifacts are now found, and written, in %s",
        _as_path(former),
        paths.root(),
    )


def said(error: Exception) -> str:
    """An error in one line, without secrets."""
    origin = _origin(error)
    first = str(origin).partition("\n")[0]
    return without_secrets(f"{type(origin).__name__}: {first}")[:LONGEST]


def _origin(error: Exception) -> BaseException:
    """The innermost error of the system or the database, which libraries wrap in their own."""
    origin: BaseException = error
    at: BaseException | None = error
    seen = set()  # causes may go round in a circle
    while at and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, (OSError, sqlite3.Error, MemoryError)):
            origin = at
        at = at.__cause__ or at.__context__
    return origin


def without_secrets(text: str) -> str:
    """Text without the users of URIs and without values that are named as a secret.

    Such names stand in the text (`token=...`, an Authorization header) or in the environment,
    whose values a server may repeat in its answer.
    """
    text = _ASSIGNED.sub(r"\1***", _USER.sub("//", text))
    text = _HEADER.sub(lambda found: f"{found[1] or found[2]} ***", text)
    text = _TOKEN.sub("***", text)
    for name in os.environ:  # another thread may change it meanwhile
        value = os.environ.get(name, "")
        if not _SECRET_NAME.search(name) or (os.path.isabs(value) and os.path.exists(value)):
            continue  # a file of secrets has none in its name
        if len(value) >= 6:  # shorter ones stand in any text
            text = text.replace(value, "***")
    return text
