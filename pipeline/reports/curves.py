"""The report's figures: the curves of a run, and those of several over one another, as SVG."""

from __future__ import annotations

import itertools
import json
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.drawing import figures
from pipeline.drawing.figures import COLOURS, OTHERS, Points
from pipeline.experiments.comparison import Pair
from pipeline.records.run_data import Experiment

MOST = 400  # points a curve: more could not be told apart, and would make the page heavy
BLACK, ORANGE = "#000000", COLOURS["fp16"]
DASHES = ("-", "--", ":", "-.")
# (title, metric, unit, base of a logarithmic axis or 0, whether its points are noisy)
CURVES = (
    ("Validation loss while training", "train/val_loss", "nats/token", 0, False),
    ("Loss while training", "train/loss", "nats/token", 0, True),
    ("Gradient norm", "train/grad_norm", "norm", 10, True),
    ("Learning rate", "train/learning_rate", "learning rate", 0, False),
    ("Speed", "perf/step_tokens_per_second", "tokens/s", 0, True),
    ("Loss scale", "train/loss_scale", "loss scale", 2, False),
)


@dataclass(frozen=True)
class Picture:
    """A figure that stands inside the page."""

    title: str
    alt: str  # what it shows, for those who cannot see it
    image: Markup
    plot: str  # JSON of what the page's script needs to read values off the curves


@dataclass(frozen=True)
class Style:
    """A run's line in every figure, and before its name."""

    colour: str
    dashes: str
    width: float

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.dashes, "lw": self.width}


ALONE = Style(COLOURS["tf32"], "-", 1.5)


def styles(count: int) -> list[Style]:
    """The base black; then a colour each, and other dashes where colours do not suffice.

    Curves may coincide: later ones are thinner, so that the earlier ones show beneath.
    """
    others = itertools.cycle((colour, dashes) for dashes in DASHES for colour in OTHERS)
    looks = enumerate(itertools.islice(itertools.chain([(BLACK, DASHES[0])], others), count))
    return [Style(*look, 3.0 - 2.0 * n / max(1, count - 1)) for n, look in looks]


