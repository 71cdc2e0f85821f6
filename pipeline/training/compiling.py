"""The step's loss by torch.compile: a graph forward, one backward, eager where it cannot be.

What is compiled is a function of its own, never the model: evaluation and sampling call the
model itself, in other modes and shapes, and so cannot make the step's graphs anew. The update is
left out: fused AdamW is one kernel for many tensors already. Sampling compiles a step of its own.

No CUDA graphs by default: they save launches, which run ahead of the device anyhow, and return
gradients in memory that the next micro-batch overwrites, so that accumulating would copy each.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pipeline.compute.sharding import is_shared
from pipeline.model.loss import (
    Passes,
    fusible_passes,
    linear_cross_entropy,
    look_up,
    softmax_passes,
)

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.model.gpt import GPT

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


def loss_of(
    model: GPT,
    precision: Precision,
    hidden: Callable[..., Tensor] | None = None,
    passes: Passes | None = None,
) -> LossFunction:
    """factor * sum of token losses; its gradients come by `backward()` alone.

    `hidden` stands for `model.hidden`, `passes` for those of `linear_cross_entropy`.
    """
    hidden, wte, vocab_size = hidden or model.hidden, model.transformer.wte, model.config.vocab_size
    in_parts = is_shared(wte.weight)  # whole from when `hidden` begins

    def loss(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden(x, None, None if in_parts else look_up(wte, x)),
            wte.weight,
            y,
            precision,
            vocab_size=vocab_size,
            scale=factor,
            passes=passes,
        )

    return loss


def compiled_loss(
    model: GPT, precision: Precision, eager: LossFunction, mode: str | None = None
) -> LossFunction:
    """`loss_of` with the model compiled, and the passes over the logits; `eager` where it cannot.

    These passes are a graph of their own: in the model's, torch would decide what of them waits
    for the backward pass, and that may be every logit. `mode` is torch.compile's for the model,
    None its default. Shapes are fixed: a training has one.
    """
    plain = model.hidden
    if is_shared(model.transformer.wte.weight):  # between blocks torch sends and receives
        hidden = _by_blocks(model, precision, mode)
    else:
        hidden = compiled(plain, plain, precision, "train.compile", mode=mode)
    if hidden is plain:
        return eager
    passes = compiled(fusible_passes, softmax_passes, precision, "train.compile")
    return loss_of(model, precision, hidden, passes)


def _by_blocks(model: GPT, precision: Precision, mode: str | None) -> Callable[..., Tensor]:
    """`model.hidden` with each block compiled by itself, all to the same kernels."""
    forward = type(model.transformer.h[0]).forward
    fast = compiled(forward, forward, precision, "train.compile", mode=mode)
    if fast is forward:
        return model.hidden

    def hidden(*given: Any) -> Tensor:
        for block in model.transformer.h:
            block.forward = partial(fast, block)
        try:
            return model.hidden(*given)
        finally:
            for block in model.transformer.h:
                del block.forward

    return hidden


def compiled(
    function: Function, eager: Function, precision: Precision, setting: str, **how: Any
) -> Function:
    """`function` by torch.compile; `eager` where it cannot be, with a warning about `setting`.

    What the compiler lacks may show on the first call only: from then on that is `eager`, too.
    """
    if reason := why_not_compile(precision):
        warnings.warn(f"{setting}=true runs eagerly: {reason}", stacklevel=3)
        return eager
    from torch._dynamo.exc import TorchDynamoException

    chosen = torch.compile(function, dynamic=False, fullgraph=True, **how)

    def call(*given: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*given)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"{setting}=true runs eagerly: {reason}", stacklevel=2)
            chosen = eager
            return eager(*given)

    return call  # type: ignore[return-value]  # it has the signature of both


def why_not_compile(precision: Precision) -> str:
    """Why torch.compile cannot work here, or ""."""
    if precision.emulated:
        return f"{precision.asked} is emulated on this device, by a mode that no compiler sees"
    if precision.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if precision.device.type == "mps":
        return "it is not supported on MPS"
    if precision.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler was found"
    return ""
