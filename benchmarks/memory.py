"""Peak memory of a training step on a card, beside the forecast, by size and setting.

    python benchmarks/memory.py                                         what is not measured yet
    python benchmarks/memory.py --device cpu --size tiny --out FOLDER   all of it, without a GPU

Real steps of two micro-batches each: the settings that `python -m pipeline forecast --memory`
proposes for cards of 4, 8, 12 and 24 GB, with the allocator held to as much; then GPT-2's four
sizes with and without activation checkpointing, in fp32 and bf16, eager and compiled. Every case is
kept in memory_gpu.json at once, and what stands there is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu import RESULTS, afterwards_empty, chosen_device
from benchmarks.kept import Kept, facts_of
from pipeline import config as configuration
from pipeline.compute import throughput
from pipeline.compute.precision import choose_precision, of_a_card
from pipeline.config import Config
from pipeline.diagnostics import forecast
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.tables import markdown
from pipeline.training import training_step

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"gpt2-124m": (1, 4, 16), "gpt2-medium": (1, 8), "gpt2-large": (1, 8), "gpt2-xl": (1, 4)}
SIZES |= {"tiny": (1, 2)}
CARDS = {"gpt2-124m": (4, 8, 12, 24), "gpt2-medium": (12, 24), "gpt2-large": (24,)}
CARDS |= {"gpt2-xl": (80,), "tiny": (4,)}
COMPILED = ("gpt2-124m", "tiny")
CONTEXT = 0.4  # GiB that driver and libraries take of a card beside the allocator
COLUMNS = ("model", "card GB", "precision", "compiled", "micro-batch", "checkpointed")
COLUMNS += ("forecast MiB", "peak MiB", "peak / forecast", "tokens/s")


@dataclass(frozen=True)
class Case:
    """One row; `card` is 0 where all of this card may be used."""

    recipe: str
    card: int
    precision: str
    compile: bool
    batch: int
    checkpointed: bool

    @property
    def key(self) -> str:
        return " ".join(map(str, asdict(self).values()))


def config_of(recipe: str) -> Config:
    """The recipe's settings; `tiny` is the default recipe in small."""
    config = configuration.load(ROOT / f"recipes/{'nano' if recipe == 'tiny' else recipe}.yaml")
    if recipe != "tiny":
        return config
    model = replace(config.model, n_layer=3, n_embd=32, block_size=32)
    return replace(config, model=model, train=replace(config.train, sequence_length=32))


def cases(recipes: list[str]) -> list[Case]:
    """What is to be measured, the small cards first: theirs is the claim."""
    found = [proposed(recipe, card) for recipe in recipes for card in CARDS.get(recipe, ())]
    for recipe in recipes:
        for batch in SIZES[recipe]:
            found += [Case(recipe, 0, "bf16", False, batch, on) for on in (False, True)]
        found.append(Case(recipe, 0, "fp32", False, batch, True))
        if recipe in COMPILED:
            found += [Case(recipe, 0, "bf16", True, batch, on) for on in (False, True)]
    return found


def proposed(recipe: str, card: int) -> Case:
    """The settings that the forecast proposes for a card of so many GB."""
    config = config_of(recipe)
    mode = of_a_card("bf16")
    words, _ = forecast.forecast(config, mode, free=card << 30).proposal(config.train.batch_size)
    batch = int(words.partition(" ")[0].partition("=")[2])
    return Case(recipe, card, "bf16", False, batch, forecast.CHECKPOINT in words)


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """Peak and speed of the case's step; raises torch.OutOfMemoryError."""
    config = config_of(case.recipe)
    settings = {"compile": case.compile, "checkpoint_activations": case.checkpointed}
    train = replace(config.train, batch_size=case.batch, accumulate=2, **settings)
    shape, precision = GPTConfig(**asdict(config.model)), choose_precision(case.precision, device)
    need = forecast.needs(shape, precision, train.sequence_length)
    expected = need.at(case.batch, 2, case.checkpointed).total / 2**20
    with torch.device(device):
        model = GPT(shape)
    throughput.forget_peak(device)
    state = training_step.start(model, train, precision, narrowing=1.0)
    ids = torch.randint(50257, (case.batch, train.sequence_length + 1))
    batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * 2
    watch, seconds = throughput.Stopwatch(device), []
    for _ in range(3):
        watch.start()
        training_step.train_step(state, batches, 1e-4, train)
        seconds.append(watch.stop())
    rate = 2 * batches[0][0].numel() / min(seconds)
    return {"forecast": expected, "peak": throughput.peak_memory_mib(device), "rate": rate}


def tried(case: Case, device: torch.device) -> dict[str, Any]:
    """`measured` within the case's card, or that it does not fit."""
    with afterwards_empty():
        limit(case.card, device)
        try:
            return measured(case, device) | {"refused": ""}
        except torch.OutOfMemoryError:
            return {"refused": "out of memory"}


def limit(card: int, device: torch.device) -> None:
    """Hold the allocator to a card of so many GB, less what a driver takes; 0 for all of this."""
    if device.type == "cuda":
        whole = torch.cuda.mem_get_info(device)[1] / 2**30
        share = min(1.0, (card - CONTEXT) / whole) if card else 1.0
        torch.cuda.set_per_process_memory_fraction(share, device)


def row(case: Case, found: dict[str, Any]) -> tuple[Any, ...]:
    given = (case.recipe, case.card or "-", case.precision, "yes" if case.compile else "no")
    given += (case.batch, "yes" if case.checkpointed else "no")
    if found["refused"]:
        return (*given, "-", found["refused"], "-", "-")
    ratio = f"{found['peak'] / found['forecast']:.2f}"
    return (*given, *(f"{found[n]:,.0f}" for n in ("forecast", "peak")), ratio, found["rate"])


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", nargs="+", default=list(SIZES)[:-1], choices=SIZES)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    asked = parser.parse_args(words)
    device = chosen_device(asked.device)
    asked.out.mkdir(parents=True, exist_ok=True)
    facts = facts_of(device)
    kept, rows = Kept(asked.out / "memory_gpu.json", facts), []
    for case in cases(asked.size):
        rows.append(row(case, kept.get(case.key, 0, partial(tried, case, device))))
        print(*rows[-1], flush=True)
    about = f"{facts['card']}, torch {facts['torch']}, code {facts['code']}"
    head = f"# Peak memory of a training step\n\n{about}; `python benchmarks/memory.py`\n\n"
    page = head + markdown(COLUMNS, rows)
    (asked.out / "memory_gpu.md").write_text(page, "utf-8")
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
