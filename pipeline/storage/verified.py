"""Large files that were read and found whole: once is enough while they stay as they are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import paths as places
from pipeline.storage.digests import digest_of

LARGE = 1 << 28  # bytes: smaller files are read each time, which takes a second
SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system, FAT's


def once(
    paths: Sequence[Path], expected: Any, check: Callable[[], None], *, anew: bool = False
) -> None:
    """Run `check`, which reads files against what is `expected` of them, unless it has passed.

    It has for large files of the same inodes, sizes and times of the last write, so hard or
    symbolic links to them, as DVC makes for each workspace, are not read again. What damages a
    file and keeps all three goes unnoticed unless `anew`; then an earlier pass is forgotten.
    """
    began, found = time.time_ns(), list(map(_stamp, paths))
    passed = places.runs() / "verified" / digest_of([found, expected])
    if passed.exists() and not anew:
        return
    passed.unlink(missing_ok=True)
    check()
    large = sum(size for _, _, size, _ in found) >= LARGE
    # A write within the clock's last tick leaves the time as it is, as git knows ("racy").
    settled = max(written for *_, written in found) < began - SETTLED_NS
    if large and settled and found == list(map(_stamp, paths)):
        with contextlib.suppress(OSError):  # no room for it: then they are read the next time
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


def _stamp(path: Path) -> tuple[int, int, int, int]:
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
