"""Which files of a folder a corpus takes, and which it passes over, and why."""

from __future__ import annotations

import fnmatch
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
# Of which nobody has to be told; data/corpus holds one, and a fetched folder its sums.
OTHERS = (".gitkeep", ".gitignore", "sha256.json")
LINKED = "linked folder"  # a kind that is refused

Parts = Sequence[str]  # of a path or a pattern


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
    taken, passed = _listed(config, suffixes)
    if LINKED in passed:
        raise InputError(
            f"corpus.path={config.path}: {_some(passed[LINKED])}: a linked folder, which DVC does "
            "not watch, so that an edit in it would go unnoticed; link its files instead "
            "(GNU: `cp -rs`) or copy them, or name it in corpus.path"
        )
    # Python has a surrogate for each byte of a name that is no UTF-8.
    if odd := [name for name in taken if any("\ud800" <= char <= "\udfff" for char in name)]:
        raise InputError(
            f"corpus.path={config.path}: {_some(odd)}: a name that is not UTF-8, which DVC "
            "refuses; rename it"
        )
    if not taken:
        asked = f"corpus.path={config.path}, corpus.pattern={config.pattern}"
        why = left_out(config, suffixes) or _takes(config, suffixes)
        raise InputError(f"{asked}: no file found; {why}{_way(config)}")
    return dict(sorted(taken.items()))


def left_out(config: CorpusConfig, suffixes: Sequence[str]) -> str:
    """What is passed over under corpus.path, and why, in one line; "" where it is nothing."""
    if not suffixes or Path(config.path).is_file():
        return ""
    _, passed = _listed(config, suffixes)
    if not passed:
        return ""
    kinds = sorted(passed, key=lambda kind: (-len(passed[kind]), kind))
    said = [f"{len(passed[kind]):,} {kind} ({_some(passed[kind])})" for kind in kinds]
    if rest := sum(len(passed[kind]) for kind in kinds[MOST_KINDS:]):
        said[MOST_KINDS:] = [f"{rest:,} of other kinds"]
    other = any(kind.startswith(".") or kind == BARE for kind in kinds)
    return f"left out {', '.join(said)}" + (f"; {_takes(config, suffixes)}" if other else "")


def _some(names: Iterable[str]) -> str:
    """The first names for a person: bytes that are no UTF-8 and what does not print, as escapes."""
    names = sorted(names)
    shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names[:MOST_NAMES]]
    return ", ".join([*map(terminal.line, shown), *["..."] * (len(names) > MOST_NAMES)])


def _way(config: CorpusConfig) -> str:
    way = "; `python -m pipeline fetch fineweb-edu` gets a corpus"
    return way if config.source == "parquet" else ""


def _takes(config: CorpusConfig, suffixes: Sequence[str]) -> str:
    plain = [suffix for suffix in suffixes if not suffix.endswith(PACKED)]
    also = f", also as {' or '.join(PACKED)}" if len(plain) < len(suffixes) else ""
    return f"corpus.source={config.source} takes {' and '.join(plain)}{also}"


def _listed(
    config: CorpusConfig, suffixes: Sequence[str]
) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """What lies under corpus.path: {name: path} of the files to read, {kind: names} of the rest."""
    root = Path(config.path)
    if not root.is_dir():
        raise InputError(f"corpus.path={config.path}: no such file or folder{_way(config)}")
    pattern = PurePosixPath(config.pattern).parts
    taken: dict[str, Path] = {}
    passed: defaultdict[str, list[str]] = defaultdict(list)

    def unreadable(error: OSError) -> None:
        passed["unreadable"].append(f"{Path(error.filename).relative_to(root).as_posix()}/")

    # As pathlib's `glob`, which follows links in 3.12 at some places and in 3.13 at others.
    for folder, folders, names in os.walk(root, onerror=unreadable):
        for name in list(folders):
            path = Path(folder, name)
            parts = path.relative_to(root).parts
            if kind := _shut_as(path, parts, pattern):
                folders.remove(name)
                passed[kind].append("/".join(parts) + "/" * (kind != LINKED))
        for name in (name for name in names if name not in OTHERS):
            path = Path(folder, name)
            parts = path.relative_to(root).parts
            if kind := _passed_as(path, parts, pattern, suffixes):
                passed[kind].append("/".join(parts))
            else:
                taken["/".join(parts)] = path
    return taken, passed


def _shut_as(path: Path, parts: Parts, pattern: Parts) -> str:
    """Why a folder is not looked into; "" if it is."""
    if path.name.startswith("."):
        return "hidden"
    if not _fits(parts, pattern, below=True):
        return "not of corpus.pattern"
    return LINKED if path.is_symlink() else ""


def _passed_as(path: Path, parts: Parts, pattern: Parts, suffixes: Sequence[str]) -> str:
    """Why a file is not taken; "" if it is."""
    if path.name.startswith("."):
        return "hidden"
    if not os.path.isfile(path):
        return "broken link" if path.is_symlink() else "no plain file"
    if not _fits(parts, pattern):
        return "not of corpus.pattern"
    ends = [suffix.lower() for suffix in path.suffixes]  # of "a.b.JSONL.gz" the last two count
    suffix = "".join(ends[-2:] if ends and ends[-1] in PACKED else ends[-1:])
    if Path(pattern[-1]).suffix or suffix in suffixes:
        return ""
    return suffix or BARE


def _fits(parts: Parts, pattern: Parts, below: bool = False) -> bool:
    """Whether a path is of a glob, in which `**` stands for any number of folders.

    With `below`, whether something in the folder of that path can be.
    """
    if below and not parts:
        return bool(pattern)
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return below or _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:], below)
