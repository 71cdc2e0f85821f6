"""Whether a difference in what two traces made is rounding, by the format it was made in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.diagnostics.trace import (
    BACKWARD,
    FORWARD,
    LOSS,
    UPDATE,
    WEIGHTS,
    Key,
    Made,
    Trace,
)

EPSILONS = {  # the gap above 1, of what a product's result or its operands are rounded to
    "fp32": torch.finfo(torch.float32).eps,
    "tf32": 2.0**-10,
    "bf16": torch.finfo(torch.bfloat16).eps,
    "fp16": torch.finfo(torch.float16).eps,
    "fp8": torch.finfo(torch.float8_e4m3fn).eps,
}
# Epsilons of the largest number up to which a difference is taken for rounding. The coarser the
# format, the fewer: 16 of fp8 would be twice the largest number itself.
LIMITS = {"fp32": 16, "tf32": 16, "bf16": 4, "fp16": 16, "fp8": 2}
HELD = {torch.bfloat16: "bf16", torch.float16: "fp16"}
PRODUCTS = ("mm", "scaled_dot_product")  # parts of the names of torch's operations


def format_of(made: Made, found: Trace) -> str:
    """The coarsest number format that what a step made can have been rounded to there.

    Inside a step that is its product's, or where nothing was multiplied that of its tensor. The
    loss and the gradients of parameters come of everything before them.
    """
    if made.phase in (WEIGHTS, UPDATE):
        return "fp32"
    inside = made.phase in (FORWARD, BACKWARD)
    if inside and not any(part in name for name in made.operations for part in PRODUCTS):
        return HELD.get(made.dtype, "fp32")
    if found.precision == "fp8" and made.phase == FORWARD and made.place not in found.linear:
        return "bf16"  # attention's: see `fp8`
    return found.precision


def size(
    values: Sequence[Mapping[Key, Tensor]], name: str, traces: Sequence[Trace], runs: Sequence[str]
) -> str:
    """A sentence on the largest difference in what is called `name`, by the coarser format there.

    Of two runs, by their names, with the values that each has by sequence.
    """
    a, b = values
    pairs = [(a[key].double(), b[key].double()) for key in a.keys() & b.keys()]
    if not pairs:
        return "It is there in one of them alone."
    if any(one.shape != other.shape for one, other in pairs):
        shapes = " and ".join(str(tuple(one.shape)) for one in pairs[0])
        return f"Their shapes are {shapes}."
    bad = [sum(int((~pair[side].isfinite()).sum()) for pair in pairs) for side in (0, 1)]
    if any(bad):
        whole = sum(one.numel() for one, _ in pairs)
        sides = " and ".join(f"{n:,} in {run}" for n, run in zip(bad, runs, strict=True))
        return f"Of its {whole:,} numbers are not finite: {sides}."
    largest = max((one - other).abs().max().item() for one, other in pairs)
    scale = max(max(one.abs().max().item(), other.abs().max().item()) for one, other in pairs)
    relative = largest / scale if scale else 0.0
    formats = [format_of(found.made[name], found) for found in traces if name in found.made]
    coarser = max(formats, key=EPSILONS.__getitem__)
    times = relative / EPSILONS[coarser]
    return (
        f"Largest difference {largest:.3g}, which is {relative:.3g} of the largest number there "
        f"and {times:,.3g} epsilons of {coarser} ({EPSILONS[coarser]:.3g}): "
        f"{_verdict(times, coarser, traces[0].made[name].phase)}."
    )


def _verdict(times: float, coarser: str, phase: int) -> str:
    if times > LIMITS[coarser]:
        return "more than rounding, another computation"
    if phase == LOSS and coarser not in ("fp32", "tf32"):
        return "rounding or not, which a mean over all targets does not tell"
    return "rounding"
