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

GREW = 3.0  # times its usual norm
LOWER = 0.5  # of the rate
SHOWN = 3  # sequences with the largest losses
LAYERS = 6
EXCERPT = 160  # characters
COLUMNS = (
    "fork",
    "the step",
    "its loss",
    "mean loss after",
    "of the last ten",
    "largest norm after",
)

Norms = dict[str, float]  # by layer, in the model's order


@dataclass(frozen=True)
class Way:
    """One of the forks from before a spike, by the settings that it changes."""

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
        reports += again.steps(step + 1, look)
        tell(_opening(again, reports, usual))
        tell(_documents(again, step, losses))
        tell(_growth(norms, step))
        found = ways(kept, reports[-1].grad_norm, usual)
        reports += again.steps(last)
    rows = [_row(found[0].name, reports, step)]
    rows += [_row(way.name, _walk(kept, first, last, way), step) for way in found[1:]]
    tell(f"Forks of {kept.name}@{first}, {after:,} steps past it:\n\n{markdown(COLUMNS, rows)}")
    return found


def ways(kept: Kept, norm: float, usual: float) -> list[Way]:
    """As it was; past a step with a gradient of this norm skipped, where it stands out; slower.

    `usual` is the median norm that the step's own skipping would go by, 0 where it is not known.
    """
    found = [Way("as it was")]
    if usual and norm > 2 * usual:
        limit = min(rules.NORM_LEAP, float(f"{math.sqrt(norm / usual):.2g}"))
        found.append(Way("skip", (f"train.skip_spikes={limit:g}",)))
    lower = [
        f"train.{name}={kept.params[f'train.{name}'] * LOWER:.6g}" for name in ("lr", "min_lr")
    ]
    return [*found, Way("lower rate", tuple(lower))]


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


def _walk(kept: Kept, first: int, last: int, way: Way) -> list[StepReport]:
    """The steps of a way, as far as its numbers stay finite."""
    reports: list[StepReport] = []
    with replay.opened(kept, first, way.changes) as again, contextlib.suppress(NumericsError):
        for report in again.steps(last):
            reports.append(report)
    return reports


def _row(name: str, reports: Sequence[StepReport], step: int) -> tuple[object, ...]:
    """One tuple of COLUMNS."""
    at = next((report for report in reports if report.step == step), None)
    later = [report for report in reports if report.step > step]
    said = "not reached" if at is None else "skipped" if at.skipped else "made"
    if not later:
        return name, said, at and at.loss, None, None, None
    losses = [report.loss for report in later]
    ended = statistics.fmean(losses[-rules.FEW :])
    norms = [report.grad_norm for report in later]
    return name, said, at and at.loss, statistics.fmean(losses), ended, max(norms)


def _opening(again: replay.Replay, reports: Sequence[StepReport], usual: float) -> str:
    """Which step, from where, and whether it is the very same."""
    first, last = reports[0].step, reports[-1]
    beside = f", usual is {usual:.4g}" if usual else ""
    said = f"{again.kept.name}, step {last.step:,}: loss {last.loss:.4f}, gradient norm "
    said += f"{last.grad_norm:.4g}{beside}; replayed from the state after {first:,} steps. "
    differ = again.differences(reports)
    if not differ:
        return f"{said}All {len(reports):,} steps are equal to the record."
    why = "; ".join(again.elsewhere) or "the machine says nothing of it"
    return f"{said}NOT equal to the record: {differ[0]} ({why}). What follows is of this replay."


def _documents(again: replay.Replay, step: int, losses: Sequence[float]) -> str:
    """The sequences with the largest losses: where they lie, and how they begin."""
    spans = token_spans.of_sequences(again.tokens, again.config.train, step)
    usual = statistics.median(losses)
    worst = sorted(range(len(losses)), key=lambda n: -losses[n])[:SHOWN]
    lines = [f"Its {len(losses):,} sequences, loss {usual:.3f} in the median; the largest losses:"]
    for n in worst:
        said = token_spans.text(again.tokens, *spans[n]).partition("\n")[2]
        shown = terminal.line(cut(" ".join(said.split()), EXCERPT))
        lines += [
            f"  {losses[n]:.3f}: tokens {token_spans.place(again.tokens, spans[n])}",
            f"    {shown}",
        ]
    begin, end = spans[worst[0]]
    lines.append(f"`python -m pipeline text {begin}-{end}` has all of the first.")
    return "\n".join(lines)


def _growth(norms: Mapping[int, Norms], step: int) -> str:
    """Which layer's gradient first was far from usual, and the largest in the step."""
    before = [norms[number] for number in sorted(norms) if number < step]
    if len(before) < 2:
        most = sorted(norms[step], key=lambda layer: -norms[step][layer])[:LAYERS]
        said = ", ".join(f"{layer} {norms[step][layer]:.3g}" for layer in most)
        return f"No state lies far enough before it to say what is usual. Gradient norms: {said}."
    usual = {layer: statistics.median(one[layer] for one in before) for layer in norms[step]}
    for number in sorted(norms):
        grown = {layer: norms[number][layer] / u for layer, u in usual.items() if u}
        if max(grown.values(), default=0) > GREW:
            break
    most = sorted(grown, key=lambda layer: -grown[layer])[:LAYERS]
    when = "in that very step" if number == step else f"in step {number:,}"
    lines = [f"First beyond {GREW:g} times its usual gradient: {most[0]}, {when}."]
    if grown[most[0]] <= GREW:
        lines = [f"No layer's gradient is beyond {GREW:g} times its usual one."]
    rows = [(layer, usual[layer], norms[number][layer], grown[layer]) for layer in most]
    table = markdown(("layer", "usual norm", f"in step {number}", "times"), rows)
    return "\n".join([*lines, "", table]).rstrip()
