"""How time and memory grow, along every axis that a user may turn, beside what is expected.

    python benchmarks/growth.py [AXIS ...] [--rounds N]

An axis is a list of points; each point works in a process of its own and they take turns. What
grows faster than its work does shows as a number above 1 in the column "over expected": measured
growth since the first point by the growth of the work. Memory is what a turn holds beyond a
process that only imported the pipeline. Writes benchmarks/results/growth.{json,md,svg}.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import outcomes, side_by_side, tokenizing
from benchmarks.peers import RECIPE
from benchmarks.side_by_side import Contestant, Result, Turn, Verdict
from pipeline import config as configuration
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.config import Config
from pipeline.data import token_files
from pipeline.data.token_writer import usable_cores
from pipeline.diagnostics import doctor
from pipeline.drawing.figures import OTHERS, sheet, svg
from pipeline.inference import generation
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.records.record_file import Record
from pipeline.tables import markdown
from pipeline.training import loop, training_step
from pipeline.training.history import step_metrics

IDLE = "idle"
HEADS = 4

Expected = Callable[[float], float]


@dataclass(frozen=True)
class Axis:
    """What is turned, the work at a point, and by what law its time and memory should grow."""

    label: str
    points: tuple[float, ...]
    start: Callable[[float], Turn]
    time: Expected
    memory: Expected
    law: str  # both laws, in words


def constant(_: float) -> float:
    return 1.0


def linear(x: float) -> float:
    return x


# --- training: one step


def shape(channels: int = 128, block_size: int = 1024) -> GPTConfig:
    return GPTConfig(max(1, channels // 32), HEADS, channels, block_size)


def step_of(model: GPTConfig, batch: int, tokens: int, accumulate: int = 1) -> Turn:
    """One optimizer step a turn, of `accumulate` batches (batch, tokens)."""
    device = runtime.choose_device("auto")
    settings = configuration.load(RECIPE).train
    draws = runtime.generator(0, "ids")
    ids = torch.randint(50257, (accumulate, batch, tokens + 1), generator=draws)
    batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]
    state = training_step.start(
        GPT(model).to(device), settings, choose_precision("fp32", device), narrowing=1.0
    )
    steps = loop.fit(state, dataclasses.replace(settings, steps=10**6), lambda _: batches)
    return lambda: next(steps).loss


def model_size(channels: float) -> Turn:
    return step_of(shape(int(channels), 128), 8, 128)


def sequence(tokens: float) -> Turn:
    return step_of(shape(), 2, int(tokens))


def batch_size(batch: float) -> Turn:
    return step_of(shape(), int(batch), 128)


def accumulation(count: float) -> Turn:
    return step_of(shape(), 2, 128, int(count))


def threads(count: float) -> Turn:
    torch.set_num_threads(int(count))
    return step_of(shape(), 8, 128)


def flops(channels: float = 128, tokens: float = 128) -> float:
    with torch.device("meta"):
        return GPT(shape(int(channels))).flops_per_token(int(tokens))


def parameters(channels: float) -> float:
    with torch.device("meta"):
        return GPT(shape(int(channels), 128)).parameter_count()


# --- around the steps


def bookkeeping(steps: float) -> Turn:
    """Record, curve and the doctor's looks at every validation, for so many steps."""
    config = configuration.load(RECIPE)

    def turn() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            record, rounds = Record("train", config), doctor.Rounds()
            for step in range(int(steps)):
                record.metrics(step_metrics(_report(step, config)), step)
                if step % config.train.val_every == 0:
                    record.metrics({"val/loss": 5.0}, step)
                    rounds.look(step, record.so_far)
            record.close("FINISHED")

    return turn


def _report(step: int, config: Config) -> loop.StepReport:
    loss = 4 + 6 / (1 + step)
    return loop.StepReport(step, loss, 1.0, 1e-3, 1.0, False, 0.3, 0.001, 1024, 10**6)


def batches(tokens: float) -> Turn:
    """A thousand batches out of a corpus of so many tokens."""
    settings = configuration.load(RECIPE).train
    ids = np.zeros(int(tokens), token_files.DTYPE)
    corpus = token_files.Tokens(ids, len(ids), "", 1, Path())

    def turn() -> None:
        for step in range(1000):
            loop.micro_batches(corpus, settings, step)

    return turn


# --- text in, text out


def new_tokens(count: float) -> Turn:
    """Greedy continuation of one token by so many, with the cache."""
    model = GPT(shape(256))
    sample = configuration.load(RECIPE).sample
    sample = dataclasses.replace(sample, max_new_tokens=int(count), temperature=0.0)
    idx = torch.full((1, 1), 464)
    return partial(generation.generate, model, idx, sample, runtime.generator(0, "sample"))


def corpus_size(megabytes: float) -> Turn:
    return _tokenize(megabytes, None)


def workers(count: float) -> Turn:
    return _tokenize(16, int(count))


def _tokenize(megabytes: float, workers: int | None) -> Turn:
    folder = Path(tempfile.mkdtemp())
    # A process of multiprocessing ends without what `atexit` and garbage collection would do.
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder,), exitpriority=0)
    text = folder / tokenizing.TEXT
    tokenizing.write_text(text, megabytes)
    return tokenizing.ours(text, folder, workers)


