"""A spike explained: its documents, the layer that grew first, and three ways past it."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import terminal
from pipeline.diagnostics import replay, rules, token_spans
from pipeline.errors import InputError, NumericsError, cut
from pipeline.model.loss import mean_loss
from pipeline.records.run_data import RunData
from pipeline.resume.fork import Kept
from pipeline.tables import markdown
from pipeline.training.loop import StepReport, micro_batches
from pipeline.training.training_step import ENOUGH, TrainState

GREW = 2.0  # times the largest norm before
ENOUGH_BEFORE = 5  # steps that say how large norms are
LOWER = 0.5  # of the rate
SHOWN = 3  # sequences with the largest losses
LAYERS = 6
EXCERPT = 160  # characters
COLUMNS = (
    *("fork", "the step", "its loss", "mean loss after", "of the last ten"),
    "largest norm after",
)
SKIP = "skip"
Norms = dict[str, float]  # by layer, in the model's order


@dataclass(frozen=True)
class Way:
    """One of the forks from before a spike; none but the first can do without `changes`."""

    name: str
    changes: tuple[str, ...] = ()


def worst_step(run: RunData) -> int:
    """The step of the largest gradient that stands out, else of the largest jump of the loss.

    Raises InputError where neither does.
    """
    step, norm, _ = rules.largest_leap(run)
    if norm:
        return step
    step, _, usual = rules.largest_jump(run)
    if usual:
        return step
    raise InputError("no step stands out, by its gradient or its loss: name one, as RUN@STEP")


def start(kept: Kept, step: int) -> int:
    """The state to begin at, with some steps between it and the spike where one is kept so."""
    early = [done for done in kept.steps if done <= step - rules.FEW]
    return early[-1] if early else kept.before(step)


def explain(kept: Kept, step: int, after: int, tell: Callable[[str], None]) -> list[Way]:
    """Tell what a step was made of, where it grew, and what came `after` it on three ways.

    The ways come back. Raises InputError where no state before the step is kept, or the tokens are
    others.
    """
    first, last = start(kept, step), step + 1 + after
    norms: dict[int, Norms] = {}

    def look(state: TrainState) -> None:
        norms[state.step] = layers(state)

    with replay.opened(kept, first) as again:
        if step >= again.planned:
            raise InputError(f"{kept.name}@{step}: its last step is {again.planned - 1:,}")
        reports = list(again.steps(step, look))
        losses = sequence_losses(again, step)
        known = again.state.norms
        usual = statistics.median(known) if len(known) >= ENOUGH else 0.0
        norm, broke = math.nan, ""
        try:
            reports += again.steps(step + 1, look)
            norm = reports[-1].grad_norm
        except NumericsError as error:
            broke = str(error).partition("\n")[0]
        tell(_opening(again, step, reports, usual, broke))
        tell(_documents(again, step, losses))
        tell(_growth(norms, step))
        found = ways(kept, norm, usual)
        if not broke:
            with contextlib.suppress(NumericsError):  # its row says how far it came
                reports += again.steps(last)
    del again  # there is room for one on a device
    rows = [_row(found[0].name, reports, step)]
    for way in found[1:]:
        rows.append(_row(way.name, _walk(kept, first, step, last, way), step))
    tell(f"Forks of {kept.name}@{first}, {after:,} steps past it:\n\n{markdown(COLUMNS, rows)}")
    return found


def ways(kept: Kept, norm: float, usual: float) -> list[Way]:
    """As it was, without the step, and at a lower rate.

    As an experiment a step can be skipped where its gradient's norm stands out; `usual` is the
    median that this goes by, 0 where it is not known.
    """
    limit: tuple[str, ...] = ()
    if usual and norm > 2 * usual:
        times = min(rules.NORM_LEAP, float(f"{math.sqrt(norm / usual):.2g}"))
        limit = (f"train.skip_spikes={times:g}",)
    rates = {name: kept.params[f"train.{name}"] * LOWER for name in ("lr", "min_lr")}
    lower = tuple(f"train.{name}={rate:.6g}" for name, rate in rates.items())
    return [Way("as it was"), Way(SKIP, limit), Way("lower rate", lower)]


def layers(state: TrainState) -> Norms:
    """The norm of each layer's gradient, weights and bias together; one wait for the device."""
    squares: dict[str, list[Tensor]] = {}
    for name, parameter in state.model.named_parameters():
        if parameter.grad is not None:
            layer = name.removeprefix("transformer.").rpartition(".")[0]
            squares.setdefault(layer, []).append(parameter.grad.norm())
    norms = torch.stack([torch.stack(parts).norm() for parts in squares.values()]).tolist()
    return dict(zip(squares, norms, strict=True))


