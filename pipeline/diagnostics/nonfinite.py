"""Where a step or a validation left the finite numbers: done again with every layer watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compute import runtime
from pipeline.config import TrainConfig
from pipeline.data.token_files import Tokens
from pipeline.diagnostics import token_spans
from pipeline.errors import InputError, NumericsError
from pipeline.model.gpt import GPT
from pipeline.model.loss import mean_loss
from pipeline.training import training_step, validation
from pipeline.training.training_step import TrainState
from pipeline.training.validation import ValidationError

AGAIN = (
    "Done again, without a compiler, every number of the step is finite: the fault is in compiled "
    "kernels or in the machine"
)


@dataclass
class Place:
    """Where numbers first were not finite."""

    what: str  # the tensor, how many of its numbers, and the weights beside it that are not finite
    rows: list[int] = field(default_factory=list)  # sequences, from 0; empty: not told apart
    batch: int = 0  # of the step's micro-batches or of validation's batches, from 0

    def words(self, sequences: int, batch: str) -> str:
        """The line of a message; `sequences` is the number of those in the batch so named."""
        rows = ", ".join(str(row + 1) for row in self.rows)
        some = f"sequence {rows} of " if 0 < len(self.rows) < sequences else ""
        return f"First not finite: {self.what}{',' if some else ''} in {some}{batch}"


IN_PARTS = (
    "The weights lie in parts over processes, so the layer was not sought: the kept step has all "
    "of them, and opens in one process"
)

Text = Callable[[int, Place | None], str]  # (step, place) -> where the step's tokens lie


def explain(error: NumericsError, state: TrainState, text: Text) -> NumericsError:
    """The error of the step at work, which in addition says where, and in which tokens.

    That takes the time of one more step, which is done eagerly, from the same weights, batches,
    random state and loss scale. Weights and moments stay as they are; gradients do not.
    """
    seen = not (math.isfinite(state.loss) and math.isfinite(state.norm))
    lines = [str(error)]
    try:
        if state.ranks.sharded:
            place = None
            lines.append(IN_PARTS)
        elif place := trace(state):
            sequences, count = len(state.batches[place.batch][0]), len(state.batches)
            lines.append(place.words(sequences, f"micro-batch {place.batch + 1} of {count}"))
        elif seen:
            lines.append(AGAIN)
        lines.append(text(state.step, place))
    except (RuntimeError, MemoryError, OSError, InputError) as problem:  # the error must get out
        lines = [str(error), f"Where that began could not be found: {problem}"]
    return NumericsError("\n".join(lines))


def trace(state: TrainState) -> Place | None:
    """Do the step at work again up to its update; None where every number is finite.

    Forward, the first module whose input or output is not finite, or the logits; backward, the
    first parameter whose gradient is not; else the norm, which large gradients overflow together.
    """
    scaler = state.precision.make_scaler()
    scaler.load_state_dict(state.before["scaler"])
    again = replace(state, scaler=scaler, loss_function=state.eager_loss)
    state.optimizer.zero_grad(set_to_none=True)
    runtime.set_rng_state(state.rng, state.precision.device)
    done = 0

    def each(loss: Tensor) -> None:
        nonlocal done
        place = watch.place
        if not place:
            finite = loss.isfinite()
            place = _in_gradients(state.model) if finite else _in_head(state, watch.hidden)
        if place:
            place.batch = done
            raise _Found(place)
        done += 1

    with _Watch(state.model) as watch:
        try:
            training_step.gradients(again, state.batches, each)
        except _Found as found:
            return found.args[0]
    return _in_norm(state.model)


def explain_validation(
    error: ValidationError, state: TrainState, held_out: Tokens, config: TrainConfig
) -> NumericsError:
    """The error of a validation, which in addition names the layer and the tokens.

    The first batch without a finite loss is left as the step at work, for a look at it.
    """
    lines = [str(error)]
    if state.ranks.sharded:
        return NumericsError(f"{error}\n{IN_PARTS}")
    for number, batch in enumerate(validation.windows(held_out, config)):
        with _Watch(state.model) as watch:
            loss = mean_loss(state.model, [batch], state.precision, state.precision.device)
        if math.isfinite(loss):
            continue
        with state.precision.products():
            place = watch.place or _in_head(state, watch.hidden)
        place.batch = number
        state.begin([batch])
        state.loss = error.loss
        lines.append(place.words(len(batch[0]), f"validation batch {number + 1}"))
        lines.append(token_spans.of_validation(held_out, config, place))
        break
    return NumericsError("\n".join(lines))


class _Found(Exception):
    """Ends the repeated step early, with the Place."""


class _Watch(ExitStack):
    """Until closed, notes the first tensor between two modules that is not finite."""

    place: Place | None = None
    hidden: Tensor  # of the last forward pass, (B, T, C)

    def __init__(self, model: GPT) -> None:
        super().__init__()
        for name, module in model.named_modules():
            if name and not isinstance(module, nn.ModuleDict | nn.ModuleList):
                self._follow(name, module)

    def _follow(self, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._look(f"the input of {name}", inputs[0], [])

        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            # Detached, or autograd would keep what a checkpointed block does not keep again.
            parameters = module.named_parameters(recurse=False)
            own = [(f"{name}.{n}", p.detach()) for n, p in parameters]
            self._look(f"the output of {name}", output, own)
            if name == "transformer.ln_f":
                self.hidden = output.detach()

        self.callback(module.register_forward_pre_hook(before).remove)
        self.callback(module.register_forward_hook(after).remove)

    def _look(self, what: str, values: Tensor, weights: list[tuple[str, Tensor]]) -> None:
        if self.place is None and values.is_floating_point():
            self.place = _place(what, values.detach(), weights)


def _place(what: str, values: Tensor, weights: list[tuple[str, Tensor]]) -> Place | None:
    """Where these values are not finite, if anywhere; rows are told apart in tensors (B, T, C)."""
    odd = ~values.isfinite()
    if not odd.any():
        return None
    beside = [f"{name} holds {_odd(w.detach())}" for name, w in weights if not w.isfinite().all()]
    rows = odd.flatten(1).any(1).nonzero().flatten().tolist() if odd.dim() == 3 else []
    return Place(f"{what} ({'; '.join([_odd(values), *beside])})", rows)


def _odd(values: Tensor) -> str:
    """ "3 inf and 1 nan of 256 numbers" """
    kinds = (("inf", int(values.isinf().sum())), ("nan", int(values.isnan().sum())))
    counts = " and ".join(f"{count:,} {kind}" for kind, count in kinds if count)
    return f"{counts} of {values.numel():,} numbers"


def _in_head(state: TrainState, hidden: Tensor) -> Place:
    """The logits of a loss that is not finite, a sequence at a time, since they are large."""
    weight = state.model.transformer.wte.weight
    with torch.no_grad(), state.precision.autocast():
        places = [
            _place("the logits", state.model.logits(row), [("transformer.wte.weight", weight)])
            for row in hidden
        ]
    odd = {row: place.what for row, place in enumerate(places) if place}
    return Place(next(iter(odd.values()), "the loss, of finite logits"), list(odd))


def _in_gradients(model: GPT) -> Place | None:
    """The first gradient in backward order that is not finite; the tied embedding comes last."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return Place(f"going backward, the gradient of {name} ({_odd(parameter.grad)})")
    return None


def _in_norm(model: GPT) -> Place | None:
    """The norm of all gradients, where these are finite and it is not."""
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    if torch.stack([*norms.values()]).norm().isfinite():
        return None
    largest = max(norms, key=lambda name: norms[name].item())
    return Place(f"the norm of all gradients, each of which is finite; {largest}'s is the largest")
