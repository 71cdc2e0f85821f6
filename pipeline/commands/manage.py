"""Commands over what lies on the disk: trainings, token files, models, DVC's cache."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from pipeline.errors import InputError

# Each verb imports what it needs itself: torch and MLflow take seconds.

log = logging.getLogger(__name__)


def ls() -> None:
    """List every training: at work, interrupted, finished.

    python -m pipeline ls
    """
    from pipeline.experiments import trainings

    log.info("%s", trainings.page(trainings.every()))


def watch() -> None:
    """Follow the trainings that are at work, until all have ended.

    python -m pipeline watch     every 2 s in a terminal, else a table every 30 s
    """
    from pipeline.experiments import trainings

    trainings.watch()


def rm(
    id: Annotated[str, Argument(metavar="ID", help="As `ls` lists it, or its beginning")],
) -> None:
    """Give back the disk space of a training that was stopped.

    python -m pipeline rm ID
    """
    from pipeline.resume import run_folder

    run_folder.remove(id)
    log.info("%s: removed", id)


def verify(
    kind: Annotated[Literal["tokens", "models", "cache"], Argument(metavar="KIND")],
    folders: Annotated[list[Path] | None, Argument(metavar="FOLDER")] = None,
    delete: Annotated[
        bool, Option("--delete", help="Delete what has changed in the cache")
    ] = False,
) -> int:
    """Check that tokens, models or DVC's cache are as written.

    python -m pipeline verify tokens data/tokens
    python -m pipeline verify models artifacts .runs    training checkpoints, too
    python -m pipeline verify cache --delete
    """
    if (kind == "cache") == bool(folders):
        raise BadParameter("expected folders of tokens or models, and none of the cache")
    if delete and kind != "cache":
        raise BadParameter("--delete is for the cache, whose files DVC can make again")
    if kind == "cache":
        return _cache(delete)
    check = _tokens if kind == "tokens" else _models
    return max(check(folder) for folder in folders or [])


def export(
    name: Annotated[str, Argument(metavar="NAME", help="A DVC experiment")] = "workspace",
    to: Annotated[Any, Option(parser=_target, metavar="DIR|hub:OWNER/NAME", help="Where")] = ...,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], Option(help="Of the weights")] = "fp32",
) -> None:
    """Write a model with tokenizer and card, for other programs.

    A token for the hub stands in HF_TOKEN, another hub in HF_ENDPOINT. A new repository is private.

    python -m pipeline export --to plays                      the model of this workspace
    python -m pipeline export NAME --to plays --dtype bf16    that of a DVC experiment
    python -m pipeline export --to hub:OWNER/NAME             one commit on the hub
    """
    from pipeline.diagnostics import doctor
    from pipeline.export import folder, hub

    (run,) = doctor.asked([name])
    if isinstance(to, Path):
        told = folder.export(run, to, dtype, to.name)
    else:
        upload = hub.opened(to)
        with tempfile.TemporaryDirectory() as scratch:
            told = folder.export(run, Path(scratch, "model"), dtype, to)
            to = upload(Path(scratch, "model"))
    log.info("%s: the model of %s in %s; %s", to, run.name, dtype, told)


def _target(text: str) -> str | Path:
    """The name of a repository, or a folder."""
    return text.removeprefix("hub:") if text.startswith("hub:") else Path(text)


def _tokens(folder: Path) -> int:
    from pipeline.data import token_files

    told = token_files.inspect(folder)
    for line, whole in told.items():
        log.log(logging.INFO if whole else logging.ERROR, "%s", line)
    return 0 if all(told.values()) else InputError.exit_code


def _models(folder: Path) -> int:
    from pipeline.model import model_dir

    for line in model_dir.verify(folder):
        log.info("%s", line)
    return 0


def _cache(delete: bool) -> int:
    from pipeline.records import dvc_history
    from pipeline.storage.digests import damaged
    from pipeline.storage.folders import remove

    folder = dvc_history.cache_folder()
    if not folder.is_dir():
        log.error("%s: nothing is cached yet", folder)
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


def ship(words: list[str]) -> None:
    """Ship one stage's record to MLflow; a stage starts this beside itself."""
    from pipeline.tracking import recording

    recording.main(words)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)  # an orderly end would wait for whatever a store that hangs has begun
