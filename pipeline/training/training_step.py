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

from pipeline.compute import sharding
from pipeline.compute.buffers import hand_back
from pipeline.compute.ranks import Ranks, here
from pipeline.compute.runtime import Numbers, derived_seed, rng_state
from pipeline.errors import InputError, NumericsError
from pipeline.model import activations, borders
from pipeline.model.loss import IGNORE
from pipeline.model.model_dir import load_model
from pipeline.training.compiling import LossFunction, compiled_loss, loss_of
from pipeline.training.optimizers import Update, build_optimizer, set_rate

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.config import InitConfig, ModelConfig, TrainConfig
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
    scaler_before: torch.amp.GradScaler = field(init=False, repr=False)  # likewise
    counts_before: dict[str, Any] = field(init=False, repr=False)  # likewise
    loss: float = math.nan  # of its gradients, nats/token
    norm: float = math.nan  # of its gradients
    ranks: Ranks = field(default_factory=here, repr=False)  # where this process stands

    def __post_init__(self) -> None:
        self.begin([])

    def begin(self, batches: list[Batch]) -> None:
        """Keep what the step at work is about to change and would need to be done again."""
        self.batches, self.rng = batches, rng_state(self.precision.device)
        self.scaler_before = _as_it_stands(self.scaler)
        self.count()

    def count(self) -> None:
        """Keep the counts as they are."""
        self.counts_before = {name: getattr(self, name) for name in COUNTS}

    @property
    def before(self) -> dict[str, Any]:
        """Scaler and counts as the step at work began, as plain values; fp16 waits for its own."""
        return {"scaler": self.scaler_before.state_dict(), **self.counts_before}


@dataclass(frozen=True)
class Launched:
    """A step that the device has been given; `finish` waits for what comes of it."""

    began: dict[str, Any]  # what the state knew of this step then: see `TrainState.begin`
    rate: float
    update: Update
    sound: Tensor  # 0-dim, bool: nothing in it stops the run
    numbers: Numbers  # loss, norm, loss scale, and whether the update was made


def from_folder(
    folder: Path,
    shape: ModelConfig,
    config: TrainConfig,
    precision: Precision,
    init: InitConfig,
) -> TrainState:
    """The state before the first step, with the model in a model directory, of `init`'s scheme.

    Seeds torch's generators for dropout; a checkpoint that is restored afterwards brings its own.
    """
    torch.manual_seed(derived_seed(config.seed, "dropout"))
    model = load_model(
        folder,
        vocab_rows=shape.vocab_rows,
        dropout=shape.dropout,
        attention=shape.attention,
        device="cpu" if here().sharded else precision.device,  # which may have no room for it
    )
    return start(model, config, precision, init.narrowing(shape.n_embd))


def start(model: GPT, config: TrainConfig, precision: Precision, narrowing: float) -> TrainState:
    """The state before the first step; `narrowing` is that of `InitConfig`, which sets rates."""
    precision.prepare(model)
    activations.mark(model, checkpointed=config.checkpoint_activations)
    borders.mark(model, documents_apart=config.mask_documents)
    if here().sharded:
        sharding.shard(model, model.transformer.h, precision.device)
    scaler = precision.make_scaler()
    eager = loss_of(model, precision)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, config, scaler.is_enabled(), narrowing),
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
) -> StepResult:
    """Make one optimizer step at a learning rate.

    Skipped are an fp16 overflow and, with `train.skip_spikes` above 0, a gradient norm of more
    than that many times the recent median. Such a step leaves parameters, moments and the counts
    of AdamW as they were; it uses up its batch and its place in the schedule.

    `look` is called between the gradients and the update. The host waits for the device once, when
    all has been launched. Raises NumericsError before an update that would spoil the parameters.
    """
    return finish(state, launch(state, batches, rate, config, look))


