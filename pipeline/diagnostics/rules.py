"""The run doctor's rules: each looks for one kind of trouble in what a run recorded."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pipeline.published import VOCAB_SIZE
from pipeline.records.run_data import RunData

FEW = 10  # steps that a median is taken over
TAIL = 0.1  # share of steps that speak for a run's end
BEFORE_SPIKE = 20  # steps that say what is usual

# Where a rule speaks up. The tests have a run just below and one just above each threshold.
NORM_GROWS = 10.0  # times the norm of the quietest steps
CUT_TO = 3.0  # a gradient of this many times its limit is cut to a fraction
ALWAYS = 0.95  # share of the second half's steps whose gradient is CUT_TO times its limit
LEARNED_NOTHING = 0.3  # nats/token below ln V
OVERFLOWS = 0.2  # share of steps
SPIKE = 1.0  # nats/token above the median of the steps before ...
SPIKE_NOISE = 8.0  # ... and this many of their standard deviations
NORM_LEAP = 10.0  # times the usual norm ...
STAYS = 5  # ... which is no leap but growth if most of so many later norms are like it
OVERFIT = 0.01  # of the best validation loss
ROSE = 0.3  # nats/token that the smoothed training loss rose again ...
ROSE_NOISE = 6.0  # ... and this many standard errors of its running mean
# Share of the weights changed by one step. In trainings of small fresh models the larger steps at
# the best rate were 2%, at a twentieth of it 0.2%.
SMALL_UPDATE = 3e-3
STILL_FALLING = 0.1  # share of the whole fall that the second half of the run brought
OF_MATRIX_RATE = 0.15
DATA_SHARE = 0.2  # of a step's time
IDLE = 50.0  # percent of the time in which the card computes
THROTTLED = 0.2  # share of the looks at a card
UNEVEN = 2.0  # times the time of the quickest quarter of the steps, for the slowest
LEAK = 0.1  # share of validation passages


@dataclass(frozen=True)
class Finding:
    """A problem that a rule found."""

    rule: str  # a short name
    verdict: str  # one sentence
    evidence: str  # the numbers behind it
    advice: str  # the settings to change

    def __str__(self) -> str:
        """Three lines for a terminal."""
        return f"{self.rule}: {self.verdict}\n  {self.evidence}\n  Try: {self.advice}."


Rule = Callable[[RunData], Finding | None]


# --- medians, growth and leaps in the curves


def tail(values: list[float]) -> list[float]:
    """The last tenth of the values, at least five."""
    return values[-max(5, round(TAIL * len(values))) :]


def growth_of_norm(run: RunData) -> float:
    """The median norm at the end over that of the quietest FEW steps; 1 for a short run."""
    norms = run.values("train/grad_norm")
    if len(norms) < 2 * FEW:
        return 1.0
    quietest = min(statistics.median(norms[i : i + FEW]) for i in range(0, len(norms), FEW))
    return statistics.median(tail(norms)) / quietest if quietest else math.inf


def cut_share(run: RunData) -> float:
    """Share of the second half's steps whose gradient is CUT_TO times its limit or more."""
    norms, limit = run.values("train/grad_norm"), run.params["train.grad_clip"]
    half = norms[len(norms) // 2 :]
    if not limit or len(half) < FEW:
        return 0.0
    return sum(norm >= CUT_TO * limit for norm in half) / len(half)


def largest_leap(run: RunData) -> tuple[int, float, float]:
    """(step, norm, usual norm) of the largest gradient that stands out; zeros where none does."""
    points, worst = run.curves.get("train/grad_norm", []), (0, 0.0, 0.0)
    norms = [norm for _, norm in points]
    for at in range(max(BEFORE_SPIKE, run.params["train.warmup_steps"]), len(points)):
        step, norm = points[at]
        before = norms[at - BEFORE_SPIKE : at]
        if norm <= worst[1] or norm <= NORM_LEAP * min(before):  # no median is below the least
            continue
        usual = statistics.median(before)
        later = norms[at + 1 : at + 1 + STAYS]
        stays = len(later) == STAYS and statistics.median(later) > NORM_LEAP * usual
        if norm > NORM_LEAP * usual > 0 and not stays:
            worst = step, norm, usual
    return worst


def largest_jump(run: RunData, but: Container[int] = ()) -> tuple[int, float, float]:
    """(step, loss, usual loss) of the largest jump of the loss; zeros where none stands out.

    The steps in `but` are no jumps.
    """
    losses, worst = run.values("train/loss"), (0.0, 0, 0.0)
    for step in range(max(BEFORE_SPIKE, run.params["train.warmup_steps"]), len(losses)):
        before = losses[step - BEFORE_SPIKE : step]
        usual = statistics.median(before)
        above = losses[step] - usual
        # In this order: the deviation is exact and slow, and few steps come as far.
        high = above > max(SPIKE, worst[0]) and step not in but
        if high and above > SPIKE_NOISE * statistics.stdev(before):
            worst = above, step, usual
    above, step, usual = worst
    return (step, losses[step], usual) if above else (0, 0.0, 0.0)


def smoothed(losses: list[float]) -> list[float]:
    """Running means over a twentieth of the run, at least five steps."""
    width = max(5, len(losses) // 20)
    sums = list(accumulate(losses, initial=0.0))
    return [(sums[i + width] - sums[i]) / width for i in range(len(losses) - width + 1)]


def largest_rise(losses: list[float]) -> tuple[float, int, int]:
    """(rise, step of the low, step of the high after it) of the pair furthest apart."""
    low, best = 0, (0.0, 0, 0)
    for step, loss in enumerate(losses):
        if loss < losses[low]:
            low = step
        best = max(best, (loss - losses[low], low, step))
    return best


# --- the rules


def gradient_norm_grows(run: RunData) -> Finding | None:
    growth = growth_of_norm(run)
    if growth < NORM_GROWS:
        return None
    last = statistics.median(tail(run.values("train/grad_norm")))
    return Finding(
        "gradient norm grows",
        f"The gradient norm has grown {growth:,.0f}-fold: training diverges, however smooth the "
        "clipped steps look.",
        f"median {last / growth:,.3g} in the quietest {FEW} steps, {last:,.3g} at the end",
        "a lower train.lr or a longer train.warmup_steps",
    )


def always_clipped(run: RunData) -> Finding | None:
    share = cut_share(run)
    if share <= ALWAYS:
        return None
    norm = statistics.median(tail(run.values("train/grad_norm")))
    limit = run.params["train.grad_clip"]
    return Finding(
        "always clipped",
        "Nearly every gradient is clipped to a fraction of its length, so that all steps have the "
        "same size, whatever the loss says.",
        f"{share:.0%} of the second half's gradients are at least {CUT_TO:g} times "
        f"train.grad_clip={limit:g}; the norm is {norm:,.3g} at the end",
        "a lower train.lr, more tokens per step (train.accumulate) or, if the loss falls well, "
        f"train.grad_clip={_rough(norm)}",
    )


def dead_scaler(run: RunData) -> Finding | None:
    scales, infinite = run.values("train/loss_scale"), run.values("train/found_inf")
    if not scales or max(scales) <= 1:  # 1 throughout where no scaler works
        return None
    share = sum(infinite) / len(scales)  # train/skipped counts spikes as well
    if scales[-1] >= 1 and share < OVERFLOWS:
        return None
    return Finding(
        "dead loss scaler",
        "Gradients overflow in fp16 however small the loss scale gets.",
        f"{share:.0%} of the steps were skipped; the scale fell from {max(scales):g} to "
        f"{scales[-1]:g}",
        "precision=bf16 or a lower train.lr",
    )


def spike(run: RunData) -> Finding | None:
    step, _, usual = largest_jump(run, _skipped_spikes(run))  # which are told by their gradient
    losses = run.values("train/loss")
    if not usual:
        return None
    back = _back(losses, step, usual)
    return Finding(
        "loss spike",
        f"The loss jumped at step {step:,} and "
        + (f"recovered within {_steps(back)}." if back else "never recovered."),
        f"{losses[step]:.3f} nats/token after a median of {usual:.3f} in {BEFORE_SPIKE} steps",
        "a lower train.lr, "
        + ("train.beta2=0.95, " if run.params["train.beta2"] > 0.95 else "")
        + "a longer train.warmup_steps or a smaller train.grad_clip",
    )


def gradient_spike(run: RunData) -> Finding | None:
    step, norm, usual = largest_leap(run)
    if not norm:
        return None
    skipped = step in _skipped_spikes(run)
    of, every = run.dvc_name, run.params.get("checkpoint.keep_every", 0)
    look = f"text --step {step}{f' --of {of}' if of else ''} for its text"
    begins = run.lineage[-1]["step"] if run.lineage else 0
    if every and step // every * every >= max(begins, 1):  # a state before it stays
        look = f"explain {of or 'workspace'}@{step} for its text and the layer that grew"
    return Finding(
        "gradient spike",
        f"The gradient of step {step:,} was {norm / usual:,.0f} times as long as usual; "
        + ("the step was skipped." if skipped else "the step was made."),
        f"norm {norm:,.3g} after a median of {usual:,.3g} in {BEFORE_SPIKE} steps",
        f"python -m pipeline {look}"
        + ("" if skipped else f", train.skip_spikes={NORM_LEAP:g}")
        + ", a lower train.lr or a longer train.warmup_steps",
    )


def _back(losses: Sequence[float], step: int, usual: float) -> int | None:
    """How many steps after a jump the loss was back; None where it never was."""
    later = losses[step + 1 :]
    return next((n for n, loss in enumerate(later, 1) if loss < usual + SPIKE / 2), None)


def _skipped_spikes(run: RunData) -> set[int]:
    """The steps skipped for their gradient norm; an overflow's is no number, and not recorded."""
    norms = {step for step, _ in run.curves.get("train/grad_norm", [])}
    return norms & {step for step, value in run.curves.get("train/skipped", []) if value}


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def stuck(run: RunData) -> Finding | None:
    losses, guessing = run.values("train/loss"), math.log(VOCAB_SIZE)
    if len(losses) < max(20, run.params["train.warmup_steps"]):
        return None
    last = statistics.fmean(tail(losses))
    if not abs(last - guessing) < LEARNED_NOTHING:
        return None
    return Finding(
        "stuck at ln V",
        f"The loss is still that of guessing among {VOCAB_SIZE:,} tokens: nothing was learned.",
        f"{last:.3f} nats/token at the end; ln {VOCAB_SIZE} is {guessing:.3f}",
        "a higher train.lr, init.std=0.02, and a look at the corpus",
    )


def worse_than_frequencies(run: RunData) -> Finding | None:
    loss, unigram = run.last("val/loss"), run.last("val/unigram_loss")
    if loss is None or unigram is None or loss < unigram:
        return None
    return Finding(
        "no better than word frequencies",
        "Token frequencies alone predict the validation text as well as this model does.",
        f"validation loss {loss:.3f} nats/token, by frequencies alone {unigram:.3f}",
        "more train.steps or a higher train.lr",
    )


def overfitting(run: RunData) -> Finding | None:
    validations, losses = run.curves.get("train/val_loss", []), run.values("train/loss")
    if len(validations) < 3:
        return None
    (best_step, best), (_, last) = min(validations, key=lambda p: p[1]), validations[-1]
    width = len(tail(losses))
    then = statistics.fmean(losses[max(0, best_step + 1 - width) : best_step + 1])
    now = statistics.fmean(losses[-width:])
    if last < (1 + OVERFIT) * best or now > then:
        return None
    seen, corpus = run.last("train/tokens"), run.last("data/train_tokens")
    epochs = f", {seen / corpus:,.1f} epochs" if seen and corpus else ""
    return Finding(
        "overfitting",
        "The model memorizes its training text: the validation loss rose while the training loss "
        "fell.",
        f"validation loss {best:.3f} at step {best_step:,}, {last:.3f} at the end; training loss "
        f"{then:.3f}, then {now:.3f}{epochs}",
        "fewer train.steps, more text, model.dropout or a smaller model",
    )


def rate_too_high(run: RunData) -> Finding | None:
    raw, ratios = list(run.values("train/loss")), run.values("train/update_ratio")
    step, _, usual = largest_jump(run)
    if usual and (back := _back(raw, step, usual) or FEW) < FEW:  # a spike, told as such, no trend
        raw[step : step + back] = [usual] * back
    losses = smoothed(raw)
    if len(losses) < 2 * FEW:
        return None
    width = len(raw) - len(losses) + 1  # steps that a running mean is taken over
    # Noise around the trend, from the differences of neighbours: those of a normal variable have a
    # median size of 0.954 times its standard deviation.
    noise = statistics.median(abs(b - a) for a, b in pairwise(raw)) / 0.954
    rise, low, high = largest_rise(losses)
    if rise <= max(ROSE, ROSE_NOISE * noise / width**0.5):
        return None
    largest = f"; the largest step changed the weights by {max(ratios):.0%}" if ratios else ""
    return Finding(
        "learning rate too high",
        "The training loss rose again after it had fallen: the steps are too large for batches "
        "of this size.",
        f"the smoothed loss rose from {losses[low]:.3f} at step {low:,} to {losses[high]:.3f} at "
        f"step {high:,}{largest}",
        f"train.lr={_rough(run.params['train.lr'] / 5)} or more tokens per step (train.accumulate)",
    )


def rate_too_low(run: RunData) -> Finding | None:
    losses, ratios = smoothed(run.values("train/loss")), run.values("train/update_ratio")
    fresh = run.params["init.source"] == "random"  # published weights want small steps
    if not fresh or not ratios or len(losses) < 2 * FEW:
        return None
    fall, second = losses[0] - losses[-1], losses[len(losses) // 2] - losses[-1]
    larger = statistics.median(sorted(ratios)[-max(5, len(ratios) // 4) :])
    if fall < ROSE or second < STILL_FALLING * fall or larger >= SMALL_UPDATE:
        return None
    return Finding(
        "learning rate too low",
        "The loss was still falling when the run ended, in steps too small for fresh weights.",
        f"{second:.3f} of {fall:.3f} nats/token fell in the second half; the larger steps changed "
        f"the weights by {larger:.2%}",
        f"train.lr={_rough(run.params['train.lr'] * 5)}",
    )


def slow(run: RunData) -> Finding | None:
    share, rate = run.last("perf/of_matrix_rate"), run.last("perf/matrix_gflops")
    speed = run.last("perf/tokens_per_second")
    if share is None or rate is None or speed is None or share >= OF_MATRIX_RATE:
        return None
    return Finding(
        "slow for this machine",
        f"Training reaches {share:.0%} of the speed of this machine's matrix products.",
        f"{speed:,.0f} tokens/s; large products run at {rate:,.0f} GFLOP/s",
        "a larger train.batch_size with a smaller train.accumulate, train.compile=true, "
        "model.attention=sdpa; check that nothing else uses the machine",
    )


def data_bound(run: RunData) -> Finding | None:
    waits, steps = _own(run, "perf/data_seconds"), _own(run, "perf/step_seconds")
    # Older records know no waits.
    pairs = [(wait, step) for wait, step in zip(waits, steps, strict=False) if step]
    if len(pairs) < FEW:
        return None
    share = statistics.median(wait / step for wait, step in pairs)
    if share < DATA_SHARE:
        return None
    wait, step = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    return Finding(
        "bound by data",
        f"A step waits {share:.0%} of its time for its tokens.",
        f"median wait {wait:.3g} ms of a median step of {step:.3g} ms",
        "data/tokens on a local disk, or more memory for the system's file cache",
    )


def _own(run: RunData, name: str) -> list[float]:
    """A curve's values, but for those of the steps that a fork has from its parent."""
    first = run.lineage[-1]["step"] if run.lineage else 0
    return [value for step, value in run.curves.get(name, []) if step >= first]


def uneven(run: RunData) -> Finding | None:
    seconds = _own(run, "perf/step_seconds")[FEW:]  # the first ones pay for a warm-up
    if len(seconds) < 2 * FEW:
        return None
    quick, _, slow = statistics.quantiles(seconds, n=4)
    if not quick or slow < UNEVEN * quick:
        return None
    return Finding(
        "uneven speed",
        "The same step took much longer at some times than at others: something else takes the "
        "machine's time, or heat slows it down.",
        f"the quickest quarter of the steps took up to {quick:.3g} s each, the slowest "
        f"{slow:.3g} s or more",
        "a machine with nothing else at work, a look at its power supply and cooling; "
        "train.time_budget fits the steps to the pace that there is",
    )


def idle(run: RunData) -> Finding | None:
    for name, busy in _of_cards(run, "utilization_percentage").items():
        if (usual := statistics.median(busy)) < IDLE:
            return Finding(
                "idle GPU",
                "The card waits for the rest of the machine more than it computes.",
                f"{name} was at work {usual:.0f}% of the time, at the median of {len(busy)} looks",
                "a larger train.batch_size with a smaller train.accumulate, train.compile=true; "
                "nothing else on the CPU",
            )
    return None


def throttled(run: RunData) -> Finding | None:
    for name, slowed in _of_cards(run, "throttled").items():
        if (share := statistics.mean(slowed)) >= THROTTLED:
            heat = run.values(f"system/{name}_temperature_celsius")
            at = f"; it had up to {max(heat):.0f} degrees Celsius" if heat else ""
            return Finding(
                "throttled GPU",
                "The card slowed itself down, because of heat or its power supply.",
                f"{name} was slowed in {share:.0%} of {len(slowed)} looks{at}",
                "a look at its cooling and power; train.time_budget fits the steps to its pace",
            )
    return None


def _of_cards(run: RunData, what: str) -> dict[str, list[float]]:
    """ "gpu_0" -> what was seen of it, every ten seconds; only where there was time for FEW."""
    names = [re.fullmatch(rf"system/(gpu_\d+)_{what}", name) for name in run.curves]
    seen = {found[1]: run.values(found[0]) for found in names if found}
    return {name: values for name, values in seen.items() if len(values) >= FEW}


def leak(run: RunData) -> Finding | None:
    share = run.last("data/val_overlap")
    if share is None or share < LEAK:
        return None
    return Finding(
        "validation leaks",
        "Much of the validation text also occurs in the training text, so that its loss measures "
        "memory.",
        f"{share:.0%} of the validation passages occur word for word in the training text",
        "a corpus without duplicate documents, one document per file (corpus.path)",
    )


def _rough(value: float) -> str:
    """One digit: no advice is better than that."""
    return f"{float(f'{value:.1g}'):g}"


# Rules that speak while a run is under way, since waiting for its end would cost days.
URGENT: tuple[Rule, ...] = (gradient_norm_grows, always_clipped, dead_scaler, spike, gradient_spike)
RULES: tuple[Rule, ...] = (
    *URGENT,
    stuck,
    worse_than_frequencies,
    overfitting,
    rate_too_high,
    rate_too_low,
    slow,
    data_bound,
    uneven,
    idle,
    throttled,
    leak,
)
