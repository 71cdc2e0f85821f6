"""Figures of studies and comparisons, drawn with matplotlib as PNG or SVG."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.experiments.comparison import Comparison
    from pipeline.ladders.registered import Forecast, Outcome
    from pipeline.studies.init_study import InitStudy
    from pipeline.studies.loss_scaling import Demonstration
    from pipeline.studies.number_formats import Format
    from pipeline.studies.roofline import Roofline

# Okabe and Ito's palette, which all kinds of colour vision can tell apart. A format has the same
# colour in every figure.
COLOURS = {
    "fp32": "#000000",
    "tf32": "#0072B2",
    "bf16": "#009E73",
    "fp16": "#D55E00",
    "fp8": "#CC79A7",  # its operands are e4m3
    "fp8_e4m3": "#CC79A7",
    "fp8_e5m2": "#E69F00",
}
# Of lines: a contrast of 3:1 or more with the page, white or, turned around, black.
OTHERS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#A87400", "#7D5FC0", "#767676")
DPI = 130

Points = Sequence[tuple[float, float]]  # (step, value)


def sheet(
    panels: int = 1, width: float = 6.4, height: float = 4.2, rows: int = 1
) -> tuple[Figure, list[Any]]:
    """A figure and its `panels` axes in `rows`, each `width` by `height` inches.

    Made without pyplot: no window, no global state, nothing to close.
    """
    from matplotlib.figure import Figure

    columns = -(-panels // rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in places[panels:]:
        unused.remove()
    axes = list(places[:panels])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without date and versions, so that the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # DVC may have linked it to its cache
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def svg(figure: Figure) -> bytes:
    """The figure as SVG with text as text; the same figure gives the same bytes."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pipeline", "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    return file.getvalue()


def logarithmic(axis: Any, base: int = 10) -> None:
    """Make the y axis logarithmic, with plain numbers: 0.001 and 10, no powers."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:.10g}" if super().__call__(x, pos) else ""

    axis.set_yscale("log", base=base)
    axis.yaxis.set_major_formatter(Plain(base))
    axis.yaxis.set_minor_formatter(Plain(base))


def loss_scale(shown: Demonstration) -> Figure:
    """The demonstration's loss scale by step, with all that befell it."""
    figure, (axes,) = sheet(1)
    points = shown.points
    steps, scales = [p.step for p in points], [p.scale for p in points]
    axes.step(steps, scales, where="post", color=COLOURS["fp16"])
    for injected, colour, label in ((False, "#0072B2", "by itself"), (True, "black", "injected")):
        marked = [p for p in points if p.skipped and p.injected == injected]
        steps, scales = [p.step for p in marked], [p.scale for p in marked]
        axes.plot(steps, scales, "x", color=colour, label=f"overflow {label}: step skipped")
    axes.axvline(points[-1].step, color="#D55E00", linestyle=":", label="the run stops itself")
    axes.set_yscale("log", base=2)
    axes.set(xlabel="step", ylabel="loss scale", title="a tiny GPT in fp16")
    axes.legend(loc="lower left", fontsize=8)
    return figure


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def init_study(study: InitStudy) -> Figure:
    """Three panels: random adds, the residual stream by block, gradient norms by block."""
    figure, (adds, stream, gradient) = sheet(3, width=5.2)
    n = len(study.adds.plain)
    k = range(1, n + 1)
    adds.plot(k, study.adds.plain, color=COLOURS["fp16"], label="added as they are")
    adds.plot(k, study.adds.scaled, color=COLOURS["tf32"], label=f"added times {n}^-0.5")
    adds.plot(k, [i**0.5 for i in k], ":", color="black", label="sqrt(k)")
    adds.plot(k, [(i / n) ** 0.5 for i in k], "--", color="black", label=f"sqrt(k / {n})")
    adds.set(xlabel="adds k", ylabel="std of the stream", title="random adds of N(0, 1)")
    adds.legend(fontsize=8)
    depths = sorted({twin.n_layer for twin in study.twins})
    for twin in study.twins:
        shade = 0.25 + 0.75 * (depths.index(twin.n_layer) + 1) / len(depths)
        colour = COLOURS["tf32" if twin.residual_scale else "fp16"]
        kind = "with residual_scale" if twin.residual_scale else "without"
        label = kind if twin.n_layer == depths[-1] else None
        style = {"color": colour, "alpha": shade, "label": label, "marker": ".", "markersize": 4}
        stream.plot(range(twin.n_layer + 1), twin.stream_std, **style)
        gradient.plot(range(1, twin.n_layer + 1), twin.grad_norm[1:], **style)
    own = study.as_is
    dots = {"color": "black", "marker": "o", "linestyle": "none", "markersize": 4}
    stream.plot(range(own.n_layer + 1), own.stream_std, label="this run's model", **dots)
    gradient.plot(range(1, own.n_layer + 1), own.grad_norm[1:], label="this run's model", **dots)
    shown = ", ".join(map(str, depths))
    stream.set(xlabel="block", ylabel="std of the stream", title=f"residual stream, depths {shown}")
    gradient.set(xlabel="block", ylabel="gradient norm", title="gradient norm of each block")
    logarithmic(gradient)
    stream.legend(fontsize=8)
    gradient.legend(fontsize=8)
    return figure


