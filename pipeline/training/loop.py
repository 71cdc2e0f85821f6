"""The training loop: a generator that makes one step and yields one report, and validation."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.compute.runtime import derived_seed
from pipeline.compute.throughput import Stopwatch
from pipeline.data.batches import batch_at, validation_windows
from pipeline.errors import InputError, NumericsError
from pipeline.model.loss import mean_loss
from pipeline.training.optimizers import learning_rate
from pipeline.training.training_step import RECENT, Batch, Look, StepResult, TrainState, train_step

if TYPE_CHECKING:
    from pipeline.config import TrainConfig
    from pipeline.data.token_files import Tokens

TOLD = 5  # skipped spikes that are warned of one by one; the curves have all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport(StepResult):
    """One optimizer step of a run, in plain numbers."""

    step: int
    learning_rate: float
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

    def aside(look: Look, state: TrainState) -> None:
        with watch.paused():
            look(state)

    while state.step < (steps := steps_at(state.step) if steps_at else config.steps):
        watch.start()
        state.begin(source(state.step))
        data_seconds = watch.so_far()
        rate = learning_rate(state.step, config, steps)
        result = train_step(
            state,
            state.batches,
            rate,
            config,
            functools.partial(aside, look) if look and state.step == look_at else None,
            functools.partial(source.prepare, state.step + 1, steps),
        )
        report = StepReport(
            **vars(result),
            step=state.step,
            learning_rate=rate,
            seconds=watch.stop(),
            data_seconds=data_seconds,
            tokens=sum(x.numel() for x, _ in state.batches),
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


def _count(state: TrainState, report: StepReport, config: TrainConfig) -> None:
    """Keep what later steps are measured by; raise NumericsError after too many skipped ones.

    A skipped spike does not count as usual, or a few of them would let the next one pass. Where
    all norms have grown for good every step is skipped, until `max_skipped` ends that.
    """
    state.skipped += report.skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if report.skipped else 0
    usual = statistics.median(state.norms) if report.spike else math.nan
    if report.spike:
        state.spikes = [*state.spikes, report.grad_norm][-TOLD:]
        state.spikes_seen += 1
        if state.spikes_seen <= TOLD:
            last = state.spikes_seen == TOLD
            log.warning(
                "step %d: skipped as a spike: gradient norm %.4g, more than train.skip_spikes=%g "
                "times the recent median of %.4g%s",
                *(report.step, report.grad_norm, config.skip_spikes, usual),
                "; further ones show in train/skipped alone" if last else "",
            )
    elif math.isfinite(report.grad_norm):
        state.norms, state.spikes = [*state.norms, report.grad_norm][-RECENT:], []
    if state.skipped_in_a_row < config.max_skipped:
        return
    if report.spike:
        norms = ", ".join(f"{norm:.4g}" for norm in state.spikes)
        why = (
            f"the last ones for gradient norms of {norms}, each more than train.skip_spikes="
            f"{config.skip_spikes:g} times the recent median of {usual:.4g}: these are no spikes, "
            "the norm has grown; try a lower train.lr, a longer train.warmup_steps or "
            "train.skip_spikes=0"
        )
    else:
        scale = state.scaler.get_scale()
        why = f"the loss scale is down to {scale:g}; try precision=bf16 or a lower train.lr"
    raise NumericsError(
        f"step {state.step}: {config.max_skipped} steps skipped in a row (train.max_skipped), {why}"
    )


class Prefetch:
    """Calls `batches_of(step)`; on CUDA one step ahead, into pinned memory.

    What costs is the host's gathering, during which the device would stand idle. The copy is
    asynchronous and stays in the step's own stream: 1 MiB of tokens takes some 40 microseconds of
    a step of 100 ms. On the CPU nothing is ahead: whoever gathered would take time from the step.
    """

    def __init__(self, batches_of: Callable[[int], list[Batch]], device: torch.device) -> None:
        self.batches_of, self.device = batches_of, device
        self._ready: tuple[int, list[Batch]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        """The batches of `step`, where `batches_of` made them: on the host, or on the device."""
        ready, self._ready = self._ready, None
        return ready[1] if ready and ready[0] == step else self._made(step)

    def prepare(self, step: int, steps: int) -> None:
        """Make those of `step`, if it is one of `steps`, while the device is at work."""
        if self.device.type == "cuda" and step < steps:
            # What is wrong with them is said when their own step begins and makes them again.
            with contextlib.suppress(InputError, OSError):
                self._ready = step, self._made(step)

    def _made(self, step: int) -> list[Batch]:
        def pinned(x: Tensor) -> Tensor:  # torch pins the host's tensors alone
            return x.pin_memory() if x.device.type == "cpu" else x

        batches = self.batches_of(step)
        if self.device.type != "cuda":
            return batches
        return [(pinned(x), pinned(y)) for x, y in batches]


# --- validation


class ValidationError(NumericsError):
    """A validation loss that is not finite."""

    def __init__(self, loss: float):
        super().__init__(f"the validation loss is {loss}: this model is not kept")
        self.loss = loss


def windows(held_out: Tokens, config: TrainConfig) -> Iterator[Batch]:
    """Batches of the first `train.val_tokens` tokens of the validation split."""
    return validation_windows(
        held_out,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        limit=config.val_tokens,
    )


def validate(
    state: TrainState,
    held_out: Tokens,
    config: TrainConfig,
    while_: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> float:
    """Mean loss in nats/token; `while_` may end the batches early by raising an error.

    Raises ValidationError where the loss is not finite.
    """
    batches = while_(windows(held_out, config))
    loss = mean_loss(state.model, batches, state.precision, state.precision.device)
    if not math.isfinite(loss):
        raise ValidationError(loss)
    return loss
