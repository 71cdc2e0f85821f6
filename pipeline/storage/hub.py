"""Files of the Hugging Face hub: listed at a commit, fetched with patience, checked by their hash.

On their way they lie in `.NAME.partial`, which gets the name of their folder when all are there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from filelock import FileLock, Timeout

from pipeline import regular
from pipeline.errors import BusyError, InputError, StorageError, cut
from pipeline.storage import folders

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0  # for the list of a repository's files
LIST_PAUSES = (2, 10)  # seconds between tries in vain
FILE_PAUSES = (2, 10, 30, 60, 120)  # and once more whenever bytes came
TRIES = 2  # of a file that comes with another hash
CHUNK_BYTES = 1 << 20  # lost with a connection; of the client's own 10 MiB some bring none at all
PASSING = (408, 429, 500, 502, 503, 504)  # answers that will be others later
T = TypeVar("T")


class HubError(InputError):
    """The hub was not reached, or does not give what was asked for."""


class File(NamedTuple):
    """A file of a model or dataset (`kind`); `digest`: SHA-256, or git's SHA-1 of a small one."""

    repository: str
    kind: str
    commit: str
    path: str
    bytes: int
    digest: str

    @property
    def name(self) -> str:
        """In a folder on this disk, which is flat."""
        return self.path.rpartition("/")[2]


def listed(repository: str, kind: str, folder: Path) -> list[File]:
    """What the hub has, at the commit that `folder` was begun with, if it was.

    Raises HubError in bounded time, and InputError for a folder with another repository's files.
    """
    from huggingface_hub import HfApi

    begun = list(_noted(_place(folder)).values())
    if other := {str(entry.get("repository")) for entry in begun} - {repository}:
        raise InputError(f"{folder}: has files of {', '.join(other)}; expected {repository}")
    asked: Any = {"revision": begun[0]["commit"]} if begun else {}
    asked |= {"repo_type": kind, "files_metadata": True, "timeout": ANSWER_SECONDS}
    info = _tried(lambda: HfApi().repo_info(repository, **asked), repository, LIST_PAUSES)
    files = []
    for found in info.siblings or ():
        lfs, path = found.lfs, found.rfilename
        size, digest = (lfs.size, lfs.sha256) if lfs else (found.size, found.blob_id)
        if size is None or not digest:
            raise HubError(f"{endpoint()}: names no size or no hash of {repository}/{path}")
        files.append(File(repository, kind, str(info.sha), path, size, digest))
    return files


def lacking(files: Sequence[File], folder: Path) -> list[File]:
    """Those that are not there or damaged; an interrupted download has only checked ones."""
    place = _place(folder)
    return [
        file
        for file in files
        if not (path := place / file.name).is_file()
        or _size(path) != file.bytes
        or (place == folder and _digest(path, file) != file.digest)
    ]


def room(files: Sequence[File], folder: Path) -> tuple[int, int]:
    """Bytes of `lacking` files that are still to come, and bytes free where `folder` will be."""
    parts = (_place(folder) / f"{file.name}.part" for file in files)
    there = next(place for place in folder.absolute().parents if place.exists())
    to_come = sum(file.bytes for file in files) - sum(map(_size, parts))
    return to_come, shutil.disk_usage(there).free


def fetch(files: Sequence[File], folder: Path, progress: Any) -> None:
    """Bring `lacking` files into `folder`; what else lies there stays.

    `progress.update` gets the bytes that came. Raises HubError, StorageError where the disk does
    not take it, BusyError where another process is at it; the next call goes on from there.
    """
    partial = _partial(folder)
    try:
        if folder.exists():
            if not files:
                return
            there = [folder / file.name for file in files if (folder / file.name).exists()]
            if own := [path for path in there if path.name not in _noted(folder)]:
                raise InputError(
                    f"{own[0]}: another file, not of the hub; move it or fetch elsewhere"
                )
            for path in there:
                path.unlink()
            folders.remove(partial)
            os.replace(folder, partial)
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / "lock", timeout=0):
            for number, file in enumerate(files, 1):
                _get(file, partial, progress)
                log.info("%s: whole (%d of %d)", file.name, number, len(files))
        for rest in (partial / "lock", *partial.glob("*.part")):
            rest.unlink(missing_ok=True)
        os.replace(partial, folder)
    except Timeout:
        raise BusyError(f"{folder}: another process is fetching it") from None
    except OSError as error:
        raise StorageError(
            f"{folder}: could not be written: {error}; {room(files, folder)[1]:,} bytes are free; "
            "the same command goes on from here"
        ) from error


