"""The run doctor: rules over what a run recorded, a verdict, the setting to change."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence

from pipeline import paths
from pipeline.diagnostics.curve_stats import (
    BEFORE_SPIKE,
    CUT_TO,
    FEW,
    NORM_LEAP,
    Finding,
    cut_share,
    growth_of_norm,
    largest_leap,
    largest_rise,
    noise_of,
    smoothed,
    tail,
)
from pipeline.errors import InputError
from pipeline.published import VOCAB_SIZE
from pipeline.records.dvc_history import WORKSPACE, experiments, of_workspace
from pipeline.records.record_file import Event
from pipeline.records.run_data import Experiment

log = logging.getLogger(__name__)

# Where a rule speaks up. Each has a run just below and one just above it in the tests.
NORM_GROWS = 10.0  # times the norm of the quietest steps
ALWAYS = 0.95  # share of the second half's steps whose gradient is CUT_TO times its limit
LEARNED_NOTHING = 0.3  # nats below ln V
OVERFLOWS = 0.2  # share of steps
SPIKE = 1.0  # nats above the median of the steps before ...
SPIKE_NOISE = 8.0  # ... and this many of their standard deviations
OVERFIT = 0.01  # of the best validation loss
ROSE = 0.3  # nats that the smoothed training loss rose again ...
ROSE_NOISE = 6.0  # ... and this many standard errors of its running mean
# Of the weights, changed by one step. In trainings of small fresh models the larger steps at the
# best rate were 2%, at a twentieth of it 0.2%.
SMALL_UPDATE = 3e-3
STILL_FALLING = 0.1  # share of the whole fall that the second half of the run brought
OF_MATRIX_RATE = 0.15
DATA_SHARE = 0.2  # of a step's time
LEAK = 0.1  # share of validation passages
WAITS = 0.05  # of the steps so far, between two looks at a training under way


Rule = Callable[[Experiment], Finding | None]


def examine(found: Experiment, rules: Sequence[Rule] | None = None) -> list[Finding]:
    """Every rule's finding on this run, in the order of RULES; none for a healthy run."""
    return [finding for rule in rules or RULES for finding in [rule(found)] if finding]


def headline(findings: list[Finding]) -> str:
    """One line: the rules that found something, or that none did."""
    return ", ".join(finding.rule for finding in findings) or "healthy"


def lines(findings: list[Finding]) -> list[str]:
    """The whole verdict for a terminal."""
    if not findings:
        return [f"healthy: {len(RULES)} rules found nothing"]
    return [line(finding) for finding in findings]


def line(finding: Finding) -> str:
    """One finding for a terminal, in three lines."""
    return f"{finding.rule}: {finding.verdict}\n  {finding.evidence}\n  Try: {finding.advice}."


def health(found: Experiment) -> dict[str, float]:
    """Numbers for the table of runs."""
    norms, ratios = found.values("train/grad_norm"), found.values("train/update_ratio")
    shown = {"health/findings": float(len(examine(found)))}
    if norms:
        shown["health/grad_norm_max"] = max(norms)
        shown["health/grad_norm_last"] = statistics.median(tail(norms))
    limit = found.params["train.grad_clip"]
    if norms and limit:
        shown["health/clipped_share"] = sum(norm > limit for norm in norms) / len(norms)
    if ratios:
        shown["health/update_ratio"] = statistics.median(ratios)
    return shown


def norm_words(found: Experiment) -> str:
    """What became of the gradient norm, in the few words that a table's cell holds."""
    growth, cut = growth_of_norm(found), cut_share(found)
    if growth is not None and growth >= NORM_GROWS:
        return f"grows {growth:,.0f}x"
    if cut is not None and cut > ALWAYS:
        return f"clipped {cut:.0%}"
    _, norm, usual = largest_leap(found)
    return f"spike {norm / usual:,.0f}x" if norm else "fine"


# --- the rules


def gradient_norm_grows(found: Experiment) -> Finding | None:
    growth = growth_of_norm(found)
    if growth is None or growth < NORM_GROWS:
        return None
    last = statistics.median(tail(found.values("train/grad_norm")))
    return Finding(
        "gradient norm grows",
        f"The gradient norm has grown {growth:,.0f}-fold: training is leaving its course, however "
        "smooth the clipped steps look.",
        f"median {last / growth:,.3g} in the quietest {FEW} steps, {last:,.3g} at the end",
        "a lower train.lr, or a longer train.warmup_steps",
    )


def always_clipped(found: Experiment) -> Finding | None:
    share = cut_share(found)
    if share is None or share <= ALWAYS:
        return None
    norm = statistics.median(tail(found.values("train/grad_norm")))
    limit = found.params["train.grad_clip"]
    return Finding(
        "always clipped",
        "Nearly every gradient is cut to a fraction of its length: all steps are of one size, "
        "whatever the loss says.",
        f"{share:.0%} of the second half's gradients are {CUT_TO:g} times train.grad_clip="
        f"{limit:g} or more, {norm:,.3g} at the end",
        "a lower train.lr, more tokens a step (train.accumulate), or, if the loss falls well, "
        f"train.grad_clip={_rough(norm)}",
    )


