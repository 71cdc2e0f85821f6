"""Loss scaling in sight: what GradScaler does when gradients overflow, shown on the real step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from pipeline.compute.runtime import one_thread
from pipeline.errors import NumericsError
from pipeline.studies import tiny
from pipeline.tables import markdown
from pipeline.training import loop
from pipeline.training.training_step import TrainState

GROWTH_INTERVAL = 5  # steps without an overflow until the scale doubles; torch's own is 2000
INJECTED = (14, 15)  # steps whose gradient is made infinite
FROM_THEN_ON = 30  # and every one from this step on
MAX_SKIPPED = 6
FIRST_SCALE = 2.0**20  # too large: fp16 gradients overflow by themselves until it has come down


@dataclass(frozen=True)
class Point:
    """One step of the demonstration, as seen from outside."""

    step: int
    scale: float  # in force during the step
    injected: bool
    found_inf: bool  # the gradient that the step saw was not finite
    skipped: bool  # the step says that it made no update
    unchanged: bool  # the parameters are bit for bit those from before


@dataclass(frozen=True)
class Demonstration:
    points: list[Point]
    stop: str  # the error that ended it

    def page(self) -> str:
        """Markdown: what happened, counted, and every step."""
        skipped = [p for p in self.points if p.skipped]
        natural = [p for p in skipped if not p.injected]
        fitting = [math.log2(p.scale) for p in self.points if not p.found_inf]
        kept = sum(p.unchanged for p in skipped)
        columns = ("step", "scale", "injected", "found inf", "skipped", "parameters unchanged")
        rows = [
            (p.step, f"2^{math.log2(p.scale):g}", p.injected, p.found_inf, p.skipped, p.unchanged)
            for p in self.points
        ]
        return (
            "# Loss scaling\n\n"
            f"A tiny GPT in fp16 on the real training step, from a scale of 2^"
            f"{math.log2(self.points[0].scale):g}. {len(natural)} steps overflowed by themselves, "
            f"{len(skipped) - len(natural)} after an injected infinity. Of the {len(skipped)} "
            f"skipped steps {kept} left every parameter as it was; the highest scale that fitted "
            f"was 2^{max(fitting, default=-math.inf):g}. The scale doubles after {GROWTH_INTERVAL} "
            f"good steps here (2,000 in training). The end: `{self.stop}`\n\n"
            f"{markdown(columns, rows)}"
        )


@one_thread()
def demonstrate(device: torch.device) -> Demonstration:
    """Train a tiny GPT in fp16 through overflows, natural and injected, until the run stops itself.

    The step, the scaler and the stop are those of every training. Takes a fraction of a second,
    uses no global randomness and leaves nothing behind.
    """
    state = tiny.state("fp16", device)
    state.scaler = torch.amp.GradScaler(
        device.type, init_scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL
    )
    state.model.transformer.ln_f.bias.register_hook(
        lambda grad: torch.full_like(grad, torch.inf) if _is_injected(state.step) else grad
    )
    seen: list[tuple[float, bool, Tensor]] = []

    def look(now: TrainState) -> None:
        grads = parameters_to_vector(p.grad for p in now.model.parameters())
        seen.append((now.scaler.get_scale(), not grads.isfinite().all().item(), _weights(now)))

    points: list[Point] = []
    stop = ""
    while not stop:
        step = state.step
        one = replace(tiny.TRAIN, max_skipped=MAX_SKIPPED, steps=step + 1)  # and no more
        try:
            list(loop.fit(state, one, tiny.batches, look=look, look_at=step))
        except NumericsError as error:
            stop = str(error)
        scale, found_inf, before = seen.pop()
        skipped = state.scaler.get_scale() < scale
        unchanged = torch.equal(before, _weights(state))
        points.append(Point(step, scale, _is_injected(step), found_inf, skipped, unchanged))
    return Demonstration(points, stop)


def _is_injected(step: int) -> bool:
    return step in INJECTED or step >= FROM_THEN_ON


def _weights(state: TrainState) -> Tensor:
    return parameters_to_vector(state.model.parameters()).detach()