def launch(
    state: TrainState,
    batches: list[Batch],
    rate: float,
    config: TrainConfig,
    look: Look | None = None,
    earlier: Launched | None = None,
) -> Launched:
    """Give the device a step, and wait for nothing: see `train_step`.

    `earlier` is the step before, where nobody has waited for it yet: if that one stops the run,
    this one leaves everything as it was, too.
    """
    scaler = state.scaler
    began = {name: getattr(state, name) for name in ("step", "batches", "rng", "scaler_before")}
    set_rate(state.optimizer, rate)
    mean = gradients(state, batches)
    if look:
        state.loss = mean.item()
        look(state)
    known = config.skip_spikes > 0 and len(state.norms) >= ENOUGH  # what is usual
    most = config.skip_spikes * statistics.median(state.norms) if known else math.inf
    update = Update(state.optimizer, config.grad_clip)
    finite = update.norm.isfinite()
    # An infinite norm under a scaler is an overflow, after which it halves its scale.
    sound = mean.isfinite() if scaler.is_enabled() else mean.isfinite() & finite
    if earlier:
        sound = sound & earlier.sound
    allowed = sound & finite & (update.norm <= most)
    update.launch(allowed)
    numbers = Numbers(mean, update.norm, scaler.scale(torch.ones_like(mean)), allowed)
    if update.alone:
        _clear(state)
    return Launched(began, rate, update, sound, numbers)


def finish(state: TrainState, launched: Launched) -> StepResult:
    """Wait for a step, and make its update if the device could not by itself.

    Raises NumericsError as `train_step`; the step at work is then this one, also where the one
    after it had been launched.
    """
    loss, norm, scale, made = launched.numbers.read()
    state.count()  # what came of the step before may not have been known when this one began
    state.loss, state.norm = loss, norm
    if not math.isfinite(loss) or not (math.isfinite(norm) or state.scaler.is_enabled()):
        vars(state).update(launched.began)
        set_rate(state.optimizer, launched.rate)
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        raise NumericsError(f"step {state.step}: the {what}; no update was made")
    launched.update.finish(allowed=bool(made))
    if not launched.update.alone:
        _clear(state)
    return StepResult(loss, norm, scale, skipped=not made)


def _clear(state: TrainState) -> None:
    """What is left of a step once its update has been launched."""
    state.scaler.update()  # a spike's gradients are finite: the scale was right
    if not (state.ranks.sharded or state.ranks.ordered):  # else it is a part of something
        hand_back("grad_weight", state.model.transformer.wte.weight.grad)
    state.optimizer.zero_grad(set_to_none=True)


def _as_it_stands(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
    """A scaler with tensors of its own: to ask this one for numbers would wait for the device."""
    kept = torch.amp.GradScaler(enabled=False)
    own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(scaler).items()}
    vars(kept).update(own)
    return kept


def gradients(
    state: TrainState, batches: list[Batch], each: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Accumulate every micro-batch's gradient and unscale once; returns the mean loss in nats.

    That is 0-dim, fp32, and stays on the device. The loss is the sum over all tokens by the number
    of valid ones in all micro-batches of all processes, so that N micro-batches of one equal one
    of N, ragged masks included. `each` gets every micro-batch's loss once its gradients are there.
    Raises InputError where no target is valid.
    """
    scaler, device = state.scaler, state.precision.device
    valid = state.ranks.count(sum(int((y != IGNORE).sum()) for _, y in batches))
    if valid == 0:
        targets = sum(y.numel() for _, y in batches) * state.ranks.world
        raise InputError(
            f"step {state.step}: all {targets:,} targets of the batch are {IGNORE}, which is to be "
            "ignored, so there is no loss; at least one has to be a token"
        )
    # Known before the products, so that low-precision gradients are made at their scaled size.
    factor = scaler.scale(torch.ones((), device=device)) / valid
    total = torch.zeros((), device=device)
    state.model.train()
    with state.precision.products():
        for number, (x, y) in enumerate(batches):
            state.ranks.next_draws(number)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with state.precision.autocast():
                loss = state.loss_function(x, y, factor)
            loss.backward()
            total += loss.detach()
            if each:
                each(loss.detach())
            state.ranks.add_in_order(loss.detach(), state.model.parameters())
    state.ranks.add_up(total, state.model.parameters())  # an overflow of one is one of all
    scaler.unscale_(state.optimizer)
    return total / scaler.scale(torch.ones((), device=device))
