"""Validation while training: the same tokens at every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.compute import sharding
from pipeline.compute.ranks import VALIDATE, Ranks
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


def windows(held_out: Tokens, config: TrainConfig, ranks: Ranks | None = None) -> Iterator[Batch]:
    """Batches of the first `train.val_tokens` tokens of the validation split, or a rank's share."""
    ranks = ranks or Ranks()
    return validation_windows(
        held_out,
        batch_size=1 if ranks.ordered else config.batch_size,
        sequence_length=config.sequence_length,
        limit=config.val_tokens,
        rank=ranks.rank,
        world=ranks.world,
        alike=ranks.sharded,
    )


def validate(
    state: TrainState,
    held_out: Tokens,
    config: TrainConfig,
    while_: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> float:
    """Mean loss in nats/token; `while_` may end the batches early by raising an error.

    Of several processes none may leave early: the others would wait for its part of the sum.
    Raises ValidationError where the loss is not finite.
    """
    ranks, device = state.ranks, state.precision.device
    ranks.lead(VALIDATE)
    batches = windows(held_out, config, ranks)
    batches = while_(batches) if ranks.world == 1 else batches
    loss = mean_loss(state.model, batches, state.precision, device, sums=ranks.sums)
    sharding.close(state.model)
    if not math.isfinite(loss):
        raise ValidationError(loss)
    return loss
