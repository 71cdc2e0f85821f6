"""AdamW with decay groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.config import TrainConfig


FUSED = ("cpu", "cuda", "mps")  # devices with a one-kernel AdamW
SKIPPING = ("cpu", "cuda")  # MPS updated in spite of an overflow (pytorch#186360)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Tensors of two or more dimensions decay, biases and LayerNorm do not (GPT-3, appendix B).

    The tied embedding is one parameter and so decays once: 50 and 98 tensors at 124M.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, config: TrainConfig, scaled: bool = False
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), its one-kernel form where the device has it.

    `scaled`: a loss scaler makes the steps, and the kernel must heed it when it says to skip one.
    """
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        fused=device in (SKIPPING if scaled else FUSED),
    )


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of all gradients together as one vector: 0-dim, on their device."""
    return nn.utils.get_total_norm([p.grad for p in _with_gradients(optimizer)])


@contextmanager
def clipping(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float) -> Iterator[None]:
    """Inside, a step uses gradients of `norm` scaled down to `limit` where they are longer.

    One-kernel AdamW divides each gradient as it reads it, which saves a pass over all of them:
    `grad_scale` is made for loss scales and divides by what it is given. `.grad` is clipped only
    once the step is made. `limit` 0 clips nothing.
    """
    if limit and skips_by_itself(optimizer):
        optimizer.grad_scale = (norm.float() / limit).clamp(min=1)
    elif limit:
        nn.utils.clip_grads_with_norm_(_with_gradients(optimizer), limit, norm)
    try:
        yield
    finally:
        vars(optimizer).pop("grad_scale", None)  # a GradScaler takes it away by itself


def _with_gradients(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernel reads on the device whether to make the step."""
    device = optimizer.param_groups[0]["params"][0].device.type
    return bool(optimizer.defaults.get("fused")) and device in SKIPPING


def update_ratio(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> float | None:
    """Norm of AdamW's last step on `weight` by the norm of the weight; None before a first step.

    Made again from the moments, decay included, so that no copy of the weights is kept.
    """
    state = optimizer.state.get(weight)
    if not state:
        return None
    group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    beta1, beta2 = group["betas"]
    count = float(state["step"])
    mean = state["exp_avg"] / (1 - beta1**count)
    scale = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
    step = mean.div_(scale).add_(weight.detach(), alpha=group["weight_decay"])
    return (group["lr"] * step.norm() / weight.detach().norm()).item()


def learning_rate(step: int, config: TrainConfig, steps: int | None = None) -> float:
    """Linear warm-up, then a cosine down to `min_lr` at the very last step.

    The first step's rate is lr / warmup_steps, never zero: a step at rate zero is a step lost.
    The shape is GPT-3's (Brown et al. 2020, appendix B), the end is exact. A run cut to `steps`
    keeps the shape: its warm-up is the same share of it.
    """
    steps = config.steps if steps is None else steps
    warmup = config.warmup_steps * steps // config.steps
    if step >= steps - 1:
        return config.min_lr
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / (steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.lr - config.min_lr)
