"""What a setting learns: validation loss of one training after the other, by settings and seed.

    python benchmarks/learning.py [--size nano|micro] [--steps N] [--minutes M]

First AdamW and Muon are tuned alike: the rate by factors of 2 until both neighbours are worse, for
Muon the matrices' own factor as well. Then both run with three seeds, of the initial weights and
of the data's order, and Muon with fewer steps, for those at which it ends as low as AdamW. Then
each lever that leaves an exact GPT-2 is pulled alone from the tuned AdamW, with the same seeds.

It reads the tokens of `data/tokens` (`dvc repro tokenize`). Each training is kept as soon as it is
made, so that the next call goes on with the rest; `--minutes` ends a call in time. One thread.
Writes benchmarks/results/learning-SIZE.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import outcomes
from benchmarks.kept import ROOT, Kept, facts_of
from pipeline import config as configuration
from pipeline import paths
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.data import token_files
from pipeline.errors import NumericsError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.tables import markdown
from pipeline.training import loop, training_step
from pipeline.training.validation import validate

Changes = dict[str, Any]
Trained = dict[str, float]  # loss: of validation at the end, nats/token; seconds: of the processor

RESULTS = ROOT / "benchmarks" / "results"
SIZES: dict[str, Changes] = {  # settings beside the nano recipe's
    "nano": {},
    "micro": {"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 64},
}
SEEDS = (1, 2, 3)
FIRST_RATE = 0.004
WARM_UP = 0.12  # share of the steps
SHORTER = (0.5, 0.65, 0.8)  # of the steps
MUON = {"train.optimizer": "muon"}
LEVERS: dict[str, dict[str, Any]] = {
    "schedule linear": {"train.schedule": "linear", "train.min_lr": 0.0},
    "schedule wsd": {"train.schedule": "wsd", "train.min_lr": 0.0},
    "zero projections": {"init.scheme": "zero_projections"},
    "Muon": {},
    "Muon, zero projections": {"init.scheme": "zero_projections"},
    "Muon, zero projections, linear": {
        "init.scheme": "zero_projections",
        "train.schedule": "linear",
        "train.min_lr": 0.0,
    },
}


class Bench:
    """Trainings of one size, each made once."""

    def __init__(self, size: str, steps: int, minutes: float, path: Path | None) -> None:
        self.size, self.steps = size, steps
        self.kept = Kept(path, facts_of(torch.device("cpu")), minutes)
        self.seconds = 0.0  # of the longest yet: what the next may take
        self.tried: dict[str, float] = {}  # losses by settings
        self.splits = [token_files.open_tokens(paths.TOKENS, s) for s in ("train", "val")]

    def trained(self, changes: Changes, seed: int) -> Trained | None:
        """A whole training; None where there is no time for it."""
        settings = {"train.steps": self.steps, "train.min_lr": changes["train.lr"] / 10, **changes}
        settings["train.warmup_steps"] = round(WARM_UP * settings["train.steps"])
        words = said({**SIZES[self.size], **settings, "init.seed": seed, "train.seed": seed})
        began = time.monotonic()
        found = self.kept.get(words, self.seconds, lambda: train(words.split(), *self.splits))
        self.seconds = max(self.seconds, time.monotonic() - began)
        return found

    def loss(self, changes: Changes, seed: int = SEEDS[0]) -> float:
        """At the end; NaN where there was no time, infinite where the training broke."""
        found = self.trained(changes, seed)
        loss = found["loss"] if found else math.nan
        self.tried[said(changes)] = loss
        return loss

    def losses(self, changes: Changes) -> list[float]:
        return [self.loss(changes, seed) for seed in SEEDS]


def said(changes: Changes) -> str:
    """As on a command line."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in changes.items()
    )


def train(words: list[str], tokens: Any, validation: Any) -> Trained:
    config = configuration.load(ROOT / "recipes" / "nano.yaml", words)
    model = GPT(GPTConfig(**asdict(config.model)))
    initialize(model, config.init, runtime.generator(config.init.seed, "init"))
    state = training_step.start(model, config.train, choose_precision("fp32", torch.device("cpu")))
    began = time.process_time()
    try:
        for _ in loop.fit(state, config.train, partial(loop.micro_batches, tokens, config.train)):
            pass
    except NumericsError:
        return {"loss": math.inf, "seconds": math.nan}
    seconds = time.process_time() - began
    loss = validate(state, validation, config.train)
    print(f"{loss:.4f} {seconds:.0f} s {' '.join(words)}", flush=True)
    return {"loss": loss, "seconds": seconds}


