"""What each lever brings on a GPU: the matrix rate of every precision, the ladder, fp8, a peer.

    python benchmarks/gpu.py [--size 124m] [--rounds 20] [--batch 64] [--build-nanogpt CHECKOUT]
    python benchmarks/gpu.py --device cpu --size tiny     the whole script, where there is no GPU

The ladder is that of Karpathy's video "Let's reproduce GPT-2": fp32, tf32, bf16, compile, flash
attention, 50304 rows, fused AdamW, each rung on top of the one before. All rungs have the same
micro-batch, the largest up to --batch (halved) that the hungriest of them, the first, can hold.
Then the last rung with --batch itself, CUDA graphs and autotuning on top of it, and fp8. With a
checkout of build-nanogpt its model, optimizer and loop body take turns with ours, in bf16,
compiled, from the same weights and batches. A first loss that disagrees voids a time.

On CUDA it writes benchmarks/results/gpu.md and gpu.png, elsewhere it only prints. What is expected
of it on paper stands in benchmarks/results/gpu_expectation.md; as long as there is no gpu.md it has
not been measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import build_nanogpt
from pipeline import config
from pipeline.compute import runtime, throughput
from pipeline.compute.precision import PRECISIONS, choose_precision
from pipeline.drawing import figures
from pipeline.errors import ConfigError, UserError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import token_losses
from pipeline.studies import op_dtypes
from pipeline.studies.tiny import TRAIN
from pipeline.tables import markdown
from pipeline.training import compiling, loop, training_step
from pipeline.training.optimizers import parameter_groups

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
SIZES = {  # layers, heads, width, tokens of a sequence, token ids, rows padded to
    "124m": (12, 12, 768, 1024, 50257, 50304),
    "tiny": (2, 2, 32, 32, 127, 128),
}
WARM_UP = 3  # steps after the first one that do not count
TURN = 10  # steps of a turn beside a peer, at whose end nothing is at work any more
TOLERANCE = 0.02  # nats between first losses: bf16 is off by a thousandth, padding by 0.001
LR, CLIP = 6e-4, 1.0
COLUMNS = ("rung", "micro-batch", "tokens/s", "from", "to", "of the one before")
COLUMNS += ("of the matrix rate", "MFU", "first step s", "peak MiB", "first loss")


@dataclass(frozen=True)
class Rung:
    """How a step is made."""

    name: str
    precision: str = "fp32"
    compile: bool = False
    mode: str | None = None  # of torch.compile
    attention: str = "naive"
    padded: bool = False
    fused: bool = False


@dataclass
class Result:
    rung: Rung
    batch: int
    first_loss: float = math.nan
    first_seconds: float = math.nan
    seconds: tuple[float, ...] = ()
    peak_mib: float = math.nan
    refused: str = ""  # why there is no time, or none that counts

    def rates(self, tokens: int) -> tuple[float, float, float]:
        """Tokens a second: median, least, most."""
        all_of = [self.batch * tokens / s for s in self.seconds]
        return statistics.median(all_of), min(all_of), max(all_of)


def ladder() -> list[Rung]:
    """The seven rungs."""
    steps: list[dict[str, Any]] = [
        {"name": "fp32"},
        {"name": "+ tf32", "precision": "tf32"},
        {"name": "+ bf16", "precision": "bf16"},
        {"name": "+ compile", "compile": True},
        {"name": "+ flash attention", "attention": "sdpa"},
        {"name": "+ padded rows", "padded": True},
        {"name": "+ fused AdamW", "fused": True},
    ]
    rungs = [Rung(**steps[0])]
    for step in steps[1:]:
        rungs.append(replace(rungs[-1], **step))
    return rungs


def extras(last: Rung, device: torch.device) -> list[Rung]:
    """What comes on top of the last rung, each by itself, with the large micro-batch."""
    emulated = choose_precision("fp8", device).emulated  # what is emulated cannot be compiled
    return [
        replace(last, name="large micro-batch"),
        replace(last, name="... with CUDA graphs", mode="reduce-overhead"),
        replace(last, name="... with autotuning", mode="max-autotune-no-cudagraphs"),
        replace(last, name="... in fp8", precision="fp8", compile=not emulated),
    ]


def model_of(rung: Rung, size: str, device: torch.device) -> GPT:
    layers, heads, width, tokens, ids, padded = SIZES[size]
    rows = padded if rung.padded else ids
    model = GPT(GPTConfig(layers, heads, width, tokens, ids, rows, attention=rung.attention))
    settings = config.load(ROOT / "recipes/nano.yaml")
    # One draw of the padded size for all, so that first losses can be compared.
    full = GPT(GPTConfig(layers, heads, width, tokens, ids, padded))
    initialize(full, settings.init, runtime.generator(1, "init"))
    weights = full.state_dict()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:rows]
    model.load_state_dict(weights)
    return model.to(device)


def state_of(rung: Rung, size: str, device: torch.device) -> training_step.TrainState:
    """The real training step's state, with the rung's levers and no other."""
    precision, model = choose_precision(rung.precision, device), model_of(rung, size, device)
    settings = config.load(ROOT / "recipes/nano.yaml").train
    state = training_step.start(model, replace(settings, compile=False), precision)
    if not rung.fused:
        groups = parameter_groups(model, settings.weight_decay)
        state.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=False)

    def plain(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        return token_losses(model(x), y).sum() * factor

    state.loss_function = plain
    if rung.compile:
        state.loss_function = compiling.compiled_loss(model, precision, plain, rung.mode)
    return state


def batch_of(size: str, batch: int) -> training_step.Batch:
    """The same tokens every time: a step's time does not depend on them."""
    tokens, ids = SIZES[size][3:5]
    chance = torch.Generator().manual_seed(0)
    drawn = torch.randint(ids, (batch, tokens + 1), generator=chance)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def our_step(
    rung: Rung, size: str, batch: int, device: torch.device, turn: int = sys.maxsize
) -> Callable[[], float]:
    """A call that makes one step of the real loop and gives its loss.

    On a GPU the next one has been launched by then, but after every `turn` steps: a step takes the
    time from one return to the next, and whoever waits for the device in between adds to it.
    """
    state, given = state_of(rung, size, device), [batch_of(size, batch)]
    settings = replace(TRAIN, grad_clip=CLIP, steps=sys.maxsize, warmup_steps=0, lr=LR, min_lr=LR)
    reports = loop.fit(state, settings, lambda step: given, pause=lambda done: done % turn == 0)
    return lambda: next(reports).loss


