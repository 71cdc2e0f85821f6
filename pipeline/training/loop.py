"""The training loop: a generator that makes one step and yields one report at a time."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.compute.ranks import STEP, Ranks
from pipeline.compute.runtime import derived_seed
from pipeline.compute.throughput import Stopwatch
from pipeline.data.batches import batch_at
from pipeline.errors import NumericsError
from pipeline.training.fingerprint import Fingerprint, Taken
from pipeline.training.optimizers import learning_rate
from pipeline.training.prefetch import Prefetch
from pipeline.training.training_step import (
    RECENT,
    Batch,
    Launched,
    Look,
    StepResult,
    TrainState,
    finish,
    launch,
)

if TYPE_CHECKING:
    from pipeline.config import TrainConfig
    from pipeline.data.token_files import Tokens

AHEAD = ("cuda",)  # devices that work by themselves, and may be given a step ahead
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
    settled: bool = True  # the state is that after this step: see `fit`
    fingerprint: Fingerprint | None = None  # of what it began with, every `fingerprint_every`

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
    look_at: int | range = -1,
    steps_at: Callable[[int], int] | None = None,
    pause: Callable[[int], bool] | None = None,
) -> Iterator[StepReport]:
    """One optimizer step and one report at a time, from `state.step` to `config.steps`.

    batches_of(step) gives the step's batches. In `look_at`, a step or several, `look` is called
    between the gradients and the update; its time is not the step's. `steps_at(step)` is asked
    before each step how many the run is to have, where that is not `config.steps`; the learning
    rate follows.

    With `pause`, a GPU is given each step before the numbers of the one before it are read, so
    that it never stands idle for them. Such a report is not `settled`: the state is at work on the
    next step already. pause(done) is asked in between, and after a yes the next step waits until
    the report has been dealt with. What pause itself launches sees the state after `done` steps.

    Raises NumericsError before an update that would spoil the parameters; a step that had been
    launched by then changes nothing either.
    """
    device = state.precision.device
    looked_at = look_at if isinstance(look_at, range) else range(look_at, look_at + 1)
    run = _Run(state, config, Prefetch(batches_of, device), Stopwatch(device), look, looked_at)
    steps_at = steps_at or (lambda step: config.steps)
    step = run.launched(steps_at(state.step))
    while step:
        done, following = step.facts["step"] + 1, None
        if pause and run.can_wait(step) and not pause(done):
            state.step = done
            try:
                following = run.launched(steps_at(done), step.work)
            except Exception:  # what was made before is told first
                yield run.report(step, settled=False)
                raise
        report = run.report(step, settled=not following)
        state.step = done
        yield report
        step = following or run.launched(steps_at(done))


class _Step(NamedTuple):
    """A step that the device is at work on, and what its report can say of it already."""

    work: Launched
    facts: dict[str, Any]
    fingerprint: Taken | None


@dataclass(frozen=True)
class _Run:
    """Launches the steps of one `fit`, and reads what came of them."""

    state: TrainState
    config: TrainConfig
    source: Prefetch
    watch: Stopwatch
    look: Look | None
    look_at: range

    def launched(self, steps: int, earlier: Launched | None = None) -> _Step | None:
        """The next of so many steps, if it is one of them; `earlier` has not been read yet."""
        state, watch, number = self.state, self.watch, self.state.step
        if number >= steps:
            return None
        state.ranks.lead(STEP, steps)
        if not earlier:
            watch.start()
        asked = watch.so_far()
        state.ranks.seed(self.config.seed, number)
        state.begin(self.source(number))
        facts = {"step": number, "steps": steps, "data_seconds": watch.so_far() - asked}
        facts["tokens"] = sum(x.numel() for x, _ in state.batches) * state.ranks.world
        facts["learning_rate"] = rate = learning_rate(number, self.config, steps)
        every = self.config.fingerprint_every
        taken = Taken(state, self.config.seed) if every and number % every == 0 else None
        look = self._aside if self.look and number in self.look_at else None
        work = launch(state, state.batches, rate, self.config, look, earlier)
        self.source.prepare(number + 1, steps)
        return _Step(work, facts, taken)

    def can_wait(self, step: _Step) -> bool:
        """Whether nothing of the step after this one depends on what the host is to read of it."""
        return (
            step.work.update.alone
            and self.state.precision.device.type in AHEAD
            and not self.config.skip_spikes  # whose limit is that of all norms so far
            and self.state.skipped_in_a_row + 1 < self.config.max_skipped  # or this may be the end
            and step.facts["step"] + 1 != step.facts["steps"]
            and step.facts["step"] + 1 not in self.look_at
        )

    def report(self, step: _Step, settled: bool) -> StepReport:
        """What came of a step, which is read here; `settled`: no other one has been launched."""
        result = finish(self.state, step.work)
        seconds = self.watch.stop() if settled else self.watch.lap()
        taken = step.fingerprint.read() if step.fingerprint else None
        facts = {**vars(result), **step.facts, "fingerprint": taken}
        report = StepReport(**facts, seconds=seconds, settled=settled)
        _count(self.state, report, self.config)
        return report

    def _aside(self, state: TrainState) -> None:
        assert self.look
        with self.watch.paused():
            self.look(state)


def micro_batches(
    tokens: Tokens, config: TrainConfig, step: int, ranks: Ranks | None = None
) -> list[Batch]:
    """The batches of one step: a pure function of the settings, so that nothing is to be kept.

    With `ranks`, the share of one process; those of all hold the same sequences as without.
    """
    ranks = ranks or Ranks()
    batch_size, accumulate = ranks.share(config.batch_size, config.accumulate)
    return [
        batch_at(
            tokens,
            step,
            micro_step,
            batch_size=batch_size,
            sequence_length=config.sequence_length,
            accumulate=accumulate,
            seed=derived_seed(config.seed, "data"),
            rank=ranks.rank,
            world=ranks.world,
        )
        for micro_step in range(accumulate)
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
        f"step {report.step}: {config.max_skipped} steps skipped in a row (train.max_skipped), "
        f"{why}"
    )
