"""One training step: gradients of every micro-batch, clipping, update."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.compute.buffers import hand_back
from pipeline.compute.runtime import derived_seed, rng_state
from pipeline.errors import InputError, NumericsError
from pipeline.model import activations
from pipeline.model.loss import IGNORE
from pipeline.model.model_dir import load_model
from pipeline.training.compiling import LossFunction, compiled_loss, loss_of
from pipeline.training.optimizers import Update, build_optimizer, set_rate

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.config import ModelConfig, TrainConfig
    from pipeline.model.gpt import GPT

Batch = tuple[Tensor, Tensor]  # inputs and targets, each (B, T) int64
Look = Callable[["TrainState"], None]

RECENT = 64  # steps whose gradient norms say what is usual ...
ENOUGH = 20  # ... and how many of them are needed to say so
COUNTS = ("skipped", "skipped_in_a_row", "norms", "spikes", "spikes_seen")


@dataclass(frozen=True)
class StepResult:
    """What came of one optimizer step."""

    loss: float  # mean over every target of every micro-batch, nats/token
    grad_norm: float  # before clipping
    loss_scale: float  # in force during the step; 1 without a scaler
    skipped: bool  # an fp16 overflow, or a spike: the parameters stay as they were


@dataclass
class TrainState:
    """What a step changes: parameters, moments, scale, counts; and the step at work itself."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    loss_function: LossFunction
    eager_loss: LossFunction  # without the compiler, for those who look at single operations
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = field(default=0, repr=False)
    norms: list[float] = field(default_factory=list, repr=False)  # of the last RECENT steps made
    spikes: list[float] = field(default_factory=list, repr=False)  # norms skipped since then
    spikes_seen: int = field(default=0, repr=False)
    batches: list[Batch] = field(init=False, repr=False)  # of the step at work
    rng: dict[str, Tensor] = field(init=False, repr=False)  # as that step began
    before: dict[str, Any] = field(init=False, repr=False)  # scaler and counts, likewise
    loss: float = math.nan  # of its gradients, nats/token

    def __post_init__(self) -> None:
        self.begin([])

    def begin(self, batches: list[Batch]) -> None:
        """Keep what the step at work is about to change and would need to be done again."""
        self.batches, self.rng = batches, rng_state(self.precision.device)
        counts = {name: getattr(self, name) for name in COUNTS}
        self.before = {"scaler": self.scaler.state_dict(), **counts}


def from_folder(
    folder: Path, shape: ModelConfig, config: TrainConfig, precision: Precision
) -> TrainState:
    """The state before the first step, with the model in a model directory.

    Seeds torch's generators for dropout; a checkpoint that is restored afterwards brings its own.
    """
    torch.manual_seed(derived_seed(config.seed, "dropout"))
    model = load_model(
        folder,
        vocab_rows=shape.vocab_rows,
        dropout=shape.dropout,
        attention=shape.attention,
        device=precision.device,
    )
    return start(model, config, precision)


def start(model: GPT, config: TrainConfig, precision: Precision) -> TrainState:
    """The state before the first step."""
    precision.prepare(model)
    activations.mark(model, checkpointed=config.checkpoint_activations)
    scaler = precision.make_scaler()
    eager = loss_of(model, precision)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, config, scaled=scaler.is_enabled()),
        scaler=scaler,
        precision=precision,
        loss_function=compiled_loss(model, precision, eager) if config.compile else eager,
        eager_loss=eager,
    )


def train_step(
    state: TrainState,
    batches: list[Batch],
    rate: float,
    config: TrainConfig,
    look: Look | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> StepResult:
    """Make one optimizer step at a learning rate.

    Skipped are an fp16 overflow and, with `train.skip_spikes` above 0, a gradient norm of more
    than that many times the recent median. Such a step leaves parameters, moments and the counts
    of AdamW as they were; it uses up its batch and its place in the schedule.

    `look` is called between the gradients and the update. The host waits for the device once,
    when all has been launched; just before, `meanwhile` is called. fp16 waits twice more, for its
    scale. Raises NumericsError before an update that would spoil the parameters.
    """
    scaler, optimizer = state.scaler, state.optimizer
    set_rate(optimizer, rate)
    mean = gradients(state, batches)
    if look:
        state.loss = mean.item()
        look(state)
    known = config.skip_spikes > 0 and len(state.norms) >= ENOUGH  # what is usual
    most = config.skip_spikes * statistics.median(state.norms) if known else math.inf
    with Update(optimizer, config.grad_clip) as update:
        update.launch(allowed=mean.isfinite() & (update.norm <= most))
        if meanwhile:
            meanwhile()
        state.loss, norm = _read(mean, update.norm)
        if not math.isfinite(state.loss):
            raise NumericsError(f"step {state.step}: the loss is {state.loss}; no update was made")
        if not math.isfinite(norm) and not scaler.is_enabled():  # a scaler halves its scale
            raise NumericsError(
                f"step {state.step}: the gradient norm is {norm}; no update was made"
            )
        made = math.isfinite(norm) and norm <= most
        update.finish(allowed=made)
    scale = scaler.get_scale()
    scaler.update()  # a spike's gradients are finite: the scale was right
    hand_back("grad_weight", state.model.transformer.wte.weight.grad)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(state.loss, norm, scale, skipped=not made)


def _read(*numbers: Tensor) -> list[float]:
    """0-dim tensors of one device as numbers, in one transfer: here the host waits for it."""
    return torch.stack(numbers).tolist()


def gradients(
    state: TrainState, batches: list[Batch], each: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Accumulate every micro-batch's gradient and unscale once; returns the mean loss in nats.

    That is 0-dim, fp32, and stays on the device. The loss is the sum over all tokens by the number
    of valid ones in all micro-batches, so that N micro-batches of one equal one of N, ragged masks
    included. `each` gets every micro-batch's loss once its gradients are there. Raises InputError
    where no target is valid.
    """
    scaler, device = state.scaler, state.precision.device
    valid = sum(int((y != IGNORE).sum()) for _, y in batches)
    if valid == 0:
        targets = sum(y.numel() for _, y in batches)
        raise InputError(
            f"step {state.step}: all {targets:,} targets of the batch are {IGNORE}, which is to be "
            "ignored, so there is no loss; at least one has to be a token"
        )
    # Known before the products, so that low-precision gradients are made at their scaled size.
    factor = scaler.scale(torch.ones((), device=device)) / valid
    total = torch.zeros((), device=device)
    state.model.train()
    with state.precision.products():
        for x, y in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with state.precision.autocast():
                loss = state.loss_function(x, y, factor)
            loss.backward()
            total += loss.detach()
            if each:
                each(loss.detach())
    scaler.unscale_(state.optimizer)
    return total / scaler.scale(torch.ones((), device=device))
