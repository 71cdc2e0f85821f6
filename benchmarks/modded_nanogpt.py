"""The plain-PyTorch optimizer benchmark of modded-nanogpt as a contestant, out of a checkout.

Its model has GPT-2 124M's depth and width, but another inside (rotary positions, RMSNorm, squared
ReLU, heads of 128, a head of its own), and Muon beside AdamW: its tokens a second say what a file
of plain PyTorch reaches at this size, and its losses are not to be compared with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import checkouts
from pipeline.errors import InputError

SCRIPT = "records/track_3_optimization/train_gpt_simple.py"


def steps(
    source: Path, layers: int, width: int, rows: int, x: Tensor, y: Tensor
) -> Callable[[int], float]:
    """A call that makes n steps on x and y (B, T) as its loop does, and gives the first's loss.

    The learning rates are its own. The head begins as zeros, as there, so that the first loss is
    ln(rows). Raises InputError.
    """
    path = source / SCRIPT
    if not path.is_file():
        raise InputError(f"--modded-nanogpt {source}: no {SCRIPT} there")
    names = checkouts.definitions(path, ())
    # One process is a world of its own, in which gathering has nothing to do.
    names.dist = SimpleNamespace(
        get_world_size=lambda: 1, get_rank=lambda: 0, all_gather=lambda out, own: None
    )
    model = names.GPT(vocab_size=rows, num_layers=layers, model_dim=width).to(x.device)
    for part in model.proj.parameters():
        torch.nn.init.zeros_(part)
    flat = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": [model.embed.weight], "lr": 0.7},
        {"params": [model.proj.weight], "lr": 0.004},
        {"params": flat, "lr": 0.015},
    ]
    own = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.001, "fused": True}
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
    optimizers = [
        torch.optim.AdamW(groups, **own),
        names.Muon(matrices, lr=0.025, weight_decay=0.05),
    ]
    compiled = torch.compile(model, dynamic=False)
    x = x.int()

    def step() -> Tensor:
        loss = compiled(x, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return lambda count: [step() for _ in range(count)][0].item() / y.numel()
