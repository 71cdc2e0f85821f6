"""Code, settings and inputs of a stage as it found them, compared with what is there at its end.

DVC hashes settings and files after a stage's command has ended, and stores the result under these
hashes. After an edit meanwhile it would say that other settings or code made the result.
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
    """SHA-256 of a file of the project when this process first asked for it."""
    return _digest(stage_graph.ROOT / name)


def find_code() -> None:
    """Remember the digest of every module as it is now; some 100 small files take 5 ms."""
    for folder in ("pipeline", "stages"):
        for path in (stage_graph.ROOT / folder).rglob("*.py"):
            as_found(path.relative_to(stage_graph.ROOT).as_posix())


def code_of(*stages: str) -> dict[str, str]:
    """SHA-256 by path, as found, of the project's files that decide these stages' results."""
    names = sorted({name for stage in stages for name in stage_graph.sources(stage)})
    return {name: as_found(name) for name in names}


def code_digest() -> str:
    """SHA-256 over the project's files that decide any result."""
    total = hashlib.sha256()
    for name, digest in code_of(*stage_graph.stages()).items():
        total.update(f"{name}\0{digest}\0".encode())
    return total.hexdigest()


def edits(stage: str, config: Config) -> list[str]:
    """A phrase for each setting and file of the project that was edited since `stage` began.

    Only those count that dvc.yaml lists for the stage, since DVC looks at no others.
    """
    try:
        now = stage_graph.settings_of(stage, settings_of(yaml_text.read(paths.PARAMS)))
        found = differing(stage_graph.settings_of(stage, flatten(config)), now)
    except ConfigError as error:
        found = [str(error)]
    code = code_of(stage).items()
    return found + [
        f"{name}: edited" for name, digest in code if _digest(stage_graph.ROOT / name) != digest
    ]


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A phrase for each setting whose value differs."""
    names = dict.fromkeys([*before, *now])
    changed = (name for name in names if before.get(name) != now.get(name))
    return [f"{name}: {_shown(before, name)} then, {_shown(now, name)} now" for name in changed]


def input_stamps(stage: str, config: Config) -> Stamps:
    """Size and time of every file in the stage's other deps: outputs of others, the user's own."""
    stamps: Stamps = {}
    for place in map(Path, stage_graph.inputs(stage, flatten(config))):
        for path in [place, *sorted(place.rglob("*"))]:
            if path.is_file():
                facts = path.stat()
                stamps[str(path)] = (facts.st_size, facts.st_mtime_ns)
    return stamps


def changed_inputs(before: Stamps, now: Stamps) -> list[str]:
    """A phrase for each of the first MOST_NAMED files that changed, are new or are gone."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    phrases = [
        f"{name}: {'added' if name not in before else 'changed' if name in now else 'gone'}"
        for name in names[:MOST_NAMED]
    ]
    more = len(names) - len(phrases)
    return [*phrases, f"and {more:,} more"] if more else phrases


def _shown(settings: dict[str, Any], name: str) -> str:
    return cut(str(settings[name])) if name in settings else "not there"


def _digest(path: Path) -> str:
    """SHA-256 of a text file, whatever its line endings; "" for a missing one."""
    try:
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    except FileNotFoundError:
        return ""


def listed(phrases: Iterable[str]) -> str:
    """The phrases, each on an indented line of its own."""
    return "".join(f"\n  {phrase}" for phrase in phrases)
