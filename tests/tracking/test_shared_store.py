"""One SQLite store for several checkouts: made once, and no reader keeps a point waiting."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.tracking import mlflow_store
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.usefixtures("own_store"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

OPEN_A_ROW = """
import sys
from pathlib import Path
from pipeline import config
from pipeline.records import record_file
from pipeline.tracking import mlflow_run, mlflow_store
client = mlflow_store.connect()
head = record_file.start_event("train", config.load(Path(sys.argv[1])))
mlflow_run.open_row(client, head | {"key": sys.argv[2]}, [])
"""


def count(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT count(*) FROM runs").fetchone()[0]


def mode(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("PRAGMA journal_mode").fetchone()[0]


@pytest.mark.slow
@pytest.mark.fault(73)
def test_four_checkouts_that_begin_one_store_at_once_lose_no_row(tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "runs.db"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    env |= {"MLFLOW_TRACKING_URI": mlflow_store.sqlite_uri(shared), "PYTHONPATH": str(ROOT)}
    begun = []
    for name in ("a", "b", "c", "d"):
        (tmp_path / name / ".dvc").mkdir(parents=True)
        words = [sys.executable, "-c", OPEN_A_ROW, str(ROOT / "recipes/nano.yaml"), name]
        begun.append(subprocess.Popen(words, cwd=tmp_path / name, env=env, stderr=subprocess.PIPE))
    for process in begun:
        said = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, said
    assert count(shared) == 4
    assert mode(shared) == "wal"
    left = {path.name for path in shared.parent.iterdir()} - {"runs.db.lock"}
    assert left == {"runs.db"}


def add_a_row(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("INSERT INTO runs (run_uuid, experiment_id) VALUES ('x', 0)")
        database.commit()


@pytest.mark.fault(73)
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_database_that_is_there_is_never_replaced(
    own_store: Path, empty_store: Path, monkeypatch, links: bool
) -> None:
    if not links:
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", refuse, raising=False)
    add_a_row(own_store)
    other = Path(shutil.copyfile(empty_store, "other.tmp"))
    mlflow_store._give_name(other, own_store)
    assert count(own_store) == 1
    mlflow_store._give_name(Path(shutil.copyfile(empty_store, "third.tmp")), Path("new.db"))
    assert count(Path("new.db")) == 0


def refuse(*_: object) -> None:
    raise PermissionError("no hard links here")


@pytest.mark.fault(73, control=True)
def test_a_rename_over_a_database_loses_its_rows(own_store: Path, empty_store: Path) -> None:
    add_a_row(own_store)
    os.replace(shutil.copyfile(empty_store, "other.tmp"), own_store)
    assert count(own_store) == 0


@pytest.mark.fault(73)
def test_the_lock_is_one_for_all_who_share_the_database(tmp_path: Path, monkeypatch) -> None:
    shared = tmp_path / "shared.db"
    (tmp_path / "link.db").symlink_to(shared)
    locks = set()
    for root, name in (("a", "shared.db"), ("b", "shared.db"), ("c", "link.db")):
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / root))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.sqlite_uri(tmp_path / name))
        locks.add(mlflow_store.lock().lock_file)
    assert locks == {f"{shared.resolve()}.lock"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert mlflow_store.lock().lock_file == str(tmp_path / "c/.runs/tracking.lock")


def test_a_link_to_a_database_that_is_to_be_made_stays_one(own_store: Path) -> None:
    own_store.unlink()
    own_store.symlink_to("elsewhere.db")
    mlflow_store.connect()
    assert own_store.is_symlink() and count(Path("elsewhere.db")) == 0


def test_the_log_of_a_database_that_was_deleted_is_not_read_into_the_new_one(
    own_store: Path,
) -> None:
    mlflow_store.connect()
    with contextlib.closing(sqlite3.connect(own_store)) as database:
        database.execute("INSERT INTO runs (run_uuid, experiment_id) VALUES ('x', 0)")
        database.commit()
        shutil.copyfile("mlflow.db-wal", "kept")
    own_store.unlink()
    shutil.move("kept", "mlflow.db-wal")
    mlflow_store.connect().create_run("0")
    assert count(own_store) == 1


@contextlib.contextmanager
def reader(path: Path):
    """Somebody who has a page open: a transaction that has read."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN")
        database.execute("SELECT count(*) FROM runs").fetchone()
        yield
        database.execute("COMMIT")


@pytest.mark.fault(74)
def test_points_arrive_at_once_while_somebody_reads(own_store: Path) -> None:
    client = mlflow_store.connect()
    run = client.create_run("0")
    with reader(own_store):
        began = time.monotonic()
        for step in range(3):
            client.log_metric(run.info.run_id, "loss", 1.0, step=step)
        assert time.monotonic() - began < 5, "MLflow waits 20 s for a lock"
        assert len(client.get_metric_history(run.info.run_id, "loss")) == 3


@pytest.mark.fault(74, control=True)
def test_without_a_log_that_is_written_ahead_a_reader_stops_the_writer(own_store: Path) -> None:
    with contextlib.closing(sqlite3.connect(own_store)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    with reader(own_store), contextlib.closing(sqlite3.connect(own_store, timeout=0.2)) as writer:
        writer.execute("INSERT INTO runs (run_uuid, experiment_id) VALUES ('x', 0)")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            writer.commit()


@pytest.mark.fault(74)
def test_an_older_store_writes_ahead_as_soon_as_it_is_free(own_store: Path, monkeypatch) -> None:
    assert mode(own_store) == "delete"  # as MLflow alone has made it
    mlflow_store.connect()  # which writes where the repository was moved
    with contextlib.closing(sqlite3.connect(own_store)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    with reader(own_store):
        began = time.monotonic()
        mlflow_store.connect()
        assert time.monotonic() - began < 5
        assert mode(own_store) == "delete"
    monkeypatch.setattr(mlflow_store, "_on_own_disk", lambda path: False)
    mlflow_store.connect()
    assert mode(own_store) == "delete"
    monkeypatch.undo()
    monkeypatch.chdir(own_store.parent)
    mlflow_store.connect()
    assert mode(own_store) == "wal"


@pytest.mark.parametrize(("kind", "own"), [("ext4", True), ("nfs4", False), ("smbfs", False)])
def test_a_disk_of_the_network_has_no_shared_memory(
    tmp_path: Path, monkeypatch, kind: str, own: bool
) -> None:
    from collections import namedtuple

    disk = namedtuple("disk", "mountpoint fstype")
    disks = [disk(tmp_path.anchor, "ext4"), disk(str(tmp_path), kind)]
    monkeypatch.setattr(mlflow_store.psutil, "disk_partitions", lambda all: disks)
    assert mlflow_store._on_own_disk(tmp_path / "a" / "mlflow.db") == own


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_what_sqlite_lays_beside_the_store_is_ignored_by_git_and_goes_with_it(
    own_store: Path,
) -> None:
    names = [f"mlflow.db{end}" for end in ("", "-wal", "-shm", ".lock")]
    for name in names:
        Path(name).touch()
    shutil.copyfile(ROOT / ".gitignore", ".gitignore")
    subprocess.run(["git", "init", "--quiet"], check=True)
    ignored = subprocess.run(["git", "check-ignore", *names], capture_output=True, text=True)
    assert ignored.stdout.split() == names
    subprocess.run(["make", "-f", str(ROOT / "Makefile"), "clean"], check=True, capture_output=True)
    assert not [name for name in names if Path(name).exists()]
