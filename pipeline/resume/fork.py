"""Forks: the states that trainings have kept, one of them written out, and a run begun with it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import paths
from pipeline.config import UNSET_PATH, Config
from pipeline.errors import ConfigError, InputError
from pipeline.published import SIZES
from pipeline.records import dvc_history, record_reader
from pipeline.records.record_file import start_event
from pipeline.records.run_data import Event, Log
from pipeline.resume import run_folder
from pipeline.resume.checkpoints import KEPT, name_of
from pipeline.resume.snapshot import FACTS, read_facts
from pipeline.storage.digests import digest_of, tree_digest
from pipeline.storage.folders import SUMS, check, copy, problems, writing

POINTS = "parent.jsonl"  # beside a forked state: the record of its training up to there
SHAPE = (*SIZES, "vocab_rows")
ID_DIGITS = 4  # of an id of `ls` at least
STEP_TOKENS = ("batch_size", "sequence_length", "accumulate")  # whose product a step has


@dataclass(frozen=True)
class Kept:
    """A training, and the states of it that there are to start from."""

    name: str
    record: Log
    steps: tuple[int, ...]  # done, in ascending order
    folder: Path | None  # where its checkpoints lie; None: in DVC's cache only
    rev: str = ""

    @property
    def params(self) -> dict[str, Any]:
        return self.record[0]["params"]

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings that this version knows, but for the debugger's, which are not its own."""
        known = configuration.kinds()
        return {n: v for n, v in self.params.items() if n in known and not n.startswith("debug.")}

    def before(self, step: int) -> int:
        """The newest state from which `step`, counted from 0, is still to be made.

        Raises InputError that says what to set where there is none.
        """
        if found := [done for done in self.steps if done <= step]:
            return found[-1]
        raise InputError(
            f"{self.name}: no checkpoint before step {step:,}; kept are those after "
            f"{_listed(self.steps)} steps. Run it again with checkpoint.keep_every={max(1, step)} "
            "or a part of that: it keeps a state before that step"
        )

    def copy(self, step: int, scratch: Path) -> Path:
        """A folder with the checkpoint after so many steps, checked; it may be a copy.

        Raises InputError for a step without one, and for one that is not whole any more.
        """
        if step not in self.steps:
            raise InputError(
                f"{self.name}@{step}: no checkpoint of that step; kept are those after "
                f"{_listed(self.steps)} steps. checkpoint.keep_every says which ones stay"
            )
        inside = paths.CHECKPOINTS / name_of(step)
        folder = self.folder / name_of(step) if self.folder else None
        folder = folder or dvc_history.copy_of(self.rev, inside.as_posix(), scratch)
        if not folder:
            raise InputError(f"{self.name}@{step}: {inside.as_posix()} is in no cache any more")
        check(folder)
        return folder


def find(name: str) -> Kept:
    """The training of a name, as `show` or `ls` lists it, or of the beginning of an id of `ls`.

    Of several it is the newest with states to start from. Raises InputError where there is none.
    """
    there: dict[str, None] = {}
    found: list[Kept] = []
    for left in run_folder.every():
        if left.identity.get("stage") == "train":
            own = left.status.get("name") or dvc_history.WORKSPACE
            there[own] = None
            if name == own or (len(name) >= ID_DIGITS and left.folder.name.startswith(name)):
                found += _of_folder(own, left.folder)
    others = list(dvc_history.experiments(("train",)))
    for one in others:
        if name == one.name and (record := one.records.get("train")):
            said = dvc_history.read_file(one, paths.CHECKPOINTS / KEPT, paths.root())
            here = None if one.rev else paths.root() / paths.CHECKPOINTS
            steps = tuple(sorted(json.loads(said))) if said else ()
            found.append(Kept(one.name, Log.of(record), steps, here, one.rev))
    if not found:
        known = ", ".join(there | {one.name: None for one in others if "train" in one.records})
        raise InputError(f"{name}: no training of that name; there are: {known or 'none'}")
    return max(found, key=lambda one: (bool(one.steps), one.record[0]["time"]))


def _of_folder(name: str, folder: Path) -> Iterator[Kept]:
    journal, states = folder / run_folder.JOURNAL, folder / "checkpoints"
    if journal.exists() and (record := record_reader.read(journal, "train", whole=False)):
        steps = sorted(int(path.name.removeprefix("step-")) for path in states.glob("step-*"))
        yield Kept(name, record, tuple(steps), states)


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps) or "no"


# --- written out, so that DVC can depend on it


