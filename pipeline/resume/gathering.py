"""A training that lies in parts over processes (FSDP), put together by the first of them.

All take part, one tensor at a time, on the order of the first (`GATHER`). It alone keeps them, in
the host's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.compute.ranks import GATHER, Ranks
from pipeline.compute.sharding import whole
from pipeline.model.gpt import GPT
from pipeline.model.model_dir import build_model

if TYPE_CHECKING:
    from pipeline.training.training_step import TrainState

WEIGHTS, ALL = range(2)  # what an order to gather is about


def model_of(state: TrainState) -> GPT:
    """The model as one process can use it; one in parts is copied to the host."""
    if not state.ranks.sharded:
        return state.model
    ask(state.ranks, WEIGHTS)
    return build_model(state.model.config, on_host(state.ranks, weights(state.model)))


def ask(ranks: Ranks, what: int) -> None:
    """The others are to call `on_host` as this process does next."""
    if ranks.sharded:
        ranks.lead(GATHER, what)


def weights(model: GPT) -> dict[str, Tensor]:
    """Parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def on_host(ranks: Ranks, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, contiguous; in all but the first process none."""
    alone = not ranks.sharded
    made = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {n: t.cpu().contiguous() for n, t in made if alone or ranks.rank == 0}
