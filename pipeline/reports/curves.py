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
from pipeline.experiments.contrast import Contrast
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
    wide: bool = False


@dataclass(frozen=True)
class Style:
    """How a run is drawn in every figure, and before its name."""

    colour: str
    dashes: str
    width: float

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.dashes, "lw": self.width}


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thin(points: Points, most: int = MOST) -> Points:
    """Some `most` points: the lowest and the highest of as many steps as that takes.

    So no spike is lost; of values that are NaN or infinite the first of those steps stays, too.
    """
    size = _each(points, most)
    if size == 1:
        return list(points)
    found = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        finite = [point for point in part if math.isfinite(point[1])]
        kept = {min(finite, key=_value), max(finite, key=_value)} if finite else set()
        if len(finite) < len(part):
            kept.add(next(point for point in part if not math.isfinite(point[1])))
        found += sorted(kept)
    return found


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _each(points: Sequence[Any], most: int = MOST) -> int:
    """How many steps are drawn as their lowest and highest value; 1 where every one is."""
    return 1 if len(points) <= most else math.ceil(len(points) / (most // 2))


def _thinned(points: Sequence[Any], most: int = MOST) -> str:
    size = _each(points, most)
    return f", lowest and highest of each {size} steps" if size > 1 else ""


def styles(count: int) -> list[Style]:
    """The base black; then a colour each, and other dashes where colours do not suffice.

    Curves may coincide: later ones are thinner, so that the earlier ones show beneath.
    """
    found = []
    for n in range(count):
        colour = OTHERS[(n - 1) % len(OTHERS)] if n else BLACK
        dashes = DASHES[(n - 1) // len(OTHERS) % len(DASHES)] if n else DASHES[0]
        found.append(Style(colour, dashes, 3.0 - 2.0 * n / max(1, count - 1)))
    return found


def curves_of(found: Experiment) -> list[Picture]:
    """What training recorded by step, as far as it is there."""
    return [picture for draw in OF_A_RUN for picture in [draw(found)] if picture]


def _panel(title: str, alt: str, draw: Callable[[Any], None], unit: str, base: int = 0) -> Picture:
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
    found = thin(points, most)
    marks = {"marker": "o", "ms": 3} if len(found) < 20 else {}
    axis.plot([x for x, _ in found], [y for _, y in found], **marks | style)


def _range(points: Points) -> str:
    return f"{points[0][1]:.4g} at step {points[0][0]}, {points[-1][1]:.4g} at step {points[-1][0]}"


def _loss(found: Experiment) -> Picture | None:
    losses, held_out = found.curves.get("train/loss"), found.curves.get("train/val_loss", [])
    if not losses:
        return None
    unigram = found.last("val/unigram_loss")

    def draw(axis: Any) -> None:
        _line(axis, losses, color=BLUE, lw=1.2, label=f"training{_thinned(losses)}")
        if held_out:
            _line(axis, held_out, marker="o", ms=4, color=ORANGE, lw=1.2, label="validation")
        if unigram is not None:
            axis.axhline(unigram, color=BLACK, ls=":", lw=1, label="unigram yardstick")

    alt = f"Training loss: {_range(losses)}."
    alt += f" Validation loss: {_range(held_out)}." if held_out else ""
    return _panel("Loss", alt, draw, "nats a token")


def _rate(found: Experiment) -> Picture | None:
    rates = found.curves.get("train/learning_rate")
    if not rates:
        return None
    alt = f"Learning rate: {_range(rates)}, at most {max(y for _, y in rates):.4g}."
    draw = lambda axis: _line(axis, rates, color=GREEN, lw=1.5)  # noqa: E731
    return _panel("Learning rate", alt, draw, "learning rate")


def _gradient(found: Experiment) -> Picture | None:
    norms = found.curves.get("train/grad_norm")
    if not norms:
        return None
    clip = found.params.get("train.grad_clip", 0)

    def draw(axis: Any) -> None:
        _line(axis, norms, color=BLUE, lw=1.2)
        if clip:
            axis.axhline(clip, color=ORANGE, ls="--", lw=1, label=f"clipped above {clip:g}")

    above = sum(y > clip for _, y in norms) if clip else 0
    alt = f"Gradient norm: {_range(norms)}; clipped in {above} of {len(norms)} steps."
    return _panel("Gradient norm", alt, draw, "norm", base=10)


def _speed(found: Experiment) -> Picture | None:
    speeds = found.curves.get("perf/step_tokens_per_second")
    if not speeds:
        return None

    def draw(axis: Any) -> None:
        _line(axis, speeds, color=GREEN, lw=1)
        axis.set_ylim(bottom=0)

    middle = statistics.median(y for _, y in speeds)
    return _panel("Speed", f"Tokens a second by step, median {middle:,.0f}.", draw, "tokens/s")


def _scale(found: Experiment) -> Picture | None:
    scales = found.curves.get("train/loss_scale")
    if not scales or found.tags.get("precision.effective") != "fp16":
        return None
    skipped = {step for step, value in found.curves.get("train/skipped", []) if value}

    def draw(axis: Any) -> None:
        _line(axis, scales, len(scales), drawstyle="steps-post", color=BLUE)
        marks = [(step, scale) for step, scale in scales if step in skipped]
        if marks:
            _line(
                axis, marks, len(marks), marker="x", ms=6, ls="", color=ORANGE, label="step skipped"
            )

    alt = f"Loss scale: {_range(scales)}; {len(skipped)} steps skipped."
    return _panel("Loss scale", alt, draw, "loss scale", base=2)


OF_A_RUN: tuple[Callable[[Experiment], Picture | None], ...] = (
    *(_loss, _gradient, _rate, _speed, _scale),
)


def overlaid(
    shown: Sequence[tuple[Experiment, Style]], held: Sequence[tuple[Contrast, Style]]
) -> list[Picture]:
    """Curves of several runs over one another, and their distances from the base."""
    found = [_distances(held)] if len(held) > 1 else []
    for title, key, unit, base, most in OF_SEVERAL:
        drawn = [(one.curves[key], style) for one, style in shown if key in one.curves]
        if not drawn:
            continue
        most = min(most, max(LEAST, MOST_TOGETHER // len(drawn)))

        def draw(axis: Any, drawn: list[Any] = drawn, most: int = most) -> None:
            for points, style in drawn:
                _line(axis, points, most, **style.line)

        each = _thinned(max((points for points, _ in drawn), key=len), most)
        found.append(_panel(title + each, f"{title} of {len(drawn)} runs.", draw, unit, base))
    return found


# (title, metric, unit, base of a logarithmic axis or 0, most points: fewer of noisy curves)
OF_SEVERAL = (
    ("Training loss", "train/loss", "nats a token", 0, MOST),
    ("Validation loss while training", "train/val_loss", "nats a token", 0, MOST),
    ("Gradient norm", "train/grad_norm", "norm", 10, 100),
    ("Speed", "perf/step_tokens_per_second", "tokens/s", 0, 50),
)


def _distances(held: Sequence[tuple[Contrast, Style]]) -> Picture:
    base, seeds = held[0][0].base, held[0][0].seeds
    most = min(MOST, max(LEAST, MOST_TOGETHER // len(held)))
    lines = [
        (thin(distance(one.run.losses, base.losses), most), style.line | {"lw": 1.2})
        for one, style in held[1:]
    ]
    curves = [run.losses for run in seeds.runs] if seeds else []
    noise, label = thin(two_std(curves)), f"two std over {len(curves)} seeds"
    draw = lambda axis: draw_distances(axis, lines, noise, label)  # noqa: E731
    title = f"Distance of training losses from {base.name}"
    alt = f"{title}, by step" + (f", beside {label}." if seeds else ".")
    return _panel(title, alt, draw, "|difference|, nats a token", base=10)
