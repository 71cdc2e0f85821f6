"""What a stage's result rests on, as the stage found it, held against what is there as it ends.

DVC hashes settings and files after a stage's command has ended, and files the result under what
it finds then. After an edit meanwhile it would say that other settings or code made this result.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths, yaml_text
from pipeline.config import flatten, settings_of
from pipeline.errors import ConfigError, cut
from pipeline.records import stage_graph

if TYPE_CHECKING:
    from pipeline.config import Config

Stamps = dict[str, tuple[int, int]]  # bytes, and when it was last written, by path
MOST_NAMED = 5  # files in one message


@functools.cache
def as_found(name: str) -> str:
    """SHA-256 of a file of the project as this process met it first; kept from then on."""
    return _digest(stage_graph.ROOT / name)


def find_code() -> None:
    """Meet every module, whatever stage this is: 80 small files take 5 ms."""
    for room in ("pipeline", "stages"):
        for path in (stage_graph.ROOT / room).rglob("*.py"):
            as_found(path.relative_to(stage_graph.ROOT).as_posix())


def code_of(*stages: str) -> dict[str, str]:
    """SHA-256 by path of the files of the project that decide these stages' results, as found."""
    names = sorted({name for stage in stages for name in stage_graph.sources(stage)})
    return {name: as_found(name) for name in names}


def code_digest() -> str:
    """SHA-256 over all files of the project that decide any result."""
    total = hashlib.sha256()
    for name, digest in code_of(*stage_graph.stages()).items():
        total.update(f"{name}\0{digest}\0".encode())
    return total.hexdigest()


def edits(stage: str, config: Config) -> list[str]:
    """A phrase for each setting and file of the project that `stage` found otherwise than it is.

    Only those that dvc.yaml lists for the stage count: DVC looks at no other.
    """
    return _edited_settings(stage, config) + [
        f"{name}: edited"
        for name, digest in code_of(stage).items()
        if _digest(stage_graph.ROOT / name) != digest
    ]


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A phrase for each setting that two sets of them do not share."""
    names = dict.fromkeys([*before, *now])
    changed = (name for name in names if before.get(name) != now.get(name))
    return [f"{name}: {_shown(before, name)} then, {_shown(now, name)} now" for name in changed]


def input_stamps(stage: str, config: Config) -> Stamps:
    """Size and time of every file in the stage's other deps: what it reads and did not write."""
    found: Stamps = {}
    for place in map(Path, stage_graph.inputs(stage, flatten(config))):
        for path in [place, *sorted(place.rglob("*"))]:
            if path.is_file():
                facts = path.stat()
                found[str(path)] = (facts.st_size, facts.st_mtime_ns)
    return found


def changed_inputs(before: Stamps, now: Stamps) -> list[str]:
    """A phrase for each file that is another one, new or gone, the first MOST_NAMED of them."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    words = [
        f"{name}: {'added' if name not in before else 'changed' if name in now else 'gone'}"
        for name in names[:MOST_NAMED]
    ]
    more = len(names) - len(words)
    return [*words, *([f"and {more:,} more"] if more else [])]


def _edited_settings(stage: str, config: Config) -> list[str]:
    try:
        now = settings_of(yaml_text.read(paths.PARAMS))
    except ConfigError as error:
        return [str(error)]
    mine = stage_graph.settings_of(stage, flatten(config))
    return differing(mine, stage_graph.settings_of(stage, now))


def _shown(settings: dict[str, Any], name: str) -> str:
    return cut(str(settings[name])) if name in settings else "not there"


def _digest(path: Path) -> str:
    """SHA-256 of a text file, whatever its line endings; nothing for one that is not there."""
    try:
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    except FileNotFoundError:
        return ""


def listed(phrases: Iterable[str]) -> str:
    """A line each, indented."""
    return "".join(f"\n  {phrase}" for phrase in phrases)
