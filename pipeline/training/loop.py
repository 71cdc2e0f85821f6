"""The training loop: a generator that makes one step and yields one report at a time."""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.compute.runtime import derived_seed
from pipeline.compute.throughput import Stopwatch
from pipeline.data.batches import batch_at
from pipeline.errors import NumericsError
from pipeline.training.optimizers import learning_rate
from pipeline.training.prefetch import Prefetch
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
