"""Validation while training: the same tokens at every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.data.batches import validation_windows
from pipeline.errors import NumericsError
from pipeline.model.loss import mean_loss

if TYPE_CHECKING:
    from pipeline.config import TrainConfig
    from pipeline.data.token_files import Tokens
    from pipeline.training.training_step import Batch, TrainState


class ValidationError(NumericsError):
    """A validation loss that is not finite."""

    def __init__(self, loss: float):
        super().__init__(f"the validation loss is {loss}: this model is not kept")
        self.loss = loss


def windows(held_out: Tokens, config: TrainConfig) -> Iterator[Batch]:
    """Batches of the first `train.val_tokens` tokens of the validation split."""
    return validation_windows(
        held_out,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        limit=config.val_tokens,
    )


def validate(
    state: TrainState,
    held_out: Tokens,
    config: TrainConfig,
    while_: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> float:
    """Mean loss in nats/token; `while_` may end the batches early by raising an error.

    Raises ValidationError where the loss is not finite.
    """
    batches = while_(windows(held_out, config))
    loss = mean_loss(state.model, batches, state.precision, state.precision.device)
    if not math.isfinite(loss):
        raise ValidationError(loss)
    return loss
