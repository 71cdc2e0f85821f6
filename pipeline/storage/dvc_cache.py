"""DVC's cache, looked through for content that has changed: DVC itself hands it out unseen."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def damaged(folder: Path) -> Iterator[Path]:
    """Files of a cache whose content is not the MD5 that they are named after.

    DVC trusts a read-only file whose time has not changed, and keeps it when a stage makes the
    right content once more: only deleting it helps.
    """
    md5 = functools.partial(hashlib.md5, usedforsecurity=False)
    for path in sorted(folder.glob("??/*")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, md5).hexdigest()
        if digest != f"{path.parent.name}{path.name}".removesuffix(".dir"):
            yield path
