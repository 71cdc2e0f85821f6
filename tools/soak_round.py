"""One training of the soak: its attempts, the moments to disturb it, and what must hold between."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.storage.digests import tree_digest
from tests.conftest import Checkout
from tools.soak_check import MODELS, checkpoints, damage

TRIES = 3  # calls of dvc without a new fault until a training has to be done
LONGEST = 180.0  # seconds that any call may take
REPRO = ("-m", "dvc", "repro", "train")


def until(true: Callable[[], bool], every: float = 0.02, seconds: float = LONGEST) -> bool:
    """Wait for something to be true; False if it is not in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


class Attempt:
    """One call of dvc, or of the stage alone, in a session of its own; its output in a file."""

    def __init__(
        self,
        made: Checkout,
        log: Path,
        command: tuple[str, ...] = REPRO,
        largest_file: int | None = None,
        **env: str,
    ):
        self.log = log
        self._trainer: psutil.Process | None = None
        limit = functools.partial(_limit, largest_file) if largest_file else None
        with open(log, "w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=made.folder,
                env=made.env | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=limit,
            )
        self.dvc = psutil.Process(self.process.pid)

    def over(self) -> bool:
        return self.process.poll() is not None

    def said(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def last_words(self) -> str:
        return " / ".join(self.said().strip().splitlines()[-3:])

    def began(self) -> bool:
        """Whether the training has said where it starts."""
        return "train: device" in self.said()

    def trainer(self) -> psutil.Process | None:
        """The stage's process, also once dvc has gone; None before it starts and after its end."""
        with contextlib.suppress(psutil.Error):
            if self._trainer is None:
                for child in self.dvc.children(recursive=True):
                    if child.cmdline()[-2:] == ["-m", "stages.train"]:
                        self._trainer = child
            if self._trainer and self._trainer.status() != psutil.STATUS_ZOMBIE:
                return self._trainer
        return None

    def close(self) -> None:
        """End whatever is left of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Round:
    """A training in a workspace of its own. `lost` says what did not hold between attempts."""

    def __init__(self, folder: Path, dice: random.Random, seconds: float = 0.0):
        self.folder, self.dice, self.trained_seconds = folder, dice, seconds
        self.made = Checkout(folder)
        self.runs: list[Attempt] = []
        self.injected: list[str] = []
        self.lost: list[str] = []
        self.spoilt: set[Path] = set()  # checkpoints that we damaged ourselves
        self.stale_store = self.garbage_store = self.done = False
        self._expected: int | None = None  # the step after which the training has to go on

    @classmethod
    def of(cls, ready: Path, folder: Path, dice: random.Random, seconds: float = 0.0) -> Round:
        shutil.copytree(ready, folder, symlinks=True)
        return cls(folder, dice, seconds)

    @property
    def attempts(self) -> int:
        return len(self.runs)

    def start(self, **how: object) -> Attempt:
        self._expected = None if self._orphaned() else self._newest_step()
        log = self.folder.with_name(f"{self.folder.name}-{self.attempts + 1}.log")
        self.runs.append(Attempt(self.made, log, **how))
        return self.runs[-1]

    def some(self, share: float = 1.0) -> float:
        """Seconds, up to a share of an undisturbed training."""
        return self.dice.uniform(0, share * self.trained_seconds)

    def moment(self) -> psutil.Process | None:
        """The trainer, at a random moment of its usual time; None if it is over by then."""
        attempt = self.runs[-1]
        until(lambda: attempt.trainer() is not None or attempt.over())
        time.sleep(self.some(0.85))
        return attempt.trainer()

    def settle(self) -> None:
        """Wait for the call to end, and look at what it left; an orphan may go on."""
        attempt = self.runs[-1]
        if not until(attempt.over):
            self.lost.append(f"no end after {LONGEST:.0f} s: {attempt.last_words()}")
            attempt.close()
        self.done = attempt.process.returncode == 0
        if not self._orphaned():
            self.lost += [
                problem
                for checkpoint in set(checkpoints(self.folder)) - self.spoilt
                for problem in damage(checkpoint)
            ]
        self._check_start(attempt)

    def finish(self) -> None:
        """Call dvc until the training is done, a bounded number of times; then fill the store."""
        for _ in range(TRIES):
            if self.done:
                break
            attempt = self.start()
            until(lambda: self.runs[-1].trainer() is not None or self.runs[-1].over())
            began = time.monotonic()
            self.settle()
            self.trained_seconds = self.trained_seconds or time.monotonic() - began
        if not self.done:
            self.lost.append(f"not done after {TRIES} more calls: {attempt.last_words()}")
        elif self.stale_store:
            if self.garbage_store:
                self.without_store()
            self.made.run(sys.executable, "-m", "pipeline", "sync", expect=None)

    def interrupted_with(self, count: int) -> list[Path]:
        """The whole checkpoints of a training that is down, by a SIGKILL if there are too few."""
        if len(self._whole()) < count and not self.done:
            attempt = self.start()
            until(lambda: len(self._whole()) >= count or attempt.over())
            time.sleep(self.some(0.3))
            if trainer := attempt.trainer():
                trainer.kill()
                self.injected.append("SIGKILL to the trainer")
            self.settle()
        until(lambda: not self._orphaned())
        return [] if self.done else self._whole()

    def without_store(self) -> bool:
        """Remove MLflow's store, if there is one."""
        found = list(self.folder.glob("mlflow.db*"))
        for path in found:
            path.unlink()
        shutil.rmtree(self.folder / "mlartifacts", ignore_errors=True)
        return bool(found)

    def copy_aside(self) -> Round:
        """A second workspace with the same inputs."""
        folder = self.folder.with_name(f"{self.folder.name}-second")
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(".runs", ".dvc", ".git"))
        return Round(folder, self.dice)

    def models(self) -> dict[str, str]:
        return {name: tree_digest(self.folder / "artifacts" / name) for name in MODELS}

    def close(self) -> None:
        for attempt in self.runs:
            attempt.close()

    def _orphaned(self) -> bool:
        return any(attempt.trainer() for attempt in self.runs)

    def _whole(self) -> list[Path]:
        found = []
        for checkpoint in checkpoints(self.folder):
            with contextlib.suppress(
                OSError
            ):  # it may go while we look, when better ones are there
                found += [checkpoint] * (not damage(checkpoint))
        return found

    def _newest_step(self) -> int | None:
        whole = self._whole()
        return int(whole[-1].name.partition("-")[2]) if whole else None

    def _check_start(self, attempt: Attempt) -> None:
        """A training that could go on did: to begin again is to lose what there was."""
        if self._expected is None or not attempt.began():
            return
        words = re.search(r"goes on after step ([\d,]+)", attempt.said())
        step = int(words[1].replace(",", "")) if words else 0
        if step != self._expected:
            self.lost.append(f"went on after step {step}, the newest whole is {self._expected}")


def _limit(largest_file: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