def stuck(found: Experiment) -> Finding | None:
    losses, nothing = found.values("train/loss"), math.log(VOCAB_SIZE)
    if len(losses) < max(20, found.params["train.warmup_steps"]):
        return None
    last = statistics.fmean(tail(losses))
    if not nothing - LEARNED_NOTHING < last < nothing + LEARNED_NOTHING:
        return None
    return Finding(
        "stuck at ln V",
        f"The loss is still what guessing among {VOCAB_SIZE:,} tokens costs: nothing was learnt.",
        f"{last:.3f} nats at the end, ln {VOCAB_SIZE} is {nothing:.3f}",
        "a higher train.lr, init.std=0.02, and a look at the corpus",
    )


def dead_scaler(found: Experiment) -> Finding | None:
    scales, infinite = found.values("train/loss_scale"), found.values("train/found_inf")
    if not scales or max(scales) <= 1:  # 1 throughout where no scaler works
        return None
    share = sum(infinite) / len(scales)  # train/skipped counts spikes as well
    if scales[-1] >= 1 and share < OVERFLOWS:
        return None
    return Finding(
        "dead loss scaler",
        "Gradients overflow in fp16 however small the loss scale gets.",
        f"{share:.0%} of the steps were skipped, the scale fell from {max(scales):g} to "
        f"{scales[-1]:g}",
        "precision=bf16, or a lower train.lr",
    )


def spike(found: Experiment) -> Finding | None:
    losses, worst = found.values("train/loss"), (0.0, 0, 0.0)
    for step in range(max(BEFORE_SPIKE, found.params["train.warmup_steps"]), len(losses)):
        before = losses[step - BEFORE_SPIKE : step]
        usual = statistics.median(before)
        above = losses[step] - usual
        # In this order: the deviation is exact and slow, and few steps come as far.
        if above > max(SPIKE, worst[0]) and above > SPIKE_NOISE * statistics.stdev(before):
            worst = above, step, usual
    above, step, usual = worst
    if not above:
        return None
    later = losses[step + 1 :]
    back = next((n for n, loss in enumerate(later, 1) if loss < usual + SPIKE / 2), None)
    return Finding(
        "loss spike",
        f"The loss leapt up at step {step:,}"
        + (f" and was back {back:,} steps later." if back else " and never came back."),
        f"{losses[step]:.3f} nats after a median of {usual:.3f}",
        "a lower train.lr, train.beta2=0.95, a longer train.warmup_steps or a smaller "
        "train.grad_clip",
    )


def gradient_spike(found: Experiment) -> Finding | None:
    step, norm, usual = largest_leap(found)
    if not norm:
        return None
    skipped = step in {at for at, value in found.curves.get("train/skipped", []) if value}
    of = f" --of {name}" if (name := found.name if found.rev else found.head["name"]) else ""
    return Finding(
        "gradient spike",
        f"The gradient of step {step:,} was {norm / usual:,.0f} times as long as usual; "
        + ("the step was skipped." if skipped else "the step was made."),
        f"norm {norm:,.3g} after a median of {usual:,.3g} in {BEFORE_SPIKE} steps",
        f"python -m pipeline text --step {step}{of} for its text"
        + ("" if skipped else f", train.skip_spikes={NORM_LEAP:g}")
        + ", a lower train.lr or a longer train.warmup_steps",
    )


def worse_than_frequencies(found: Experiment) -> Finding | None:
    loss, unigram = found.last("val/loss"), found.last("val/unigram_loss")
    if loss is None or unigram is None or loss < unigram:
        return None
    return Finding(
        "no better than word frequencies",
        "How often each token occurs tells as much of the validation text as this model does.",
        f"validation loss {loss:.3f}, by frequencies alone {unigram:.3f}",
        "more train.steps, or a higher train.lr",
    )


def overfitting(found: Experiment) -> Finding | None:
    validations, losses = found.curves.get("train/val_loss", []), found.values("train/loss")
    if len(validations) < 3:
        return None
    (best_step, best), (_, last) = min(validations, key=lambda p: p[1]), validations[-1]
    width = len(tail(losses))
    then = statistics.fmean(losses[max(0, best_step + 1 - width) : best_step + 1])
    now = statistics.fmean(losses[-width:])
    if last < (1 + OVERFIT) * best or now > then:
        return None
    seen, corpus = found.last("train/tokens"), found.last("data/train_tokens")
    epochs = f", {seen / corpus:,.1f} epochs" if seen and corpus else ""
    return Finding(
        "overfitting",
        "The model learns its training text by heart: validation got worse while training got "
        "better.",
        f"validation {best:.3f} at step {best_step:,}, {last:.3f} at the end; training {then:.3f} "
        f"and {now:.3f}{epochs}",
        "fewer train.steps, more text, model.dropout or a smaller model",
    )


