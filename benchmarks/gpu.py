"""What each lever brings on a GPU: matrix rates, the ladder, the stage's own step, two peers.

    python benchmarks/gpu.py [--minutes 8] [--build-nanogpt CHECKOUT] [--modded-nanogpt CHECKOUT]
    python benchmarks/gpu.py --device cpu --size tiny     the whole script, where there is no GPU

The ladder is that of Karpathy's video "Let's reproduce GPT-2": fp32, tf32, bf16, compile, flash
attention, 50304 rows, fused AdamW, each rung on top of the one before, with the formula of the loss
as it is written. All rungs have the same micro-batch, the largest up to --batch (halved) that the
hungriest of them, the first, can hold. Then come the last rung with --batch itself, CUDA graphs and
autotuning on top of it; the step that the train stage makes, and each of its settings beside it;
and, from checkouts, the models, optimizers and loops of others, turns alternating, in bf16,
compiled, on the same batches. A first loss that disagrees voids a time.

Every result is kept in benchmarks/results/gpu.json at once. After --minutes nothing is begun, and
the same command goes on with what is missing, on the same card, torch and code. On CUDA it writes
gpu.md and gpu.png beside it, elsewhere it only prints. What is expected of it on paper stands in
benchmarks/results/gpu_expectation.md; as long as there is no gpu.md it has not been measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import multiprocessing
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import build_nanogpt, modded_nanogpt
from benchmarks.kept import Kept, facts_of
from pipeline import config
from pipeline.compute import runtime, throughput
from pipeline.compute.determinism import deterministic
from pipeline.compute.precision import PRECISIONS, choose_precision
from pipeline.drawing import figures
from pipeline.errors import ConfigError, UserError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import token_losses
from pipeline.studies import op_dtypes
from pipeline.tables import markdown
from pipeline.training import compiling, loop, training_step
from pipeline.training.optimizers import parameter_groups

BUILD_NANOGPT, MODDED_NANOGPT = "build-nanogpt", "modded-nanogpt"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
SIZES = {  # layers, heads, width, tokens of a sequence, token ids, rows padded to
    "124m": (12, 12, 768, 1024, 50257, 50304),
    "tiny": (2, 2, 32, 32, 127, 128),
}
WARM_UP = 3  # steps after the first one that do not count
TURN = 10  # steps that are timed together, so that they may run ahead of the host
# Seconds that a rung is expected to take at most, by what is compiled for it: on an H100 a graph
# took 20 to 60; those that a call may not have are left for the next one.
EAGER_SECONDS, COMPILED_SECONDS, TUNED_SECONDS = 20, 75, 180
TOLERANCE = 0.02  # nats between first losses: bf16 is off by a thousandth, padding by 0.001
LR, CLIP = 6e-4, 1.0
# Settings of the train stage that change how a step is made, and not what it learns.
LEVERS = (
    ("train.deterministic=true",),
    ("train.checkpoint_activations=true",),
    ("model.attention=flash",),
    ("model.attention=cudnn",),
)
TUNED = "max-autotune-no-cudagraphs"
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
    settings: tuple[str, ...] | None = None  # the train stage's own step, with these changed

    @property
    def most_seconds(self) -> int:
        if self.mode == TUNED:
            return TUNED_SECONDS
        return COMPILED_SECONDS if self.compile else EAGER_SECONDS


@dataclass
class Result:
    """Seconds are those of a step, one for each turn."""

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


def extras(last: Rung) -> list[Rung]:
    """What comes on top of the last rung, each by itself, with the large micro-batch."""
    return [
        replace(last, name="large micro-batch"),
        replace(last, name="... with CUDA graphs", mode="reduce-overhead"),
        replace(last, name="... with autotuning", mode=TUNED),
    ]


def levers(last: Rung, device: torch.device) -> list[Rung]:
    """The train stage's step as the recipes have it, in bf16, and one setting changed in each."""
    emulated = choose_precision("fp8", device).emulated  # what is emulated cannot be compiled
    own = replace(last, name="the train stage's step", settings=())
    return [
        own,
        replace(own, name="precision=fp8", precision="fp8", compile=not emulated),
        replace(own, name="train.compile=false", compile=False),
        *(replace(own, name=", ".join(changed), settings=changed) for changed in LEVERS),
    ]


def model_of(rung: Rung, size: str, device: torch.device) -> GPT:
    layers, heads, width, tokens, ids, padded = SIZES[size]
    rows, settings = padded if rung.padded else ids, settings_of(rung)
    attention = rung.attention if rung.settings is None else settings.model.attention
    model = GPT(GPTConfig(layers, heads, width, tokens, ids, rows, attention=attention))
    # One draw of the padded size for all, so that first losses can be compared.
    full = GPT(GPTConfig(layers, heads, width, tokens, ids, padded))
    initialize(full, settings.init, runtime.generator(1, "init"))
    weights = full.state_dict()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:rows]
    model.load_state_dict(weights)
    return model.to(device)