def bit_layout(formats: Sequence[Format]) -> Figure:
    """A row for each format with a square for each bit: sign, exponent, mantissa."""
    from matplotlib.patches import Rectangle

    figure, (axis,) = sheet(1, width=11, height=3.4)
    parts = (("sign", "#999999"), ("exponent", COLOURS["tf32"]), ("mantissa", COLOURS["fp8_e5m2"]))
    for row, f in enumerate(formats):
        bits = (f.sign_bits, f.exponent_bits, f.mantissa_bits)
        colours = [colour for (_, colour), n in zip(parts, bits, strict=True) for _ in range(n)]
        # Exponents end, and mantissas begin, at the same place in every row.
        start = 8 - f.exponent_bits
        for place, colour in enumerate(colours):
            axis.add_patch(Rectangle((start + place, -row), 0.9, 0.8, facecolor=colour))
        axis.text(-0.4, 0.4 - row, f.name, ha="right", va="center", fontweight="bold")
        words = f"{' + '.join(map(str, bits))}   to {f.largest:.3g}, eps {f.epsilon:.3g}"
        axis.text(33, 0.4 - row, words, va="center", fontsize=9)
    for name, colour in parts:
        axis.add_patch(Rectangle((0, 99), 1, 1, facecolor=colour, label=name))
    axis.set(xlim=(-3.5, 44), ylim=(0.1 - len(formats), 1.1))
    axis.set_axis_off()
    axis.legend(loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.45, 1.12))
    return figure


def error_and_speed(study: Roofline) -> Figure:
    """Relative error against speed, for every product of the model in every mode."""
    sets = ("the model's", "GPT-2 124M's") if study.mostly_calls else ("the model's",)
    figure, axes = sheet(len(sets), width=8)
    base = {p.shape: p.seconds for p in study.products if p.precision.asked == "fp32"}
    for reference, (axis, whose) in enumerate(zip(axes, sets, strict=True)):
        for mode, (speed, error) in study.speed_and_error(bool(reference)).items():
            products = [p for p in study.in_mode(mode) if p.reference == reference]
            emulated = " (emulated)" if products[0].precision.emulated else ""
            points = [(base[p.shape] / p.seconds, p.error) for p in products]
            axis.plot(*_columns(points), "o", color=COLOURS[mode], alpha=0.35)
            label = f"{mode}{emulated}: {speed:.2f} times fp32's speed, error {error:.1e}"
            axis.plot([speed], [error], "D", color=COLOURS[mode], markersize=9, label=label)
        axis.set_yscale("log")
        axis.set(xlabel="speed relative to fp32", ylabel="relative error against float64")
        axis.set_title(f"{whose} products, {study.device}; diamonds are medians")
        axis.legend(fontsize=9)
    return figure


