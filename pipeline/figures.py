"""Figures: what the studies measured, drawn with matplotlib and saved as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
