"""Single training steps for tests: settings, and a step with a clipping limit of its own."""

from __future__ import annotations

from dataclasses import replace

from pipeline.studies.tiny import TRAIN
from pipeline.training.training_step import Batch, Look, StepResult, TrainState, train_step


def one_step(
    state: TrainState,
    batches: list[Batch],
    rate: float = 1e-3,
    clip: float = 1.0,
    look: Look | None = None,
) -> StepResult:
    return train_step(state, batches, rate, replace(TRAIN, grad_clip=clip), look)
