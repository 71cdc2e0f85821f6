"""The training step and the loop around it, as a generator of step reports."""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.compute.buffers import hand_back
from pipeline.compute.runtime import derived_seed, rng_state
from pipeline.compute.throughput import Stopwatch
from pipeline.data.batches import batch_at
from pipeline.errors import InputError, NumericsError
from pipeline.model.loss import IGNORE, linear_cross_entropy, look_up
from pipeline.training.compiling import LossFunction, compiled_loss
from pipeline.training.optimizers import (
    build_optimizer,
    clipping,
    gradient_norm,
    learning_rate,
    skips_by_itself,
)
from pipeline.training.prefetch import Batch, Prefetch

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.config import TrainConfig
    from pipeline.data.token_files import Tokens
    from pipeline.model.gpt import GPT

Look = Callable[["TrainState"], None]

RECENT = 64  # steps whose gradient norms say what is usual ...
ENOUGH = 20  # ... and how many of them are needed to say so
TOLD = 5  # skipped spikes that are warned of one by one; the curves have all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, in plain numbers."""

    step: int
    loss: float  # mean nats a target token over every micro-batch
    grad_norm: float  # before clipping
    learning_rate: float
    loss_scale: float
    skipped: bool  # an fp16 overflow, or a spike: the parameters stay as they were
    seconds: float  # of the whole step
    data_seconds: float  # of these, until the batches were there
    tokens: int
    steps: int  # that the run has, as things stand

    @property
    def last(self) -> bool:
        return self.step == self.steps - 1

    @property
    def spike(self) -> bool:
        """Skipped by `train.skip_spikes`: an overflow's norm is not finite."""
        return self.skipped and math.isfinite(self.grad_norm)


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
    loss: float = math.nan  # of its gradients: mean nats a target

    def __post_init__(self) -> None:
        self.begin([])

    def begin(self, batches: list[Batch]) -> None:
        """Keep what the step at work is about to change and would need to be done again."""
        self.batches, self.rng = batches, rng_state(self.precision.device)
        self.before = {
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "norms": self.norms,
            "spikes": self.spikes,
            "spikes_seen": self.spikes_seen,
        }


def start(model: GPT, config: TrainConfig, precision: Precision) -> TrainState:
    """The state before the first step."""
    precision.prepare(model)
    eager, scaler = _fused_loss(model, precision), precision.make_scaler()
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, config, scaled=scaler.is_enabled()),
        scaler=scaler,
        precision=precision,
        loss_function=compiled_loss(model, precision, eager) if config.compile else eager,
        eager_loss=eager,
    )


def fit(
    state: TrainState,
    config: TrainConfig,
    batches_of: Callable[[int], list[Batch]],
    look: Look | None = None,
    look_at: int = -1,
    steps_at: Callable[[int], int] | None = None,
) -> Iterator[StepReport]:
    """One optimizer step and one report at a time, from `state.step` to `config.steps`.

    batches_of(step) gives the step's batches. In step `look_at`, `look` is called between the
    gradients and the update; its time is not the step's. `steps_at(step)` is asked before each
    step how many the run is to have, where that is not `config.steps`; the learning rate follows.
    Raises NumericsError before an update that would spoil the parameters.
    """
    watch, source = Stopwatch(state.precision.device), Prefetch(batches_of, state.precision.device)

    def aside(state: TrainState) -> None:
        with watch.paused():
            look(state)

    while state.step < (steps := steps_at(state.step) if steps_at else config.steps):
        watch.start()
        state.begin(source(state.step))
        data_seconds = watch.so_far()
        tokens = sum(x.numel() for x, _ in state.batches)
        rate = learning_rate(state.step, config, steps)
        now = aside if look and state.step == look_at else None
        loss, norm, scale, skipped = train_step(
            state,
            state.batches,
            rate,
            config.grad_clip,
            now,
            config.skip_spikes,
            functools.partial(source.prepare, state.step + 1, steps),
        )
        seconds = watch.stop()
        report = StepReport(
            step=state.step,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            loss_scale=scale,
            skipped=skipped,
            seconds=seconds,
            data_seconds=data_seconds,
            tokens=tokens,
            steps=steps,
        )
        _count(state, report, config)
        state.step += 1
        yield report


def micro_batches(tokens: Tokens, config: TrainConfig, step: int) -> list[Batch]:
    """The batches of one step: a pure function of the settings, so that nothing is to be kept."""
    return [
        batch_at(
            tokens,
            step,
            micro_step,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            accumulate=config.accumulate,
            seed=derived_seed(config.seed, "data"),
        )
        for micro_step in range(config.accumulate)
    ]