def export(kept: Kept, step: int) -> Path:
    """Write a state below `data/forks`, with its training's points so far; its path from the root.

    The name ends in a digest of the content, so the same state has the same name.
    """
    scratch = paths.runs()
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = kept.copy(step, Path(folder))
        facts = read_facts(source)
        # The fork has a budget, and a best model, of its own.
        facts |= {"best_loss": "inf", "best_step": 0, "budget": {"spent": 0.0, "planned": 0}}
        tokens = math.prod(kept.params[f"train.{name}"] for name in STEP_TOKENS)
        parent = {"name": kept.name, "step": step, "record": kept.record[0]["id"], "tokens": tokens}
        facts["lineage"] = [*facts.get("lineage", []), parent]
        facts["shape"] = {name: kept.params[f"model.{name}"] for name in SHAPE}
        points = "".join(json.dumps(event) + "\n" for event in _until(kept.record, step))
        digest = digest_of([tree_digest(source / SUMS), facts, points])[:8]
        place = paths.FORKS / f"{kept.name}-{step}-{digest}"
        target = paths.root() / place
        if not (target / SUMS).exists() or problems(target):
            size = sum(path.stat().st_size for path in source.iterdir())
            with writing(target, size) as partial:
                for path in source.glob("*.safetensors"):
                    shutil.copyfile(path, partial / path.name)
                (partial / FACTS).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
                (partial / POINTS).write_text(points, "utf-8")
    return place


def _until(record: Log, step: int) -> Iterator[Event]:
    """The points and texts of so many steps; what is no curve of training is the parent's own."""
    for event in record.of_kind("metrics", "text"):
        if event["kind"] == "text":
            if event["step"] <= step:
                yield event
        elif event["step"] < step and {"train/loss", "train/val_loss"} & event["values"].keys():
            yield event


# --- a run that begins with it


def problem(config: Config, facts: Mapping[str, Any]) -> str:
    """Why settings do not fit a forked state, by its facts; "" where they do."""
    said = [
        f"model.{name}={mine}: the forked state is of model.{name}={theirs}"
        for name, theirs in facts["shape"].items()
        if (mine := getattr(config.model, name)) != theirs
    ]
    if config.train.steps <= facts["step"]:
        said.append(
            f"train.steps={config.train.steps}: expected more than {facts['step']}, the steps that "
            "the forked state has behind it"
        )
    mine, theirs = config.init.narrowing(config.model.n_embd), _narrowing(facts["optimizer"])
    if mine != theirs:
        said.append(
            f"init.scheme={config.init.scheme} init.mup_base={config.init.mup_base}: the matrices' "
            f"rate times {mine:g}, in the forked state times {theirs:g}; a fork keeps the scheme "
            "of its weights"
        )
    return "\n".join(said)


def _narrowing(optimizer: Mapping[str, Any]) -> float:
    """`InitConfig.narrowing` of the training that a snapshot's optimizer is of."""
    options = [group["options"] for group in optimizer["groups"]]
    by_mup = [one["rate_factor"] for one in options if "rate_factor" in one]
    return float(by_mup[0]) if by_mup and optimizer["kind"] == "AdamW" else 1.0


def start(config: Config) -> Mapping[str, Any]:
    """The facts of the state that a training begins with; none where it is no fork.

    Raises ConfigError where the settings do not fit that state, InputError where it is none.
    """
    source = Path(config.train.fork)
    if config.train.fork == UNSET_PATH:
        return {}
    try:
        facts = read_facts(source)
        if said := problem(config, facts):
            raise ConfigError(said)
        facts["lineage"][-1]["step"]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"train.fork={source}: not a state that `fork` wrote") from None
    return facts


def begin(run: run_folder.Run, config: Config) -> str:
    """Give a fork's run its state and its parents' points, once; what a person is told, if any.

    What follows is a training that resumes. Raises what `start` does, and InputError where the
    state is not whole.
    """
    facts, source = start(config), Path(config.train.fork)
    if not facts or any(run.folder.glob("checkpoints/step-*")):
        return ""
    check(source)
    parent = facts["lineage"][-1]
    of = f"{parent['name']}@{parent['step']}"
    tags = {"fork": of, "fork.lineage": json.dumps(facts["lineage"])}
    head = [start_event("train", config), {"kind": "tags", "values": tags}]
    lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in head)
    # First: without the checkpoint all of this is done again.
    run.journal.write_text(lines + (source / POINTS).read_text("utf-8"), "utf-8", newline="\n")
    copy(source, run.folder / "checkpoints" / name_of(facts["step"]))
    return f"a fork of {of}: starting from step {parent['step']:,}/{config.train.steps:,}"
