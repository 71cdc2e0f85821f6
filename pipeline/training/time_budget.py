"""train.time_budget: how many steps fit into the minutes that a training may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.compute.throughput import WARM_UP_STEPS

if TYPE_CHECKING:
    from pipeline.config import TrainConfig

MEASURED = 3  # steps after warm-up, before which the plan is that of the settings
FORWARD_SHARE = 1 / 3  # of a step's time on the same tokens: forward 2 N, forward and backward 6 N


def validation_seconds(step_seconds: float, config: TrainConfig) -> float:
    """What one validation takes, from the time of a step: its tokens, the forward pass alone."""
    tokens = config.batch_size * config.sequence_length * config.accumulate
    return FORWARD_SHARE * step_seconds * config.val_tokens / tokens


class Budget:
    """Asked before every step how many steps the run is to have; its clock starts when made.

    A machine that slows down gets fewer steps, one that speeds up more, never more than
    `train.steps`. The answer settles as the end comes near, so that the learning rate arrives at
    its minimum in the last step and the last validation still fits.
    """

    def __init__(
        self,
        config: TrainConfig,
        clock: Callable[[], float] = time.monotonic,
        first: int = 0,
        spent: float = 0.0,
        planned: int = 0,
    ):
        """A resumed run gives its `first` step, and the `facts` of the one before it."""
        self._config, self._clock = config, clock
        self._began, self._first = clock() - spent, first
        self._warm: tuple[int, float] | None = None  # the first measured step, and when it began
        self._planned = planned or config.steps
        self._settled = False

    def ends_soon(self, done: int) -> bool:
        """Whether the last steps are to be planned, for which no other may be at work meanwhile."""
        return bool(self._config.time_budget) and done + MEASURED >= self._planned

    def facts(self) -> dict[str, float]:
        """What a later process has to know: seconds spent, and the plan as it stands."""
        return {"spent": self._clock() - self._began, "planned": self._planned}

    def steps(self, step: int) -> int:
        """Steps of the whole run, as things stand before step number `step`."""
        now = self._clock()
        if self._warm is None and step >= self._first + WARM_UP_STEPS:
            self._warm = step, now
        if not self._config.time_budget or self._settled or not self._warm:
            return self._planned
        first, began = self._warm
        if step >= first + MEASURED:
            pace = (now - began) / (step - first)  # with all that lies between steps
            left = self._config.time_budget * 60 - (now - self._began)
            fitting = int((left - validation_seconds(pace, self._config)) / pace)
            self._planned = min(step + max(1, fitting), self._config.steps)
            self._settled = fitting < 2  # this one is the last, whatever the clock says after it
        return self._planned
