"""What a training checkpoint costs: seconds, share of training time, memory; and to go on from it.

    python benchmarks/checkpoints.py [--recipe recipes/gpt2-124m.yaml] [--rounds 5]

Prints a Markdown table and writes it to benchmarks/results/checkpoints.md. The share is that of
the recipe's own cadence in minutes; with a cadence in steps it depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import config
from pipeline.compute.precision import choose_precision
from pipeline.compute.throughput import peak_memory_mib
from pipeline.model.gpt import GPTConfig
from pipeline.model.hf_layout import outline
from pipeline.model.model_dir import save_model
from pipeline.resume import checkpoints
from pipeline.training import training_step

RESULTS = Path(__file__).resolve().parent / "results" / "checkpoints.md"
GO_ON = "verify and go on, mapped files counted"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def state_of(settings: config.Config) -> training_step.TrainState:
    """Weights and moments of the recipe's size; what they are changes no time."""
    c = settings.model
    shape = GPTConfig(c.n_layer, c.n_head, c.n_embd, c.block_size, vocab_rows=c.vocab_rows)
    model = outline(shape).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
            parameter.grad = torch.full_like(parameter, 1e-3)
    device = torch.device("cpu")
    state = training_step.start(
        model, settings.train, choose_precision("fp32", device), narrowing=1.0
    )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return state


def resident_mib() -> float:
    return int(STATUS.read_text().partition("VmRSS:")[2].split()[0]) / 2**10


def timed(work: Callable[[], object], rounds: int) -> tuple[list[float], float]:
    """Seconds of each round, and by how much memory grew meanwhile, in MiB; NaN where unknown."""
    seconds, growth = [], float("nan")
    for _ in range(rounds):
        if CLEAR.exists():
            CLEAR.write_text("5")
            before = resident_mib()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
        if CLEAR.exists():
            growth = peak_memory_mib(torch.device("cpu")) - before
    return seconds, growth


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="recipes/gpt2-124m.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    settings = config.load(asked.recipe)
    state = state_of(settings)
    weights = 4 * state.model.parameter_count() / 2**20
    with tempfile.TemporaryDirectory(dir=".") as folder:
        saved = checkpoints.Checkpoints(Path(folder), settings.checkpoint)

        def save() -> None:
            state.step += 1
            saved.save(state, {"best_step": 0})

        def go_on() -> None:
            saved.newest().restore(state)

        rows = [
            ("checkpoint", *timed(save, asked.rounds)),
            (
                "best model",
                *timed(lambda: save_model(state.model, Path(folder) / "m"), asked.rounds),
            ),
            (GO_ON, *timed(go_on, asked.rounds)),
        ]
    every = 60 * settings.checkpoint.every_minutes
    lines = [
        f"{asked.recipe}: {state.model.parameter_count():,} parameters, {weights:,.0f} MiB of "
        f"weights; torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        "",
        f"`python benchmarks/checkpoints.py --recipe {asked.recipe} --rounds {asked.rounds}`",
        "",
        f"| | median s | from | to | share at one in {every / 60:g} min | MiB more | of weights |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, seconds, growth in rows:
        middle = statistics.median(seconds)
        share = f"{middle / (every + middle):.2%}" if every and name != GO_ON else "-"
        spread = f"{min(seconds):.2f} | {max(seconds):.2f}"
        memory = f"{growth:,.0f} | {growth / weights:.2f}"
        lines.append(f"| {name} | {middle:.2f} | {spread} | {share} | {memory} |")
    text = "\n".join(lines) + "\n"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8", newline="\n")
    print(text)


if __name__ == "__main__":
    main()
