"""The report's figures: the curves of a run, and those of several over one another, as SVG."""

from __future__ import annotations

import itertools
import json
import math
import operator
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.drawing import figures
from pipeline.drawing.figures import COLOURS, OTHERS, Points
from pipeline.experiments.comparison import Pair
from pipeline.records.run_data import Experiment

MOST = 400  # points a curve: more could not be told apart, and would make the page heavy
BLACK, BLUE, GREEN, ORANGE = "#000000", COLOURS["tf32"], COLOURS["bf16"], COLOURS["fp16"]
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Picture:
    """A figure that stands inside the page."""

    title: str
    alt: str  # what it shows, for those who cannot see it
    image: Markup
    plot: str = ""  # JSON of what the page's script needs to read values off the curves


@dataclass(frozen=True)
class Style:
    """A run's line in every figure, and before its name."""

    colour: str
    dashes: str
    width: float

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.dashes, "lw": self.width}


def styles(count: int) -> list[Style]:
    """The base black; then a colour each, and other dashes where colours do not suffice.

    Curves may coincide: later ones are thinner, so that the earlier ones show beneath.
    """
    others = itertools.cycle((colour, dashes) for dashes in DASHES for colour in OTHERS)
    looks = enumerate(itertools.islice(itertools.chain([(BLACK, DASHES[0])], others), count))
    return [Style(*look, 3.0 - 2.0 * n / max(1, count - 1)) for n, look in looks]


def thin(points: Points, most: int = MOST) -> Points:
    """Some `most` points: the lowest and the highest of as many steps as that takes.

    So no spike is lost; of values that are NaN or infinite the first of those steps stays, too.
    """
    size = _each(points, most)
    if size == 1:
        return list(points)
    value = operator.itemgetter(1)
    kept: list[tuple[float, float]] = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        finite = [point for point in part if math.isfinite(point[1])]
        ends = {min(finite, key=value), max(finite, key=value)} if finite else set()
        if len(finite) < len(part):
            ends.add(next(point for point in part if not math.isfinite(point[1])))
        kept += sorted(ends)
    return kept


