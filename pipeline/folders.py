"""Folders that are whole or not there: written aside, on the disk, and named last."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import StorageError


@contextmanager
def writing(folder: Path, needed: int) -> Iterator[Path]:
    """Yields a new sibling folder to write into, which replaces `folder` in the end.

    Its files reach the disk first and the final name comes last, so a folder of that name is
    always whole. Raises StorageError with the bytes `needed` and free where the disk does not
    take it; then, and after any other error, an old folder stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial = folder.with_name(f".{folder.name}.{token}.partial")
    try:
        partial.mkdir()
        yield partial
        _sync(partial)
        _replace(partial, folder, folder.with_name(f".{folder.name}.{token}.replaced"))
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free
        raise StorageError(
            f"{folder}: could not be written: {error}; it needs {needed:,} bytes, {free:,} are free"
        ) from error
    finally:
        remove(partial)


def recover(folder: Path) -> None:
    """Tidy up after a save that was killed; call it only while nobody else writes `folder`.

    A folder moved aside for a successor that never came gets its name back; the rest goes.
    """
    folder = Path(folder)
    for replaced in sorted(folder.parent.glob(f".{folder.name}.*.replaced")):
        if not os.path.lexists(folder):
            os.replace(replaced, folder)
        remove(replaced)
    for partial in folder.parent.glob(f".{folder.name}.*.partial"):
        remove(partial)


def remove(path: Path) -> None:
    """Delete a folder, link or file, if it is there; DVC's links may be read-only."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        if os.name == "nt":  # there a read-only file cannot be deleted
            for file in path.rglob("*"):
                file.chmod(stat.S_IWRITE)
        shutil.rmtree(path)


def _sync(folder: Path) -> None:
    """Have a folder's files, and their names, on the disk and not only in memory."""
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and keeps names by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, target: Path, aside: Path) -> None:
    """Give `new` the name `target`; what had it moves aside first (see `recover`), then goes."""
    if os.path.lexists(target):
        os.replace(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        if os.path.lexists(aside):
            os.replace(aside, target)
        raise
    _sync_names(target.parent)
    remove(aside)
