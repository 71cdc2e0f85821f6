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
        # Two processes may see the same start some seconds apart after the clock was set.
        return abs(psutil.Process(int(pid)).create_time() - float(created)) < 5
    return False


class Claim:
    """A fingerprint held under its lock. `folder` exists only while a result is handed over."""

    def __init__(self, folder: Path, waited: bool):
        self.folder = folder
        self.waited = waited

    def adopt(self) -> bool:
        """Take over what another process made of this very fingerprint while this one waited.

        Every output is checked against its SHA-256 before it replaces anything here.
        """
        manifest = self.folder / "result.json"
        if not self.waited or not manifest.exists():
            return False
        digests: dict[str, str] = json.loads(manifest.read_text("utf-8"))
        shared = {name: self.folder / name for name in digests}
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
            copy(output, self.folder / output)
        digests = {output.as_posix(): tree_digest(output) for output in outputs}
        part = self.folder / "result.json.part"
        part.write_text(json.dumps(digests), "utf-8")
        os.replace(part, self.folder / "result.json")

    def awaited(self) -> bool:
        """Whether another living process waits for this fingerprint."""
        marks = self.folder.parent.glob(f"{self.folder.name}.waiting-*")
        return any(is_alive(mark.name.partition(".waiting-")[2]) for mark in marks)


@contextlib.contextmanager
def claim(fingerprint: str) -> Iterator[Claim]:
    """Hold a fingerprint; a second process with the same one waits here for its turn.

    A result that was handed over goes once nobody waits for it any more.
    """
    folder = paths.runs() / fingerprint[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    holder = folder.with_name(f"{folder.name}.holder")
    waited = _acquire(lock, holder, folder.with_name(f"{folder.name}.waiting-{this_process()}"))
    try:
        holder.write_text(str(os.getpid()), "utf-8")
        if not waited:  # what a crash may have left is nobody's
            shutil.rmtree(folder, ignore_errors=True)
        held = Claim(folder, waited)
        yield held
        if not held.awaited():
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, holder: Path, mark: Path) -> bool:
    """Take the lock; True if it had to be waited for, under a mark that others can see."""
    try:
        lock.acquire(timeout=0)
        return False
    except Timeout:
        pass
    mark.touch()
    try:
        who = "another process"
        with contextlib.suppress(OSError):
            who = f"process {holder.read_text('utf-8')}"
        log.warning("%s trains this very configuration: waiting for its result", who)
        lock.acquire()
    finally:
        mark.unlink(missing_ok=True)
    return True


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
