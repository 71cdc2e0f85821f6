"""What sums in a fixed order cost (distributed.ordered): steps with and without, in turn.

    python benchmarks/ordered.py [--rounds 7] [--steps 10]

The default recipe's model and batch on the CPU, in 1 and in 2 processes of one thread. Times are
processor seconds of all processes, so that others at work on the machine count little. Prints the
median ratio, its range, and the last losses, which in order are the same for any number.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import config as configuration
from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import Ranks, join
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.training import training_step

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2


def work(rank: int, world: int, ordered: bool, steps: int, folder: str) -> None:
    """One process of a turn; leaves its processor seconds a step and its last loss."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    ranks = Ranks(rank, world, ordered=ordered)
    join(ranks)
    config = configuration.load(ROOT / "recipes/nano.yaml")
    shape, train = config.model, config.train
    model = GPT(GPTConfig(shape.n_layer, shape.n_head, shape.n_embd, shape.block_size))
    initialize(model, config.init, torch.Generator().manual_seed(0))
    state = training_step.start(
        model,
        train,
        choose_precision("fp32", torch.device("cpu")),
        config.init.narrowing(shape.n_embd),
    )
    each, count = ranks.share(train.batch_size, train.accumulate)
    draws = torch.Generator().manual_seed(0)
    size = train.batch_size * train.accumulate, train.sequence_length + 1
    began = 0.0
    for step in range(WARM_UP + steps):
        ids = torch.randint(50257, size, generator=draws).view(count, world, each, -1)[:, rank]
        ranks.seed(0, step)
        began = time.process_time() if step == WARM_UP else began
        result = training_step.train_step(state, [(x[:, :-1], x[:, 1:]) for x in ids], 1e-3, train)
    seconds = (time.process_time() - began) / steps
    Path(folder, f"{rank}.txt").write_text(f"{seconds} {result.loss!r}")
    dist.destroy_process_group()


def turn(world: int, ordered: bool, steps: int) -> tuple[float, float]:
    """(processor seconds a step of all processes, last loss)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, ordered, steps, folder), nprocs=world)
        found = [path.read_text().split() for path in Path(folder).glob("*.txt")]
    return sum(float(seconds) for seconds, _ in found), float(found[0][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    for world in (1, 2):
        ratios, losses = [], {}
        for _ in range(asked.rounds):
            plain, losses[False] = turn(world, False, asked.steps)
            ordered, losses[True] = turn(world, True, asked.steps)
            ratios.append(ordered / plain)
        print(
            f"{world} processes: in order {statistics.median(ratios):.2f} times the processor time "
            f"({min(ratios):.2f} to {max(ratios):.2f}); last loss {losses[True]!r} in order, "
            f"{losses[False]!r} otherwise"
        )


if __name__ == "__main__":
    main()
