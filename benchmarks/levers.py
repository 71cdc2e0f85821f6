"""What each lever of the training step is worth on a CPU: the step without it beside the whole.

    python benchmarks/levers.py [--size nano|mini|124M] [--rounds 9]

Every contestant takes one step a turn on the same batches; a lever's ratio is the time without it
by the time with all of them. Their first losses must agree before a time counts. Prints a Markdown
table and writes it to benchmarks/results/levers-SIZE.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from pipeline import config
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.model import loss
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import token_losses
from pipeline.studies.tiny import TRAIN
from pipeline.training import compiling, optimizers, training_step
from pipeline.training.compiling import LossFunction

try:
    import resource
except ImportError:  # Windows counts no page faults for us
    resource = None

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SIZES = {"nano": (4, 4, 128, 8, 128), "mini": (6, 6, 384, 8, 128), "124M": (12, 12, 768, 2, 256)}
ALL = "all levers"


def fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    return torch.empty(shape, dtype=dtype, device=device)


def without_a_look(_, logits: torch.Tensor, indices: torch.Tensor, *rest: torch.Tensor):
    """The losses by the top logit and its probability."""
    target, top = logits.gather(1, indices).squeeze(1), logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    return top - target - logits.amax(1).log()


# What takes a lever away: (module, name in it, the plain way).
LEVERS = {
    "loss by the target's probability": [(loss._Head, "_losses", without_a_look)],
    "reused buffer of logits": [(loss, "reused", fresh)],
    "memory of the tied gradient handed on": [(training_step, "hand_back", lambda *_: None)],
    "head's weight gradient by pieces": [(loss, "COLUMNS", 1 << 30)],
    "look-up's gradient by rows": [(compiling, "look_up", lambda wte, idx: None)],
    "clipping inside fused AdamW": [(optimizers, "SKIPPING", ())],
}


def plain_loss(state: training_step.TrainState) -> LossFunction:
    def function(x, y, factor):
        return token_losses(state.model(x), y).sum() * factor

    return function


def contestants(model: GPT, settings: config.TrainConfig, precision) -> dict:
    """{name: (state, patches)}: those that differ in patches alone share one state."""
    whole = training_step.start(model, settings, precision, narrowing=1.0)
    found = {ALL: (whole, [])}
    found |= {f"without {name}": (whole, patches) for name, patches in LEVERS.items()}
    plain = training_step.start(copy.deepcopy(model), settings, precision, narrowing=1.0)
    plain.loss_function = plain_loss(plain)
    found["without linear + cross-entropy in one"] = (plain, [])
    with mock.patch.object(optimizers, "FUSED", ()):
        found["without fused AdamW"] = (
            training_step.start(model, settings, precision, narrowing=1.0),
            [],
        )
    bare = training_step.start(plain.model, settings, precision, narrowing=1.0)
    with mock.patch.object(optimizers, "FUSED", ()):
        bare.optimizer = optimizers.build_optimizer(plain.model, settings)
    bare.loss_function = plain.loss_function
    found["without any"] = (bare, [])
    less = replace(settings, checkpoint_activations=True)
    checkpointed = training_step.start(copy.deepcopy(model), less, precision, narrowing=1.0)
    found["with activation checkpointing"] = (checkpointed, [])
    return found


def step(
    state: training_step.TrainState, patches: list, ids: torch.Tensor
) -> tuple[float, float, int]:
    """(loss, seconds, page faults) of one step at a learning rate so small that states stay put."""
    with contextlib.ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value))
        faults, began = page_faults(), time.perf_counter()
        made = training_step.train_step(state, [(ids[:, :-1], ids[:, 1:])], 1e-12, TRAIN)
        return made.loss, time.perf_counter() - began, page_faults() - faults


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def measure(entries: dict, batches: list[torch.Tensor], rounds: int) -> dict:
    """{name: [(loss, seconds, faults), ...]}, the first round of each left out."""
    results = {name: [] for name in entries}
    for turn in range(rounds + 1):
        for name, (state, patches) in entries.items():
            found = step(state, patches, batches[turn % len(batches)])
            if turn:
                results[name].append(found)
        first = [rows[0][0] for rows in results.values() if rows]
        if first and max(first) - min(first) > 1e-4:
            raise SystemExit(f"first losses differ: {dict(zip(results, first, strict=True))}")
    return results


def table(results: dict) -> list[str]:
    lines = [
        "| | median ms | slower than all levers | quartiles of the pairs | page faults |",
        "|---|---:|---:|---:|---:|",
    ]
    whole = [row[1] for row in results[ALL]]
    for name, rows in results.items():
        seconds = [row[1] for row in rows]
        middle = statistics.median(seconds)
        pairs = statistics.quantiles([s / w for s, w in zip(seconds, whole, strict=True)], n=4)
        lines.append(
            f"| {name} | {1e3 * middle:,.0f} | {middle / statistics.median(whole):.3f} | "
            f"{pairs[0]:.2f} to {pairs[2]:.2f} | {statistics.median(r[2] for r in rows):,.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="nano", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    settings = config.load(ROOT / "recipes/nano.yaml")
    layers, heads, width, batch, length = SIZES[asked.size]
    model = GPT(GPTConfig(layers, heads, width, max(128, length)))
    initialize(model, settings.init, runtime.generator(settings.init.seed, "init"))
    draws = torch.Generator().manual_seed(0)
    batches = [torch.randint(50257, (batch, length + 1), generator=draws) for _ in range(3)]
    entries = contestants(model, settings.train, choose_precision("fp32", CPU))
    results = measure(entries, batches, asked.rounds)
    lines = [
        f"{asked.size}: {layers} layers, {heads} heads, width {width}, {batch} x {length} tokens, "
        f"50,304 rows, fp32; {asked.rounds} turns; {platform.machine()} "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
        "",
        f"`python benchmarks/levers.py --size {asked.size} --rounds {asked.rounds}`",
        "",
        *table(results),
    ]
    text = "\n".join(lines) + "\n"
    out = ROOT / "benchmarks/results" / f"levers-{asked.size}.md"
    out.write_text(text, encoding="utf-8", newline="\n")
    print(text)


if __name__ == "__main__":
    main()