def _each(points: Sequence[Any], most: int = MOST) -> int:
    """How many steps are drawn as their lowest and highest value; 1 where every one is."""
    return 1 if len(points) <= most else math.ceil(len(points) / (most // 2))


def _thinned(points: Sequence[Any], most: int = MOST) -> str:
    size = _each(points, most)
    return f", lowest and highest of each {size} steps" if size > 1 else ""


def smooth(points: Points) -> Points:
    """A moving mean over a twentieth of the steps, at 200 of them; nothing for a short curve.

    At the beginning, where a loss falls fast, over fewer. What is not finite is left out.
    """
    found: list[tuple[float, float]] = []
    if not (most_wing := len(points) // 40):
        return found
    for at in range(0, len(points), -(-len(points) // 200)):
        wing = min(most_wing, at)
        finite = [y for _, y in points[at - wing : at + wing + 1] if math.isfinite(y)]
        found.append((points[at][0], sum(finite) / len(finite) if finite else math.nan))
    return found


def _axis() -> Any:
    _, (axis,) = figures.sheet(1, width=4.8, height=3.0)
    return axis


def _picture(axis: Any, title: str, alt: str, unit: str, base: int = 0) -> Picture:
    """`base` is that of a logarithmic axis, 0 for a linear one."""
    axis.set(xlabel="step", ylabel=unit)
    if base:
        figures.logarithmic(axis, base)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    text = figures.svg(axis.figure).decode()
    # An id may stand in a page once: curves keep theirs as a class, others have no use.
    text = re.sub(r' id="((?:curve|raw)\d+)"', r' class="\1"', text[text.index("<svg") :])
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    names = {line.get_gid(): line.get_label().removeprefix("_") for line in axis.lines}
    names = {curve: name for curve, name in names.items() if curve and name}
    limits = *axis.get_position().extents, *axis.get_xlim(), *axis.get_ylim(), bool(base)
    return Picture(title, alt, Markup(text), json.dumps({"limits": limits, "names": names}))


def _line(axis: Any, points: Points, most: int = MOST, **style: Any) -> None:
    """Few points are marked: a single one makes no line."""
    shown = thin(points, most)
    marks = {"marker": "o", "ms": 3} if len(shown) < 20 else {}
    axis.plot([x for x, _ in shown], [y for _, y in shown], **marks | style)


def _noisy(axis: Any, points: Points, number: int, label: str, pale: str, **style: Any) -> None:
    """A smoothed curve, by `label`, over the points themselves, by `pale` if that is not empty.

    A label that begins with "_" is in no legend.
    """
    smoothed = smooth(points)
    if smoothed and pale:
        below = {"linestyle": "-", "lw": 0.8, "alpha": 0.35, "label": pale}
        _line(axis, points, gid=f"raw{number}", **style | below)
    own = label if smoothed or pale in ("", "_") else pale
    _line(axis, smoothed or points, gid=f"curve{number}", label=own, **style)


def _range(points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"{start:.4g} at step {first}, {end:.4g} at step {last}"


# --- one run


def curves_of(run: Experiment) -> list[Picture]:
    """What training recorded by step, as far as it is there."""
    drawn = {key: draw for key, draw in OF_A_RUN.items() if run.curves.get(key)}
    if run.tags.get("precision.effective") != "fp16":
        drawn.pop("train/loss_scale", None)
    return [draw(run, run.curves[key]) for key, draw in drawn.items()]


def _loss(run: Experiment, losses: Points) -> Picture:
    held_out, unigram = run.curves.get("train/val_loss"), run.last("val/unigram_loss")
    axis, alt = _axis(), f"Training loss: {_range(losses)}."
    _noisy(axis, losses, 0, "smoothed", f"training{_thinned(losses)}", color=BLUE)
    if held_out:
        style = {"marker": "o", "ms": 4, "color": ORANGE, "lw": 1.2}
        _line(axis, held_out, gid="curve1", label="validation", **style)
        alt += f" Validation loss: {_range(held_out)}."
    if unigram is not None:
        axis.axhline(unigram, color=BLACK, ls=":", lw=1, label="unigram baseline")
    return _picture(axis, "Loss", alt, "nats/token")


def _gradient(run: Experiment, norms: Points) -> Picture:
    clip, axis = run.params.get("train.grad_clip", 0), _axis()
    _noisy(axis, norms, 0, "smoothed", f"norm{_thinned(norms)}", color=BLUE)
    if clip:
        axis.axhline(clip, color=ORANGE, ls="--", lw=1, label=f"clipped above {clip:g}")
    above = sum(y > clip for _, y in norms) if clip else 0
    alt = f"Gradient norm: {_range(norms)}; clipped in {above} of {len(norms)} steps."
    return _picture(axis, "Gradient norm", alt, "norm", base=10)


def _rate(_: Experiment, rates: Points) -> Picture:
    axis = _axis()
    _line(axis, rates, color=GREEN, lw=1.5, gid="curve0", label="_learning rate")
    alt = f"Learning rate: {_range(rates)}, at most {max(y for _, y in rates):.4g}."
    return _picture(axis, "Learning rate", alt, "learning rate")


def _speed(_: Experiment, speeds: Points) -> Picture:
    axis, middle = _axis(), statistics.median(y for _, y in speeds)
    _noisy(axis, speeds, 0, "smoothed", f"tokens/s{_thinned(speeds)}", color=GREEN)
    axis.set_ylim(bottom=0)
    return _picture(axis, "Speed", f"Speed by step, median {middle:,.0f} tokens/s.", "tokens/s")


def _scale(run: Experiment, scales: Points) -> Picture:
    axis, skipped = _axis(), {step for step, v in run.curves.get("train/skipped", []) if v}
    style = {"drawstyle": "steps-post", "color": BLUE, "gid": "curve0", "label": "_loss scale"}
    _line(axis, scales, len(scales), **style)
    if marks := [(step, scale) for step, scale in scales if step in skipped]:
        style = {"marker": "x", "ms": 6, "ls": "", "color": ORANGE, "label": "step skipped"}
        _line(axis, marks, len(marks), **style)
    alt = f"Loss scale: {_range(scales)}; {len(skipped)} steps skipped."
    return _picture(axis, "Loss scale", alt, "loss scale", base=2)


OF_A_RUN: dict[str, Callable[[Experiment, Points], Picture]] = {
    "train/loss": _loss,
    "train/grad_norm": _gradient,
    "train/learning_rate": _rate,
    "perf/step_tokens_per_second": _speed,
    "train/loss_scale": _scale,  # of a training in fp16 alone
}


# --- several runs


# (title, metric, unit, base of a logarithmic axis or 0, see `_noisy`)
OF_SEVERAL = (
    ("Validation loss while training", "train/val_loss", "nats/token", 0, ""),
    ("Training loss", "train/loss", "nats/token", 0, "_"),
    ("Gradient norm", "train/grad_norm", "norm", 10, ""),
    ("Speed", "perf/step_tokens_per_second", "tokens/s", 0, ""),
)


def overlaid(
    runs: Sequence[tuple[Experiment, Style]], pairs: Sequence[tuple[Pair, Style]]
) -> list[Picture]:
    """Curves of several runs over one another, and their distances from the base, the first."""
    pictures = []
    for title, key, unit, base, pale in OF_SEVERAL:
        lines = [(n, *run) for n, run in enumerate(runs) if key in run[0].curves]
        if not lines:
            continue
        axis = _axis()
        for n, run, style in lines:
            shown = pale if len(lines) <= len(OTHERS) else ""  # more are a fog
            _noisy(axis, run.curves[key], n, f"_{run.name}", shown, **style.line)
        how = ", smoothed" if any(smooth(run.curves[key]) for _, run, _ in lines) else ""
        pictures.append(_picture(axis, title + how, f"{title} of {len(lines)} runs.", unit, base))
    return pictures + ([_distances(pairs)] if len(pairs) > 1 else [])


def _distances(pairs: Sequence[tuple[Pair, Style]]) -> Picture:
    base, seeds = pairs[0][0].base, pairs[0][0].seeds
    axis, lines = _axis(), []
    for n, (pair, style) in enumerate(pairs[1:], 1):
        points = figures.distance(pair.run.losses, base.losses)
        named = {"lw": 1.2, "gid": f"curve{n}", "label": f"_{pair.run.name}"}
        lines.append((smooth(points) or points, style.line | named))
    curves = [run.losses for run in seeds.runs] if seeds else []
    label = f"two std over {len(curves)} seeds"
    noise = figures.two_std(curves)
    figures.draw_distances(axis, lines, smooth(noise) or noise, label)
    title = f"Distance of training losses from {base.name}"
    alt = f"{title}, by step" + (f", beside {label}." if seeds else ".")
    return _picture(axis, title, alt, "|difference|, nats/token", base=10)