AXES = {
    "model": Axis(
        "channels",
        (64, 128, 256, 512),
        model_size,
        lambda x: flops(x),
        parameters,
        "time as the floating-point operations, memory as the parameters",
    ),
    "sequence": Axis(
        "tokens a sequence",
        (128, 256, 512, 1024),
        sequence,
        lambda x: x * flops(tokens=x),
        linear,
        "time as tokens and the attention between them, memory as tokens",
    ),
    "batch": Axis(
        "sequences a batch", (2, 4, 8, 16, 32), batch_size, linear, linear, "both as sequences"
    ),
    "accumulate": Axis(
        "micro-batches a step",
        (1, 2, 4, 8),
        accumulation,
        linear,
        constant,
        "time as micro-batches, memory not at all",
    ),
    "threads": Axis(
        "threads of a step",
        (1, 2),
        threads,
        lambda x: 1 / x,
        constant,
        "time as one over threads, memory not at all",
    ),
    "steps": Axis(
        "steps recorded",
        (500, 2000, 8000, 20000),
        bookkeeping,
        linear,
        linear,
        "time and memory as steps",
    ),
    "batches": Axis(
        "tokens of the corpus",
        (1e6, 1e7, 1e8),
        batches,
        constant,
        linear,
        "time of a thousand batches not at all; memory as the tokens, which lie in it here",
    ),
    "generate": Axis(
        "new tokens", (64, 128, 256, 512), new_tokens, linear, constant, "time as new tokens"
    ),
    "corpus": Axis(
        "megabytes of text",
        (4, 16, 64),
        corpus_size,
        linear,
        constant,
        "time as text, memory not at all",
    ),
    "workers": Axis(
        "threads that tokenize 16 MB",
        (1, 2, 4),
        workers,
        lambda x: 1 / min(x, usable_cores()),
        linear,
        "time as one over threads up to the cores, memory as threads",
    ),
}


# --- the measurement


def idle() -> Turn:
    return partial(time.sleep, 0.2)  # long enough for its memory to be looked at


def measured(axis: Axis, rounds: int) -> tuple[list[Result], float]:
    """A result for each point, and the MiB of a process that does nothing."""
    points = [Contestant(f"{x:g}", partial(axis.start, x)) for x in axis.points]
    base, *found = side_by_side.measure(
        [Contestant(IDLE, idle), *points],
        lambda own, others: Verdict(),
        reference=IDLE,
        rounds=rounds,
        tell=lambda line: print(f"growth: {axis.label}: {line}", file=sys.stderr),
    )
    return found, base.memory_mib


def growth(axis: Axis, found: list[Result], idle_mib: float) -> list[dict[str, float]]:
    """A row for each point; `over` is measured growth since the first by that of the work."""
    table: list[dict[str, float]] = []
    for x, result in zip(axis.points, found, strict=True):
        if result.refused:
            raise RuntimeError(f"{axis.label} {x:g}: {result.refused}")
        row = {"x": x, "median s": result.median, "least s": min(result.seconds)}
        row |= {"most s": max(result.seconds), "MiB": result.memory_mib - idle_mib}
        first, start = (table or [row])[0], axis.points[0]
        row["time over"] = row["median s"] / first["median s"] / (axis.time(x) / axis.time(start))
        row["memory over"] = row["MiB"] / first["MiB"] / (axis.memory(x) / axis.memory(start))
        table.append(row)
    return table


# --- what people read

HEAD = "# growth\n\n![time and memory along each axis](growth.svg)\n"


def publish(name: str, table: list[dict[str, float]]) -> None:
    """Put an axis into the three files; the others in them stay as they were measured."""
    path = outcomes.RESULTS / "growth.json"
    kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    kept[name] = {"points": table, "run": outcomes.circumstances()}
    kept = {name: kept[name] for name in AXES if name in kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    page = "\n".join([HEAD, *(part(name, entry) for name, entry in kept.items())])
    for file, text in [(path, json.dumps(kept, indent=1) + "\n"), (path.with_suffix(".md"), page)]:
        file.write_text(text, encoding="utf-8", newline="\n")
    path.with_suffix(".svg").write_bytes(picture(kept))


def part(name: str, entry: dict[str, Any]) -> str:
    axis, run = AXES[name], entry["run"]
    return (
        f"## {name}\n\nExpected: {axis.law}. `{run['command']}` on {run['date']} at "
        f"{run['commit'] or 'no commit'}; {run['machine']}; {run['versions']}\n\n"
        + markdown([axis.label, *list(entry["points"][0])[1:]], map(dict.values, entry["points"]))
    )


def picture(kept: dict[str, Any]) -> bytes:
    """Time and memory along every axis, the expected growth dashed from the first point."""
    figure, panels = sheet(len(kept), width=3.4, height=3.0, rows=2)
    for panel, (name, entry) in zip(panels, kept.items(), strict=True):
        axis, rows = AXES[name], entry["points"]
        xs = [row["x"] for row in rows]
        for column, law, colour in [
            ("median s", axis.time, OTHERS[0]),
            ("MiB", axis.memory, OTHERS[2]),
        ]:
            first = rows[0][column]
            panel.plot(xs, [row[column] / first for row in rows], "o-", color=colour, label=column)
            expected = [law(x) / law(xs[0]) for x in xs]
            panel.plot(xs, expected, "--", color=colour, lw=0.9)
        panel.set(xscale="log", yscale="log", title=name, xlabel=axis.label)
        panel.set_xticks(xs, [f"{x:g}" for x in xs])
        panel.minorticks_off()
    panels[0].legend(title="first point = 1, dashed: expected", fontsize=7, title_fontsize=7)
    return svg(figure)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)}; all")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(words)
    if unknown := set(asked.axes) - set(AXES):
        parser.error(f"AXIS {', '.join(unknown)}: expected some of {', '.join(AXES)}")
    for name in asked.axes or AXES:
        table = growth(AXES[name], *measured(AXES[name], asked.rounds))
        publish(name, table)
        print(part(name, json.loads((outcomes.RESULTS / "growth.json").read_text("utf-8"))[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
