"""Loss scaling in sight: what GradScaler does when gradients overflow, shown on the real step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from pipeline.compute.precision import choose_precision
from pipeline.compute.runtime import generator, one_thread
from pipeline.errors import NumericsError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.tables import markdown
from pipeline.training import loop, training_step

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=64, vocab_rows=64)
GROWTH_INTERVAL = 5  # steps without an overflow until the scale doubles; torch's own is 2000
INJECTED = (14, 15)  # steps whose gradient is made infinite
FROM_THEN_ON = 30  # and every one from this step on
MAX_SKIPPED = 6
FIRST_SCALE = 2.0**20  # too large: fp16 gradients overflow by themselves until it has come down
STEPS = 60  # never reached


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
    seconds: float  # of its steps: what torch imports for them, every training needs

    def page(self) -> str:
        """Markdown: what happened, counted, and every step."""
        skipped = [p for p in self.points if p.skipped]
        natural = [p for p in skipped if not p.injected]
        highest = max((p.scale for p in self.points if not p.found_inf), default=0.0)
        kept = sum(p.unchanged for p in skipped)
        columns = ("step", "scale", "injected", "found inf", "skipped", "parameters unchanged")
        rows = [
            (p.step, f"2^{_log2(p.scale):g}", p.injected, p.found_inf, p.skipped, p.unchanged)
            for p in self.points
        ]
        return (
            "# Loss scaling\n\n"
            f"A tiny GPT in fp16 on the real training step, from a scale of 2^"
            f"{_log2(self.points[0].scale):g}. {len(natural)} steps overflowed by themselves, "
            f"{len(skipped) - len(natural)} after an injected infinity. Of the {len(skipped)} "
            f"skipped steps {kept} left every parameter as it was; the highest scale that fitted "
            f"was 2^{_log2(highest):g}. The scale doubles after {GROWTH_INTERVAL} good steps here "
            f"(2,000 in training). The end: `{self.stop}`\n\n{markdown(columns, rows)}"
        )


@one_thread()
def demonstrate(device: torch.device) -> Demonstration:
    """Train a tiny GPT in fp16 through overflows, natural and injected, until the run stops itself.

    The step, the scaler and the stop are those of every training. Takes a fraction of a second,
    uses no global randomness and leaves nothing behind.
    """
    state, config = _start(device), _settings()
    began = time.perf_counter()
    state.model.transformer.ln_f.bias.register_hook(
        lambda grad: torch.full_like(grad, torch.inf) if _is_injected(state.step) else grad
    )
    seen: list[tuple[float, bool, Tensor]] = []

    def look(now: training_step.TrainState) -> None:
        grads = torch.cat([p.grad.flatten() for p in now.model.parameters()])
        seen.append((now.scaler.get_scale(), not grads.isfinite().all().item(), _weights(now)))

    points: list[Point] = []
    try:
        for step in range(STEPS):
            config.steps = step + 1  # one step a call, each of them looked into
            for _ in loop.fit(state, config, _batches(), look=look, look_at=step):
                points.append(_point(state, step, *seen[-1]))
    except NumericsError as error:
        points.append(_point(state, state.step, *seen[-1]))
        return Demonstration(points, str(error), time.perf_counter() - began)
    raise AssertionError("the demonstration ends with a stop")


def _point(
    state: training_step.TrainState, step: int, scale: float, inf: bool, before: Tensor
) -> Point:
    skipped = state.scaler.get_scale() < scale
    unchanged = torch.equal(before, _weights(state))
    return Point(step, scale, _is_injected(step), inf, skipped, unchanged)


def _is_injected(step: int) -> bool:
    return step in INJECTED or step >= FROM_THEN_ON


def _settings() -> SimpleNamespace:
    return SimpleNamespace(
        lr=1e-3,
        min_lr=1e-3,
        warmup_steps=0,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.95,
        grad_clip=1.0,
        compile=False,
        max_skipped=MAX_SKIPPED,
        skip_spikes=0.0,
    )


def _start(device: torch.device) -> training_step.TrainState:
    with torch.random.fork_rng(devices=[]):  # a new module draws weights that nobody uses
        model = GPT(SHAPE)
    initialize(model, SimpleNamespace(std=0.02, residual_scale=True), generator(0, "demonstration"))
    state = training_step.start(model.to(device), _settings(), choose_precision("fp16", device))
    state.scaler = torch.amp.GradScaler(
        device.type, init_scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL
    )
    return state


def _batches() -> Callable[[int], list[training_step.Batch]]:
    """On the host, as those of every training are: the step takes them to the device."""
    ids = torch.randint(SHAPE.vocab_size, (4, SHAPE.block_size + 1), generator=generator(0, "ids"))
    return lambda step: [(ids[:, :-1], ids[:, 1:])]


def _weights(state: training_step.TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def _log2(value: float) -> float:
    return math.log2(value) if value > 0 else -math.inf