def train_step(
    state: TrainState,
    batches: list[Batch],
    rate: float,
    grad_clip: float,
    look: Look | None = None,
    skip_spikes: float = 0.0,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[float, float, float, bool]:
    """Gradients, clip, step, update: mean loss, gradient norm, scale, skipped.

    Skipped are an fp16 overflow and, with `skip_spikes` above 0, a gradient norm of more than
    that many times the recent median. Such a step leaves parameters, moments and the counts of
    AdamW as they were; it uses up its batch and its place in the schedule.

    The host waits for the device once, when all has been launched; just before, `meanwhile` is
    called. fp16 waits twice more, for its scale.
    """
    scaler, optimizer = state.scaler, state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = rate
    mean = gradients(state, batches)
    if look:
        state.loss = mean.item()
        look(state)
    norm = gradient_norm(optimizer)
    most = _spike_limit(state, skip_spikes)
    allowed = mean.isfinite() & norm.isfinite() & (norm <= most)
    with clipping(optimizer, norm, grad_clip):
        if skips_by_itself(optimizer):
            _step_if(optimizer, allowed)
        if meanwhile:
            meanwhile()
        state.loss, length = _read(mean, norm)
        _check(state, state.loss, length)
        if not skips_by_itself(optimizer) and allowed:
            optimizer.step()
    scale = scaler.get_scale()
    scaler.update()  # a spike's gradients are finite: the scale was right
    hand_back("grad_weight", state.model.transformer.wte.weight.grad)
    optimizer.zero_grad(set_to_none=True)
    return state.loss, length, scale, not (math.isfinite(length) and length <= most)


def _step_if(optimizer: torch.optim.Optimizer, allowed: Tensor) -> None:
    """The update, if `allowed` (0-dim, bool) says so on the device: nobody waits for it.

    This is how GradScaler tells a fused optimizer of an overflow.
    """
    optimizer.found_inf = (~allowed).float()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


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


def _check(state: TrainState, loss: float, norm: float) -> None:
    """Stop before the update; an inf gradient passes with a scaler alone, which then halves."""
    if not math.isfinite(loss):
        raise NumericsError(f"step {state.step}: the loss is {loss}; no update was made")
    if not math.isfinite(norm) and not state.scaler.is_enabled():
        raise NumericsError(f"step {state.step}: the gradient norm is {norm}; no update was made")


def _spike_limit(state: TrainState, factor: float) -> float:
    """The largest gradient norm that is no spike; infinity as long as nobody can say."""
    enough = factor > 0 and len(state.norms) >= ENOUGH
    return factor * statistics.median(state.norms) if enough else math.inf


def _count(state: TrainState, report: StepReport, config: TrainConfig) -> None:
    """Keep what later steps are measured by; raise NumericsError after too many skipped ones.

    A skipped spike does not count as usual, or a few of them would let the next one pass. Where
    all norms have grown for good every step is skipped, until `max_skipped` ends that.
    """
    state.skipped += report.skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if report.skipped else 0
    if report.spike:
        _tell_spike(state, report, config)
    elif math.isfinite(report.grad_norm):
        state.norms, state.spikes = [*state.norms, report.grad_norm][-RECENT:], []
    if state.skipped_in_a_row >= config.max_skipped:
        raise NumericsError(
            f"step {state.step}: {config.max_skipped} steps skipped in a row (train.max_skipped), "
            + (_spikes_stop(state, config) if report.spike else _scale_stop(state))
        )


def _tell_spike(state: TrainState, report: StepReport, config: TrainConfig) -> None:
    """One warning a spike, as long as they are few."""
    state.spikes = [*state.spikes, report.grad_norm][-TOLD:]
    state.spikes_seen += 1
    if state.spikes_seen > TOLD:
        return
    last = "; further ones show in train/skipped alone" if state.spikes_seen == TOLD else ""
    log.warning(
        "step %d: skipped as a spike: gradient norm %.4g, more than train.skip_spikes=%g times "
        "the recent median of %.4g%s",
        *(report.step, report.grad_norm, config.skip_spikes, statistics.median(state.norms), last),
    )


def _spikes_stop(state: TrainState, config: TrainConfig) -> str:
    norms = ", ".join(f"{norm:.4g}" for norm in state.spikes)
    return (
        f"the last ones for gradient norms of {norms}, each more than train.skip_spikes="
        f"{config.skip_spikes:g} times the recent median of {statistics.median(state.norms):.4g}: "
        "these are no spikes, the norm has grown; try a lower train.lr, a longer "
        "train.warmup_steps or train.skip_spikes=0"
    )


def _scale_stop(state: TrainState) -> str:
    scale = state.scaler.get_scale()
    return f"the loss scale is down to {scale:g}; try precision=bf16 or a lower train.lr"


def _fused_loss(model: GPT, precision: Precision) -> LossFunction:
    """(x, y, factor) -> factor * sum of token losses; its gradients come by `backward()` alone."""

    def loss(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        return linear_cross_entropy(
            model.hidden(x, looked_up=look_up(model.transformer.wte, x)),
            model.transformer.wte.weight,
            y,
            precision,
            vocab_size=model.config.vocab_size,
            scale=factor,
        )

    return loss
