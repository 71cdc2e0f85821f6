"""Muon for the blocks' matrices, AdamW for all else, as one optimizer.

Momentum is made orthogonal, so that a step moves a matrix equally far in all of its directions
(Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"). Embeddings, the
tied head, biases and LayerNorms stay with AdamW.

`torch.optim.Muon` does the same to whole matrices, in bf16 on any device, which a CPU without
bf16 computes 17 to 40 times slower than fp32. Here queries, keys and values are three matrices,
though one parameter holds them, and a device multiplies in a format that it knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compute.precision import choose_precision

# Of the quintic iteration: they bring singular values of 0.001 and more to 0.7 to 1.2 in five
# rounds, and do not go on to 1, which would take longer and helps nobody.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
MOMENTUM = 0.95
TINY = 1e-7  # least norm that is divided by


class Muon(torch.optim.Optimizer):
    """`matrices` are groups with `parts`: of how many matrices, one below the other, each weight
    is made. `adamw` has all other parameters; its groups and its state become part of this one's.

    `scale` makes an orthogonal matrix (rows, columns) a step: "original" by
    sqrt(max(1, rows / columns)), "match_rms_adamw" by 0.2 sqrt(max(rows, columns)), which moves
    weights as far as AdamW does, so that its rate and decay fit (Liu et al. 2025, "Muon is
    scalable for LLM training", eq. 4). Decay is decoupled: weights shrink by lr * weight_decay.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        adamw: torch.optim.AdamW,
        lr: float,
        weight_decay: float,
        scale: str,
    ) -> None:
        own = {"lr": lr, "weight_decay": weight_decay, "scale": scale}
        super().__init__([{"parts": 1} | own | group for group in matrices], {})
        self._matrices = list(self.param_groups)
        self._adamw = adamw
        for group in adamw.param_groups:
            self.add_param_group(group)  # the same dictionary: what is set here is set there
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        self._adamw.step()
        for group in self._matrices:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight.grad)
        momentum = state["momentum"]
        momentum.lerp_(weight.grad, 1 - MOMENTUM)
        ahead = weight.grad.lerp(momentum, MOMENTUM)  # Nesterov's: as if one step further
        step = orthogonal(ahead.view(group["parts"], -1, weight.size(1)))
        rows, columns = step.shape[1:]
        if group["scale"] == "original":
            factor = math.sqrt(max(1, rows / columns))
        else:
            factor = 0.2 * math.sqrt(max(rows, columns))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(step.reshape(weight.shape), alpha=-group["lr"] * factor)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the same shape: U V^T of each U S V^T, singular values near 1.

    The Newton-Schulz iteration of `torch.optim.Muon`, in bf16 on a GPU that multiplies it and in
    fp32 elsewhere.
    """
    low = choose_precision("bf16", matrices.device)
    on_tensor_cores = matrices.is_cuda and low.effective == "bf16"
    x = matrices.to(torch.bfloat16 if on_tensor_cores else torch.float32)
    if tall := x.size(1) > x.size(2):
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=TINY)  # no singular value above 1
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x
