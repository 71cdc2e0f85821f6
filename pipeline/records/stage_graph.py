"""What dvc.yaml says: which stages there are, and what decides their results."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]  # of the code that runs, in a temporary workspace too


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml; its paths are relative to the workspace."""

    deps: tuple[str, ...]  # files and folders; `${corpus.path}` is a path that a setting names
    params: tuple[str, ...]  # settings or whole sections
    outs: tuple[str, ...]

    def reads(self, setting: str) -> bool:
        """Whether the stage's result depends on a setting, given by its dotted name."""
        return any(setting == name or setting.startswith(f"{name}.") for name in self.params)


@functools.cache
def stages() -> dict[str, Stage]:
    """Every stage by name, in the order of dvc.yaml, in which they run."""
    entries = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    return {
        name: Stage(*(tuple(entry.get(part, ())) for part in ("deps", "params", "outs")))
        for name, entry in entries.items()
    }


@functools.cache
def upstream(stage: str) -> tuple[str, ...]:
    """The stages that `stage` builds on, directly or through others, in the order they run in."""
    deps = set(stages()[stage].deps)
    parents = [name for name, other in stages().items() if deps & set(other.outs)]
    ancestors = {name for parent in parents for name in (*upstream(parent), parent)}
    return tuple(name for name in stages() if name in ancestors)


def settings_of(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted name, that `stage` reads."""
    return {name: value for name, value in settings.items() if stages()[stage].reads(name)}


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted name, that any stage reads."""
    every = stages().values()
    return {n: value for n, value in settings.items() if any(stage.reads(n) for stage in every)}


def changes_training(setting: str) -> bool:
    """Whether the trained weights depend on a setting: not on what is looked at, or kept."""
    read = any(stages()[stage].reads(setting) for stage in (*upstream("train"), "train"))
    return read and not setting.startswith(("debug.", "checkpoint.", "train.fingerprint_every"))


def sources(stage: str) -> tuple[str, ...]:
    """The deps of `stage` that are files of the project: code and pinned versions."""
    made = {out for other in stages().values() for out in other.outs}
    return tuple(dep for dep in stages()[stage].deps if dep not in made and "$" not in dep)


def inputs(stage: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The other deps of `stage`: outputs of earlier stages, and the user's own files."""
    code = set(sources(stage))
    return tuple(
        str(settings[dep[2:-1]]) if dep.startswith("${") else dep
        for dep in stages()[stage].deps
        if dep not in code
    )


def locked(text: bytes) -> dict[str, str]:
    """DVC's MD5 by path of every output in a dvc.lock; empty for a broken one."""
    return {path: md5 for _, outs in _entries(text).values() for path, md5 in outs.items()}


def fitting(text: bytes) -> set[str]:
    """The stages that a dvc.lock has run on the very outputs that it has of the stages before.

    Equal bytes count, whatever settings they were made with: a corpus that was moved gives the
    same tokens, and DVC the training of before.
    """
    entries, outs = _entries(text), locked(text)
    found: set[str] = set()
    for name, stage in stages().items():
        deps = entries[name][0] if name in entries else {}
        made = {dep for dep in stage.deps for other in stages().values() if dep in other.outs}
        alike = all(dep in deps and deps[dep] == outs.get(dep) for dep in made)
        if name in entries and alike and found.issuperset(upstream(name)):
            found.add(name)
    return found


def locked_deps(text: bytes, stage: str) -> dict[str, str]:
    """DVC's MD5 by path of what a dvc.lock was made with; empty for a broken one.

    Of `stage` and the ones before it. DVC puts them there when it has run a stage, and when it has
    found the result in its cache.
    """
    entries = _entries(text)
    if not {*upstream(stage), stage} <= entries.keys():
        return {}
    return {p: md5 for one in (*upstream(stage), stage) for p, md5 in entries[one][0].items()}


@functools.cache  # most commits share their dvc.lock
def _entries(text: bytes) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """By stage, the MD5 by path of what a dvc.lock was made with, and of its outputs."""
    try:
        # The loader in C: the other takes 0.2 s, and a hundred experiments have a lock each.
        lock = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text).get_single_data()
        return {
            name: (_md5s(entry.get("deps", [])), _md5s(entry.get("outs", [])))
            for name, entry in lock["stages"].items()
        }
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def _md5s(listed: list[dict[str, Any]]) -> dict[str, str]:
    return {one["path"]: str(one["md5"]) for one in listed if "md5" in one}


def code_paths(stage: str) -> set[str]:
    """The files of the project that decide the result of `stage`, those of the ones before too."""
    return {name for one in (*upstream(stage), stage) for name in sources(one)}


@functools.cache
def places() -> set[str]:
    """The settings that say where an input lies. What it is DVC knows by its content."""
    return {dep[2:-1] for one in stages().values() for dep in one.deps if dep.startswith("${")}


def own_files(stage: str, settings: Mapping[str, Any]) -> set[str]:
    """The user's files and folders that the stages before `stage` read, such as a corpus."""
    made = {out for other in stages().values() for out in other.outs}
    return {path for one in upstream(stage) for path in inputs(one, settings)} - made
