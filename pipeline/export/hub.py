"""An exported folder on its way to the Hugging Face hub, or to what HF_ENDPOINT names instead."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigError, InputError, some
from pipeline.export.card import CARD
from pipeline.storage.folders import SUMS
from pipeline.storage.hub import refusal


def opened(name: str) -> Callable[[Path], str]:
    """A function that uploads a folder to this repository, which the hub has been asked for.

    A new repository is private, and the upload one commit. Raises ConfigError without a token in
    the environment, HubError for what the hub refuses, InputError for a repository of other files.
    """
    if not (token := os.environ.get("HF_TOKEN")):
        raise ConfigError(f"--to hub:{name}: HF_TOKEN is not set; expected a token that may write")
    from huggingface_hub import CommitOperationAdd, HfApi

    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of addresses that are signed
    hub = HfApi(token=token)
    with _refusals(name):
        hub.whoami()
        there = set(hub.list_repo_files(name)) if hub.repo_exists(name) else set()
    if (others := there - {".gitattributes"}) and not {CARD, SUMS} <= there:
        raise InputError(
            f"--to hub:{name}: expected a new repository, an empty one or one with an earlier "
            f"export; it holds {some(sorted(others))}"
        )

    def upload(folder: Path) -> str:
        files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        with _refusals(name):
            hub.create_repo(name, private=True, exist_ok=True)
            return str(hub.create_commit(name, files, commit_message="Export").commit_url)

    return upload


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client's errors share no base, nor its HTTP library's
        why = error.__cause__ if type(error) is RuntimeError else error  # it only names the file
        raise refusal(why or error, f"--to hub:{name}") from None
