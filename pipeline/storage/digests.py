"""Digests of values, files and folders: SHA-256 for us, MD5 as DVC names what it keeps."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MD5 = functools.partial(hashlib.md5, usedforsecurity=False)


def digest_of(value: Any) -> str:
    """SHA-256 of a plain value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tree_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and contents in order."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        total.update(file.relative_to(path).as_posix().encode() + b"\0")
        with open(file, "rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def dvc_md5(path: Path) -> str:
    """What DVC calls this file or folder in dvc.lock and in its cache."""
    if path.is_file():
        with open(path, "rb") as content:
            return hashlib.file_digest(content, _MD5).hexdigest()
    files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    listed = [{"md5": dvc_md5(files[name]), "relpath": name} for name in sorted(files)]
    return _MD5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def damaged(cache: Path) -> Iterator[Path]:
    """Files of a DVC cache whose content is not the MD5 that they are named after.

    DVC trusts a read-only file whose time has not changed, and keeps it when a stage makes the
    right content once more: only deleting it helps.
    """
    for path in sorted(cache.glob("??/*")):
        if dvc_md5(path) != f"{path.parent.name}{path.name}".removesuffix(".dir"):
            yield path
