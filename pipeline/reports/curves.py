"""The report's figures: the curves of a run, and those of several over one another, as SVG."""

from __future__ import annotations

import base64
import itertools
import math
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.drawing import figures
from pipeline.drawing.figures import COLOURS, OTHERS, Points
from pipeline.experiments.comparison import Pair
from pipeline.records.run_data import Experiment

MOST = 400  # points a curve: more could not be told apart, and would make the page heavy
MOST_TOGETHER = 8000  # of all curves in one figure
LEAST = 40
BLACK, BLUE, GREEN, ORANGE = "#000000", COLOURS["tf32"], COLOURS["bf16"], COLOURS["fp16"]
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Picture:
    """A figure that stands inside the page."""

    title: str
    alt: str  # what it shows, for those who cannot see it
    uri: str  # a data URI


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


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


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


def _axis() -> Any:
    _, (axis,) = figures.sheet(1, width=4.8, height=3.0)
    return axis


def _picture(axis: Any, title: str, alt: str, unit: str, base: int = 0) -> Picture:
    """`base` is that of a logarithmic axis, 0 for a linear one."""
    axis.set(xlabel="step", ylabel=unit)
    if base:
        axis.set_yscale("log", base=base)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    return Picture(title, alt, data_uri(figures.svg(axis.figure), "svg+xml"))


def _line(axis: Any, points: Points, most: int = MOST, **style: Any) -> None:
    """Few points are marked: a single one makes no line."""
    shown = thin(points, most)
    marks = {"marker": "o", "ms": 3} if len(shown) < 20 else {}
    axis.plot([x for x, _ in shown], [y for _, y in shown], **marks | style)


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
    _line(axis, losses, color=BLUE, lw=1.2, label=f"training{_thinned(losses)}")
    if held_out:
        _line(axis, held_out, marker="o", ms=4, color=ORANGE, lw=1.2, label="validation")
        alt += f" Validation loss: {_range(held_out)}."
    if unigram is not None:
        axis.axhline(unigram, color=BLACK, ls=":", lw=1, label="unigram baseline")
    return _picture(axis, "Loss", alt, "nats/token")


def _gradient(run: Experiment, norms: Points) -> Picture:
    clip, axis = run.params.get("train.grad_clip", 0), _axis()
    _line(axis, norms, color=BLUE, lw=1.2)
    if clip:
        axis.axhline(clip, color=ORANGE, ls="--", lw=1, label=f"clipped above {clip:g}")
    above = sum(y > clip for _, y in norms) if clip else 0
    alt = f"Gradient norm: {_range(norms)}; clipped in {above} of {len(norms)} steps."
    return _picture(axis, "Gradient norm", alt, "norm", base=10)


def _rate(_: Experiment, rates: Points) -> Picture:
    axis = _axis()
    _line(axis, rates, color=GREEN, lw=1.5)
    alt = f"Learning rate: {_range(rates)}, at most {max(y for _, y in rates):.4g}."
    return _picture(axis, "Learning rate", alt, "learning rate")


def _speed(_: Experiment, speeds: Points) -> Picture:
    axis, middle = _axis(), statistics.median(y for _, y in speeds)
    _line(axis, speeds, color=GREEN, lw=1)
    axis.set_ylim(bottom=0)
    return _picture(axis, "Speed", f"Speed by step, median {middle:,.0f} tokens/s.", "tokens/s")


def _scale(run: Experiment, scales: Points) -> Picture:
    axis, skipped = _axis(), {step for step, v in run.curves.get("train/skipped", []) if v}
    _line(axis, scales, len(scales), drawstyle="steps-post", color=BLUE)
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


# (title, metric, unit, base of a logarithmic axis or 0, most points: fewer of noisy curves)
OF_SEVERAL = (
    ("Training loss", "train/loss", "nats/token", 0, MOST),
    ("Validation loss while training", "train/val_loss", "nats/token", 0, MOST),
    ("Gradient norm", "train/grad_norm", "norm", 10, 100),
    ("Speed", "perf/step_tokens_per_second", "tokens/s", 0, 50),
)


def overlaid(
    runs: Sequence[tuple[Experiment, Style]], pairs: Sequence[tuple[Pair, Style]]
) -> list[Picture]:
    """Curves of several runs over one another, and their distances from the base."""
    pictures = [_distances(pairs)] if len(pairs) > 1 else []
    for title, key, unit, base, most in OF_SEVERAL:
        lines = [(run.curves[key], style) for run, style in runs if key in run.curves]
        if not lines:
            continue
        axis, most = _axis(), min(most, _together(len(lines)))
        for points, style in lines:
            _line(axis, points, most, **style.line)
        each = _thinned(max((points for points, _ in lines), key=len), most)
        pictures.append(_picture(axis, title + each, f"{title} of {len(lines)} runs.", unit, base))
    return pictures


def _together(count: int) -> int:
    """Points of each of so many curves in one figure."""
    return min(MOST, max(LEAST, MOST_TOGETHER // count))


def _distances(pairs: Sequence[tuple[Pair, Style]]) -> Picture:
    base, seeds = pairs[0][0].base, pairs[0][0].seeds
    axis, most = _axis(), _together(len(pairs))
    lines = [
        (thin(figures.distance(pair.run.losses, base.losses), most), style.line | {"lw": 1.2})
        for pair, style in pairs[1:]
    ]
    curves = [run.losses for run in seeds.runs] if seeds else []
    label = f"two std over {len(curves)} seeds"
    figures.draw_distances(axis, lines, thin(figures.two_std(curves)), label)
    title = f"Distance of training losses from {base.name}"
    alt = f"{title}, by step" + (f", beside {label}." if seeds else ".")
    return _picture(axis, title, alt, "|difference|, nats/token", base=10)
