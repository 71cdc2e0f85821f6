"""One step of a replay with all that it makes told apart: outputs, gradients, the update."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.diagnostics.replay import Replay
from pipeline.errors import InputError, NumericsError
from pipeline.training.fingerprint import mark_of, sequence_marks
from pipeline.training.training_step import TrainState

WEIGHTS, FORWARD, LOSS, BACKWARD, GRADIENTS, UPDATE = range(6)  # in the order of a step
PHASES = (
    *("before the step", "going forward", "the loss", "going backward", "the gradients"),
    "the update",
)
Key = tuple[int, int]  # a sequence by its content, and how many like it came before
WHOLE: Key = (0, 0)  # of what is not made sequence by sequence
# Operations that make no number, by the beginning of their names.
PLUMBING = (
    *("view", "_unsafe_view", "_reshape", "reshape", "transpose", "t", "detach", "split", "expand"),
    *("unsafe_split", "alias", "slice", "select", "unsqueeze", "squeeze", "permute", "as_strided"),
    *("empty", "empty_like", "empty_strided", "new_empty", "resize_", "_local_scalar_dense"),
    *("set_", "lift_fresh", "clone", "arange", "ones", "zeros", "new_zeros", "zeros_like"),
)


@dataclass
class Made:
    """One thing that a step makes."""

    phase: int
    place: str  # the module in which it was made
    marks: dict[Key, int] = field(default_factory=dict)  # equal for equal bits, by sequence
    operations: tuple[str, ...] = ()  # of torch, since what was made before
    dtype: torch.dtype = torch.float32  # that its numbers were made in


@dataclass
class Trace:
    """All that one step made, by name and in the order of a step."""

    made: dict[str, Made]
    values: dict[Key, Tensor]  # of what was asked for, on the host
    seen: bool  # whether the layers were: a compiled step's are not
    precision: str  # in effect
    linear: frozenset[str]  # the layers that multiply in it, where it is fp8
    cut: tuple[int, int]  # micro-batches, and sequences in the first of them
    broke: str = ""  # why the step was not made to its end


def traced(again: Replay, step: int, wanted: str = "") -> Trace:
    """Make one step, at whose beginning `again` stands; the values of what is `wanted` are kept.

    Numbers are told apart as fp32, -0 being 0, so that a format alone is no difference. Raises
    InputError for a step that is none of the training's.
    """
    state, broke = again.state, ""
    with _Watch(state, wanted) as watch:
        watch.note_weights(WEIGHTS, "weight")
        try:
            reports = list(again.steps(step + 1, watch.look))
            if not reports:
                raise InputError(
                    f"{again.kept.name}: step {step:,} is not one of its {again.planned:,} steps"
                )
            (report,) = reports
            watch.note(GRADIENTS, "", "the norm of all gradients", _number(report.grad_norm))
            watch.note(UPDATE, "", "the learning rate", _number(report.learning_rate))
            watch.note_weights(UPDATE, "updated weight")
        except NumericsError as error:
            broke = str(error).partition("\n")[0]
    made = dict(sorted(watch.made.items(), key=lambda item: item[1].phase))
    cut = len(state.batches), len(state.batches[0][0])
    layers = state.model.named_modules()
    linear = frozenset(name for name, layer in layers if isinstance(layer, nn.Linear))
    return Trace(made, watch.values, watch.seen, state.precision.effective, linear, cut, broke)


def first_difference(a: Trace, b: Trace) -> tuple[str, list[str]] | None:
    """(the first thing that differs, those before it, which are equal), by name.

    Compared is what both have made of the same sequences. None where all of that is equal.
    """
    equal: list[str] = []
    for name, mine in a.made.items():
        if name not in b.made:
            if mine.phase == WEIGHTS:
                return name, equal
            continue
        theirs = b.made[name].marks
        common = mine.marks.keys() & theirs.keys()
        if any(mine.marks[key] != theirs[key] for key in common):
            return name, equal
        equal += [name] if common else []
    return None


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class _Operations(TorchDispatchMode):
    """Notes the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.quiet = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.quiet and name not in PLUMBING:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def taken(self) -> tuple[str, ...]:
        """Those since the last call, each once."""
        names, self.names = tuple(dict.fromkeys(self.names)), []
        return names


