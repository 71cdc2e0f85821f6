"""Parameters that lie in parts over several processes, by FSDP2 (`fully_shard`).

Each process keeps a share of the rows of every parameter, of its gradient and of its moments. They
are DTensors: their shape is that of the whole. A block is whole while it computes, forward and
backward; embeddings and the last norm are for as long as a micro-batch takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Leave this process its share of every parameter, in place, on `device`; names stay.

    One block at a time is there in full. Gradients become sums over all processes, as soon as the
    backward pass has made a block's, and after each micro-batch: else they would all be there in
    full. `model.hidden` brings together what it computes with.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in (*blocks, model):
        made: Any = fully_shard(unit, mesh=mesh)
        made.set_gradient_divide_factor(1.0)  # a sum, no mean ...
        made.set_force_sum_reduction_for_comms(True)  # ... by an operation that gloo has, too
    register_fsdp_forward_method(model, "hidden")


def close(model: nn.Module) -> None:
    """After a forward pass without a backward one: what it brought together goes again."""
    reshard = getattr(model, "reshard", None)
    if reshard:
        reshard()


def is_shared(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All of a tensor; where processes share it all of them have to call this."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def own(tensor: Any) -> Tensor:
    """This process's rows of a tensor, in the same memory."""
    return tensor.to_local() if is_shared(tensor) else tensor


def own_rows(tensor: Tensor, like: Any) -> Tensor:
    """The rows of a whole tensor that this process has of the shared parameter `like`."""
    if not is_shared(like):
        return tensor
    share = -(-len(tensor) // like.device_mesh.size())
    first = share * like.device_mesh.get_local_rank()
    return tensor[first : first + share]


def shared(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor that is shared as the parameter `like` of its shape is."""
    made = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False)
    own(made).copy_(own_rows(tensor, like))
    return made
