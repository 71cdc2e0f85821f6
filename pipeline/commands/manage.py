"""Commands over what lies on the disk: interrupted trainings, token files, models, DVC's cache."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from pipeline.errors import InputError

# Each verb imports what it needs itself: torch and MLflow take seconds.

log = logging.getLogger(__name__)


def runs(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """List the trainings that are at work or interrupted, or remove one.

    python -m pipeline runs            lists them: state, step, time, size
    python -m pipeline runs remove ID  gives the disk space of one back
    """
    from pipeline.resume import run_folder

    commands = parser.add_subparsers(dest="command")
    commands.add_parser("remove", help="give its disk space back").add_argument("id")
    asked = parser.parse_args(words)
    if asked.command == "remove":
        run_folder.remove(asked.id)
    for line in run_folder.lines():
        log.info("%s", line)


def verify(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Check that token files, models, training checkpoints or DVC's cache are as written.

    python -m pipeline verify tokens data/tokens
    python -m pipeline verify models artifacts .runs
    python -m pipeline verify cache --delete
    """
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("tokens", help="token files").add_argument("folder", type=Path)
    models = kinds.add_parser("models", help="models and training checkpoints below folders")
    models.add_argument("folder", type=Path, nargs="+")
    whole = kinds.add_parser("cache", help="every file of DVC's cache")
    whole.add_argument("--delete", action="store_true", help="delete what has changed")
    asked = parser.parse_args(words)
    if asked.kind == "tokens":
        return _tokens(asked.folder)
    if asked.kind == "models":
        return _models(asked.folder)
    return _cache(asked.delete)


def _tokens(folder: Path) -> int:
    from pipeline.data import token_files

    told = token_files.inspect(folder)
    for line, whole in told.items():
        log.log(logging.INFO if whole else logging.ERROR, "%s", line)
    return 0 if all(told.values()) else InputError.exit_code


def _models(folders: list[Path]) -> int:
    from pipeline.model import model_dir

    for folder in folders:
        for line in model_dir.verify(folder):
            log.info("%s", line)
    return 0


def _cache(delete: bool) -> int:
    from pipeline import paths
    from pipeline.storage.digests import damaged
    from pipeline.storage.folders import remove

    folder = paths.root() / ".dvc" / "cache" / "files" / "md5"
    if not folder.is_dir():
        log.error("%s: nothing is cached yet, or DVC's cache lies elsewhere", folder)
        return InputError.exit_code
    found = list(damaged(folder))
    for path in found:
        log.error("%s: %s", path, "changed, deleted" if delete else "its content has changed")
        if delete:
            remove(path)
    if not found:
        log.info("%s: every file is whole", folder)
    elif delete:
        log.info("now make them again: `dvc repro -f -s STAGE` for the stage that complained")
    else:
        log.info("`python -m pipeline verify cache --delete` deletes them")
        return InputError.exit_code
    return 0


def ship(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Ship one stage's record to MLflow; a stage starts this beside itself."""
    from pipeline.tracking import recording

    recording.main(words)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)  # an orderly end would wait for whatever a store that hangs has begun