def their_step(source: Path, size: str, batch: int, device: torch.device) -> Callable[[], float]:
    """The same of build-nanogpt, from our weights and on our batch."""
    layers, heads, width, tokens, _, padded = SIZES[size]
    shape = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": tokens}
    weights = model_of(ladder()[-1], size, torch.device("cpu")).state_dict()
    x, y = (part.to(device) for part in batch_of(size, batch))
    return build_nanogpt.step(source, shape | {"vocab_size": padded}, weights, x, y, LR, CLIP)


def timed(rung: Rung, batch: int, make: Callable[[], Callable[[], float]], rounds: int, device):
    """The rung's Result; one that runs out of memory, or cannot be had here, is refused."""
    result = Result(rung, batch)
    precision = choose_precision(rung.precision, device)
    if why := why_not(rung, precision):
        return replace(result, refused=why)
    throughput.forget_peak(device)
    try:
        step = make()
        began = time.perf_counter()
        result.first_loss, result.first_seconds = step(), time.perf_counter() - began
        spent(step, WARM_UP)
        result.seconds = tuple(spent(step) for _ in range(rounds))
        result.peak_mib = throughput.peak_memory_mib(device)
    except torch.OutOfMemoryError:
        result.refused = "out of memory"
    return result


def why_not(rung: Rung, precision: Any) -> str:
    if precision.effective != precision.asked:
        return precision.reason
    return compiling.why_not_compile(precision) if rung.compile else ""