def sequence_losses(again: replay.Replay, step: int) -> list[float]:
    """Each sequence's loss by the weights that the step begins with, without dropout."""
    state = again.state
    place = state.precision.device
    return [
        mean_loss(state.model, [(x[n : n + 1], y[n : n + 1])], state.precision, place)
        for x, y in micro_batches(again.tokens, again.config.train, step)
        for n in range(len(x))
    ]


def _walk(kept: Kept, first: int, step: int, last: int, way: Way) -> list[StepReport]:
    """The steps of a way, as far as its numbers stay finite."""
    reports: list[StepReport] = []
    skips = way.name == SKIP
    opened = replay.opened(kept, first, () if skips else way.changes)
    with opened as again, contextlib.suppress(NumericsError):
        if skips:
            reports += again.steps(step)
            again.state.step = step + 1
        for report in again.steps(last):
            reports.append(report)
    return reports


def _row(name: str, reports: Sequence[StepReport], step: int) -> tuple[object, ...]:
    """One tuple of COLUMNS."""
    at = next((report for report in reports if report.step == step), None)
    later = [report for report in reports if report.step > step]
    said = "made" if at and not at.skipped else "skipped" if at or later else "not reached"
    if not later:
        return name, said, at and at.loss, None, None, None
    losses = [report.loss for report in later]
    ended = statistics.fmean(losses[-rules.FEW :])
    norms = [report.grad_norm for report in later]
    return name, said, at and at.loss, statistics.fmean(losses), ended, max(norms)


def _opening(
    again: replay.Replay, step: int, reports: Sequence[StepReport], usual: float, broke: str
) -> str:
    """Which step, from where, and whether it is the very same; `broke` says why it was not made."""
    first, beside = step - len(reports) + (not broke), f", usual is {usual:.4g}" if usual else ""
    came = (
        broke or f"loss {reports[-1].loss:.4f}, gradient norm {reports[-1].grad_norm:.4g}{beside}"
    )
    said = f"{again.kept.name}, step {step:,}: {came}; "
    said += f"replayed from the state after {first:,} steps. "
    differ = again.differences(reports)
    if not differ:
        return f"{said}All {len(reports):,} steps are equal to the record."
    why = "; ".join(again.elsewhere) or "on what seems to be the same machine"
    return f"{said}NOT equal to the record: {differ[0]} ({why}). What follows is of this replay."


def _documents(again: replay.Replay, step: int, losses: Sequence[float]) -> str:
    """The sequences with the largest losses: where they lie, and how they begin."""
    spans = token_spans.of_sequences(again.tokens, again.config.train, step)
    known = [n for n, loss in enumerate(losses) if not math.isnan(loss)]  # else without a target
    if not known:
        return "No sequence of it has a loss that is a number."
    usual = statistics.median(losses[n] for n in known)
    worst = sorted(known, key=lambda n: -losses[n])[:SHOWN]
    many = f"Its {len(losses):,} sequences, loss {usual:.3f} in the median; the largest losses:"
    lines = [many if len(losses) > 1 else "Its one sequence, and its loss:"]
    for n in worst:
        said = token_spans.text(again.tokens, *spans[n]).partition("\n")[2]
        shown = terminal.line(cut(" ".join(said.split()), EXCERPT))
        lines += [
            f"  {losses[n]:.3f}: tokens {token_spans.place(again.tokens, spans[n])}",
            f"    {shown}",
        ]
    begin, end = spans[worst[0]]
    of = "of the first" if len(worst) > 1 else "of it"
    lines.append(f"`python -m pipeline text {begin}-{end}` has all {of}.")
    return "\n".join(lines)


def _growth(norms: Mapping[int, Norms], step: int) -> str:
    """Which layer's gradient was the first beyond all before it, and the largest in that step."""
    for number in range(min(norms) + ENOUGH_BEFORE, step + 1):
        before = [norms[earlier] for earlier in range(min(norms), number)]
        times = {layer: _times(norm, layer, before) for layer, norm in norms[number].items()}
        first, *_ = most = sorted(times, key=lambda layer: -times[layer])[:LAYERS]
        if times[first] > GREW:
            break
    else:
        if step - min(norms) >= ENOUGH_BEFORE:
            return f"No layer's gradient was {GREW:g} times all since step {min(norms):,}."
        return (
            f"Fewer than {ENOUGH_BEFORE} steps lie between the state and the step: nobody can say "
            "which layer grew. A smaller checkpoint.keep_every helps."
        )
    when = "in that very step" if number == step else f"in step {number:,}"
    rows = [
        (n, statistics.median(one[n] for one in before), norms[number][n], times[n]) for n in most
    ]
    columns = ("layer", "usual norm", f"in step {number}", "times the largest before")
    head = f"The first gradient beyond {GREW:g} times all before it: {first}, {when}."
    return f"{head}\n\n{markdown(columns, rows)}".rstrip()


def _times(norm: float, layer: str, before: Sequence[Norms]) -> float:
    largest = max(one[layer] for one in before)
    return norm / largest if largest else 0.0
