"""A training with fingerprints (train.fingerprint_every) and without, taking turns; the hash alone.

    python benchmarks/fingerprint.py [--steps 35] [--turns 4] [--every 10]

The nano recipe on the CPU, one thread, on tokens of chance: never, every N steps, in every step,
then the other way round, and so on. Times are the processor's, which a busy machine changes less.
Then the sums over as many
parameters as GPT-2 124M has. Writes benchmarks/results/fingerprint.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import outcomes
from pipeline import config as configuration
from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import Ranks
from pipeline.compute.runtime import generator
from pipeline.config import Config
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.published import VOCAB_SIZE
from pipeline.tables import markdown
from pipeline.training import fingerprint, loop, training_step

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # steps that are not timed
LARGE = 124_475_904  # parameters of GPT-2 124M
REPEATS = 7


def trained(config: Config, every: int) -> list[float]:
    """The processor's seconds of each step; other programs' are not among them."""
    settings = replace(config.train, fingerprint_every=every)
    model = GPT(GPTConfig(**asdict(config.model)))
    initialize(model, config.init, generator(0, "weights"))
    state = training_step.start(
        model,
        settings,
        choose_precision("fp32", torch.device("cpu")),
        config.init.narrowing(config.model.n_embd),
    )

    def batches(step: int) -> list[training_step.Batch]:
        shape = settings.batch_size, settings.sequence_length + 1
        ids = torch.randint(VOCAB_SIZE, shape, generator=generator(step, "ids"))
        return [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]

    times = [time.process_time()]
    for _ in loop.fit(state, settings, batches):
        times.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(times)][WARM_UP:]


def seconds_of(parameters: list[Tensor]) -> float:
    """Of the sums over these, the median of REPEATS."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.process_time()
        fingerprint.weight_sums(parameters, Ranks()).tolist()
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--every", type=int, default=10)
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    changes = [f"train.steps={asked.steps}", "train.warmup_steps=2"]
    config = configuration.load(ROOT / "recipes" / "nano.yaml", changes)
    means: dict[int, list[float]] = {0: [], asked.every: [], 1: []}
    trained(config, 1)  # what a process does once
    for turn in range(asked.turns):
        for every, found in list(means.items())[:: -1 if turn % 2 else 1]:
            found.append(statistics.fmean(trained(config, every)))
            print(every, found[-1], file=sys.stderr, flush=True)
    off = statistics.median(means[0])
    rows = [
        (f"fingerprint_every={n}", *(1000 * mean for mean in found), statistics.median(found) / off)
        for n, found in means.items()
    ]
    nano = [p.detach() for p in GPT(GPTConfig(**asdict(config.model))).parameters()]
    sums = [(f"{sum(p.numel() for p in nano):,}", 1000 * seconds_of(nano))]
    sums.append((f"{LARGE:,}", 1000 * seconds_of([torch.randn(LARGE)])))
    said = page(rows, sums, asked.turns)
    (outcomes.RESULTS / "fingerprint.md").write_text(said, encoding="utf-8", newline="\n")
    print(said)


def page(rows: list[tuple[object, ...]], sums: list[tuple[str, float]], turns: int) -> str:
    facts = outcomes.circumstances()
    about = "; ".join(facts[key] for key in ("date", "commit", "machine", "versions"))
    turned = [f"ms a step, turn {n}" for n in range(1, turns + 1)]
    return (
        f"# fingerprints of steps\n\n`{facts['command']}`: {about}\n\n"
        "The nano recipe, the processor's time of the mean step of each turn, and the median turn "
        "by that without:\n\n"
        + markdown(("setting", *turned, "of 0"), rows)
        + "\nThe sums over all weights alone, once:\n\n"
        + markdown(("parameters", "ms"), sums)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