class _Watch(ExitStack):
    """Until closed, notes what the modules of a model make in a step, and what becomes of it."""

    def __init__(self, state: TrainState, wanted: str):
        super().__init__()
        self.made: dict[str, Made] = {}
        self.values: dict[Key, Tensor] = {}
        self.seen = state.loss_function is state.eager_loss
        self._state, self._wanted = state, wanted
        self._keys: list[Key] = []  # of the micro-batch at work
        self._known: Counter[int] = Counter()
        self._last: Tensor | None = None  # noted going forward
        self._head: tuple[str, ...] = ()  # operations between the last module and the loss
        self._forward = False  # else a checkpointed block computes its inside again
        self._operations = _Operations()
        if self.seen:
            self._follow_loss(state)
            for name, module in state.model.named_modules():
                if name and not isinstance(module, nn.ModuleDict | nn.ModuleList):
                    self._follow(name, module)
            self.enter_context(self._operations)

    def note_weights(self, phase: int, what: str) -> None:
        for name, parameter in self._state.model.named_parameters():
            self.note(phase, name.rpartition(".")[0], f"the {what} {name}", parameter)

    def look(self, state: TrainState) -> None:
        """Between gradients and update: the loss, then gradients from the last layer on."""
        self.note(LOSS, "", "the loss", _number(state.loss))
        self.made["the loss"].operations = self._head
        for name, parameter in reversed(list(state.model.named_parameters())):
            if parameter.grad is not None:
                place = name.rpartition(".")[0]
                self.note(GRADIENTS, place, f"the gradient of {name}", parameter.grad)

    def note(self, phase: int, place: str, name: str, values: Tensor) -> None:
        """What was made; of a tensor (B, T, C) each sequence by itself."""
        with self._silence(), torch.no_grad():
            operations = self._operations.taken() if phase in (FORWARD, BACKWARD) else ()
            exact = values.detach()
            exact = exact if exact.dtype is torch.float64 else exact.float() + 0.0
            by_sequence = phase in (FORWARD, BACKWARD) and exact.dim() == 3
            parts = dict(zip(self._keys, exact, strict=True)) if by_sequence else {WHOLE: exact}
            one = self.made.setdefault(name, Made(phase, place, {}, operations, values.dtype))
            one.marks |= {key: mark_of(part) for key, part in parts.items()}
            if name == self._wanted:
                self.values |= {key: part.cpu().clone() for key, part in parts.items()}

    @contextlib.contextmanager
    def _silence(self) -> Iterator[None]:
        before, self._operations.quiet = self._operations.quiet, True
        try:
            yield
        finally:
            self._operations.quiet = before

    def _follow_loss(self, state: TrainState) -> None:
        own = state.loss_function

        def loss(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
            with self._silence():
                marks = sequence_marks((x, y))
            self._keys = []
            for mark in marks:
                self._keys.append((mark, self._known[mark]))
                self._known[mark] += 1
            self._forward = True
            made = own(x, y, factor)
            self._forward, self._last = False, None
            self._head = self._operations.taken()
            return made

        state.loss_function = loss
        self.callback(setattr, state, "loss_function", own)

    def _follow(self, name: str, module: nn.Module) -> None:
        parent = name.rpartition(".")[0]

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs[0] is not self._last:  # what the module before has given
                self._step_on(parent, f"the input of {name}", inputs[0])

        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            self._step_on(name, f"the output of {name}", output)

        self.callback(module.register_forward_pre_hook(before).remove)
        self.callback(module.register_forward_hook(after).remove)

    def _step_on(self, place: str, name: str, values: Tensor) -> None:
        """Going forward: a tensor that a module takes or gives, and later its gradient."""
        if not self._forward or not values.is_floating_point():
            return
        new, self._last = values is not self._last, values
        self.note(FORWARD, place, name, values)
        # What is no sequence's own has a gradient that depends on how the step is cut.
        if new and values.requires_grad and values.dim() == 3:
            values.register_hook(self._going_back(place, f"the gradient of {name}"))

    def _going_back(self, place: str, name: str) -> Callable[[Tensor], None]:
        return lambda grad: self.note(BACKWARD, place, name, grad)
