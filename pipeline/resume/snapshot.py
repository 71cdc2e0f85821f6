"""A training state on disk: all that its next step needs to be done again, and no pickle.

A snapshot is a folder. Its tensors have names that say what they are (`model.NAME`,
`exp_avg.NAME`, `rng.cpu`, `x.0`, ...) and lie in one safetensors file a kind; `snapshot.json`
holds the plain facts, the optimizer's among them, and `sha256.json` the sums of all files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import regular
from pipeline.compute.sharding import is_shared, own, own_rows, shared
from pipeline.errors import InputError
from pipeline.resume import gathering
from pipeline.storage.folders import check, writing
from pipeline.storage.tensor_files import read_file, write_tensors
from pipeline.training.training_step import TrainState

FACTS = "snapshot.json"
OWN = ("model", "rng", "x", "y", "rest", "options")  # no part of an optimizer may be called so
# Options that say how a device computes, not what: those of the machine at hand stay.
MACHINE = ("fused", "foreach", "capturable")
PART = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # what may be the first word of a tensor's name


def save_snapshot(folder: Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Write the state and the step at work, its batches included; `facts` are plain values.

    Scaler, counts and generators are those of the step's beginning (`TrainState.begin`), whether
    or not it has updated them since; weights and moments are as they stand. Takes three times the
    weights on the disk with AdamW, and no memory on a CPU: the files are written from the tensors
    themselves, those of another device one file at a time. Raises StorageError as
    `folders.writing`, InputError for an optimizer whose state is not tensors and plain values.
    """
    optimizer, kinds = parts(state)
    rest = {f"rng.{kind}": value for kind, value in state.rng.items()} | kinds.pop("rest", {})
    for n, (x, y) in enumerate(state.batches):  # views into larger tensors: not their own memory
        rest |= {f"x.{n}": x.clone(), f"y.{n}": y.clone()}
    kinds["rest"] = rest
    needed = sum(tensor.nbytes for kind in kinds.values() for tensor in kind.values())
    with writing(folder, needed) as partial:
        gathering.ask(state.ranks, gathering.ALL)
        for kind, tensors in kinds.items():
            own = gathering.on_host(state.ranks, tensors)
            write_tensors(own, partial / f"{kind}.safetensors")
        own_facts = {
            "step": state.step,
            **state.before,
            "micro_batches": len(state.batches),
            "loss": repr(state.loss),  # JSON knows no NaN
            "optimizer": optimizer,
        }
        text = json.dumps({**facts, **own_facts}, indent=1) + "\n"
        (partial / FACTS).write_text(text, "utf-8")


