"""Training checkpoints: when to save, which to keep, and the one to resume from."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.compute import runtime
from pipeline.config import CheckpointConfig, TrainConfig
from pipeline.errors import InputError, StorageError
from pipeline.model.model_dir import save_model
from pipeline.resume.gathering import model_of
from pipeline.resume.snapshot import read_facts, read_tensors, restore, save_snapshot
from pipeline.storage.folders import SUMS, check, copy, discard, recover_all, writing
from pipeline.training.training_step import TrainState

log = logging.getLogger(__name__)

KEPT = "kept.json"  # beside the checkpoints that stay: a list of their steps
ORDERED = "(ordered)"  # in `machine`
FORKS_CHOOSE = ("precision",)  # of `machine`, what a fork may have changed


@dataclass(frozen=True)
class Checkpoint:
    """A snapshot between two steps, and what it says besides."""

    path: Path
    facts: dict[str, Any]  # those of the training's history, and `machine`

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return self.facts["step"]

    @property
    def is_forked(self) -> bool:
        """Whether it is another training's, which this one begins with."""
        lineage = self.facts.get("lineage") or [{"step": -1}]  # earlier versions had none
        return bool(lineage[-1]["step"] == self.step)

    def restore(self, state: TrainState) -> None:
        """Put it into a fresh state and into torch's generators.

        Warns where the machine is another one than the one that saved, and where a fork's optimizer
        moves parameters in another way, so that their moments begin at zero.
        """
        anew = restore(state, read_tensors(self.path), self.facts, self.is_forked)
        runtime.set_rng_state(state.rng, state.precision.device)
        if anew:
            count = sum(1 for _ in state.model.parameters())
            said = f"{len(anew)} of {count} parameters begin with moments at zero ({anew[0]}, ...)"
            log.warning("the forked state is of another optimizer: %s", said)
        then, now = self.facts["machine"], machine(state)
        aside = FORKS_CHOOSE if self.is_forked else ()
        changed = [
            f"{key}: {then.get(key)} then, {now[key]} now"
            for key in now
            if then.get(key) != now[key] and key not in aside
        ]
        if changed:
            does = "forks" if self.is_forked else "resumes"
            said = "; ".join(changed)
            log.warning("this training %s, but not bit-equal to an unbroken one: %s", does, said)


def at(run: Path, step: int) -> Checkpoint:
    """The checkpoint after so many steps in a run's folder."""
    path = run / "checkpoints" / name_of(step)
    return Checkpoint(path, read_facts(path))


