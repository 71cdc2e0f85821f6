"""Which files of a folder a corpus takes, and which it passes over, and why."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline import terminal
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

PACKED = (".gz", ".zst")
MOST_NAMES = 3  # of each kind that is passed over
MOST_KINDS = 6
BARE = "without a suffix"
GITS_OWN = (".gitkeep", ".gitignore")  # of which nobody has to be told; data/corpus holds one

Parts = Sequence[str]  # of a path or a pattern


@dataclass
class Listing:
    """What lies under corpus.path: the files to read by name, and the names passed over by kind."""

    taken: dict[str, Path] = field(default_factory=dict)
    passed: dict[str, list[str]] = field(default_factory=dict)
    linked: list[str] = field(default_factory=list)  # folders behind a symbolic link

    def passes(self, kind: str, name: str) -> None:
        self.passed.setdefault(kind, []).append(name)


def packed(*suffixes: str) -> tuple[str, ...]:
    """The suffixes, and the same of packed files: ".txt", ".txt.gz", ".txt.zst"."""
    return (*suffixes, *(suffix + end for suffix in suffixes for end in PACKED))


def files(config: CorpusConfig, suffixes: Sequence[str]) -> dict[str, Path]:
    """{name: path} in the order of the names, which are relative to corpus.path, with `/`.

    corpus.path is a file or a folder of which corpus.pattern says what to take. Only files with one
    of the source's `suffixes` are taken, unless the pattern itself ends in one; nothing hidden.

    Raises InputError where there is no file, for a name that is no UTF-8, and for a linked folder:
    DVC does not look into it, so an edit in it would go unnoticed.
    """
    path = Path(config.path)
    if path.is_file():
        return {path.name: path}
    listing = _listed(config, suffixes)
    if listing.linked:
        raise InputError(
            f"corpus.path={config.path}: {_some(listing.linked)}: a linked folder, which DVC does "
            "not watch, so that an edit in it would go unnoticed; link its files instead "
            "(GNU: `cp -rs`) or copy them, or name it in corpus.path"
        )
    if odd := [name for name in listing.taken if not _is_utf8(name)]:
        raise InputError(
            f"corpus.path={config.path}: {_some(odd)}: a name that is not UTF-8, which DVC "
            "refuses; rename it"
        )
    if not listing.taken:
        asked = f"corpus.path={config.path}, corpus.pattern={config.pattern}"
        passed = left_out(config, suffixes)
        raise InputError(f"{asked}: no file found; {passed or _takes(config, suffixes)}")
    return {name: listing.taken[name] for name in sorted(listing.taken)}


def left_out(config: CorpusConfig, suffixes: Sequence[str]) -> str:
    """What is passed over under corpus.path, and why, in one line; "" where it is nothing."""
    if not suffixes or Path(config.path).is_file():
        return ""
    passed = _listed(config, suffixes).passed
    if not passed:
        return ""
    kinds = sorted(passed, key=lambda kind: (-len(passed[kind]), kind))
    said = [f"{len(passed[kind]):,} {kind} ({_some(passed[kind])})" for kind in kinds]
    if rest := sum(len(passed[kind]) for kind in kinds[MOST_KINDS:]):
        said[MOST_KINDS:] = [f"{rest:,} of other kinds"]
    other = any(kind.startswith(".") or kind == BARE for kind in kinds)
    return f"left out {', '.join(said)}" + (f"; {_takes(config, suffixes)}" if other else "")


def shown(name: str) -> str:
    """A file's name for a person: bytes that are no UTF-8 and what does not print, as escapes."""
    return terminal.line(os.fsencode(name).decode("utf-8", "backslashreplace"))


def _some(names: list[str]) -> str:
    some = [shown(name) for name in sorted(names)[:MOST_NAMES]]
    return ", ".join(some + ["..."] * (len(names) > len(some)))


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _takes(config: CorpusConfig, suffixes: Sequence[str]) -> str:
    plain = [suffix for suffix in suffixes if not suffix.endswith(PACKED)]
    also = f", also as {' or '.join(PACKED)}" if len(plain) < len(suffixes) else ""
    return f"corpus.source={config.source} takes {' and '.join(plain)}{also}"


def _listed(config: CorpusConfig, suffixes: Sequence[str]) -> Listing:
    """Every entry under corpus.path; folders that are hidden, linked or not asked for stay shut."""
    root, listing = Path(config.path), Listing()
    if not root.is_dir():
        raise InputError(f"corpus.path={config.path}: no such file or folder")
    pattern = PurePosixPath(config.pattern).parts

    def unreadable(error: OSError) -> None:
        listing.passes("unreadable", _name(root, error.filename, "") + "/")

    # As pathlib's `glob`, which follows links in 3.12 at some places and in 3.13 at others.
    for folder, folders, names in os.walk(root, onerror=unreadable):
        for name in list(folders):
            if not _enters(root, Path(folder, name), pattern, listing):
                folders.remove(name)
        for name in (name for name in names if name not in GITS_OWN):
            path = Path(folder, name)
            whole = _name(root, folder, name)
            if kind := _passed_as(path, whole.split("/"), pattern, suffixes):
                listing.passes(kind, whole)
            else:
                listing.taken[whole] = path
    return listing


def _name(root: Path, folder: str | Path, name: str) -> str:
    return Path(folder, name).relative_to(root).as_posix()


def _enters(root: Path, path: Path, pattern: Parts, listing: Listing) -> bool:
    """Whether to look into a folder; if not, it is noted in `listing`."""
    name = _name(root, path, "")
    if path.name.startswith("."):
        listing.passes("hidden", f"{name}/")
    elif not _reaches(name.split("/"), pattern):
        listing.passes("not of corpus.pattern", f"{name}/")
    elif path.is_symlink():
        listing.linked.append(name)
    else:
        return True
    return False


def _passed_as(path: Path, parts: Parts, pattern: Parts, suffixes: Sequence[str]) -> str:
    """Why a file is not taken; "" if it is."""
    if parts[-1].startswith("."):
        return "hidden"
    if not os.path.isfile(path):
        return "broken link" if path.is_symlink() else "no plain file"
    if not _fits(parts, pattern):
        return "not of corpus.pattern"
    suffix = _suffix(parts[-1])
    if Path(pattern[-1]).suffix or suffix in suffixes:
        return ""
    return suffix or BARE


def _suffix(name: str) -> str:
    """ "a.txt" -> ".txt", "a.b.JSONL.gz" -> ".jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] and suffixes[-1] in PACKED else suffixes[-1:])


def _fits(parts: Parts, pattern: Parts) -> bool:
    """Whether a path is of a glob, in which `**` stands for any number of folders."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _reaches(parts: Parts, pattern: Parts) -> bool:
    """Whether something below a folder can be of a glob."""
    if not parts or not pattern:
        return bool(pattern)
    if pattern[0] == "**":
        return True
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _reaches(parts[1:], pattern[1:])
