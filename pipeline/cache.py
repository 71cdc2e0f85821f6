"""DVC's cache, looked through for content that has changed: DVC itself hands it out unseen."""

from __future__ import annotations

import argparse
import functools
import hashlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline import paths, terminal
from pipeline.errors import InputError
from pipeline.folders import remove

log = logging.getLogger(__name__)


def damaged(folder: Path) -> Iterator[Path]:
    """Files of a cache whose content is not the MD5 that they are named after.

    DVC trusts a read-only file whose time has not changed, and keeps it when a stage makes the
    right content once more: only deleting it helps.
    """
    md5 = functools.partial(hashlib.md5, usedforsecurity=False)
    for path in sorted(folder.glob("??/*")):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, md5).hexdigest()
        if found != f"{path.parent.name}{path.name}".removesuffix(".dir"):
            yield path


def main(words: list[str]) -> None:
    terminal.guard()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(prog="python -m pipeline.cache", description=__doc__)
    parser.add_argument("command", choices=["verify"], help="read every file of DVC's cache")
    parser.add_argument("--delete", action="store_true", help="delete what has changed")
    asked = parser.parse_args(words)
    folder = paths.root() / ".dvc" / "cache" / "files" / "md5"
    if not folder.is_dir():
        log.error("%s: nothing is cached yet, or DVC's cache lies elsewhere", folder)
        sys.exit(InputError.exit_code)
    found = list(damaged(folder))
    for path in found:
        log.error("%s: %s", path, "changed, deleted" if asked.delete else "its content has changed")
        if asked.delete:
            remove(path)
    if not found:
        log.info("%s: every file is whole", folder)
    elif asked.delete:
        log.info("now make them again: `dvc repro -f -s STAGE` for the stage that complained")
    else:
        log.info("`python -m pipeline.cache verify --delete` deletes them")
        sys.exit(InputError.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