def thin(points: Points) -> Points:
    """Some MOST points: the lowest and the highest of as many steps as that takes.

    So no spike is lost; of values that are NaN or infinite the first of those steps stays, too.
    """
    if len(points) <= MOST:
        return list(points)
    value, size = operator.itemgetter(1), math.ceil(len(points) / (MOST // 2))
    kept: list[tuple[float, float]] = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        finite = [point for point in part if math.isfinite(point[1])]
        ends = {min(finite, key=value), max(finite, key=value)} if finite else set()
        if len(finite) < len(part):
            ends.add(next(point for point in part if not math.isfinite(point[1])))
        kept += sorted(ends)
    return kept


def smooth(points: Points, steps: int = 0) -> Points:
    """A moving mean over a twentieth of the steps, at some 200 of them; a short curve as it is.

    Of a curve that has so many `steps`, if that is said. At the beginning, where a loss falls
    fast, over fewer. What is not finite is left out.
    """
    most, found = max(len(points), steps) // 40, []
    for at in range(0, len(points), max(1, len(points) // 200)):
        near = points[max(0, at - most) : at + min(most, at) + 1]
        finite = [y for _, y in near if math.isfinite(y)]
        found.append((points[at][0], sum(finite) / len(finite) if finite else math.nan))
    return found


def relatives_steps(runs: Sequence[Experiment]) -> list[int]:
    """For each run the most steps of those here that are of one tree of forks with it.

    Smoothed as that one, its curve is its parent's where the steps are.
    """
    trained = [run.records["train"][0]["id"] if "train" in run.records else "" for run in runs]
    roots = [
        run.lineage[0]["record"] if run.lineage else own
        for run, own in zip(runs, trained, strict=True)
    ]
    steps = [len(run.curves.get("train/loss", [])) for run in runs]
    return [max(n for n, of in zip(steps, roots, strict=True) if of == own) for own in roots]


def charts(runs: Sequence[tuple[Experiment, Style]]) -> list[Picture]:
    """What training recorded by step, as far as it is there; of several runs over one another."""
    pictures, alone = [], len(runs) == 1
    steps = relatives_steps([run for run, _ in runs])
    for title, key, unit, base, noisy in CURVES:
        lines = [(n, run, style) for n, (run, style) in enumerate(runs) if _has(run, key)]
        if not lines or (alone and key == "train/val_loss"):  # it is with the training loss
            continue
        _, (axis,) = figures.sheet(1, width=4.8, height=3.0)
        for n, run, style in lines:
            points, name = run.curves[key], title.lower() if alone else f"_{run.name}"
            line = style.line | {"gid": f"curve{n}", "label": name}
            if noisy and (alone or (key == "train/loss" and len(lines) <= len(OTHERS))):
                below = {"gid": f"raw{n}", "label": name if alone else "_"}
                _line(axis, points, **line | below | {"linestyle": "-", "lw": 0.8, "alpha": 0.35})
                line |= {"label": "smoothed"} if alone else {}
            _line(axis, smooth(points, steps[n]) if noisy else points, **line)
        if alone:
            _mark(axis, runs[0][0], key)
        said = "; ".join(f"{run.name} {_range(run.curves[key])}" for _, run, _ in lines)
        title += ", smoothed" if noisy and not alone else ""
        pictures.append(_picture(axis, title, f"{title}: {said}.", unit, base))
    return pictures


def _has(run: Experiment, key: str) -> bool:
    scaled = run.tags.get("precision.effective") == "fp16"
    return bool(run.curves.get(key)) and (scaled or key != "train/loss_scale")


def _mark(axis: Any, run: Experiment, key: str) -> None:
    """What belongs to one run's curve: other losses, the clipping, skipped steps."""
    if key == "train/loss":
        if held_out := run.curves.get("train/val_loss"):
            style = {"marker": "o", "ms": 4, "color": ORANGE, "lw": 1.2}
            _line(axis, held_out, gid="curve1", label="validation", **style)
        if (unigram := run.last("val/unigram_loss")) is not None:
            axis.axhline(unigram, color=BLACK, ls=":", lw=1, label="unigram baseline")
        if run.lineage:
            parent = run.lineage[-1]
            axis.axvline(parent["step"], color=BLACK, lw=0.8, label=f"forked from {parent['name']}")
    elif key == "train/grad_norm" and (clip := run.params.get("train.grad_clip", 0)):
        axis.axhline(clip, color=ORANGE, ls="--", lw=1, label=f"clipped above {clip:g}")
    elif key == "train/loss_scale":
        skipped = {step for step, value in run.curves.get("train/skipped", []) if value}
        style = {"marker": "x", "ms": 6, "ls": "", "color": ORANGE, "label": "step skipped"}
        if marks := [point for point in run.curves[key] if point[0] in skipped]:
            _line(axis, marks, **style)


def distances(pairs: Sequence[tuple[Pair, Style]]) -> Picture:
    """How far the training losses of several runs are from the first one's."""
    base, seeds = pairs[0][0].base, pairs[0][0].seeds
    _, (axis,) = figures.sheet(1, width=4.8, height=3.0)
    lines = [
        (
            smooth(figures.distance(pair.run.losses, base.losses)),
            style.line | {"lw": 1.2, "gid": f"curve{n}", "label": f"_{pair.run.name}"},
        )
        for n, (pair, style) in enumerate(pairs[1:], 1)
    ]
    curves = [run.losses for run in seeds.runs] if seeds else []
    label = f"two std over {len(curves)} seeds"
    figures.draw_distances(axis, lines, smooth(figures.two_std(curves)), label)
    title = f"Distance of training losses from {base.name}, smoothed"
    alt = f"{title}, by step" + (f", beside {label}." if seeds else ".")
    return _picture(axis, title, alt, "|difference|, nats/token", base=10)


def _line(axis: Any, points: Points, **style: Any) -> None:
    """Few points are marked: a single one makes no line. A label with a "_" is in no legend."""
    shown = thin(points)
    marks = {"marker": "o", "ms": 3} if len(shown) < 20 else {}
    axis.plot([x for x, _ in shown], [y for _, y in shown], **marks | style)


def _range(points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"{start:.4g} at step {first}, {end:.4g} at step {last}"


def _picture(axis: Any, title: str, alt: str, unit: str, base: int) -> Picture:
    """`base` is that of a logarithmic axis, 0 for a linear one."""
    axis.set(xlabel="step", ylabel=unit)
    if base:
        figures.logarithmic(axis, base)
    if unit == "tokens/s":
        axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    text = figures.svg(axis.figure).decode()
    # An id may stand in a page once: curves keep theirs as a class, others have no use.
    text = re.sub(r' id="((?:curve|raw)\d+)"', r' class="\1"', text[text.index("<svg") :])
    names = {ln.get_gid(): ln.get_label().removeprefix("_") for ln in axis.lines if ln.get_gid()}
    limits = *axis.get_position().extents, *axis.get_xlim(), *axis.get_ylim(), bool(base)
    plot = json.dumps({"limits": limits, "names": names})
    return Picture(title, alt, Markup(re.sub(r'<g id="[^"]*">', "<g>", text)), plot)