def spent(step: Callable[[], float], steps: int = 1) -> float:
    """Seconds a step; each ends with its loss, for which it waits by itself."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


@contextlib.contextmanager
def afterwards_empty() -> Iterator[None]:
    """What a rung held and compiled is gone before the next one."""
    try:
        yield
    finally:
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def climb(size: str, batch: int, rounds: int, device: torch.device, tell: Callable) -> list[Result]:
    """Every rung, and what comes on top."""
    rungs, found = ladder(), []
    common = batch
    for rung in [*rungs, *extras(rungs[-1], device)]:
        small = rung in rungs
        while True:
            given = common if small else batch
            with afterwards_empty():
                make = lambda r=rung, b=given: our_step(r, size, b, device)  # noqa: E731
                result = timed(rung, given, make, rounds, device)
            if result.refused != "out of memory" or given == 1 or rung is not rungs[0]:
                break
            common //= 2
        found.append(judged(result, found))
        tell(f"{rung.name}: {result.refused or f'{result.rates(SIZES[size][3])[0]:,.0f} tokens/s'}")
    return found


def judged(result: Result, before: Sequence[Result]) -> Result:
    """Refused where the first loss is not that of the first rung, on the same batch."""
    same = next((r for r in before if r.batch == result.batch and not r.refused), None)
    if same and not result.refused and abs(result.first_loss - same.first_loss) > TOLERANCE:
        result.refused = f"first loss {result.first_loss:.4f}, {same.rung.name}'s is "
        result.refused += f"{same.first_loss:.4f}"
    return result


def duel(source: Path, size: str, batch: int, rounds: int, device: torch.device) -> list[Result]:
    """Ours and build-nanogpt's, turns of TURN steps alternating."""
    ours = replace(ladder()[-1], name="ours")
    theirs = replace(ours, name="build-nanogpt")
    makers = {
        ours: lambda: our_step(ours, size, batch, device, TURN),
        theirs: lambda: their_step(source, size, batch, device),
    }
    results, steps = [], []
    for rung, make in makers.items():
        began = time.perf_counter()
        steps.append(make())
        loss = steps[-1]()
        results.append(Result(rung, batch, loss, time.perf_counter() - began))
        spent(steps[-1], TURN - 1)
    for _ in range(rounds):
        for result, step in zip(results, steps, strict=True):
            result.seconds += (spent(step, TURN),)
    judged(results[1], results[:1])
    return results


def kernels(size: str, device: torch.device) -> str:
    """Which kernels of attention and of the update really ran, from one step watched."""
    rung = replace(ladder()[-1], compile=False)
    state = state_of(rung, size, device)
    state.eager_loss = state.loss_function
    settings = replace(config.load(ROOT / "recipes/nano.yaml").train, steps=1, warmup_steps=0)
    watch = op_dtypes.Watch(state)
    list(watch.first_of(loop.fit(state, settings, lambda step: [batch_of(size, 1)])))
    names = dict.fromkeys(row.operation for row in watch.rows)
    return ", ".join(n for n in names if "attention" in n or "adamw" in n)


def rows_of(
    found: list[Result], size: str, device: torch.device, rates: dict[str, float]
) -> list[tuple[Any, ...]]:
    """One tuple of COLUMNS for each result."""
    rows, before = [], None
    tokens, flops = SIZES[size][3], flops_of(size)
    for r in found:
        if r.refused:
            rows.append((f"{r.rung.name}: {r.refused}", r.batch, *["-"] * 8, r.first_loss))
            continue
        middle, least, most = r.rates(tokens)
        peak = throughput.peak_flops(runtime.device_name(device), r.rung.precision)
        mfu = throughput.utilisation(middle, flops, peak)
        share = middle * flops / rates[r.rung.precision]
        gain = f"{middle / before:.2f}" if before else "-"
        rows.append(
            (r.rung.name, r.batch, middle, least, most, gain, f"{share:.1%}")
            + (f"{mfu:.1%}" if mfu else "-", r.first_seconds, r.peak_mib, r.first_loss)
        )
        before = middle
    return rows


