"""What a setting learns: validation loss of one training after the other, by settings and seed.

    python benchmarks/learning.py [--size micro|nano|mini] [--steps N] [--minutes M]

First AdamW and Muon are tuned: the rate by factors of 2 until both neighbours are worse, for Muon
the matrices' own factor as well. AdamW's rate is judged by all three seeds, Muon's two by the
first; of the largest size AdamW's by the first, and Muon's are given. Then both run with all three
seeds, of the initial weights and of the data's order. Each lever that leaves an exact GPT-2 is
pulled alone from the tuned Muon, the schedule from AdamW as well, and those that gain all together.
These, or Muon alone, also run with fewer steps, for those at which they end as low as AdamW.

It reads the tokens of `data/tokens` (`dvc repro tokenize`). Each training is kept as soon as it is
made, so that the next call goes on with the rest; `--minutes` ends a call in time. One thread.
Writes benchmarks/results/learning-SIZE-STEPS.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from scipy import stats

from benchmarks import outcomes
from benchmarks.kept import ROOT, Kept, facts_of
from pipeline import config as configuration
from pipeline import paths
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.data import token_files
from pipeline.errors import NumericsError
from pipeline.model import borders
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.tables import markdown
from pipeline.training import loop, training_step
from pipeline.training.validation import validate

Changes = dict[str, Any]
Trained = dict[str, float]  # loss: of validation at the end, nats/token; seconds: of the processor

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Size:
    """A model beside the nano recipe's, and the rates from which its search sets out."""

    settings: Changes
    rate: float  # of AdamW
    muon: tuple[float, float]  # rate, and the matrices' factor
    whole: bool = True  # else Muon's rates are not searched, and few levers are pulled