def rate_too_high(found: Experiment) -> Finding | None:
    raw, ratios = found.values("train/loss"), found.values("train/update_ratio")
    losses = smoothed(raw)
    if len(losses) < 2 * FEW:
        return None
    width = len(raw) - len(losses) + 1  # steps that a running mean is taken over
    rise, low, high = largest_rise(losses)
    noise = noise_of(raw)
    if rise <= max(ROSE, ROSE_NOISE * noise / width**0.5):
        return None
    step = f"; the largest step changed the weights by {max(ratios):.0%}" if ratios else ""
    return Finding(
        "learning rate too high",
        "The training loss rose again after it had fallen: the steps are too large for batches "
        "of this size.",
        f"the smoothed loss rose from {losses[low]:.3f} at step {low:,} to {losses[high]:.3f} at "
        f"step {high:,}{step}",
        f"train.lr={_rough(found.params['train.lr'] / 5)}, or more tokens a step: train.accumulate",
    )


def rate_too_low(found: Experiment) -> Finding | None:
    losses, ratios = smoothed(found.values("train/loss")), found.values("train/update_ratio")
    fresh = found.params["init.source"] == "random"  # published weights want small steps
    if not fresh or not ratios or len(losses) < 2 * FEW:
        return None
    fall, second = losses[0] - losses[-1], losses[len(losses) // 2] - losses[-1]
    largest = statistics.median(sorted(ratios)[-max(5, len(ratios) // 4) :])
    if fall < ROSE or second < STILL_FALLING * fall or largest >= SMALL_UPDATE:
        return None
    return Finding(
        "learning rate too low",
        "The loss was still falling when the run ended, in steps too small for fresh weights.",
        f"{second:.3f} of {fall:.3f} nats fell in the second half; the larger steps changed the "
        f"weights by {largest:.2%}",
        f"train.lr={_rough(found.params['train.lr'] * 5)}",
    )


def _rough(value: float) -> str:
    """One digit: no advice is better than that."""
    return f"{float(f'{value:.1g}'):g}"


def slow(found: Experiment) -> Finding | None:
    share, rate = found.last("perf/of_matrix_rate"), found.last("perf/matrix_gflops")
    speed = found.last("perf/tokens_per_second")
    if share is None or rate is None or speed is None or share >= OF_MATRIX_RATE:
        return None
    return Finding(
        "slow for this machine",
        f"Training reaches {share:.0%} of what this machine's matrix products reach.",
        f"{speed:,.0f} tokens/s; large products run at {rate:,.0f} GFLOP/s",
        "a larger train.batch_size with a smaller train.accumulate, train.compile=true, "
        "model.attention=sdpa; and see that nothing else uses the machine",
    )


def data_bound(found: Experiment) -> Finding | None:
    waits, steps = found.values("perf/data_seconds"), found.values("perf/step_seconds")
    # Older records know no waits.
    pairs = [(data, step) for data, step in zip(waits, steps, strict=False) if step]
    if len(pairs) < FEW:
        return None
    share = statistics.median(data / step for data, step in pairs)
    if share < DATA_SHARE:
        return None
    return Finding(
        "bound by data",
        f"A step waits {share:.0%} of its time for its tokens.",
        f"{statistics.median(d for d, _ in pairs) * 1e3:.3g} ms of "
        f"{statistics.median(s for _, s in pairs) * 1e3:.3g} ms, medians",
        "data/tokens on a local disk, or more memory for the system's file cache",
    )


def leak(found: Experiment) -> Finding | None:
    share = found.last("data/val_overlap")
    if share is None or share < LEAK:
        return None
    return Finding(
        "validation leaks",
        "Much of the validation text stands in the training text: its loss measures memory.",
        f"{share:.0%} of the validation passages occur in the training tokens word for word",
        "a corpus without duplicate documents, one document a file (corpus.path)",
    )


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
    leak,
)


class Rounds:
    """The doctor's looks at a training under way: what is urgent, once each.

    A look reads all steps so far. The next one waits until these have grown by a twentieth, so
    that all looks of a run together read some twenty times its steps, however often it validates.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._next = 0.0

    def look(self, steps: int, events: Callable[[], list[Event]]) -> list[Finding]:
        """After so many steps, what has not been told before; `events` gives the record."""
        if steps < self._next:
            return []
        self._next = (1 + WAITS) * steps
        findings = examine(Experiment("", "", {"train": events()}), URGENT)
        new = [finding for finding in findings if finding.rule not in self._told]
        self._told |= {finding.rule for finding in new}
        return new


def asked(names: list[str]) -> list[Experiment]:
    """The experiments of these names; raises InputError where one is not there or not trained."""
    everything = [of_workspace(paths.root())] if set(names) == {WORKSPACE} else experiments()
    known = {found.name: found for found in everything}
    for name in names:
        if name not in known:
            raise InputError(f"{name}: no such experiment; known: {', '.join(known)}")
        if "train" not in known[name].records:
            raise InputError(f"{name}: nothing trained yet: `dvc repro` or `make repro` trains")
    return [known[name] for name in names]