def roofline(study: Roofline) -> Figure:
    """Roofs by measured bandwidth and rates, with every product and operation below them."""
    figure, (axis,) = sheet(1, width=10, height=5.6)
    drawn = [f for f in (*study.operations, *study.products) if f.flops]
    low = min(f.intensity for f in drawn) / 2
    high = max(*(f.intensity for f in drawn), *(study.ridge(mode) for mode in study.rates)) * 2
    for mode, rate in study.rates.items():
        xs = [low, study.ridge(mode), high]
        label = f"{mode}: {rate / 1e9:,.0f} GFLOP/s"
        axis.plot(xs, [study.roof(x, mode) for x in xs], color=COLOURS[mode], lw=1.2, label=label)
    names: dict[str, list[Any]] = {}
    for f in drawn:
        names.setdefault(f.name, []).append(f)
        colour = COLOURS[f.precision.asked] if hasattr(f, "precision") else "#777777"
        axis.plot([f.intensity], [f.rate], "o", color=colour, markersize=5)
    _number(axis, names)
    axis.set(xscale="log", yscale="log", xlim=(low, high))
    axis.set(xlabel="arithmetic intensity, FLOP/byte", ylabel="FLOP/s")
    axis.set_title(f"{study.device}, measured bandwidth {study.bandwidth / 1e9:.1f} GB/s")
    axis.legend(loc="lower right", fontsize=8, title="roofs and products")
    return figure


def _number(axis: Any, names: dict[str, list[Any]]) -> None:
    """Number the columns of points and list their names beside the axes: no text collides."""
    numbered = sorted(names.items(), key=lambda item: item[1][0].intensity)
    lines, columns = [], []
    for number, (name, points) in enumerate(numbered, 1):
        lines.append(f"{number:>2}  {name}")
        x = points[0].intensity  # a mode of other widths has a column of its own
        y = max(p.rate for p in points if p.intensity == x)
        close = [c for c in columns if x / c[0] < 1.3 and 0.4 < y / c[1] < 2.5]
        if close:
            columns.remove(close[0])
            columns.append((close[0][0], max(y, close[0][1]), f"{close[0][2]},{number}"))
        else:
            columns.append((x, y, str(number)))
    for x, y, text in columns:
        style = {"ha": "center", "fontsize": 9, "bbox": {"color": "white", "alpha": 0.7, "pad": 1}}
        axis.annotate(text, (x, y), xytext=(0, 7), textcoords="offset points", **style)
    style = {"va": "top", "fontsize": 9, "family": "monospace"}
    axis.text(1.02, 0.98, "\n".join(lines), transform=axis.transAxes, **style)


