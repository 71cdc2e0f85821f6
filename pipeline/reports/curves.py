"""The report's figures: the curves of a run, and those of several over one another, as SVG."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.drawing.figures import (
    COLOURS,
    OTHERS,
    Points,
    distance,
    draw_distances,
    sheet,
    svg,
    two_std,
)
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
    looks = []
    for n in range(count):
        colour = OTHERS[(n - 1) % len(OTHERS)] if n else BLACK
        dashes = DASHES[(n - 1) // len(OTHERS) % len(DASHES)] if n else DASHES[0]
        looks.append(Style(colour, dashes, 3.0 - 2.0 * n / max(1, count - 1)))
    return looks


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thin(points: Points, most: int = MOST) -> Points:
    """Some `most` points: the lowest and the highest of as many steps as that takes.

    So no spike is lost; of values that are NaN or infinite the first of those steps stays, too.
    """
    size = _each(points, most)
    if size == 1:
        return list(points)
    kept: list[tuple[float, float]] = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        finite = [point for point in part if math.isfinite(point[1])]
        ends = {min(finite, key=_value), max(finite, key=_value)} if finite else set()
        if len(finite) < len(part):
            ends.add(next(point for point in part if not math.isfinite(point[1])))
        kept += sorted(ends)
    return kept


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _each(points: Sequence[Any], most: int = MOST) -> int:
    """How many steps are drawn as their lowest and highest value; 1 where every one is."""
    return 1 if len(points) <= most else math.ceil(len(points) / (most // 2))


def _thinned(points: Sequence[Any], most: int = MOST) -> str:
    size = _each(points, most)
    return f", lowest and highest of each {size} steps" if size > 1 else ""


def _together(count: int, most: int = MOST) -> int:
    """Points of each of so many curves in one figure."""
    return min(most, max(LEAST, MOST_TOGETHER // count))


def _panel(title: str, alt: str, unit: str, draw: Callable[[Any], None], base: int = 0) -> Picture:
    """`base` is that of a logarithmic axis, 0 for a linear one."""
    figure, (axis,) = sheet(1, width=4.8, height=3.0)
    draw(axis)
    axis.set(xlabel="step", ylabel=unit)
    if base:
        axis.set_yscale("log", base=base)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    return Picture(title, alt, data_uri(svg(figure), "svg+xml"))


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
    return [
        draw(run, run.curves[key]) for key, draw in OF_A_RUN.items() if run.curves.get(key)
    ] + _scale(run)


def _loss(run: Experiment, losses: Points) -> Picture:
    held_out, unigram = run.curves.get("train/val_loss"), run.last("val/unigram_loss")

    def draw(axis: Any) -> None:
        _line(axis, losses, color=BLUE, lw=1.2, label=f"training{_thinned(losses)}")
        if held_out:
            _line(axis, held_out, marker="o", ms=4, color=ORANGE, lw=1.2, label="validation")
        if unigram is not None:
            axis.axhline(unigram, color=BLACK, ls=":", lw=1, label="unigram baseline")

    alt = f"Training loss: {_range(losses)}."
    alt += f" Validation loss: {_range(held_out)}." if held_out else ""
    return _panel("Loss", alt, "nats/token", draw)


def _gradient(run: Experiment, norms: Points) -> Picture:
    clip = run.params.get("train.grad_clip", 0)

    def draw(axis: Any) -> None:
        _line(axis, norms, color=BLUE, lw=1.2)
        if clip:
            axis.axhline(clip, color=ORANGE, ls="--", lw=1, label=f"clipped above {clip:g}")

    above = sum(y > clip for _, y in norms) if clip else 0
    alt = f"Gradient norm: {_range(norms)}; clipped in {above} of {len(norms)} steps."
    return _panel("Gradient norm", alt, "norm", draw, base=10)


def _rate(_: Experiment, rates: Points) -> Picture:
    alt = f"Learning rate: {_range(rates)}, at most {max(y for _, y in rates):.4g}."
    draw = lambda axis: _line(axis, rates, color=GREEN, lw=1.5)  # noqa: E731
    return _panel("Learning rate", alt, "learning rate", draw)


def _speed(_: Experiment, speeds: Points) -> Picture:
    def draw(axis: Any) -> None:
        _line(axis, speeds, color=GREEN, lw=1)
        axis.set_ylim(bottom=0)

    middle = statistics.median(y for _, y in speeds)
    return _panel("Speed", f"Speed by step, median {middle:,.0f} tokens/s.", "tokens/s", draw)


OF_A_RUN: dict[str, Callable[[Experiment, Points], Picture]] = {
    "train/loss": _loss,
    "train/grad_norm": _gradient,
    "train/learning_rate": _rate,
    "perf/step_tokens_per_second": _speed,
}


def _scale(run: Experiment) -> list[Picture]:
    """The loss scale of a training in fp16; of no other."""
    scales = run.curves.get("train/loss_scale")
    if not scales or run.tags.get("precision.effective") != "fp16":
        return []
    skipped = {step for step, value in run.curves.get("train/skipped", []) if value}

    def draw(axis: Any) -> None:
        _line(axis, scales, len(scales), drawstyle="steps-post", color=BLUE)
        marks = [(step, scale) for step, scale in scales if step in skipped]
        if marks:
            style = {"marker": "x", "ms": 6, "ls": "", "color": ORANGE, "label": "step skipped"}
            _line(axis, marks, len(marks), **style)

    alt = f"Loss scale: {_range(scales)}; {len(skipped)} steps skipped."
    return [_panel("Loss scale", alt, "loss scale", draw, base=2)]


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
        if lines:
            pictures.append(_overlay(title, lines, unit, base, _together(len(lines), most)))
    return pictures


def _overlay(
    title: str, lines: Sequence[tuple[Points, Style]], unit: str, base: int, most: int
) -> Picture:
    def draw(axis: Any) -> None:
        for points, style in lines:
            _line(axis, points, most, **style.line)

    each = _thinned(max((points for points, _ in lines), key=len), most)
    return _panel(title + each, f"{title} of {len(lines)} runs.", unit, draw, base)


def _distances(pairs: Sequence[tuple[Pair, Style]]) -> Picture:
    base, seeds = pairs[0][0].base, pairs[0][0].seeds
    most = _together(len(pairs))
    lines = [
        (thin(distance(pair.run.losses, base.losses), most), style.line | {"lw": 1.2})
        for pair, style in pairs[1:]
    ]
    curves = [run.losses for run in seeds.runs] if seeds else []
    noise, label = thin(two_std(curves)), f"two std over {len(curves)} seeds"
    draw = lambda axis: draw_distances(axis, lines, noise, label)  # noqa: E731
    title = f"Distance of training losses from {base.name}"
    alt = f"{title}, by step" + (f", beside {label}." if seeds else ".")
    return _panel(title, alt, "|difference|, nats/token", draw, base=10)
