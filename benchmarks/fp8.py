"""From which width on fp8 beats bf16 on this GPU: GPT-2's four widths, compiled, side by side.

    python benchmarks/fp8.py [--layers 6] [--batch 32] [--steps 30]
    python benchmarks/fp8.py --device cpu --size tiny     the whole script, where there is no GPU

The real training step, on sequences of 1,024 tokens: tokens/s from the median step after warm-up,
and the mean loss of the last five steps, which see the same batches in both precisions. All widths
have the same few layers, so that compiling takes seconds: where one precision wins is a matter of
the width, how much it wins also one of the depth, since the head is bf16 in both. `--layers 0`
takes GPT-2's own depths.

Each width is kept in fp8_gpu.json as soon as it is measured, and a call with the same options on
the same card, torch and code goes on where the last one ended. On CUDA it writes
benchmarks/results/fp8_gpu.md, elsewhere it only prints. Expected on an H100 with --layers 6: 8
compilations of 10 to 25 s and 8 times 30 steps of 0.05 to 0.25 s, 3 minutes in all. What should
come out stands in benchmarks/results/fp8_expectation.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import outcomes
from benchmarks.gpu import afterwards_empty, chosen_device
from benchmarks.kept import Kept, facts_of
from pipeline.compute import runtime, throughput
from pipeline.compute.precision import choose_precision
from pipeline.errors import ConfigError, UserError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.studies import tiny
from pipeline.tables import markdown
from pipeline.training import loop, training_step

# Width: GPT-2's depth and heads.
SIZES = {
    "gpt2": {768: (12, 12), 1024: (24, 16), 1280: (36, 20), 1600: (48, 25)},
    "tiny": {32: (1, 2), 64: (2, 2)},
}
TOKENS = {"gpt2": (1024, 50257, 50304), "tiny": (32, 127, 128)}  # length, token ids, rows
PAIR = ("bf16", "fp8")
LAST = 5  # steps whose loss is shown, averaged
COLUMNS = ("width", "layers", "bf16 tokens/s", "fp8 tokens/s", "fp8 by bf16", "bf16 loss")
COLUMNS += ("fp8 loss", "bf16 peak MiB", "fp8 peak MiB")


def batch_of(step: int, size: str, batch: int) -> list[training_step.Batch]:
    """Tokens as frequent as words are (Zipf's law): there is something to learn."""
    length, ids, _ = TOKENS[size]
    draws = torch.rand(batch, length + 1, generator=runtime.generator(step, "ids"))
    drawn: Tensor = (ids**draws).long() - 1
    return [(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())]


def measured(
    width: int, layers: int, precision: str, asked: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Speed, loss and memory of some steps; `refused` says why there are none."""
    chosen = choose_precision(precision, device)
    if chosen.effective != precision:
        return {"refused": chosen.reason}
    length, ids, rows = TOKENS[asked.size]
    model = GPT(GPTConfig(layers, SIZES[asked.size][width][1], width, length, ids, rows))
    initialize(model, tiny.INIT, runtime.generator(0, "init"))
    config = replace(
        tiny.TRAIN,
        steps=asked.steps,
        batch_size=asked.batch,
        sequence_length=length,
        lr=6e-4,
        min_lr=6e-4,
        warmup_steps=5,
        compile=device.type == "cuda",
    )
    throughput.forget_peak(device)
    try:
        state = training_step.start(model.to(device), config, chosen, narrowing=1.0)
        batches = lambda step: batch_of(step, asked.size, asked.batch)  # noqa: E731
        reports = list(loop.fit(state, config, batches))
    except torch.OutOfMemoryError:
        return {"refused": f"{precision}: out of memory; try a smaller --batch"}
    return {
        "rate": throughput.tokens_per_second([r.seconds for r in reports], reports[0].tokens),
        "loss": statistics.mean(r.loss for r in reports[-LAST:]),
        "peak": throughput.peak_memory_mib(device),
    }


def sweep(asked: argparse.Namespace, device: torch.device, kept: Kept) -> dict[str, Any]:
    """{"width precision": what was measured}."""
    found = {}
    for width, (depth, _) in SIZES[asked.size].items():
        for precision in PAIR:
            name = f"{width} {precision}"
            given = width, asked.layers or depth, precision, asked, device
            call = afterwards_empty()(lambda given=given: measured(*given))
            found[name] = kept.get(name, 0, call)
            print(name, found[name], flush=True)
    return found


def page(asked: argparse.Namespace, about: dict[str, Any], kept: dict[str, Any]) -> str:
    rows, ahead = [], {}
    for width, (depth, _) in SIZES[asked.size].items():
        low, eight = (kept[f"{width} {precision}"] for precision in PAIR)
        layers = asked.layers or depth
        if why := low.get("refused") or eight.get("refused"):
            rows.append((f"{width}: {why}", layers, *[None] * 7))
            continue
        ratio = eight["rate"] / low["rate"]
        ahead[width] = ratio > 1
        rows.append(
            (width, layers, low["rate"], eight["rate"], round(ratio, 3))
            + (f"{low['loss']:.4f}", f"{eight['loss']:.4f}", low["peak"], eight["peak"])
        )
    return (
        f"# fp8 against bf16 on {about['card']}\n\n{verdict(ahead)} Sequences a step: "
        f"{asked.batch}, each of {TOKENS[asked.size][0]:,} tokens; the loss is that of steps "
        f"{asked.steps - LAST + 1} to {asked.steps}.\n\n{markdown(COLUMNS, rows)}\n"
        f"`{about['command']}` on {about['date']} at {about['commit']}; {about['machine']}; "
        f"{about['versions']}, CUDA {torch.version.cuda or 'none'}\n"
    )


def verdict(ahead: dict[int, bool]) -> str:
    """`ahead`: {width: whether fp8 was faster}, narrowest first."""
    if not ahead:
        return "Neither could be measured at any width."
    losing = [width for width, faster in ahead.items() if not faster]
    winning = [width for width in ahead if width > max(losing, default=0)]
    if not winning:
        return "fp8 is the slower one at the greatest width measured."
    return f"fp8 is the faster one from width {winning[0]:,} on."


def main(words: list[str], folder: Path | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="gpt2", choices=SIZES)
    parser.add_argument("--layers", type=int, default=6, help="0: GPT-2's own depths")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args(words)
    if asked.steps < 2 * LAST:
        raise ConfigError(f"--steps {asked.steps}: expected {2 * LAST} or more")
    device = chosen_device(asked.device)
    about = outcomes.circumstances() | {"card": runtime.device_name(device)}
    folder = folder or (outcomes.RESULTS if device.type == "cuda" else None)
    kept = Kept(folder / "fp8_gpu.json" if folder else None, facts_of(device, options=vars(asked)))
    text = page(asked, about, sweep(asked, device, kept))
    print(text)
    if folder:
        (folder / "fp8_gpu.md").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
