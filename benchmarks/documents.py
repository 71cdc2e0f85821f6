"""Training with documents kept apart (train.mask_documents) and without, taking turns.

    python benchmarks/documents.py [--steps 150] [--seeds 2] [--length 256] [--corpus python-docs]

The nano recipe's model and schedule on an embedded corpus, one thread. Every model is validated in
both ways, over the same targets. A third one keeps documents apart in attention alone, and counts
positions on over borders. Writes benchmarks/results/documents.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import outcomes
from pipeline import config as configuration
from pipeline.compute.precision import choose_precision
from pipeline.compute.runtime import generator
from pipeline.config import Config
from pipeline.data import corpus, token_writer
from pipeline.data.token_files import Tokens, open_tokens
from pipeline.model import borders
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.tables import markdown
from pipeline.training import loop, training_step, validation

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 10  # steps that are not timed


def going_on(idx: Tensor) -> tuple[Tensor, Tensor]:
    _, mask = borders.apart(idx)
    return torch.arange(idx.size(1)).expand_as(idx), mask


WAYS = {"off": None, "on": borders.apart, "on, positions going on": going_on}


def trained(config: Config, seed: int, way: str, train: Tokens, val: Tokens) -> tuple[float, ...]:
    """Seconds of a step, the median; validation losses over windows, apart, and going on."""
    settings = replace(config.train, seed=seed)
    c = config.model
    model = GPT(GPTConfig(c.n_layer, c.n_head, c.n_embd, c.block_size))
    initialize(model, config.init, generator(seed, "weights"))
    state = training_step.start(
        model,
        settings,
        choose_precision("fp32", torch.device("cpu")),
        config.init.narrowing(c.n_embd),
    )
    model.layout = WAYS[way]
    batches = partial(loop.micro_batches, train, settings)
    seconds = [report.seconds for report in loop.fit(state, settings, batches)][WARM_UP:]
    losses = []
    for layout in WAYS.values():
        model.layout = layout
        losses.append(validation.validate(state, val, settings))
    return statistics.median(seconds), *losses


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--corpus", default="python-docs")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    changes = [f"corpus.source={asked.corpus}", f"train.steps={asked.steps}"]
    changes += [f"{name}={asked.length}" for name in ("model.block_size", "train.sequence_length")]
    changes += ["train.batch_size=2", "train.warmup_steps=20", "train.val_tokens=10000"]
    config = configuration.load(ROOT / "recipes" / "nano.yaml", changes)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        token_writer.write_tokens(corpus.documents(config.corpus), place, workers=1)
        train, val = (open_tokens(place, split) for split in ("train", "val"))
        rows, first = [], {}
        for seed in range(asked.seeds):
            for way in WAYS:
                seconds, *losses = trained(config, seed, way, train, val)
                first.setdefault(seed, seconds)
                rows.append((way, seed, 1000 * seconds, seconds / first[seed], *losses))
                print(*rows[-1], file=sys.stderr, flush=True)
        mean = len(train) / train.documents
        said = page(asked.corpus, asked.length, mean, train, val, rows)
    path = outcomes.RESULTS / "documents.md"
    path.write_text(said, encoding="utf-8", newline="\n")
    print(said)


def page(
    name: str, length: int, mean: float, train: Tokens, val: Tokens, rows: list[tuple[object, ...]]
) -> str:
    facts = outcomes.circumstances()
    about = "; ".join(facts[key] for key in ("date", "commit", "machine", "versions"))
    columns = ("train.mask_documents", "seed", "ms a step", "of off")
    columns += ("validated over windows", "apart", "apart, positions going on")
    return (
        f"# documents kept apart\n\n`{facts['command']}`: {about}\n\n"
        f"{name}: {len(train):,} training tokens, {mean:,.0f} a document in the mean; sequences of "
        f"{length}.\nLosses in nats/token over the same targets.\n\n" + markdown(columns, rows)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
