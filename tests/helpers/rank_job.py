"""`train` as a process, for tests of several: without what they are not about, and with a fault.

`python -m tests.helpers.rank_job` in a workspace trains like `python -m stages.train`. FAULT is
RANK:STEP:KIND, one of FAULTS that befalls that rank in that step; several stand between commas.
With `evaluate` behind it, it is that stage, and a step is a batch of items.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.compute import machine
from pipeline.diagnostics import doctor, forecast
from pipeline.distributed import start, team
from pipeline.errors import StorageError
from pipeline.inference import multiple_choice
from pipeline.records import record_file
from pipeline.tracking import recording
from pipeline.training import training_step
from pipeline.training.history import History
from stages import common, evaluate, train
from tests.conftest import NoCourier, wait_for


def raises(error: Exception) -> Callable[[Any], None]:
    def fault(_: object) -> None:
        raise error

    return fault


def spoil(state: training_step.TrainState) -> None:
    """Gradients that are not finite, in this rank alone, until the step is over."""
    original, step = state.loss_function, state.step

    def loss(*given: torch.Tensor) -> torch.Tensor:
        made = original(*given)
        if state.step == step:
            made.register_hook(lambda grad: grad * math.inf)
        return made

    state.loss_function = loss


FAULTS: dict[str, Callable[[training_step.TrainState], None]] = {
    "crash": raises(KeyError("a bug")),
    "refuse": raises(StorageError("no room on this rank")),
    "leave": lambda _: os._exit(0),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda _: time.sleep(600),
    "hold": lambda _: wait_for(Path("go").exists, 300),
    "SIGTERM": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda _: os.kill(os.getpid(), signal.SIGINT),
    "spoil": spoil,
}


def main() -> None:
    place = start.place(os.environ)
    rank = place.ranks.rank if place else 0
    faults = [fault.split(":") for fault in os.environ.get("FAULT", "").split(",") if fault]
    original, add = training_step.gradients, History.add

    def gradients(state: training_step.TrainState, *rest: Any) -> torch.Tensor:
        for who, step, kind in faults:
            if (int(who), int(step)) == (rank, state.step) and state.ranks.rank == rank:
                FAULTS[kind](state)
        return original(state, *rest)

    def note(self: History, report: Any, *rest: Any) -> None:
        with open("losses.txt", "a") as file:
            file.write(f"{report.step} {report.loss!r} {report.skipped}\n")
        add(self, report, *rest)

    training_step.gradients, History.add = gradients, note
    if os.environ.get("NAIVE"):
        team.Board.settle = lambda self, error, where="": error
    record_file.git.said = lambda *_: ""
    recording.Courier = NoCourier
    forecast.before_training = lambda *_: []
    forecast.after_first_steps = lambda *_: ""
    doctor.judge = lambda *_: ({}, [])
    doctor.Rounds.look = lambda *_: []
    machine.matrix_rate = lambda *_: 1e9
    if "evaluate" in sys.argv[1:]:
        sys.argv[1:] = []
        score, done = multiple_choice._nats, iter(range(1 << 30))

        def faulty(*given: Any) -> Any:
            batch = next(done)
            for who, step, kind in faults:
                if (int(who), int(step)) == (rank, batch):
                    FAULTS[kind](given[0])
            return score(*given)

        multiple_choice._nats = faulty
        common.run(evaluate.main, "evaluate", evaluate.follow)
    else:
        common.run(train.main, "train")


if __name__ == "__main__":
    main()
