"""Training runs in progress: a folder each under the main root, one trainer, the others wait."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pipeline import paths
from pipeline.records import tree_digest

log = logging.getLogger(__name__)


def this_process() -> str:
    """This process, told apart from a later one with the same number."""
    return f"{os.getpid()}-{psutil.Process().create_time():.2f}"


def is_alive(process: str) -> bool:
    """Whether the process that `this_process` named still runs on this machine."""
    pid, _, created = process.partition("-")
    with contextlib.suppress(psutil.Error, ValueError):
        return f"{psutil.Process(int(pid)).create_time():.2f}" == created
    return False


class Claim:
    """The folder of one fingerprint, held under its lock."""

    def __init__(self, folder: Path):
        self.folder = folder

    def adopt(self) -> bool:
        """Take over what another process made of this very fingerprint while this one waited.

        Every output is checked against its SHA-256 before it replaces anything here.
        """
        manifest = self.folder / "result.json"
        if not manifest.exists():
            return False
        digests: dict[str, str] = json.loads(manifest.read_text("utf-8"))
        shared = {name: self.folder / "result" / name for name in digests}
        if any(not p.exists() or tree_digest(p) != digests[name] for name, p in shared.items()):
            return False
        for name, path in shared.items():
            copy(path, Path(name))
        return True

    def share(self, outputs: list[Path]) -> None:
        """Leave the result for those that wait for it; nothing is kept where nobody does."""
        if not self.awaited():
            return
        for output in outputs:
            copy(output, self.folder / "result" / output)
        digests = {output.as_posix(): tree_digest(output) for output in outputs}
        part = self.folder / "result.json.part"
        part.write_text(json.dumps(digests), "utf-8")
        os.replace(part, self.folder / "result.json")

    def awaited(self) -> bool:
        """Whether another living process waits for this folder."""
        marks = self.folder.glob("waiting-*")
        return any(is_alive(mark.name.removeprefix("waiting-")) for mark in marks)


@contextlib.contextmanager
def claim(fingerprint: str) -> Iterator[Claim]:
    """Hold the fingerprint's folder; a second process with the same one waits here for its turn.

    The folder goes when the work succeeds and nobody waits for what it holds.
    """
    folder = paths.runs() / fingerprint[:16]
    folder.mkdir(parents=True, exist_ok=True)
    holder, mark = folder / "holder", folder / f"waiting-{this_process()}"
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        mark.touch()
        who = holder.read_text("utf-8") if holder.exists() else "another one"
        log.warning("process %s trains this very configuration: waiting for its result", who)
        lock.acquire()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        holder.write_text(str(os.getpid()), "utf-8")
        held = Claim(folder)
        yield held
        if not held.awaited():
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def copy(source: Path, target: Path) -> None:
    """Copy a file or folder to a new place; an old one is removed, never written into.

    DVC may have linked the old one to its cache, where writing in place would damage it.
    """
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