def settings_of(rung: Rung) -> config.Config:
    """The default recipe, but for what the rung says."""
    compiled = f"train.compile={str(rung.compile).lower()}"
    return config.load(ROOT / "recipes/nano.yaml", [compiled, *(rung.settings or ())])


def state_of(rung: Rung, size: str, device: torch.device) -> training_step.TrainState:
    """The real training step's state; below the stage's own with the rung's levers and no other."""
    precision, model = choose_precision(rung.precision, device), model_of(rung, size, device)
    settings = settings_of(rung).train
    if rung.settings is not None:
        return training_step.start(model, settings, precision, narrowing=1.0)
    state = training_step.start(model, replace(settings, compile=False), precision, narrowing=1.0)
    if not rung.fused:
        groups = parameter_groups(model, settings.weight_decay)
        state.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=False)

    def plain(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        return token_losses(model(x), y).sum() * factor

    state.loss_function = plain
    if rung.compile:
        state.loss_function = torch.compile(plain, dynamic=False, fullgraph=True, mode=rung.mode)
    return state


def batch_of(size: str, batch: int) -> training_step.Batch:
    """The same tokens every time: a step's time does not depend on them."""
    tokens, ids = SIZES[size][3:5]
    chance = torch.Generator().manual_seed(0)
    drawn = torch.randint(ids, (batch, tokens + 1), generator=chance)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def our_steps(rung: Rung, size: str, batch: int, device: torch.device) -> Callable[[int], float]:
    """A call that makes n steps, in the stage's own loop, and gives the first one's loss."""
    state, given = state_of(rung, size, device), [batch_of(size, batch)]
    settings = replace(
        settings_of(rung).train, grad_clip=CLIP, lr=LR, min_lr=LR, warmup_steps=0, skip_spikes=0.0
    )

    def steps(count: int) -> float:
        until = replace(settings, steps=state.step + count)
        reports = loop.fit(state, until, lambda step: given, pause=lambda done: False)
        return [report.loss for report in reports][0]

    return steps


def their_steps(
    name: str, source: Path, size: str, batch: int, device: torch.device
) -> Callable[[int], float]:
    """The same of a peer on our batch; build-nanogpt's begins with our weights."""
    layers, heads, width, tokens, _, padded = SIZES[size]
    x, y = (part.to(device) for part in batch_of(size, batch))
    if name == MODDED_NANOGPT:
        return modded_nanogpt.steps(source, layers, width, padded, x, y)
    shape = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": tokens}
    weights = model_of(ladder()[-1], size, torch.device("cpu")).state_dict()
    return build_nanogpt.steps(source, shape | {"vocab_size": padded}, weights, x, y, LR, CLIP)


def timed(rung: Rung, size: str, batch: int, rounds: int, device: torch.device) -> Result:
    """The rung's Result; one that runs out of memory, or cannot be had here, is refused."""
    result, watch = Result(rung, batch), throughput.Stopwatch(device)
    if why := why_not(rung, choose_precision(rung.precision, device)):
        return replace(result, refused=why)
    throughput.forget_peak(device)
    with deterministic(settings_of(rung).train.deterministic, device):
        try:
            steps = our_steps(rung, size, batch, device)
            watch.start()
            result.first_loss, result.first_seconds = steps(1), watch.stop()
            steps(WARM_UP)
            result.seconds = tuple(spent(steps, watch) for _ in range(rounds))
            result.peak_mib = throughput.peak_memory_mib(device)
        except torch.OutOfMemoryError:
            result.refused = "out of memory"
    return result


def apart(rung: Rung, *given: Any) -> Result:
    """`timed`; a deterministic one in a process of its own, as cuBLAS is told when it starts."""
    device = given[-1]
    try:
        settings_of(rung)
    except ConfigError as error:  # of other code than this file's
        return Result(rung, given[1], refused=str(error))
    if device.type != "cuda" or not settings_of(rung).train.deterministic:
        with afterwards_empty():
            return timed(rung, *given)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(timed, rung, *given).result()


def why_not(rung: Rung, precision: Any) -> str:
    if precision.effective != precision.asked:
        return precision.reason
    return compiling.why_not_compile(precision) if rung.compile else ""


def spent(steps: Callable[[int], float], watch: throughput.Stopwatch) -> float:
    """Seconds of a step, of TURN that follow one another."""
    watch.start()
    steps(TURN)
    return watch.stop() / TURN


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


def climb(
    size: str, batch: int, rounds: int, device: torch.device, kept: Kept, tell: Callable
) -> tuple[list[Result], list[Result]]:
    """Every rung with what comes on top of the last, and the levers: those there is time for."""
    rungs = ladder()
    common, found = batch, []
    while first := measured(rungs[0], size, common, rounds, device, kept):
        if first.refused != "out of memory" or common == 1:
            break
        common //= 2
    # What the first rung can hold is known once it has been measured.
    small = [(rung, common) for rung in rungs] if first else []
    large = [(rung, batch) for rung in extras(rungs[-1])]
    beside = [(rung, batch) for rung in levers(rungs[-1], device)]
    for group in (small + large, beside):
        results: list[Result] = []
        for rung, given in group:
            if result := measured(rung, size, given, rounds, device, kept):
                results.append(judged(result, [r for part in (*found, results) for r in part]))
                rate = result.refused or f"{result.rates(SIZES[size][3])[0]:,.0f} tokens/s"
                tell(f"{rung.name}: {rate}")
        found.append(results)
    return found[0], found[1]


def measured(
    rung: Rung, size: str, batch: int, rounds: int, device: torch.device, kept: Kept
) -> Result | None:
    """What is kept of it, or comes of it now; None if there is no time."""
    name = f"{rung.name} {asdict(rung)} x {batch}"
    plain = kept.get(
        name, rung.most_seconds, lambda: asdict(apart(rung, size, batch, rounds, device))
    )
    return restored(plain) if plain else None


def restored(plain: dict[str, Any]) -> Result:
    rung = dict(plain["rung"])
    rung["settings"] = None if rung["settings"] is None else tuple(rung["settings"])
    return Result(**plain | {"rung": Rung(**rung), "seconds": tuple(plain["seconds"])})


def judged(result: Result, before: Sequence[Result]) -> Result:
    """Refused where the first loss is not that of the first rung, on the same batch."""
    same = next((r for r in before if r.batch == result.batch and not r.refused), None)
    if same and not result.refused and abs(result.first_loss - same.first_loss) > TOLERANCE:
        result.refused = f"first loss {result.first_loss:.4f}, {same.rung.name}'s is "
        result.refused += f"{same.first_loss:.4f}"
    return result


def duel(
    sources: dict[str, Path], size: str, batch: int, rounds: int, device: torch.device
) -> list[Result]:
    """Ours, as the train stage makes it, and the peers', turns alternating."""
    ours = replace(levers(ladder()[-1], device)[0], name="ours")
    makers = {ours: lambda: our_steps(ours, size, batch, device)}
    for name, source in sources.items():
        makers[replace(ours, name=name)] = partial(their_steps, name, source, size, batch, device)
    watch, results, steps = throughput.Stopwatch(device), [], []
    for rung, make in makers.items():
        began = time.perf_counter()
        steps.append(make())
        loss = steps[-1](1)
        results.append(Result(rung, batch, loss, time.perf_counter() - began))
        steps[-1](WARM_UP)
    for _ in range(rounds):
        for result, call in zip(results, steps, strict=True):
            result.seconds += (spent(call, watch),)
    for result in results[1:]:
        expected = math.log(SIZES[size][5])  # of a head of zeros
        if result.rung.name != MODDED_NANOGPT:
            judged(result, results[:1])
        elif abs(result.first_loss - expected) > TOLERANCE:
            result.refused = f"first loss {result.first_loss:.4f}, expected {expected:.4f}"
    return results


def kernels(size: str, device: torch.device) -> str:
    """Which kernels of attention and of the update really ran, from one step watched."""
    rung = replace(ladder()[-1], compile=False)
    state = state_of(rung, size, device)
    state.eager_loss = state.loss_function
    settings = replace(settings_of(rung).train, steps=1, warmup_steps=0)
    watch = op_dtypes.Watch(state)
    list(watch.first_of(loop.fit(state, settings, lambda step: [batch_of(size, 1)])))
    names = dict.fromkeys(row.operation for row in watch.rows)
    return ", ".join(n for n in names if "attention" in n or "adamw" in n)


def rows_of(
    found: list[Result],
    size: str,
    device: torch.device,
    rates: dict[str, float],
    base: str = "",
) -> list[tuple[Any, ...]]:
    """One tuple of COLUMNS for each result, against the one before or the rung named `base`."""
    rows, before = [], None
    tokens, flops = SIZES[size][3], flops_of(size)
    for r in found:
        if r.refused:
            rows.append((f"{r.rung.name}: {r.refused}", r.batch, *["-"] * 8, r.first_loss))
            continue
        middle, least, most = r.rates(tokens)
        peak = throughput.peak_flops(runtime.device_name(device), r.rung.precision)
        mfu = throughput.utilisation(middle, flops, peak)
        rate = rates.get(r.rung.precision, math.nan)
        gain = f"{middle / before:.2f}" if before else "-"
        rows.append(
            (r.rung.name, r.batch, middle, least, most, gain, f"{middle * flops / rate:.1%}")
            + (f"{mfu:.1%}" if mfu else "-", r.first_seconds, r.peak_mib, r.first_loss)
        )
        before = before if before and base else middle
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
    asked = parsed(words)
    device = chosen_device(asked.device)
    # No run on a CPU is to be taken for the figure of a GPU.
    folder = folder or (RESULTS if device.type == "cuda" else None)
    facts = facts_of(device, size=asked.size, batch=asked.batch, rounds=asked.rounds)
    kept = Kept(folder / "gpu.json" if folder else None, facts, asked.minutes)
    rates = kept.get("matrix rates", EAGER_SECONDS, lambda: matrix_rates(device)) or {}
    seen = kept.get("kernels", EAGER_SECONDS, lambda: kernels(asked.size, device)) or "none yet"
    found, beside = climb(asked.size, asked.batch, asked.rounds, device, kept, print)
    sources = {
        n: s
        for n, s in ((BUILD_NANOGPT, asked.build_nanogpt), (MODDED_NANOGPT, asked.modded_nanogpt))
        if s
    }
    pair = []
    if sources:
        with afterwards_empty():
            pair = kept.get(
                f"beside {', '.join(sources)}",
                COMPILED_SECONDS * (1 + len(sources)),
                lambda: [
                    asdict(r) for r in duel(sources, asked.size, asked.batch, asked.rounds, device)
                ],
            )
    hidden = {str(source): "CHECKOUT" for source in sources.values()}  # paths of this machine
    shown = [hidden.get(word, word) for word in words]
    rows = partial(rows_of, size=asked.size, device=device, rates=rates)
    parts = [head(shown, facts, rates, asked.size, seen)]
    if kept.missing:
        names = "; ".join(name.partition(" {")[0] for name in kept.missing)
        parts.append(f"Not measured yet, for want of time: {names}. The same command goes on.\n\n")
    parts.append(markdown(COLUMNS, rows(found)))
    columns = tuple("of the first" if c == "of the one before" else c for c in COLUMNS)
    parts.append("\nAs the train stage makes it, and with one setting changed:\n\n")
    parts.append(markdown(columns, rows(beside, base="first")))
    if pair:
        parts.append("\nBeside others, in bf16 and compiled, turns alternating:\n\n")
        theirs = [restored(plain) for plain in pair]
        parts.append(markdown(columns, rows([*theirs[1:], theirs[0]], base="first")))
    print("".join(parts))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.md").write_text("".join(parts), encoding="utf-8", newline="\n")
        title = f"GPT-2 {asked.size}, {runtime.device_name(device)}"
        figures.save(draw([*found, *beside], asked.size, title), folder / "gpu.png")


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="124m", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=4, help=f"turns of {TURN} steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=8.0, help="0 for no limit")
    for name in (BUILD_NANOGPT, MODDED_NANOGPT):
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT")
    return parser.parse_args(words)


def matrix_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large product in every precision that is in effect here."""
    chosen = (choose_precision(name, device) for name in PRECISIONS)
    return {p.asked: throughput.matrix_rate(p) for p in chosen if p.effective == p.asked}


def head(
    words: list[str], facts: dict[str, Any], rates: dict[str, float], size: str, seen: str
) -> str:
    """Machine, versions, command, matrix rates, roofs, and the kernels that ran."""
    roofs = [
        (name, rate / 1e12, rate / flops_of(size), 0.6 * rate / flops_of(size))
        for name, rate in rates.items()
    ]
    columns = ("precision", "matrix rate, TFLOP/s", "roof, tokens/s", "60% of it")
    return (
        f"# The ladder on {facts['card']}\n\n"
        f"GPT-2 {size}, {flops_of(size) / 1e6:,.1f} MFLOP a token; torch {facts['torch']}, "
        f"CUDA {torch.version.cuda or 'none'}; code {facts['code']}. Kernels seen in the last "
        f"rung: {seen}.\n\n`python benchmarks/gpu.py {shlex.join(words)}`\n\n"
        f"{markdown(columns, roofs)}\n"
    )


if __name__ == "__main__":
    warnings.simplefilter("default")
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