def comparison(found: Comparison) -> Figure:
    """Training losses together, and their distances from the base beside the noise of seeds."""
    figure, (curves, distances) = sheet(2, width=6.8)
    named = {v: COLOURS.get(v, OTHERS[n % len(OTHERS)]) for n, v in enumerate(found.runs)}
    base = [run.losses for run in found.runs[found.base]]
    for losses in base[1:]:
        curves.plot(losses, color="#bbbbbb", lw=0.8)
    if len(base) > 1:
        curves.plot([], [], color="#bbbbbb", lw=0.8, label=f"{found.base}, other seeds")
    # Curves may coincide: later ones are thinner, so that the earlier ones show beneath.
    lines = []
    for n, value in enumerate(found.runs):
        run, colour = found.main(value), named[value]
        width = 3.2 - 2.2 * n / max(1, len(found.runs) - 1)
        curves.plot(run.losses, color=colour, lw=width, label=f"{found.setting}={value}")
        pair = found.pair(value)
        if pair and value != found.base:
            style = {"color": colour, "lw": 1.2, "label": str(value)}
            lines.append((distance(run.losses, pair.base.losses), style))
    curves.set(xlabel="step", ylabel="training loss, nats/token", title="training loss")
    curves.legend(fontsize=8)
    draw_distances(distances, lines, two_std(base), f"two std over {len(base)} seeds")
    distances.set_title(f"distance from {found.setting}={found.base}, same seed")
    if distances.get_legend_handles_labels()[0]:
        distances.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def ladder(
    seen: dict[str, Points],
    fitted: dict[str, Points],
    forecast: Forecast,
    outcome: Outcome | None,
) -> Figure:
    """Losses by tokens of each size, `seen` and `fitted`; the forecast's band, and what came."""
    figure, (axis,) = sheet(1, width=8, height=4.8)
    for n, (size, points) in enumerate(seen.items()):
        colour = OTHERS[n % len(OTHERS)]
        axis.plot(*_columns(points), "o", color=colour, ms=5, label=size)
        axis.plot(*_columns(fitted[size]), color=colour, lw=1)
    tokens, losses, low, high = zip(*forecast.curve, strict=True)
    count = f"{forecast.parameters / 1e6:,.3g} M parameters"
    axis.fill_between(tokens, low, high, color="#dddddd", label=f"band for {count}")
    axis.plot(tokens, losses, "--", color="black", lw=1)
    error = [[max(0.0, forecast.loss - forecast.low)], [max(0.0, forecast.high - forecast.loss)]]
    style = {"color": "black", "capsize": 5, "marker": "_", "ms": 12, "label": "forecast"}
    axis.errorbar([forecast.tokens], [forecast.loss], yerr=error, linestyle="none", **style)
    if outcome:
        mark = {"color": "#D55E00", "marker": "*", "ms": 14, "linestyle": "none"}
        axis.plot([forecast.tokens], [outcome.loss], label="outcome", **mark)
    axis.set_xscale("log")
    lengths = sorted({x for points in seen.values() for x, _ in points} | {forecast.tokens})
    axis.set_xticks(lengths, [f"{tokens:,.0f}" for tokens in lengths])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="tokens trained on", ylabel="validation loss, nats/token")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def transfer(found: Sequence[tuple[str, Points, tuple[float, float, float] | None]]) -> Figure:
    """Losses by learning rate for each width; stars mark the best rates, with their std in log2.

    Lines of rates far too low leave it at the top: they would hide the differences of the others.
    """
    figure, (axis,) = sheet(1, width=8, height=4.8)
    for n, (name, points, best) in enumerate(found):
        colour = OTHERS[n % len(OTHERS)]
        by_rate: dict[float, list[float]] = {}
        for rate, loss in points:
            by_rate.setdefault(rate, []).append(loss)
        means = [(rate, statistics.fmean(losses)) for rate, losses in sorted(by_rate.items())]
        axis.plot(*_columns(points), ".", color=colour, ms=5, alpha=0.6)
        axis.plot(*_columns(means), color=colour, lw=1.2, label=name)
        if best:
            rate, loss, std = best
            std = 0.0 if math.isnan(std) else std
            error = [[rate - rate * 2**-std], [rate * 2**std - rate]]
            axis.errorbar([rate], [loss], xerr=error, color=colour, marker="*", ms=13, capsize=5)
    losses = [loss for _, points, _ in found for _, loss in points]
    lowest, middle = min(losses), statistics.median(losses)
    if middle > lowest:
        axis.set_ylim(lowest - 0.2 * (middle - lowest), middle + 3 * (middle - lowest))
    rates = sorted({rate for _, points, _ in found for rate, _ in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.set(xlabel="train.lr", ylabel="validation loss, nats/token")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def distance(losses: Sequence[float], others: Sequence[float]) -> Points:
    """The absolute difference of two curves by step."""
    return [(s, abs(a - b)) for s, (a, b) in enumerate(zip(losses, others, strict=False))]


def two_std(curves: Sequence[Sequence[float]]) -> Points:
    """Twice the standard deviation over the curves by step; nothing for a single curve."""
    steps = enumerate(zip(*curves, strict=False)) if len(curves) > 1 else ()
    return [(step, 2 * statistics.stdev(losses)) for step, losses in steps]


def draw_distances(
    axis: Any, lines: Sequence[tuple[Points, dict[str, Any]]], noise: Points, label: str
) -> None:
    """Draw distances by step, each in its line's style, over a grey area up to `noise`.

    The axis is logarithmic, since seeds may lie a nat apart where precisions differ by a
    thousandth. A step at which two curves are equal leaves a gap.
    """
    axis.set(xlabel="step", ylabel="|difference|, nats/token")
    seen = [
        [y for _, y in points if 0 < y < math.inf] for points in (noise, *(p for p, _ in lines))
    ]
    seen = [ys for ys in seen if ys]
    if not seen:
        axis.text(0.5, 0.5, "no difference", ha="center", va="center", transform=axis.transAxes)
        return
    # A difference that changes its sign passes zero: such dips must not set the scale.
    low, high = min(map(statistics.median, seen)) / 30, max(map(max, seen)) * 1.5
    logarithmic(axis)
    axis.set_ylim(low, high)
    if noise:
        steps, level = zip(*noise, strict=True)
        axis.fill_between(steps, low, level, color="#dddddd", label=label)
    for points, style in lines:
        axis.plot(*_columns([(step, y or math.nan) for step, y in points]), **style)