def flops_of(size: str) -> int:
    layers, heads, width, tokens, ids, padded = SIZES[size]
    with torch.device("meta"):
        model = GPT(GPTConfig(layers, heads, width, tokens, ids, padded))
    return model.flops_per_token(tokens)


def draw(found: list[Result], size: str, title: str) -> Any:
    """Tokens a second by rung, least and most as error bars."""
    figure, (axis,) = figures.sheet(1, width=9)
    shown = [r for r in found if not r.refused]
    rates = [r.rates(SIZES[size][3]) for r in shown]
    off = [[m - low for m, low, _ in rates], [high - m for m, _, high in rates]]
    axis.barh([r.rung.name for r in shown], [m for m, _, _ in rates], xerr=off, color="#0072B2")
    axis.invert_yaxis()
    axis.set(xlabel="tokens a second", title=title)
    return figure


def chosen_device(name: str) -> torch.device:
    """Raises ConfigError where there is no GPU and nobody asks for another device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device here, and this benchmark is of one; `--device cpu --size tiny` runs "
            "all of it, for figures that say nothing of a GPU"
        )
    return runtime.choose_device(name)


def main(words: list[str], folder: Path | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="124m", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--build-nanogpt", type=Path, metavar="CHECKOUT")
    asked = parser.parse_args(words)
    device = chosen_device(asked.device)
    rates = {}
    for name in PRECISIONS:
        precision = choose_precision(name, device)
        if precision.effective == name:
            rates[name] = throughput.matrix_rate(precision)
    found = climb(asked.size, asked.batch, asked.rounds, device, print)
    source = str(asked.build_nanogpt)  # a path of this machine, of no use to others
    shown = ["CHECKOUT" if word == source else word for word in words]
    parts = [head(shown, device, rates, asked.size)]
    parts.append(markdown(COLUMNS, rows_of(found, asked.size, device, rates)))
    if asked.build_nanogpt:
        with afterwards_empty():
            pair = duel(asked.build_nanogpt, asked.size, asked.batch, asked.rounds, device)
        parts.append("\nBeside build-nanogpt, in bf16 and compiled, turns alternating:\n\n")
        parts.append(markdown(COLUMNS, rows_of(pair[::-1], asked.size, device, rates)))
    print("".join(parts))
    # No run on a CPU is to be taken for the figure of a GPU.
    if folder := folder or (RESULTS if device.type == "cuda" else None):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.md").write_text("".join(parts), encoding="utf-8", newline="\n")
        title = f"GPT-2 {asked.size}, {runtime.device_name(device)}"
        figures.save(draw(found, asked.size, title), folder / "gpu.png")


def head(words: list[str], device: torch.device, rates: dict[str, float], size: str) -> str:
    """Machine, versions, command, matrix rates, roofs, and the kernels that ran."""
    measured = [
        (name, rate / 1e12, rate / flops_of(size), 0.6 * rate / flops_of(size))
        for name, rate in rates.items()
    ]
    columns = ("precision", "matrix rate, TFLOP/s", "roof, tokens/s", "60% of it")
    return (
        f"# The ladder on {runtime.device_name(device)}\n\n"
        f"GPT-2 {size}, {flops_of(size) / 1e6:,.1f} MFLOP a token; torch {torch.__version__}, "
        f"CUDA {torch.version.cuda or 'none'}. Kernels seen: {kernels(size, device)}.\n\n"
        f"`python benchmarks/gpu.py {shlex.join(words)}`\n\n{markdown(columns, measured)}\n"
    )


if __name__ == "__main__":
    warnings.simplefilter("default")
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