def parts(state: TrainState) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(the optimizer's facts, {kind: {name: tensor}} of weights and moments), no memory copied."""
    optimizer, kinds = _packed(state.optimizer, dict(state.model.named_parameters()))
    model = {f"model.{name}": p for name, p in gathering.weights(state.model).items()}
    return optimizer, {"model": model, **kinds}


def take_part(state: TrainState, what: int) -> None:
    """What all but the first process do where that one puts together a state in parts."""
    kinds = parts(state)[1] if what else {"model": gathering.weights(state.model)}
    for tensors in kinds.values():
        gathering.on_host(state.ranks, tensors)


def read_facts(folder: Path) -> dict[str, Any]:
    """The plain facts of a snapshot; raises InputError where there is none."""
    if not (folder / FACTS).exists():
        raise InputError(
            f"{folder}: no snapshot of a training step is there; a run names the one it leaves"
        )
    return regular.read_json(folder / FACTS, regular.SNAPSHOT_BYTES)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a snapshot by name, mapped from its files: each is read when it is used.

    Raises InputError where a file is not the one that was written.
    """
    check(folder)
    files = map(read_file, sorted(folder.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}


def restore(
    state: TrainState, tensors: Mapping[str, Tensor], facts: dict[str, Any], forked: bool = False
) -> list[str]:
    """Put a snapshot into a fresh state; the generators stay: see `runtime.set_rng_state`.

    NaN and infinite weights are put back as they were: they may be what one wants to look at.
    Raises InputError where the snapshot is of another optimizer. One that is `forked` keeps its
    own optimizer with its options; the names of the parameters that it moves in another way than
    the snapshot's come back, whose moments begin at zero.
    """
    parameters = dict(state.model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            own(parameter).copy_(own_rows(tensors[f"model.{name}"], parameter))
    anew = _unpack(facts["optimizer"], tensors, state.optimizer, parameters, forked)
    if facts["scaler"]:
        state.scaler.load_state_dict(facts["scaler"])
    for name in state.before.keys() - {"scaler"} | {"step"}:
        setattr(state, name, facts[name])
    count = range(facts["micro_batches"])
    state.begin([(tensors[f"x.{n}"].clone(), tensors[f"y.{n}"].clone()) for n in count])
    names = [name for name in tensors if name.startswith("rng.")]
    state.rng = {name.removeprefix("rng."): tensors[name].clone() for name in names}
    state.loss = float(facts["loss"])
    return anew


# --- any torch optimizer's state as named tensors and JSON, and back to the bit


def _packed(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(facts for JSON, {kind: {name: tensor}}) of the state of `parameters`, which have names.

    Tensors keep their memory. Those of a parameter's shape are of the kind that their key in the
    state names, others of kind "rest". Raises InputError naming what is neither a tensor nor a
    plain value nor a list, tuple or dictionary of such, and a key among OWN.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups, states, parts = [], {}, _Parts()
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(
            {
                "params": [_named(names, p) for p in group["params"]],
                "options": {k: parts.pack(v, f"options.{k}.{number}") for k, v in options.items()},
            }
        )
    for parameter, state in optimizer.state.items():
        name = _named(names, parameter)
        for key in state:
            if not (isinstance(key, str) and PART.fullmatch(key)) or key in OWN:
                raise InputError(f"the optimizer's state of {name}: {key!r} cannot be saved")
        states[name] = {k: parts.pack(v, f"{k}.{name}", parameter) for k, v in state.items()}
    kind = type(optimizer).__name__
    return {"kind": kind, "groups": groups, "state": states}, parts.kinds


def _unpack(
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    forked: bool,
) -> list[str]:
    """Put what `_packed` gave into a fresh optimizer of the same kind over the same parameters.

    The tensors are copied, to the device of their parameter or the host, where they lay, and in
    their own dtype, which `load_state_dict` would change. Options are put back but for MACHINE.
    Raises InputError where the optimizer is another one, unless `forked`: see `restore`.
    """
    groups = optimizer.param_groups
    names = {id(parameter): name for name, parameter in parameters.items()}
    own = [[names.get(id(p), "") for p in group["params"]] for group in groups]
    then, now = facts["kind"], type(optimizer).__name__
    anew = []
    if forked:  # what moves a parameter shows in its group's options; a newer torch may know more
        options = {name: set(g["options"]) for g in facts["groups"] for name in g["params"]}
        for members, group in zip(own, groups, strict=True):
            mine = group.keys() - {"params"}
            anew += [n for n in members if not (mine <= options[n] or options[n] <= mine)]
    elif then != now or own != [group["params"] for group in facts["groups"]]:
        differs = f"{then} then, {now} now" if then != now else "its groups hold other parameters"
        raise InputError(f"the snapshot is of another optimizer: {differs}")
    device = next(iter(parameters.values())).device
    for group, saved in zip(groups, [] if forked else facts["groups"], strict=not forked):
        options = {k: v for k, v in saved["options"].items() if k not in MACHINE}
        group.update({k: _unpacked(v, tensors, device) for k, v in options.items()})
    optimizer.state.clear()
    for name, state in facts["state"].items():
        if name not in anew:
            parameter = parameters[name]
            optimizer.state[parameter] = {
                key: _unpacked(value, tensors, parameter.device, parameter)
                for key, value in state.items()
            }
    return anew


class _Parts:
    """Collects tensors by kind while values become JSON."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, Tensor]] = {}
        self._memory: set[int] = set()

    def pack(self, value: Any, name: str, parameter: Tensor | None = None) -> Any:
        """A JSON value; a list stands for itself, {"kind": ...} for what JSON has no word for."""
        if isinstance(value, Tensor):
            return self._tensor(value, name, parameter)
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            items = [self.pack(v, f"{name}.{n}", parameter) for n, v in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if type(value) is dict:
            return {
                "dict": [
                    [self.pack(k, f"{name}.{n}.key"), self.pack(v, f"{name}.{n}", parameter)]
                    for n, (k, v) in enumerate(value.items())
                ]
            }
        raise InputError(
            f"the optimizer's {name} is a {type(value).__name__}, which cannot be saved: expected "
            "tensors, numbers, texts and lists, tuples or dictionaries of them"
        )

    def _tensor(self, value: Tensor, name: str, parameter: Tensor | None) -> dict[str, str]:
        of_parts = hasattr(value, "__tensor_flatten__") and not is_shared(value)
        if value.layout is not torch.strided or of_parts:
            raise InputError(f"the optimizer's {name} is not a plain dense tensor: cannot be saved")
        alike = parameter is not None and value.shape == parameter.shape and value.dim() > 0
        kind = name.partition(".")[0] if alike else "rest"
        memory = own(value).untyped_storage().data_ptr()
        value = value.detach()
        if memory in self._memory:  # a file holds nothing twice
            value = value.clone()
        self._memory.add(memory)
        self.kinds.setdefault(kind, {})[name] = value
        beside = parameter is None or value.device == parameter.device
        return {"tensor" if beside else "host": name}


def _unpacked(
    value: Any,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    parameter: Tensor | None = None,
) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors, device, parameter) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in ("tensor", "host"):  # a copy: what was read may be the file, mapped into memory
        tensor = tensors[content]
        if parameter is not None and is_shared(parameter) and tensor.shape == parameter.shape:
            return shared(tensor, parameter)
        return tensor.to(device if kind == "tensor" else "cpu", copy=True)
    parts = _unpacked(content, tensors, device, parameter)
    return tuple(parts) if kind == "tuple" else dict(parts)


def _named(names: Mapping[int, str], parameter: Any) -> str:
    if id(parameter) not in names:
        what = tuple(parameter.shape) if isinstance(parameter, Tensor) else repr(parameter)
        raise InputError(f"the optimizer holds {what}, which is no parameter of the model")
    return names[id(parameter)]
