"""Activation checkpointing: what blocks need for the backward pass is computed again there."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ConfigError
from pipeline.model.gpt import GPT, Block, KVCache


class CheckpointedBlock(Block):
    """A block of which only the input is kept: see `mark`. Without gradients, as any other."""

    def forward(
        self, x: Tensor, layer: int, cache: KVCache | None, mask: Tensor | None = None
    ) -> Tensor:
        # The second time dropout draws the same numbers; without dropout there are none to keep.
        again = {"use_reentrant": False, "preserve_rng_state": self.attn.dropout > 0}
        return checkpoint(Block.forward, self, x, layer, cache, mask, **again)


def mark(model: GPT, *, checkpointed: bool) -> None:
    """Turn blocks into `CheckpointedBlock`s, or back, in place; parameters and names stay.

    Raises ConfigError for dropout on MPS, whose generator torch's `checkpoint` does not put back.
    """
    if checkpointed and model.config.dropout and model.transformer.wte.weight.device.type == "mps":
        raise ConfigError(
            f"train.checkpoint_activations=true with model.dropout={model.config.dropout:g}: "
            "expected model.dropout=0 on MPS, where torch cannot draw the same numbers again"
        )
    for block in model.transformer.h:
        block.__class__ = CheckpointedBlock if checkpointed else Block