def cached(name: str, patterns: list[str]) -> Path:
    """A model's snapshot in the client's own cache; raises HubError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the client's errors share no base, nor its HTTP library's
        raise refusal(error.__cause__ or error, name) from None


def endpoint() -> str:
    """The hub's address, or its mirror's."""
    from huggingface_hub import constants

    return _plain(constants.ENDPOINT)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _place(folder: Path) -> Path:
    return _partial(folder) if _partial(folder).exists() and not folder.exists() else folder


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _noted(place: Path) -> dict[str, Any]:
    return regular.read_json(place / folders.SUMS) if (place / folders.SUMS).exists() else {}


def _digest(path: Path, file: File) -> str:
    with open(path, "rb") as content:
        if len(file.digest) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest()
        blob = b"blob %d\0" % _size(path) + content.read()
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def _get(file: File, partial: Path, progress: Any) -> None:
    """Fetch a file from where an earlier try stopped, check it, and note it in `folders.SUMS`."""
    part, what = partial / f"{file.name}.part", f"{file.repository}/{file.path}"
    for _ in range(TRIES):
        _tried(lambda: _stream(file, part, progress), what, FILE_PAUSES, lambda: _size(part))
        if _digest(part, file) == file.digest:
            break
        part.unlink()
        log.warning("%s: came with another hash than the hub names", what)
    else:
        raise HubError(
            f"{endpoint()}: {what} came damaged {TRIES} times; a mirror or a proxy on the way "
            "changes it"
        )
    sha256 = (
        file.digest if len(file.digest) == 64 else hashlib.sha256(part.read_bytes()).hexdigest()
    )
    noted = _noted(partial) | {file.name: file._asdict() | {"sha256": sha256}}
    with open(partial / f"{folders.SUMS}.part", "w", encoding="utf-8", newline="\n") as sums:
        json.dump(noted, sums, indent=1)
        sums.flush()
        os.fsync(sums.fileno())
    os.replace(sums.name, partial / folders.SUMS)
    os.replace(part, partial / file.name)


def _stream(file: File, part: Path, progress: Any) -> None:
    """What `part` lacks, in one request of the client, which itself keeps no part for a restart."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    url = hf_hub_url(file.repository, file.path, repo_type=file.kind, revision=file.commit)
    with open(part, "ab") as stream:
        if stream.tell() > file.bytes:
            stream.seek(0)
            stream.truncate()
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=file.bytes,
            tqdm_class=cast(Any, lambda **_: nullcontext(progress)),
        )
        stream.flush()
        os.fsync(stream.fileno())


def _tried(
    call: Callable[[], T], what: str, pauses: Sequence[float], reached: Callable[[], int] = int
) -> T:
    """What `call` gives; where the connection breaks, again, and anew whenever bytes came."""
    import httpx2

    theirs = logging.getLogger("huggingface_hub")
    theirs.handlers, theirs.propagate = [_Voice()], False
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs each address, signed ones too
    broken = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    left, so_far = list(pauses), reached()
    while True:
        try:
            return call()
        except Exception as error:  # as in `cached`
            if isinstance(error, OSError) and error.errno is not None:  # of this disk
                raise
            if reached() > so_far:
                left, so_far = list(pauses), reached()
            passing = getattr(getattr(error, "response", None), "status_code", 0) in PASSING
            too_few = type(error) is OSError  # bytes, at an end without an error
            if not left or not (passing or too_few or isinstance(error, broken)):
                raise refusal(error, what) from None
            log.warning("%s: %s; next try in %d s", what, _said(error), left[0])
            time.sleep(left.pop(0))


def refusal(error: BaseException, what: str) -> HubError:
    """The client says well what an answer means; without a secret, and with the way to a mirror."""
    return HubError(f"{endpoint()}: {what}: {_said(error)} (HF_ENDPOINT names a mirror)")


def _said(error: BaseException) -> str:
    return cut(f"{type(error).__name__}: {_plain(' '.join(str(error).split()))}", 600)


def _plain(text: str) -> str:
    """Without a user in an address, without what signs one, and without the token."""
    from huggingface_hub import get_token

    text = text.replace(get_token() or "\0", "***")
    return re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?[^\s'\"]*", "", text))


class _Voice(logging.Handler):
    """What the client warns of, in our log."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("%s", _plain(record.getMessage().replace("\n", " ")))
