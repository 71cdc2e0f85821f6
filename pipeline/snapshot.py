"""A training state on disk: all that its next step needs to be done again, and no pickle.

A snapshot is a folder of two files: `state.safetensors` holds every tensor under a name that says
what it is (`model.NAME`, `exp_avg.NAME`, `rng.cpu`, `x.0`, ...), `snapshot.json` the plain facts
and the SHA-256 of the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.folders import writing
from pipeline.records import tree_digest
from pipeline.training import TrainState

TENSORS, FACTS = "state.safetensors", "snapshot.json"


def save_snapshot(folder: Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Write the state and the step at work, its batches included; `facts` are plain values.

    Scaler, counts and generators are those of the step's beginning (`TrainState.begin`), whether
    or not it has updated them since; weights and moments are as they stand.
    Takes the disk space of the weights and the optimizer's moments, three times the weights.
    Raises StorageError as `folders.writing` does.
    """
    from safetensors.torch import save_file

    tensors = _tensors(state)
    with writing(folder, sum(t.numel() * t.element_size() for t in tensors.values())) as partial:
        save_file(tensors, partial / TENSORS)
        own = {
            "step": state.step,
            **state.before,
            "micro_batches": len(state.batches),
            "loss": repr(state.loss),  # JSON knows no NaN
            "sha256": tree_digest(partial / TENSORS),
        }
        text = json.dumps({**facts, **own}, indent=1) + "\n"
        (partial / FACTS).write_text(text, "utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """The plain facts of a snapshot; raises InputError where there is none."""
    try:
        return json.loads((folder / FACTS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a snapshot of a training step: {error}") from None


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a snapshot on the CPU.

    Raises InputError where the file is not the one that was written.
    """
    from safetensors.torch import load_file

    expected, found = read_facts(folder)["sha256"], tree_digest(folder / TENSORS)
    if found != expected:
        raise InputError(f"{folder / TENSORS}: damaged: SHA-256 {found}, expected {expected}")
    return load_file(folder / TENSORS)


def restore(state: TrainState, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Put a snapshot into a fresh state; the generators stay: see `runtime.set_rng_state`.

    NaN and infinite weights are put back as they were: they may be what one wants to look at.
    """
    state.model.load_state_dict(_under("model.", tensors))
    for name, parameter in state.model.named_parameters():
        parts = {part: tensors.get(f"{part}.{name}") for part in ("step", "exp_avg", "exp_avg_sq")}
        if all(value is not None for value in parts.values()):
            state.optimizer.state[parameter] = {
                part: value.to(parameter.device) for part, value in parts.items()
            }
    if facts["scaler"]:
        state.scaler.load_state_dict(facts["scaler"])
    for name in ("step", "skipped", "skipped_in_a_row"):
        setattr(state, name, facts[name])
    state.begin([(tensors[f"x.{n}"], tensors[f"y.{n}"]) for n in range(facts["micro_batches"])])
    state.rng, state.loss = _under("rng.", tensors), float(facts["loss"])


def _tensors(state: TrainState) -> dict[str, Tensor]:
    named = {f"model.{name}": p.detach() for name, p in state.model.named_parameters()}
    for name, parameter in state.model.named_parameters():
        for part, value in state.optimizer.state.get(parameter, {}).items():
            named[f"{part}.{name}"] = torch.as_tensor(value)
    named |= {f"rng.{kind}": value for kind, value in state.rng.items()}
    for n, (x, y) in enumerate(state.batches):
        named |= {f"x.{n}": x, f"y.{n}": y}
    # Batches are views into larger tensors; safetensors takes only tensors of their own.
    return {name: tensor.cpu().contiguous().clone() for name, tensor in named.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