SIZES = {
    "micro": Size({"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 64}, 0.004, (0.002, 1.0)),
    "nano": Size({"precision": "bf16"}, 0.002, (0.032, 0.5)),
    "mini": Size(
        {"precision": "bf16", "model.n_layer": 6, "model.n_head": 6, "model.n_embd": 384},
        0.001,
        (0.016, 0.5),
        whole=False,
    ),
}
SEEDS = (1, 2, 3)
WARM_UP = 0.12  # share of the steps
SHORTER = (0.125, 0.25, 0.35, 0.5, 0.7, 1.0)  # of the steps
MUON = {"train.optimizer": "muon"}
GROWS = "grows"  # the share of the tokens that come in steps of a quarter of the size
LEVERS: dict[str, Changes] = {
    "schedule wsd": {"train.schedule": "wsd", "train.min_lr": 0.0},
    "schedule wsd, longer": {"train.schedule": "wsd", "train.min_lr": 0.0, "train.cooldown": 0.4},
    "schedule linear": {"train.schedule": "linear", "train.min_lr": 0.0},
    "zero projections": {"init.scheme": "zero_projections"},
    "documents apart": {"train.mask_documents": True},
    "a batch that grows": {GROWS: 0.3},
}
CHEAPER = ("schedule wsd, longer", "zero projections")  # those of the largest size


class Bench:
    """Trainings of one size, each made once."""

    def __init__(self, size: str, steps: int, minutes: float, path: Path | None) -> None:
        self.size, self.steps = SIZES[size], steps
        self.kept = Kept(path, facts_of(torch.device("cpu")), minutes)
        self.seconds = 0.0  # of the longest yet: what the next may take
        self.tried: dict[str, float] = {}  # losses by settings
        self.splits = [token_files.open_tokens(paths.TOKENS, s) for s in ("train", "val")]

    def trained(self, changes: Changes, seed: int) -> Trained | None:
        """A whole training; None where there is no time for it."""
        settings = {"train.steps": self.steps, "train.min_lr": changes["train.lr"] / 10, **changes}
        settings["train.warmup_steps"] = round(WARM_UP * settings["train.steps"])
        words = said({**self.size.settings, **settings, "init.seed": seed, "train.seed": seed})
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
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={str(value).lower()}"
        for name, value in changes.items()
    )


def train(words: list[str], tokens: Any, validation: Any) -> Trained:
    """Validated as `evaluate` does it, with what stands before a document in sight."""
    grows = sum(float(word.partition("=")[2]) for word in words if word.startswith(GROWS))
    words = [word for word in words if not word.startswith(GROWS)]
    config = configuration.load(ROOT / "recipes" / "nano.yaml", words)
    model = GPT(GPTConfig(**asdict(config.model)))
    initialize(model, config.init, runtime.generator(config.init.seed, "init"))
    precision = choose_precision(config.precision, torch.device("cpu"))
    whole, early = config.train, round(grows * config.train.steps)
    small = replace(whole, batch_size=max(1, whole.batch_size // 4))
    first = early * (whole.batch_size // small.batch_size)  # small steps, of the same tokens
    steps = whole.steps - early + first
    schedule = replace(whole, steps=steps, warmup_steps=round(WARM_UP * steps))

    def batches(step: int) -> list[Any]:
        if step < first:
            return loop.micro_batches(tokens, small, step)
        return loop.micro_batches(tokens, whole, step - first + early)

    narrowing = config.init.narrowing(config.model.n_embd)
    state = training_step.start(model, schedule, precision, narrowing)
    began = time.process_time()
    try:
        for _ in loop.fit(state, schedule, batches):
            pass
    except NumericsError:
        return {"loss": math.inf, "seconds": math.nan}
    seconds = time.process_time() - began
    borders.mark(model, documents_apart=False)
    loss = validate(state, validation, whole)
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
    """Settings of AdamW and of Muon, each at its best; Muon's by the first seed alone."""
    seeds = SEEDS if bench.size.whole else SEEDS[:1]

    def adamws(lr: float) -> float:
        return statistics.mean(bench.loss({"train.lr": lr}, seed) for seed in seeds)

    adamw = best(adamws, bench.size.rate)
    rate, factor = bench.size.muon

    def muon(lr: float, by: float) -> Changes:
        return {**MUON, "train.lr": lr, "train.muon_lr_factor": by}

    def by_factor(at: float, lr: float) -> float:
        return best(lambda by: bench.loss(muon(lr, by)), at)

    def by_rate(at: float, own: float) -> float:  # the matrices' own rate stays where it is
        return best(lambda lr: bench.loss(muon(lr, own / lr)), at)

    while bench.size.whole:  # by turns, until neither moves
        factor = by_factor(factor, rate)
        lr = by_rate(rate, rate * factor)
        if lr == rate:
            break
        rate, factor = lr, rate * factor / lr
    return {"train.lr": adamw}, muon(rate, factor)


def spread(values: list[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return "broke" if math.inf in values else "not yet"
    return f"{statistics.mean(known):.4f} ± {statistics.stdev(known):.4f}"


def sure(gains: list[float]) -> bool:
    """Whether they are above 0 with a chance of 95%, by Student's t; not where one is missing."""
    if not all(map(math.isfinite, gains)):
        return False
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.mean(gains) > stats.t.ppf(0.975, len(gains) - 1) * error


def share(bench: Bench, changes: Changes, base: list[float]) -> list[float]:
    """Of the steps after which a training of that length ends as low as `base`, for each seed.

    Between two lengths of SHORTER by a straight line; below the first one, that one: at most that
    many are needed. NaN where there was no time.
    """
    found = []
    for seed, target in zip(SEEDS, base, strict=True):
        ends: list[tuple[float, float]] = []
        for part in SHORTER:
            loss = bench.loss({**changes, "train.steps": round(part * bench.steps)}, seed)
            ends.append((part, loss))
            if not loss > target:
                break
        found.append(crossed(ends, target))
    return found


def crossed(ends: Iterable[tuple[float, float]], target: float) -> float:
    """The first length at which (length, loss) comes down to `target`, by straight lines.

    The first of them where it starts so low, and any behind one that broke. Infinite where it does
    not come down, and NaN where a loss on the way is unknown.
    """
    before: tuple[float, float] | None = None
    for length, loss in ends:
        if math.isnan(loss):
            return math.nan
        if loss <= target and (not before or math.isinf(before[1])):
            return length
        if loss <= target and before:
            return before[0] + (length - before[0]) * (before[1] - target) / (before[1] - loss)
        before = length, loss
    return math.inf


@dataclass
class Row:
    """A lever, or several: the losses with it, by seeds, beside those of another row."""

    name: str
    changes: Changes
    losses: list[float]
    over: Row | None = None
    shares: list[float] = field(default_factory=list)  # of the steps, to end as low as AdamW

    @property
    def gains(self) -> list[float]:
        assert self.over
        return [b - loss for b, loss in zip(self.over.losses, self.losses, strict=True)]

    def cells(self) -> tuple[str, ...]:
        gain = f"{spread(self.gains)} over {self.over.name}" if self.over else ""
        return self.name, spread(self.losses), gain, told(self.shares), said(self.changes)


def told(shares: list[float]) -> str:
    known = [part for part in shares if not math.isnan(part)]
    low = min(known, default=math.nan)
    bound = "at most " if low == SHORTER[0] else ""
    return ", ".join(bound * (part == low) + f"{part:.2f}" for part in known)


def rows_of(bench: Bench) -> list[Row]:
    adamw, muon = tuned(bench)
    base = Row("AdamW", adamw, bench.losses(adamw))
    matrices = Row("Muon", muon, bench.losses(muon), base)
    matrices.shares = share(bench, muon, base.losses)
    rows = [base, matrices]

    def pull(over: Row, names: list[str]) -> Row:
        changes = dict(over.changes)
        for name in names:
            changes |= LEVERS[name]
        rows.append(Row(", ".join((over.name, *names)), changes, bench.losses(changes), over))
        return rows[-1]

    if not bench.size.whole:
        for name in CHEAPER:
            pull(matrices, [name])
        return rows
    gaining = {name: row for name in LEVERS if sure((row := pull(matrices, [name])).gains)}
    pull(base, ["schedule wsd"])
    schedules = [name for name in gaining if name.startswith("schedule")]
    for name in sorted(schedules, key=lambda name: statistics.mean(gaining[name].losses))[1:]:
        del gaining[name]  # there is one at a time
    fast = pull(matrices, list(gaining)) if len(gaining) > 1 else next(iter(gaining.values()), None)
    if fast:
        fast.shares = share(bench, fast.changes, base.losses)
    return rows


def page(bench: Bench, name: str) -> str:
    rows = rows_of(bench)
    ratio = step_ratio(bench, rows[0].changes, rows[1].changes)
    tried = sorted(bench.tried.items(), key=lambda item: item[0])
    columns = ("lever", "loss", "gain", "share of the steps", "settings")
    parts = [
        f"# What a setting learns: {name}\n",
        f"Validation loss in nats/token after {bench.steps} steps of 512 tokens, mean and standard "
        f"deviation of {len(SEEDS)} seeds; gains are taken seed by seed. The share is that of the "
        "steps after which a whole training ends as low as AdamW's of the same seed.\n",
        f"`{outcomes.command(sys.argv)}` at {outcomes.commit_of(ROOT) or 'no commit'}\n",
        f"{outcomes.machine()}; one thread; torch {torch.__version__}\n",
        markdown(columns, [row.cells() for row in rows]),
        f"A step with Muon takes {ratio} of AdamW's processor time.\n",
        "## All trainings\n",
        markdown(("settings", "loss of the last seed"), tried),
    ]
    if bench.kept.missing:
        parts.append(f"Not made yet: {len(bench.kept.missing)} trainings.\n")
    return "\n".join(parts)


def step_ratio(bench: Bench, adamw: Changes, muon: Changes) -> str:
    """Seed by seed, by the processor's time."""
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
    name = f"learning-{options.size}-{options.steps}"
    bench = Bench(options.size, options.steps, options.minutes, RESULTS / f"{name}.json")
    text = page(bench, options.size)
    (RESULTS / f"{name}.md").write_text(text, "utf-8", newline="\n")
    print(text)


if __name__ == "__main__":
    main()