class Checkpoints:
    """The checkpoints of one training below its run's folder: `checkpoints/` and `best/`.

    A checkpoint is a snapshot between two steps. The best model so far is a model directory of
    its own; checkpoints name it by its step, and those that none names any more go.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig):
        self.folder, self._best = folder / "checkpoints", folder / "best"
        self._settings, self._saved = settings, time.monotonic()
        for parent in (self.folder, self._best):
            recover_all(parent)  # what a killed save left; the run's lock is held

    def due(self, done: int) -> bool:
        """Whether it is time to save after so many steps."""
        minutes = self._settings.every_minutes
        by_time = minutes and time.monotonic() - self._saved >= 60 * minutes
        each = (self._settings.every_steps, self._settings.keep_every)
        return bool(by_time or any(steps and done % steps == 0 for steps in each))

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Write a checkpoint of the state as it stands after a step; old ones go once it is there.

        `facts` are the history's. Raises StorageError where the disk does not take it; the earlier
        checkpoints are as they were.
        """
        state.begin([])
        facts = {**facts, "machine": machine(state)}
        save_snapshot(self.folder / name_of(state.step), state, facts)
        self._saved = time.monotonic()
        with contextlib.suppress(OSError):  # where somebody reads an old one, the next save tries
            for old in self._all()[: -self._settings.keep]:
                if not self._stays(old):
                    discard(old)
        self._prune_best(facts["best_step"])

    def keep_best(self, state: TrainState) -> None:
        """The best model so far; those before it go, unless a checkpoint names them."""
        save_model(model_of(state), self.best(state.step))
        self._prune_best(state.step)

    def _prune_best(self, newest: int) -> None:
        named = {name_of(newest)}
        for path in self._all():
            try:
                named.add(name_of(read_facts(path)["best_step"]))
            except (InputError, KeyError):  # damaged since: which one it names is not known
                return
        with contextlib.suppress(OSError):
            for model in self._best.glob("step-*"):
                if model.name not in named:
                    discard(model)

    def _stays(self, path: Path) -> bool:
        """Whether a checkpoint is one of checkpoint.keep_every."""
        every = self._settings.keep_every
        return bool(every) and int(path.name.removeprefix("step-")) % every == 0

    def write_models(self, last: Path, best: Path, state: TrainState, best_step: int) -> None:
        """Write the training's result: the model as it stands, and the best one."""
        save_model(model_of(state), last)
        copy(self.best(best_step), best)

    def write_kept(self, folder: Path) -> None:
        """Write the checkpoints that stay, and `kept.json`, which lists their steps."""
        kept = [path for path in self._all() if self._stays(path)]
        steps = [read_facts(path)["step"] for path in kept]
        with writing(folder, 0, sums=False) as partial:
            (partial / KEPT).write_text(json.dumps(steps) + "\n", "utf-8")
            for path in kept:
                copy(path, partial / path.name, link=True)

    def best(self, step: int) -> Path:
        """Where the best model of that step lies."""
        return self._best / name_of(step)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there never was one.

        A damaged one is a warning, and goes where an older one is whole. Raises InputError where
        none is: to begin again in silence would throw days away.
        """
        damaged: list[Path] = []
        for path in reversed(self._all()):
            try:
                _check(path)
                found = Checkpoint(path, read_facts(path))
                if best := found.facts["best_step"]:
                    _check(self.best(best))
            except InputError as error:
                log.warning("a damaged checkpoint is passed over:\n%s", error)
                damaged.append(path)
                continue
            for old in damaged:
                discard(old)
            return found
        if damaged:
            raise InputError(
                f"{self.folder}: none of {len(damaged)} checkpoints is whole; "
                "checkpoint.resume=never starts this training anew"
            )
        return None

    def check_room(self, parameters: int, train: TrainConfig) -> None:
        """Raise StorageError where the disk cannot take what this training will keep at a time.

        A checkpoint holds three times the weights and may name a best model of its own; one more
        than `keep` lies there while it is written, beside the last model and the copies of both
        for the pipeline. Of those of `train` some stay; what the pipeline gets of those is links.
        """
        run, c = self.folder.parent, self._settings
        there = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        first = int(self._all()[0].name.removeprefix("step-")) if self._all() else 0
        kept = c.keep + 1 + staying(c, train, first)
        needed = (4 * kept + 5) * 4 * parameters - there
        free = shutil.disk_usage(run).free
        if free < needed:
            lower = f"lower checkpoint.keep={c.keep}"
            lower = f"raise checkpoint.keep_every={c.keep_every}" if c.keep_every else lower
            raise StorageError(
                f"{run}: checkpoints and models of this training need {needed:,} more bytes, "
                f"{free:,} are free; make room, or {lower}"
            )

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def staying(settings: CheckpointConfig, train: TrainConfig, first: int = 0) -> int:
    """How many checkpoints stay from `first` on, none after the last step.

    With a time budget nobody knows, and it is 0.
    """
    every = 0 if train.time_budget else settings.keep_every
    return (train.steps - 1) // every - max(0, first - 1) // every if every else 0


def machine(state: TrainState) -> dict[str, str]:
    """What has to be the same for a resumed training to be bit-equal to an unbroken one.

    On CUDA that takes `train.deterministic` as well.
    """
    precision, ranks = state.precision, state.ranks
    processes = str(ranks.world) + (" (fsdp)" if ranks.sharded else "")
    return {
        "torch": torch.__version__,
        "device": runtime.device_name(precision.device),  # with the threads of a CPU
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "precision": precision.effective + (" (emulated)" if precision.emulated else ""),
        "processes": f"any {ORDERED}" if ranks.ordered else processes,
    }


def _check(folder: Path) -> None:
    """Raise InputError for what is not as it was written; a folder without sums is not ours."""
    if not (folder / SUMS).exists():
        raise InputError(f"{folder / SUMS}: missing")
    check(folder)


def name_of(step: int) -> str:
    return f"step-{step:08}"