def best(loss: Callable[[float], float], first: float) -> float:
    """The argument at which both neighbours by a factor of 2 have higher losses."""
    at = first
    while True:
        here, lower, higher = loss(at), loss(at / 2), loss(at * 2)
        if not min(lower, higher) < here:  # NaN, too, where there was no time
            return at
        at = at / 2 if lower < higher else at * 2


def tuned(bench: Bench) -> tuple[Changes, Changes]:
    """Settings of AdamW and of Muon, each at its best in the same way."""
    adamw = best(lambda lr: bench.loss({"train.lr": lr}), FIRST_RATE)
    rate, factor = adamw, 1.0

    def muon(lr: float, by: float) -> Changes:
        return {**MUON, "train.lr": lr, "train.muon_lr_factor": by}

    def by_factor(at: float, lr: float) -> float:
        return best(lambda by: bench.loss(muon(lr, by)), at)

    def by_rate(at: float, own: float) -> float:  # the matrices' own rate stays where it is
        return best(lambda lr: bench.loss(muon(lr, own / lr)), at)

    while True:  # by turns, until neither moves
        factor = by_factor(factor, rate)
        lr = by_rate(rate, rate * factor)
        if lr == rate:
            return {"train.lr": adamw}, muon(rate, factor)
        rate, factor = lr, rate * factor / lr


def spread(losses: list[float]) -> str:
    known = [loss for loss in losses if not math.isnan(loss)]
    if len(known) < 2:
        return "not yet"
    return f"{statistics.mean(known):.4f} ± {statistics.stdev(known):.4f}"


def reached(bench: Bench, changes: Changes, target: float) -> str:
    """At how many steps a training of that length ends at `target`, between two lengths."""
    steps = bench.steps
    ends = []
    for count in sorted(round(share * steps) for share in (*SHORTER, 1)):
        ends.append((count, statistics.mean(bench.losses({**changes, "train.steps": count}))))
    if ends[0][1] < target:
        return f"fewer steps than {ends[0][0]} of {steps}, after which its loss is {ends[0][1]:.4f}"
    for (a, high), (b, low) in pairwise(ends):
        if low <= target <= high:
            at = a + (b - a) * (high - target) / (high - low)
            return f"{at:.0f} of {steps} ({at / steps:.2f})"
    shown = ", ".join(f"{count}: {loss:.4f}" for count, loss in ends)
    return f"a number of steps not between these ({shown})"


def page(bench: Bench) -> str:
    adamw, muon = tuned(bench)
    tried = sorted(bench.tried.items(), key=lambda item: item[0])
    base = bench.losses(adamw)
    rows: list[tuple[object, ...]] = [("AdamW", spread(base), "", said(adamw))]
    for name, changes in LEVERS.items():
        whole = {**(muon if name.startswith("Muon") else adamw), **changes}
        losses = bench.losses(whole)
        gains = [b - loss for b, loss in zip(base, losses, strict=True)]
        rows.append((name, spread(losses), spread(gains), said(whole)))
    steps = reached(bench, muon, statistics.mean(base))
    parts = [
        f"# What a setting learns: {bench.size}\n",
        f"Validation loss in nats/token after {bench.steps} steps of 512 tokens, mean and standard "
        f"deviation of {len(SEEDS)} seeds; the gain is taken seed by seed.\n",
        f"`{outcomes.command(sys.argv)}` at {outcomes.commit_of(ROOT) or 'no commit'}\n",
        f"{outcomes.machine()}; one thread; torch {torch.__version__}\n",
        markdown(("lever", "loss", "gain over AdamW", "settings"), rows),
        f"Muon ends as low as AdamW with {steps}. Its step takes {step_ratio(bench, adamw, muon)} "
        "of AdamW's processor time.\n",
        "## The rates tried, with the first seed\n",
        markdown(("settings", "loss"), tried),
    ]
    if bench.kept.missing:
        parts.append(f"Not made yet: {len(bench.kept.missing)} trainings.\n")
    return "\n".join(parts)


def step_ratio(bench: Bench, adamw: Changes, muon: Changes) -> str:
    """Seed by seed; each pair was made one behind the other."""
    pairs = [[bench.trained(c, seed) for c in (muon, adamw)] for seed in SEEDS]
    ratios = [a["seconds"] / b["seconds"] for a, b in pairs if a and b]
    if not ratios:
        return "(not known yet)"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=0.0, help="end in time; 0: no limit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "learning.json"
    bench = Bench(options.size, options.steps, options.minutes, path)
    text = page(bench)
    (RESULTS / f"learning-{options.size}.md").write_text(text, "utf-8", newline="\n")
    print(text)


if __name__ == "__main__":
    main()
