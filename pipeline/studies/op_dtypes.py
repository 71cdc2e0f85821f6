"""Which operation ran in which number format: the dispatcher watched during a real training step.

Two views of every operation. The kernel's: the dtypes of the tensors that it was really given.
The mode's: the format that the precision in force means. They differ where the format has no
dtype of its own (tf32) or is emulated (a CPU multiplies bf16 values held in fp32). An emulated
product shows the mode's format only if the values that reached the kernel are numbers of that
format, so a product that went round the emulation is seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.compute.emulation import LOW, OPERANDS, rounding
from pipeline.studies import tiny
from pipeline.studies.number_formats import DTYPES, round_to_format
from pipeline.tables import markdown
from pipeline.training.loop import StepReport, fit
from pipeline.training.training_step import TrainState

NAMES = {torch.float64: "fp64"} | {dtype: name for name, dtype in DTYPES.items() if dtype}
NO_WORK = ("empty_like", "zeros_like", "ones_like", "_unsafe_view")  # they read no value
FP8 = ("fp8_e4m3", "fp8_e5m2")  # the narrower range first
SAMPLE = 1 << 16  # values of an operand that are looked at

STEP, BESIDE = "optimizer", "scaling and clipping"  # places of the update
COLUMNS = ("phase", "where", "operation", "mode", "kernel", "calls")


class Row(NamedTuple):
    """Calls of one operation in one place. Formats read "operands -> result"."""

    phase: str  # forward, backward or update
    where: str  # the module; going back, the operation whose gradient it is
    operation: str
    mode: str
    kernel: str

    def is_product(self) -> bool:
        return self.operation in PRODUCTS


PRODUCTS = {op.overloadpacket.__name__: positions for op, positions in OPERANDS.items()} | {
    "_scaled_mm": (0, 1),  # of fp8
    "linear": (0, 1),  # one operation on MPS, as is its gradient
    "linear_backward": (0, 1, 2),
    "_scaled_dot_product_attention_math_for_mps": (0, 1, 2),
    "_scaled_dot_product_flash_attention": (0, 1, 2),
    "_scaled_dot_product_flash_attention_backward": (0, 1, 2, 3),
    "_scaled_dot_product_efficient_attention": (0, 1, 2),
    "_scaled_dot_product_efficient_attention_backward": (0, 1, 2, 3),
    "_scaled_dot_product_cudnn_attention": (0, 1, 2),
    "_scaled_dot_product_cudnn_attention_backward": (0, 1, 2, 3),
}
MATRIX_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "addmv")


class Watch(TorchDispatchMode):
    """Counts the operations of one training step by place and format, and changes none.

    `first_of` enters it around the step, hence outside every mode that the step enters itself: it
    sees what is left for the kernels.
    """

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self.state = state
        self.precision = state.precision
        self.rows: Counter[Row] = Counter()
        self.tensors: dict[str, Counter[str]] = {}
        self._places = [BESIDE]
        self._gradients: dict[nn.Parameter, torch.dtype] = {}
        self._kept: tuple[str, Tensor] | None = None

    def first_of(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        """The reports of a training loop, its first step watched."""
        state = self.state
        self._note("parameters before", _dtypes(state.model.parameters()))
        with ExitStack() as hooks:
            hooks.callback(setattr, state, "loss_function", state.loss_function)
            state.loss_function = self._forward
            for name, module in state.model.named_modules():
                if not isinstance(module, nn.ModuleDict | nn.ModuleList) and name:
                    place = re.sub(r"\.\d+\b", ".*", name.removeprefix("transformer."))
                    self._follow(place, module, hooks)
            for parameter in state.model.parameters():
                hook = parameter.register_post_accumulate_grad_hook(self._after_gradient)
                hooks.enter_context(hook)
            optimizer, places = state.optimizer, self._places
            hooks.enter_context(optimizer.register_step_pre_hook(lambda *_: places.append(STEP)))
            hooks.enter_context(optimizer.register_step_post_hook(lambda *_: places.pop()))
            with self:
                first = next(reports)
        self._look_at_the_state()
        yield first
        yield from reports

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands, returned = _floats([args, kwargs]), _floats([result])
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        idle = views or name in NO_WORK or rounding()
        if operands and (returned or func._schema.is_mutable) and not idle:
            kernel = _arrow(operands, returned)
            mode = self._mode_of(name, args) or kernel
            self.rows[Row(*self._phase_and_place(), name, mode, kernel)] += 1
        return result

    def _mode_of(self, name: str, args: Any) -> str:
        """The formats of a product whose kernel's dtypes do not tell them, or ""."""
        effective = self.precision.effective
        if name not in PRODUCTS or effective == "fp32":
            return ""
        operands = [args[position] for position in PRODUCTS[name]]
        if any(operand.dtype is not torch.float32 for operand in operands):
            return ""
        if effective == "fp8":
            return _fp8_arrow(operands)
        result = effective if effective in LOW else "fp32"
        if self.precision.emulated and all(_fits(operand, effective) for operand in operands):
            return f"{effective} -> {result}"
        hardware = self.precision.device.type == "cuda" and name in MATRIX_PRODUCTS
        if hardware and torch.get_float32_matmul_precision() == "high":
            return "tf32 -> fp32"
        return ""

    def _phase_and_place(self) -> tuple[str, str]:
        if torch._C._current_graph_task_id() != -1:
            node = torch._C._current_autograd_node()
            name = node.name().rpartition("::")[2] if node else "autograd"
            return "backward", re.sub(r"Backward\d*$", "", name)
        place = self._places[-1]
        return "update" if place in (STEP, BESIDE) else "forward", place

    def _forward(self, x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        """The loss, where it is known that this is the forward pass, inside the context."""
        self._note("parameters inside", _dtypes(self.state.model.parameters()))
        self._places.append("embedding")
        try:
            return self.state.eager_loss(x, y, factor)
        finally:
            self._places.pop()

    def _follow(self, place: str, module: nn.Module, hooks: ExitStack) -> None:
        def enter(*_: Any) -> None:
            self._places.append(place)

        def leave(_: nn.Module, __: Any, output: Tensor) -> None:
            self._places.pop()
            if place == "ln_f":
                self._places[-1] = "head and loss"
            self._note("module outputs", [output.dtype])
            if output.dtype in LOW.values() and not self._kept:
                self._kept = (place, output.detach())

        hooks.enter_context(module.register_forward_pre_hook(enter))
        hooks.enter_context(module.register_forward_hook(leave))

    def _after_gradient(self, parameter: nn.Parameter) -> None:
        """Seen here, since the optimizer may never be called: in fp16 a step may be skipped."""
        self._gradients[parameter] = parameter.grad.dtype

    def _look_at_the_state(self) -> None:
        self._note("gradients (.grad)", self._gradients.values())
        self._note("parameters after", _dtypes(self.state.model.parameters()))
        moments = tree_leaves(list(self.state.optimizer.state.values()))
        self._note("optimizer state", _dtypes(_floats([moments])))
        if self._kept:
            self._note(f"output of {self._kept[0]}, held since", [self._kept[1].dtype])
            self._kept = None

    def _note(self, what: str, dtypes: Iterable[torch.dtype]) -> None:
        formats = self.tensors.setdefault(what, Counter())
        formats.update(NAMES.get(dtype, str(dtype)) for dtype in dtypes)

    def page(self) -> str:
        """The tables as Markdown, and what they say about two sentences that people repeat."""
        p = self.precision
        head = (
            f"# Which operation ran in what\n\nPrecision asked {p.asked}, effective {p.effective}, "
            f"on {p.device.type}" + (f": {p.reason}" if p.reason else "") + ".\n\n"
            "Mode: the format that the precision means; kernel: the dtypes that the kernel got. "
            "The loss makes the head's gradients in its forward pass, so these stand there.\n"
        )
        parts = [head, *(f"\n{sentence}\n" for sentence in self.sentences())]
        parts.append("\n## Tensors outside the operations\n\n")
        held = [(what, _joined(formats)) for what, formats in self.tensors.items()]
        parts.append(markdown(("tensors", "formats"), held))
        for phase in ("forward", "backward", "update"):
            rows = [row[1:] for row in self.cells() if row[0] == phase]
            parts.append(f"\n## {phase.capitalize()}\n\n{markdown(COLUMNS[1:], rows)}")
        return "".join(parts)

    def cells(self) -> list[tuple[str, str, str, str, str, int]]:
        """One tuple of COLUMNS for every row, in the order of first calls."""
        return [(*row, calls) for row, calls in self.rows.items()]

    def sentences(self) -> list[str]:
        """Leaving autocast, and the gradients' formats: as this step had them."""
        before, inside, after = (
            _joined(self.tensors[f"parameters {when}"]) for when in ("before", "inside", "after")
        )
        held = next((w for w in self.tensors if w.startswith("output of")), None)
        left = (
            f"The {held} the context was left, is still {_joined(self.tensors[held])}."
            if held
            else "No module's output was in a low format."
        )
        backward = Counter()
        for row, calls in self.rows.items():
            if row.phase == "backward" and row.is_product():
                backward[row.mode] += calls
        return [
            f'**"Leaving autocast restores the variables to fp32."** Parameters: {before} before, '
            f"{inside} inside, {after} afterwards: nothing was there to restore. {left}",
            f'**"Gradients are computed in fp32."** Products of the backward pass: '
            f"{_joined(backward)}. What accumulates in .grad: "
            f"{_joined(self.tensors['gradients (.grad)'])}.",
        ]


def watched(precision: str, device: torch.device) -> Watch:
    """A watch that has seen the first step of the tiny training in this precision."""
    state = tiny.state(precision, device)
    watch = Watch(state)
    list(watch.first_of(fit(state, tiny.TRAIN, tiny.batches)))
    return watch


def _dtypes(tensors: Iterable[Tensor]) -> list[torch.dtype]:
    return [t.dtype for t in tensors]


def _floats(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def _arrow(operands: list[Tensor], results: list[Tensor]) -> str:
    sides = [
        "+".join(dict.fromkeys(NAMES.get(t.dtype, str(t.dtype)) for t in side))
        for side in (operands, results or operands[:1])
    ]
    return " -> ".join(sides)


def _fp8_arrow(operands: list[Tensor]) -> str:
    """The formats of an emulated product in mode fp8, whose rest is bf16, or ""."""
    eight = [next((n for n in FP8 if _fits(operand, n)), "") for operand in operands]
    if all(eight):
        return f"{'+'.join(dict.fromkeys(eight))} -> bf16"
    return "bf16 -> bf16" if all(_fits(operand, "bf16") for operand in operands) else ""


def _fits(x: Tensor, name: str) -> bool:
    """Whether the values (the first ones of a large tensor) are numbers of the format."""
    x = x.detach()
    while x.dim() > 1 and x.numel() > SAMPLE:
        x = x[0]
    x = x.reshape(-1)[:SAMPLE].contiguous()
    return torch.equal(round_to_format(x, name).nan_to_num(), x.nan_to_num())


def _joined(formats: Counter[str]) -> str:
    if len(formats) == 1:
        return next(iter(formats))
    return ", ".join(f"{name} ({count})" for name, count in formats.items()) or "none"
