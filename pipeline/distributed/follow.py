"""A training as every process but the first has it: it does what that one says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import GATHER, LEAVE, STEP, VALIDATE
from pipeline.compute.runtime import choose_device
from pipeline.errors import InputError, NumericsError
from pipeline.resume import checkpoints, run_folder, snapshot
from pipeline.resume.interruption import Interruption
from pipeline.training.inputs import open_inputs
from pipeline.training.loop import fit, micro_batches
from pipeline.training.training_step import TrainState, from_folder
from pipeline.training.validation import validate

if TYPE_CHECKING:
    from pipeline.config import Config


class _Left(Exception):
    """The first process has ended, for a signal or 0."""


def follow(config: Config, tell: Callable[[TrainState, dict[str, Any]], None]) -> None:
    """Steps and validations as the first process orders them; `tell` gets what is trained here.

    Everything is computed here as it is there, but for records, checkpoints and words. So what is
    wrong with the numbers is known to both, and that one says it.
    """
    inputs = open_inputs(config.train)
    identity = run_folder.identity("train", config, inputs.digests())
    precision = choose_precision(config.precision, choose_device(config.device))
    state = from_folder(paths.INIT, config.model, config.train, precision, config.init)
    ranks = state.ranks
    tell(state, identity)

    def next_order() -> tuple[int, int]:
        order, value = ranks.told()
        while order == GATHER:
            snapshot.take_part(state, value)
            order, value = ranks.told()
        if order == LEAVE:
            raise _Left(value)
        return order, value

    def steps_at(_: int) -> int:
        while True:
            order, value = next_order()
            if order == STEP:
                return value
            assert order == VALIDATE
            validate(state, inputs.val, config.train)

    batches = partial(micro_batches, inputs.train, config.train, ranks=ranks)
    with Interruption():  # what comes to this one is known to all in the next step
        try:
            _, done = next_order()  # START
            if done >= 0:
                checkpoints.at(run_folder.folder_of(identity), done).restore(state)
            for _ in fit(state, config.train, batches, steps_at=steps_at, pause=lambda _: False):
                pass
        except (NumericsError, InputError):
            next_order()  # the first one explains it, and is gone then ...
            raise  # ... or goes on: it has no such error
        except _Left as left:
            if number := left.args[0]:
                sys.exit(128 + number)
