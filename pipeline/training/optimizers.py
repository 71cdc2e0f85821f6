"""Which optimizer moves which parameter, the update, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.compute import sharding
from pipeline.training.muon import Muon

if TYPE_CHECKING:
    from pipeline.config import TrainConfig


FUSED = ("cpu", "cuda", "mps")  # devices with a one-kernel AdamW
SKIPPING = ("cpu", "cuda")  # MPS updated in spite of an overflow (pytorch#186360)
QKV = "c_attn.weight"  # three matrices in one parameter


def parameter_groups(
    model: nn.Module, weight_decay: float, narrowing: float = 1.0
) -> list[dict[str, Any]]:
    """Tensors of two or more dimensions decay, biases and LayerNorm do not (GPT-3, appendix B).

    The tied embedding is one parameter and so decays once: 50 and 98 tensors at 124M.

    By muP the blocks' matrices have the rate times `narrowing` (Yang et al. 2022, table 8), and so
    has `ln_f`, for the reason in `init.initialize`. AdamW shrinks weights by rate * decay at each
    step: the matrices' decay is divided by it, so that no width changes that (as `MuAdamW` of the
    authors' package `mup` has it).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() >= 2]
    vectors = [(name, p) for name, p in named if p.dim() < 2]
    groups = []
    for members, decay, part in ((matrices, weight_decay, ".h."), (vectors, 0.0, ".ln_f.")):
        own = [p for name, p in members if part in name and narrowing != 1.0]
        scaled = {"weight_decay": decay / narrowing, "rate_factor": narrowing}
        rest = [p for name, p in members if part not in name or narrowing == 1.0]
        groups += [{"params": own, **scaled}] if own else []
        groups.append({"params": rest, "weight_decay": decay})
    return groups


def build_optimizer(
    model: nn.Module, config: TrainConfig, scaled: bool = False, narrowing: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), its one-kernel form where the device has it; or Muon.

    `scaled`: a loss scaler makes the steps, and the kernel must heed it when it says to skip one.
    `narrowing` is that of `InitConfig`, for AdamW alone.
    """
    device = next(model.parameters()).device.type
    groups = parameter_groups(model, config.weight_decay, narrowing)
    matrices = muon_groups(model, config) if config.optimizer == "muon" else []
    taken = {id(p) for group in matrices for p in group["params"]}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    adamw = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        fused=device in (SKIPPING if scaled else FUSED),
    )
    if not matrices:
        return adamw
    return Muon(matrices, adamw, config.lr, config.weight_decay, config.muon_scale)


def muon_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The blocks' matrices: those of queries, keys and values in one, and single ones."""
    of_blocks = [(n, p) for n, p in model.named_parameters() if ".h." in n and p.dim() == 2]
    return [
        {
            "params": [p for name, p in of_blocks if name.endswith(QKV) == joined],
            "parts": 3 if joined else 1,
            "rate_factor": config.muon_lr_factor,
        }
        for joined in (True, False)
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the schedule's rate, times the group's own `rate_factor` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


class Update:
    """One update of an optimizer: clipped, and made only where it is allowed.

    One-kernel AdamW reads both from the device, so that nobody waits for it: `found_inf`, by which
    GradScaler tells it of an overflow, skips the step, and `grad_scale`, made for loss scales,
    divides each gradient as it is read, which saves a pass over all of them. Other optimizers
    get gradients that are clipped in place, and step once the host knows.

    `launch` queues what can be, and `finish` makes the rest. `limit` 0 clips nothing. `norm` is
    the gradients' before clipping, 0-dim on their device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, limit: float):
        device = optimizer.param_groups[0]["params"][0].device.type
        self._optimizer, self._limit = optimizer, limit
        # Whether the optimizer's kernel reads on the device whether to make the step.
        self.alone = bool(optimizer.defaults.get("fused")) and device in SKIPPING
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.norm = sharding.whole(nn.utils.get_total_norm([p.grad for p in parameters]))
        if limit and not self.alone:
            nn.utils.clip_grads_with_norm_(parameters, limit, self.norm)

    def launch(self, allowed: Tensor) -> None:
        """Queue the update, which is made if `allowed` (0-dim, bool) says so on the device."""
        if not self.alone:
            return
        told = {"found_inf": (~allowed).float()}
        if self._limit:
            told["grad_scale"] = (self.norm.float() / self._limit).clamp(min=1)
        vars(self._optimizer).update(told)
        try:
            self._optimizer.step()
        finally:
            for name in told:  # a GradScaler takes its own away by itself
                del vars(self._optimizer)[name]

    def finish(self, allowed: bool) -> None:
        """Make the update, if `launch` could not."""
        if allowed and not self.alone:
            self._optimizer.step()


def learning_rate(step: int, config: TrainConfig, steps: int | None = None) -> float:
    """Linear warm-up, then `config.schedule` down to `min_lr` at the very last step, exactly.

    `cosine` is GPT-3's (Brown et al. 2020, appendix B), `linear` a straight line. `wsd` stays at
    `lr` and takes the straight line in the last `cooldown` share of the steps (Hu et al. 2024,
    MiniCPM, 4.3; Hägele et al. 2024), so that one long run can be cooled down at several lengths.
    The first step's rate is lr / warmup_steps, never zero: a step at rate zero is a step lost. A
    run cut to `steps` keeps the shape: warm-up and cooldown are the same shares of it.
    """
    steps = config.steps if steps is None else steps
    warmup = config.warmup_steps * steps // config.steps
    if step >= steps - 1:
        return config.min_lr
    if step < warmup:
        return config.lr * (step + 1) / warmup
    fall = warmup  # the last step at the full rate, from which it goes down
    if config.schedule == "wsd":
        fall = max(warmup, steps - 1 - max(1, round(config.cooldown * steps)))
    progress = max(0, step - fall) / (steps - 1 - fall)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + left * (config.lr - config.min_lr)
