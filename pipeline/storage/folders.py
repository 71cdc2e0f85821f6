"""Folders that are whole or not there: written aside, on the disk, and named last.

A folder may carry its own SHA-256 sums: a flipped bit loads without an error in safetensors, and
DVC does not notice one in its cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import regular
from pipeline.errors import InputError, StorageError, cut

LONGEST = 1000  # characters of a path in an error
SUMS = "sha256.json"  # {file name: {"bytes": ..., "sha256": ...}}


@contextmanager
def writing(folder: Path, needed: int, sums: bool = True) -> Iterator[Path]:
    """Yields a new sibling folder to write into, which replaces `folder` in the end.

    Its files reach the disk first and the final name comes last, so a folder of that name is
    always whole; `sums` are those that `check` asks for. Raises StorageError with the bytes
    `needed` and free where the disk does not take it; then, and after any other error, an old
    folder stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial = folder.with_name(f".{folder.name}.{token}.partial")
    try:
        partial.mkdir()
        yield partial
        if sums:
            _write_sums(partial)
        _sync(partial)
        _replace(partial, folder, folder.with_name(f".{folder.name}.{token}.replaced"))
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free
        raise StorageError(
            f"{folder}: could not be written: {error}; it needs {needed:,} bytes, {free:,} are free"
        ) from error
    finally:
        remove(partial)


def problems(folder: Path) -> list[str]:
    """What is not as it was written, a line a file; nothing for a folder that carries no sums.

    A file that was put there later is none of theirs.
    """
    sums = folder / SUMS
    if not sums.exists():
        return []
    try:
        content = regular.read_json(sums)
        listed = {name: (int(s["bytes"]), str(s["sha256"])) for name, s in content.items()}
    except InputError as error:
        return [str(error)]
    except (TypeError, LookupError, ValueError, OverflowError) as error:
        return [f"{sums}: cannot be read: {cut(str(error))}"]
    lines = []
    for name, (size, digest) in listed.items():
        path = folder / Path(name).name
        if not os.path.isfile(path):  # False for a name that is too long, too
            lines.append(f"{cut(str(path), LONGEST)}: missing")
        elif path.stat().st_size != size:
            lines.append(f"{path}: {path.stat().st_size:,} bytes, expected {cut(f'{size:,}')}")
        elif (now := _sha256(path)) != digest:
            lines.append(f"{path}: damaged: SHA-256 {now}, expected {cut(digest)}")
    return lines


def check(folder: Path) -> None:
    """Raise InputError naming every file of `folder` that is not as it was written."""
    if damage := problems(folder):
        raise InputError("\n".join(damage))


def copy(source: Path, target: Path, link: bool = False) -> None:
    """Copy a file or a folder; a file or folder of that name is replaced in one go.

    It is not written into: DVC may have linked it to its cache. With `link` the files of a folder
    are second names of the same bytes, where the disk can do that.
    """
    if source.is_dir():
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        take = _link if link else shutil.copyfile
        with writing(target, size, sums=False) as partial:
            shutil.copytree(source, partial, copy_function=take, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            shutil.copyfile(source, partial)
            with open(partial, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            remove(partial)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that knows no second names
        shutil.copyfile(source, target)


def recover(folder: Path) -> None:
    """Tidy up after a save that was killed; call it only while nobody else writes `folder`.

    A folder moved aside for a successor that never came gets its name back; the rest goes.
    """
    for replaced in sorted(folder.parent.glob(f".{folder.name}.*.replaced")):
        if not os.path.lexists(folder):
            os.replace(replaced, folder)
        remove(replaced)
    for partial in folder.parent.glob(f".{folder.name}.*.partial"):
        remove(partial)


def recover_all(parent: Path) -> None:
    """The same for every folder in `parent`."""
    for name in {path.name.rsplit(".", 2)[0][1:] for path in parent.glob(".*.*.*")}:
        recover(parent / name)


def discard(folder: Path) -> None:
    """Delete a folder of which no part may be seen under its name."""
    if os.path.lexists(folder):
        aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
        os.replace(folder, aside)
        remove(aside)


def remove(path: Path) -> None:
    """Delete a folder, link or file, if it is there; DVC's links may be read-only."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        if os.name == "nt":  # there a read-only file cannot be deleted
            for file in path.rglob("*"):
                file.chmod(stat.S_IWRITE)
        shutil.rmtree(path)


def _write_sums(folder: Path) -> None:
    sums = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    text = json.dumps(sums, indent=1) + "\n"
    (folder / SUMS).write_text(text, encoding="utf-8", newline="\n")


def _sha256(path: Path) -> str:
    with regular.opened(path) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Have a folder's files, and their names, on the disk and not only in memory."""
    for path in folder.iterdir():
        if path.is_dir():
            _sync(path)
            continue
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
