"""MLflow's store: where it is, a client for it, and what it says when it fails, without secrets."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from pipeline import paths

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_SECONDS = 30.0
ANSWER_SECONDS = 5.0  # for a database that another process writes into
LONGEST = 300  # characters of an error's message

_SECRET = r"token|secret|passw|credential|key"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_ASSIGNED = re.compile(rf"((?:{_SECRET})[\w-]*=)[^\s&]+", re.IGNORECASE)


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else one sqlite file at the main repository root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.root().as_posix()}/mlflow.db"


def connect() -> MlflowClient:
    """A client for the store, which is created under a lock if it does not exist.

    Import and limits come first: MLflow reads its environment when it is imported, and its
    defaults wait minutes for a server that is gone. Raises one of `store_errors`.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    uri = store_uri()
    if uri.startswith("sqlite:///"):
        # A kept connection goes on with a file that somebody deleted, and reads from it, too.
        os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    from mlflow import MlflowClient

    # What goes wrong is told once, by whoever asked; MLflow would add a traceback at every try.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        with lock():
            _create_sqlite(path)
        _check_sqlite(path)
    return MlflowClient(tracking_uri=uri)


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises that is not there or does not answer."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, sqlite3.Error, OSError


def artifact_root() -> str:
    return (paths.root() / "mlartifacts").as_uri()


def lock() -> FileLock:
    """Held while rows are found and opened: several stages may start at once."""
    paths.runs().mkdir(parents=True, exist_ok=True)
    return FileLock(paths.runs() / "tracking.lock", timeout=LOCK_SECONDS)


def _create_sqlite(path: Path) -> None:
    """Build the schema in a temporary file and rename it: a reader never meets half a database.

    An empty file is what a client left that lost its database: no database either.
    """
    if path.exists() and not (path.is_file() and path.stat().st_size == 0):
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    store = SqlAlchemyStore(f"sqlite:///{temporary.as_posix()}", artifact_root())
    store.engine.dispose()
    os.replace(temporary, path)


def _check_sqlite(path: Path) -> None:
    """Ask once whether it is a database to write into: MLflow would try for minutes."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=ANSWER_SECONDS)) as database:
        database.execute("BEGIN IMMEDIATE")


def said(error: Exception) -> str:
    """What went wrong, in one line, without secrets."""
    origin = _origin(error)
    first = str(origin).partition("\n")[0]
    return without_secrets(f"{type(origin).__name__}: {first}")[:LONGEST]


def _origin(error: Exception) -> BaseException:
    """What the system or the database said, which libraries wrap in words of their own."""
    found: BaseException = error
    inner: BaseException | None = error
    seen = {id(error)}  # causes may go round in a circle
    while (inner := inner.__cause__ or inner.__context__) and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, (OSError, sqlite3.Error)):
            found = inner
    return found


def without_secrets(text: str) -> str:
    """Leave out what a URI says of its user, and every value that a name calls a secret.

    Names are those in the text (`token=...`, an Authorization header) and those of environment
    variables, whose values a server may well repeat in what it answers.
    """
    text = _ASSIGNED.sub(r"\1***", re.sub(r"//\S*@", "//", text))
    text = re.sub(r"\b(Basic|Bearer) \S+", r"\1 ***", text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:  # shorter ones stand in any text
            text = text.replace(value, "***")
    return text
