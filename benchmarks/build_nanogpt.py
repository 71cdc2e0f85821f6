"""build-nanogpt as a contestant: its own model and optimizer, out of a checkout."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError

WANTED = ("CausalSelfAttention", "MLP", "Block", "GPTConfig", "GPT")


def steps(
    source: Path,
    shape: dict[str, int],
    weights: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    rate: float,
    clip: float,
) -> Callable[[int], float]:
    """A call that makes n steps in bf16, compiled, on x and y (B, T); gives the first one's loss.

    `weights` are ours, which have the same names but for the tied head. Raises InputError.
    """
    names, device = definitions(source), x.device.type
    model = names["GPT"](names["GPTConfig"](**shape))
    model.load_state_dict(weights, strict=False)
    model.to(x.device)
    optimizer = model.configure_optimizers(0.1, rate, device)
    compiled = torch.compile(model)

    def step() -> float:
        torch.set_float32_matmul_precision("high")
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            _, loss = compiled(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return loss.item()

    return lambda count: [step() for _ in range(count)][0]


def definitions(source: Path) -> dict[str, Any]:
    """The model's classes. The script trains when it is imported, so nothing else of it is run.

    Raises InputError where there is no such script.
    """
    path = source / "train_gpt2.py"
    if not path.is_file():
        raise InputError(f"--build-nanogpt {source}: no train_gpt2.py there")
    kept = [n for n in ast.parse(path.read_text("utf-8"), str(path)).body if _harmless(n)]
    names: dict[str, Any] = {"__name__": "build_nanogpt", "master_process": False}
    sys.modules.setdefault("build_nanogpt", type(sys)("build_nanogpt"))  # dataclass looks there
    exec(compile(ast.Module(kept, []), str(path), "exec"), names)
    return names


def _harmless(node: ast.stmt) -> bool:
    """A class of the model, or an import of torch or the standard library."""
    if isinstance(node, ast.Import):
        return all(_known(name.name) for name in node.names)
    if isinstance(node, ast.ImportFrom):
        return _known(node.module or "")
    return isinstance(node, ast.ClassDef) and node.name in WANTED


def _known(module: str) -> bool:
    top = module.partition(".")[0]
    return top == "torch" or top in sys.stdlib_module_names
