"""Training steps of this pipeline and of its peers, side by side.

    python benchmarks/train.py [--size nano mini 124m] [--precision fp32] [--rounds N]
                               [--nanogpt CHECKOUT] [--build-nanogpt CHECKOUT]

Same starting weights, batches and hyperparameters; a step is forward, backward, clipping and
AdamW. The transformers contestant is GPT2LMHeadModel with the fused AdamW of its Trainer. A time
counts only for who has the losses of transformers in the first steps. Low precisions are autocast
for the peers, as their scripts have it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks import checkouts, outcomes, side_by_side
from benchmarks.checkouts import BUILD_NANOGPT, NANOGPT
from benchmarks.outcomes import OURS
from benchmarks.peers import HF, SIZES, Task, build_nanogpt_model, hf_model, nanogpt_model
from benchmarks.side_by_side import Contestant, Turn, Verdict
from pipeline.compute import runtime
from pipeline.compute.precision import PRECISIONS, choose_precision
from pipeline.compute.throughput import synchronize
from pipeline.training import loop, training_step
from pipeline.training.optimizers import learning_rate

FIRST_STEPS = 3  # compared, not timed
# Rows that pad a peer's vocabulary count in its softmax: log(50304 / 50257) is 9e-5 of the loss.
FIRST_LOSS, NEXT_LOSSES = 2e-4, 2e-3  # relative; updates amplify GELU's two forms a little
ROUNDS = {"nano": 15, "mini": 11, "124m": 7}


def ours(task: Task) -> Turn:
    """The loop that the train stage runs, one step a turn."""
    config, device = task.config(), runtime.choose_device(task.device)
    precision = choose_precision(task.precision, device)
    state = training_step.start(task.model().to(device), config.train, precision, narrowing=1.0)
    steps = loop.fit(state, config.train, lambda step: [task.batch(step)])
    return lambda: next(steps).loss


def transformers(task: Task) -> Turn:
    model = hf_model(task)
    decay = task.config().train.weight_decay
    groups = [  # as its Trainer makes them: no decay for biases and norms
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]

    def optimizer() -> torch.optim.Optimizer:
        c = task.config().train
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=1e-8, fused=True)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return model(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss

    return _steps(task, model, optimizer, loss)


def nanogpt(task: Task, checkout: Path) -> Turn:
    model, c = nanogpt_model(task, checkout), task.config().train
    kind = runtime.choose_device(task.device).type
    made = partial(model.configure_optimizers, c.weight_decay, c.lr, (c.beta1, c.beta2), kind)
    return _steps(task, model, made, lambda x, y: model(x, y)[1])


def build_nanogpt(task: Task, checkout: Path) -> Turn:
    model, c = build_nanogpt_model(task, checkout), task.config().train
    kind = runtime.choose_device(task.device).type
    made = partial(model.configure_optimizers, c.weight_decay, c.lr, kind)
    return _steps(task, model, made, lambda x, y: model(x, y)[1])


def _steps(
    task: Task,
    model: nn.Module,
    make_optimizer: Callable[[], torch.optim.Optimizer],
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> Turn:
    """The loop of a peer's script, one step a turn: autocast, scaler, clipping, rate, update."""
    config, device = task.config().train, runtime.choose_device(task.device)
    model.to(device).train()
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = make_optimizer()
    dtype, numbers = PRECISIONS[task.precision], itertools.count()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    torch.set_float32_matmul_precision("high" if task.precision == "tf32" else "highest")

    def turn() -> float:
        step = next(numbers)
        x, y = (ids.to(device) for ids in task.batch(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = loss_of(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return loss.item()

    return turn


def agree(losses: list[float], others: list[float], precision: str = "fp32") -> Verdict:
    """Refuses whose first losses are not those of the reference, in words that say how far off.

    In bf16 and fp16 every step may be off by the format's own rounding, half an epsilon.
    """
    rounding = torch.finfo(PRECISIONS[precision]).eps / 2
    for step, (loss, other) in enumerate(zip(losses, others, strict=True)):
        bound = max(rounding, NEXT_LOSSES if step else FIRST_LOSS)
        if not math.isclose(loss, other, rel_tol=bound):
            off = f"{loss:.5f} instead of {other:.5f}"
            return Verdict(f"loss of step {step}: {off}, more than {bound:g} apart")
    return Verdict()


def contestants(task: Task, nano: str | None, build: str | None) -> list[Contestant]:
    return [
        Contestant(OURS, partial(ours, task)),
        Contestant(HF, partial(transformers, task), version(HF)),
        Contestant(
            NANOGPT, partial(nanogpt, task, Path(nano or "")), **checkouts.part_in(NANOGPT, nano)
        ),
        Contestant(
            BUILD_NANOGPT,
            partial(build_nanogpt, task, Path(build or "")),
            **checkouts.part_in(BUILD_NANOGPT, build),
        ),
    ]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="+", default=list(ROUNDS), help="nano, mini, 124m")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int)
    checkouts.add_arguments(parser)
    asked = parser.parse_args(words)
    for size in asked.size:
        task = Task(size, asked.precision, asked.device)
        results = side_by_side.measure(
            contestants(task, asked.nanogpt, asked.build_nanogpt),
            partial(agree, precision=asked.precision),
            reference=HF,
            rounds=asked.rounds or ROUNDS.get(size, 5),
            warm_up=FIRST_STEPS,
            tell=lambda line: print(f"train: {line}", file=sys.stderr),
        )
        layers, _, _, batch, tokens = SIZES[size]
        about = (
            f"A training step on {batch} x {tokens} tokens, {layers} layers and heads; losses of "
            f"the first {FIRST_STEPS} steps within {FIRST_LOSS:g} (the first) and {NEXT_LOSSES:g}."
        )
        base = NANOGPT if asked.nanogpt else HF
        case = outcomes.Case(
            f"{size}, {asked.precision}", task.tokens, "tokens", base, results, about
        )
        print(outcomes.publish("train", case))


if __name__ == "__main__":
    main(sys.argv[1:])
