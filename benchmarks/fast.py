"""What gpt2-124m-fast.yaml claims: as low a loss as gpt2-124m.yaml's, after fewer of its steps.

    python benchmarks/fast.py                      what that trains
    python benchmarks/fast.py --run [--steps N]    all of it, on a card

The second line trains the published recipe, then the fast one to the longest of LENGTHS, and from
states of that one a cool-down to each of the others, all on the corpus of the fast recipe. Where
these losses come down to the published recipe's is the share of its steps that is needed. It is
held against CLAIM, which was written before any of this ran on a card.

The trainings are experiments of DVC up to the stage `train`: rows in MLflow, lines of `show`. Given
again, the command goes on with what is missing. It needs 10 billion tokens (`python -m pipeline
fetch fineweb-edu --tokens 10B`) and, at 453,800 tokens/s, 14 hours of one card. `--steps 1910` is a
tenth of everything, the warm-up too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.learning import crossed
from pipeline import config as configuration
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.ladders import ladder, plan
from pipeline.ladders.ladder import Done
from pipeline.ladders.plan import Rung

ROOT = Path(__file__).resolve().parent.parent
BASE, FAST = "gpt2-124m", "gpt2-124m-fast"
LENGTHS = (0.4, 0.5, 0.6, 0.7)  # of the published recipe's steps


@dataclass(frozen=True)
class Claim:
    """The share of the steps that is needed, and a band that it is to lie in."""

    share: float
    low: float
    high: float

    def words(self) -> str:
        return f"{self.share:.2f} [{self.low:.2f}, {self.high:.2f}]"


CLAIM = Claim(0.5, 0.4, 0.7)


def rungs(steps: int = 0) -> tuple[Rung, list[Rung]]:
    """The published recipe's training; the fast one's longest, and its cool-downs.

    `steps` are the published recipe's, its own if 0. A step has as many tokens in both.
    """
    base, fast = recipe(BASE), recipe(FAST)
    corpus = replace(fast.corpus, path=str(ROOT / fast.corpus.path))  # each need not copy it
    base = replace(base, corpus=corpus, distributed=fast.distributed)
    fast = replace(fast, corpus=corpus, evaluate=base.evaluate)  # which does not run
    steps = steps or base.train.steps
    by = steps / base.train.steps
    tenth = 5 * max(1, round(steps / 50))  # so that few states are kept for the cool-downs
    lengths = [round(10 * part) * tenth for part in LENGTHS]
    every = math.gcd(*(plan.stable_steps(fast, length) for length in lengths[:-1]))
    long = rung(fast, by, lengths[-1], every)
    cooled = [replace(rung(fast, by, length), parent=long) for length in lengths[:-1]]
    return rung(base, by, steps), [long, *cooled]


def recipe(name: str) -> Config:
    return configuration.load(ROOT / "recipes" / f"{name}.yaml")


def rung(config: Config, by: float, steps: int, every: int = 0) -> Rung:
    """A recipe over so many steps, with its warm-up multiplied, validated at its end."""
    warm_up = round(by * config.train.warmup_steps)
    train = replace(config.train, steps=steps, warmup_steps=warm_up, val_every=steps)
    kept = replace(config.checkpoint, keep_every=every)
    config = replace(config, train=train, checkpoint=kept)
    name = f"claim-{config.train.optimizer}-{steps}"
    return Rung(name, config.train.optimizer, config)


def verdict(base: Done, fast: Sequence[Done]) -> str:
    """The claim in two sentences, beside what came of it."""
    in_order = sorted(fast, key=lambda one: one.rung.steps)
    ends = [(one.rung.steps / base.rung.steps, one.loss) for one in in_order]
    share = crossed(ends, base.loss)
    shown = ", ".join(f"{loss:.4f} at {part:.2f}" for part, loss in ends)
    said = f"{base.loss:.4f} nats/token after {base.rung.steps:,} steps as published; {shown}."
    if math.isinf(share):
        return f"{said} More than {ends[-1][0]:.2f} of the steps are needed: the claim was wrong."
    least = "at most " if share == ends[0][0] else ""
    right = CLAIM.low <= share <= CLAIM.high and not least
    where = "inside the band" if right else "not inside the band: the claim was wrong"
    return f"{said} The share is {least}{share:.2f}, claimed were {CLAIM.words()}: {where}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="train what is missing")
    parser.add_argument("--steps", type=int, default=0, help="as published; 19,073 if not said")
    options = parser.parse_args()
    base, fast = rungs(options.steps)
    for one in (base, *fast):
        begins = f", from step {one.begins:,} of the longest" if one.parent else ""
        print(f"{one.name}: {one.tokens:,} tokens{begins}")
    if options.run:
        try:
            plan.check_here([base, *fast])
            done = ladder.run_missing([base, *fast], ladder.trained())
        except UserError as error:
            sys.exit(f"error: {error}")
        print(verdict(done[0], done[1:]))


if __name__ == "__main__":
    main()
