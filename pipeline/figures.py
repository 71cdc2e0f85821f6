"""Figures: what the studies measured, drawn with matplotlib and saved as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from pipeline.init_study import InitStudy
    from pipeline.scaling import Demonstration

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart. A format
# has the same colour in every figure.
COLOURS = {
    "fp32": "#000000",
    "tf32": "#0072B2",
    "bf16": "#009E73",
    "fp16": "#D55E00",
    "fp8_e4m3": "#CC79A7",
    "fp8_e5m2": "#E69F00",
}
DPI = 130


def sheet(panels: int = 1, width: float = 6.4, height: float = 4.2) -> tuple[Figure, list[Any]]:
    """A figure of `panels` axes side by side, each `width` by `height` inches.

    Without pyplot: no window, no global state, nothing to close.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without the date or versions in it: the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # DVC may have linked it to its cache
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def loss_scale(
    run: Sequence[tuple[int, float, bool, bool]], shown: Demonstration, precision: str
) -> Figure:
    """This training's loss scale by step, and the demonstration's with all that befell it.

    `run` holds (step, scale, found an inf, skipped) for every step.
    """
    figure, (own, other) = sheet(2)
    if precision == "fp16":
        own.step([p[0] for p in run], [p[1] for p in run], where="post", color=COLOURS["fp16"])
        skipped = [p for p in run if p[3]]
        own.plot(
            [p[0] for p in skipped], [p[1] for p in skipped], "x", color="black", label="skipped"
        )
        own.set_yscale("log", base=2)
        own.set(xlabel="step", ylabel="loss scale")
        own.set_title(f"this training: {len(skipped)} of {len(run)} steps skipped")
        if skipped:
            own.legend()
    else:
        words = f"{precision} needs no loss scaling:\nits gradients have fp32's exponents"
        own.text(0.5, 0.5, words, ha="center", va="center", transform=own.transAxes)
        own.set_axis_off()
        own.set_title("this training")
    points = shown.points
    other.step(
        [p.step for p in points], [p.scale for p in points], where="post", color=COLOURS["fp16"]
    )
    for injected, colour, label in ((False, "#0072B2", "by itself"), (True, "black", "injected")):
        marked = [p for p in points if p.skipped and p.injected == injected]
        steps, scales = [p.step for p in marked], [p.scale for p in marked]
        other.plot(steps, scales, "x", color=colour, label=f"overflow {label}: step skipped")
    other.axvline(points[-1].step, color="#D55E00", linestyle=":", label="the run stops itself")
    other.set_yscale("log", base=2)
    other.set(xlabel="step", ylabel="loss scale", title="demonstration: a tiny GPT in fp16")
    other.legend(loc="lower left", fontsize=8)
    return figure


def init_study(found: InitStudy) -> Figure:
    """Random adds, the residual stream by block, gradient norms by block."""
    figure, (adds, stream, gradient) = sheet(3, width=5.2)
    n = len(found.adds.plain)
    k = range(1, n + 1)
    adds.plot(k, found.adds.plain, color=COLOURS["fp16"], label="added as they are")
    adds.plot(k, found.adds.scaled, color=COLOURS["tf32"], label=f"added times {n}^-0.5")
    adds.plot(k, [i**0.5 for i in k], ":", color="black", label="sqrt(k)")
    adds.plot(k, [(i / n) ** 0.5 for i in k], "--", color="black", label=f"sqrt(k / {n})")
    adds.set(xlabel="adds k", ylabel="std of the stream", title="random adds of N(0, 1)")
    adds.legend(fontsize=8)
    depths = sorted({twin.n_layer for twin in found.twins})
    for twin in found.twins:
        shade = 0.25 + 0.75 * (depths.index(twin.n_layer) + 1) / len(depths)
        colour = COLOURS["tf32" if twin.residual_scale else "fp16"]
        label = "with residual_scale" if twin.residual_scale else "without"
        label = label if twin.n_layer == depths[-1] else None
        style = {"color": colour, "alpha": shade, "label": label, "marker": ".", "markersize": 4}
        stream.plot(range(twin.n_layer + 1), twin.stream_std, **style)
        gradient.plot(range(1, twin.n_layer + 1), twin.grad_norm[1:], **style)
    own = found.as_is
    dots = {"color": "black", "marker": "o", "linestyle": "none", "markersize": 4}
    stream.plot(range(own.n_layer + 1), own.stream_std, label="this run's model", **dots)
    gradient.plot(range(1, own.n_layer + 1), own.grad_norm[1:], label="this run's model", **dots)
    shown = ", ".join(map(str, depths))
    stream.set(xlabel="block", ylabel="std of the stream", title=f"residual stream, depths {shown}")
    gradient.set(xlabel="block", ylabel="gradient norm", title="gradient norm of each block")
    gradient.set_yscale("log")
    stream.legend(fontsize=8)
    gradient.legend(fontsize=8)
    return figure
