"""A training state on disk: all that its next step needs to be done again, and no pickle.

A snapshot is a folder. Its tensors have names that say what they are (`model.NAME`,
`exp_avg.NAME`, `rng.cpu`, `x.0`, ...) and lie in one safetensors file a kind; `snapshot.json`
holds the plain facts, `sha256.json` the sums of all files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.folders import check, writing
from pipeline.training import TrainState
from pipeline.weight_files import write_tensors

FACTS = "snapshot.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_snapshot(folder: Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Write the state and the step at work, its batches included; `facts` are plain values.

    Scaler, counts and generators are those of the step's beginning (`TrainState.begin`), whether
    or not it has updated them since; weights and moments are as they stand. Takes the disk space
    of the weights and the optimizer's moments, three times the weights, and no memory on a CPU:
    the files are written from the tensors themselves. From another device one file's tensors at a
    time come over, as many bytes as the weights have. Raises StorageError as `folders.writing`.
    """
    kinds = _kinds(state)
    needed = sum(t.numel() * t.element_size() for kind in kinds.values() for t in kind.values())
    with writing(folder, needed) as partial:
        for kind, tensors in kinds.items():
            own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            write_tensors(own, partial / f"{kind}.safetensors")
        own_facts = {
            "step": state.step,
            **state.before,
            "micro_batches": len(state.batches),
            "loss": repr(state.loss),  # JSON knows no NaN
        }
        text = json.dumps({**facts, **own_facts}, indent=1) + "\n"
        (partial / FACTS).write_text(text, "utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """The plain facts of a snapshot; raises InputError where there is none."""
    try:
        return json.loads((folder / FACTS).read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no snapshot of a training step is there; a run names the one it leaves"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a snapshot of a training step: {error}") from None


class Tensors(Mapping[str, Tensor]):
    """The tensors of a snapshot by name, each read when it is asked for.

    Raises InputError where a file is not the one that was written.
    """

    def __init__(self, folder: Path):
        from safetensors import safe_open

        check(folder)
        files = [safe_open(p, framework="pt") for p in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without reading the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def restore(state: TrainState, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Put a snapshot into a fresh state; the generators stay: see `runtime.set_rng_state`.

    NaN and infinite weights are put back as they were: they may be what one wants to look at.
    """
    optimizer = state.optimizer.state_dict()
    numbers = iter(n for group in optimizer["param_groups"] for n in group["params"])
    of = {id(p): next(numbers) for group in state.optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            if all(f"{part}.{name}" in tensors for part in ("step", *MOMENTS)):
                # Copies of their own: what was read may be the file itself, mapped into memory.
                optimizer["state"][of[id(parameter)]] = {
                    part: tensors[f"{part}.{name}"].to(parameter.device, copy=True)
                    for part in ("step", *MOMENTS)
                }
    state.optimizer.load_state_dict(optimizer)
    if facts["scaler"]:
        state.scaler.load_state_dict(facts["scaler"])
    for name in state.before.keys() - {"scaler"} | {"step"}:
        setattr(state, name, facts[name])
    count = range(facts["micro_batches"])
    state.begin([(tensors[f"x.{n}"].clone(), tensors[f"y.{n}"].clone()) for n in count])
    names = [name for name in tensors if name.startswith("rng.")]
    state.rng = {name.removeprefix("rng."): tensors[name].clone() for name in names}
    state.loss = float(facts["loss"])


def _kinds(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """The state's tensors by the file that they go into; parameters by name, tied ones once."""
    model = {f"model.{name}": p.detach() for name, p in state.model.named_parameters()}
    small = {f"rng.{kind}": value for kind, value in state.rng.items()}
    moments: dict[str, dict[str, Tensor]] = {part: {} for part in MOMENTS}
    for name, parameter in state.model.named_parameters():
        for part, value in state.optimizer.state.get(parameter, {}).items():
            moments.get(part, small)[f"{part}.{name}"] = torch.as_tensor(value)
    for n, (x, y) in enumerate(state.batches):  # views into larger tensors: not their own memory
        small |= {f"x.{n}": x.clone(), f"y.{n}": y.clone()}
    return {"model": model, **moments, "rest": small}
