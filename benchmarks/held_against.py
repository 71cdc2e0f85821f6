"""This pipeline's figures held against code that nobody here wrote.

    python benchmarks/held_against.py --build-nanogpt CHECKOUT [--steps 60] [--harness FOLDER]

Training and HellaSwag's scoring against build-nanogpt's own, executed from the checkout; the same
scoring against an installed lm-evaluation-harness (FOLDER: where `pip install --target` put it);
bits per byte against transformers in float64; roundings against whole numbers. One small model,
trained here on Python's help texts, stands for all. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks import checkouts, outcomes, train
from benchmarks.peers import Task
from pipeline.compute.precision import choose_precision
from pipeline.config import Config
from pipeline.data import token_files
from pipeline.data.tokenizer import EOT, encode, gpt2, token_byte_lengths
from pipeline.inference import evaluation, multiple_choice
from pipeline.inference.evaluation import Context
from pipeline.inference.multiple_choice import Choice
from pipeline.model.gpt import GPT
from pipeline.model.model_dir import save_model
from pipeline.studies.number_formats import DTYPES, round_to_format
from pipeline.training import loop, training_step

CPU = torch.device("cpu")
ITEMS, VAL_TOKENS = 100, 6000
# Mantissa bits and the exponents of the smallest and the largest normal number, by the standards.
STANDARDS = {
    "fp32": (23, -126, 127),
    "tf32": (10, -126, 127),
    "bf16": (7, -126, 127),
    "fp16": (10, -14, 15),
    "fp8_e4m3": (3, -6, 8),
    "fp8_e5m2": (2, -14, 15),
}


@dataclass(frozen=True)
class Unpadded(Task):
    """Nano without padded rows, which build-nanogpt counts in its softmax; on real text."""

    def config(self) -> Config:
        found = super().config()
        return replace(found, model=replace(found.model, vocab_rows=50257))

    def ids(self, step: int, rows: int, tokens: int) -> torch.Tensor:
        ids = torch.from_numpy(corpus("train").astype(np.int64))
        starts = torch.arange(rows) * tokens + step * rows * tokens
        return torch.stack([ids[int(s) % (len(ids) - tokens) :][:tokens] for s in starts])


def corpus(split: str) -> np.ndarray:
    """(tokens,) uint16 of Python's help texts, every fourth for validation."""
    texts = [
        topics[name]
        for number, name in enumerate(sorted(topics))
        if (number % 4 == 0) == (split == "val")
    ]
    return np.array([t for text in texts for t in (EOT, *encode(text).tolist())], dtype=np.uint16)


def trained(checkout: Path, steps: int) -> tuple[GPT, str]:
    """Our model after `steps`, and how its losses compare to build-nanogpt's."""
    task = Unpadded("nano", device="cpu")
    config = task.config()
    state = training_step.start(
        task.model(), config.train, choose_precision("fp32", CPU), narrowing=1.0
    )
    ours = loop.fit(state, replace(config.train, steps=10_000), lambda step: [task.batch(step)])
    theirs = train.build_nanogpt(task, checkout)
    pairs = [(next(ours).loss, theirs()) for _ in range(steps)]
    apart = max(abs(a - b) for a, b in pairs)
    return state.model, (
        f"losses of {steps} steps part by at most {apart:.1e} "
        f"(from {pairs[0][0]:.3f} to {pairs[-1][0]:.3f})"
    )


def predictions(nats: np.ndarray, items: list[Choice]) -> dict[str, list[int]]:
    """Ours by metric, as `multiple_choice` has them."""
    characters = [[len(gpt2().decode(e)) - 1 for e in item.endings] for item in items]
    tokens = [[len(e) for e in item.endings] for item in items]
    by = {"acc": 1, "acc_norm": np.array(characters), "acc_per_token": np.array(tokens)}
    return {name: (nats / by_what).argmin(1).tolist() for name, by_what in by.items()}


class _Choices(TorchFunctionMode):
    """Keeps what `argmin` finds: build-nanogpt prints only how many were right."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.argmin:
            self.found.append(int(result))
        return result


def against_build_nanogpt(
    checkout: Path, folder: Path, rows: list[dict[str, Any]], ours: dict[str, list[int]]
) -> str:
    theirs = checkouts.definitions(checkout / "hellaswag.py", ("enc",))
    theirs.enc, theirs.iterate_examples = gpt2(), lambda split: iter(rows)
    with contextlib.redirect_stdout(io.StringIO()), _Choices() as choices:
        theirs.evaluate(str(folder), "cpu")
    torch.set_float32_matmul_precision("highest")
    both = zip(("acc", "acc_per_token"), (choices.found[0::2], choices.found[1::2]), strict=True)
    equal = [sum(a == b for a, b in zip(found, ours[m], strict=True)) for m, found in both]
    return f"the same ending by sum {equal[0]} and by tokens {equal[1]} times of {len(rows)}"


def against_harness(folder: Path, path: Path, nats: np.ndarray, items: list[Choice]) -> str:
    """Predictions by sum and by characters, row by row."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    task = {
        "task": "made",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "label",
        "doc_to_choice": "endings",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    found = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    samples = sorted(found["samples"]["made"], key=lambda sample: sample["doc_id"])
    theirs = -np.array([[float(reply[0]) for reply in s["filtered_resps"]] for s in samples])
    own = predictions(nats, items)
    labels = [item.label for item in items]
    right = {
        m: [float(p == n) for p, n in zip(own[m], labels, strict=True)] for m in ("acc", "acc_norm")
    }
    equal = {m: sum(a == s[m] for a, s in zip(right[m], samples, strict=True)) for m in right}
    chosen = predictions(theirs, items)
    same = sum(a == b for m in right for a, b in zip(chosen[m], own[m], strict=True))
    return (
        f"acc says the same {equal['acc']} and acc_norm {equal['acc_norm']} times of {len(items)}; "
        f"the same ending {same} times of {2 * len(items)}; likelihoods part by at most "
        f"{abs(theirs - nats).max():.1e} nats"
    )


def against_transformers(
    model: GPT, folder: Path, tokens: token_files.Tokens, context: Context
) -> str:
    """Bits per byte from transformers' own logits in float64, window by window."""
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    lengths, nats, size = token_byte_lengths(), 0.0, context.sequence_length
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    for first in range(0, len(ids) - 1, size):
        window = ids[first : first + size + 1]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        losses = F.cross_entropy(logits, window[1:], reduction="none")
        nats += losses[torch.from_numpy(lengths)[window[1:]] > 0].sum().item()
    expected = nats / math.log(2) / int(lengths[tokens.ids[1:]].sum())
    ours = dict(evaluation.validation(model, tokens, context))["bits_per_byte"]
    both = f"{ours:.9f} and {expected:.9f} over {len(ids) - 1:,} targets"
    return f"{both}: {abs(ours - expected):.1e} apart"


def nearest(x: float, name: str) -> float:
    """`x` rounded to the format by whole numbers alone."""
    mantissa, lowest, highest = STANDARDS[name]
    fraction, exponent = math.frexp(abs(x))
    whole, gap = int(fraction * 2**53), max(exponent - 1, lowest) - mantissa
    kept, rest = divmod(whole, 1 << (gap - exponent + 53))
    twice = 2 * rest - (1 << (gap - exponent + 53))
    found = math.ldexp(kept + (twice > 0 or (twice == 0 and (name == "tf32" or kept & 1))), gap)
    largest = math.ldexp(2 - 2.0**-mantissa, highest) if name != "fp8_e4m3" else 448.0
    beyond = math.nan if name == "fp8_e4m3" else math.inf
    return math.copysign(found if found <= largest else beyond, x)


def roundings(count: int) -> str:
    """Doubles over each format's range and beyond, and ties with their neighbours."""
    draw, wrong = np.random.default_rng(0), 0
    for name in DTYPES:
        mantissa, lowest, highest = STANDARDS[name]
        powers = draw.integers(lowest - mantissa - 3, highest + 2, count)
        x = np.ldexp(1 + draw.random(count), powers) * draw.choice([-1, 1], count)
        ties = np.ldexp(np.floor(np.ldexp(x, mantissa - powers)) + 0.5, powers - mantissa)
        x = np.concatenate([x, ties, np.nextafter(ties, 0), np.nextafter(ties, math.inf)])
        expected = np.array([nearest(value, name) for value in x.tolist()])
        found = round_to_format(torch.from_numpy(x), name).numpy()
        wrong += int((~((found == expected) | (np.isnan(found) & np.isnan(expected)))).sum())
    return f"{4 * count * len(DTYPES):,} doubles in {len(DTYPES)} formats: {wrong} not exact"


def findings(checkout: Path, steps: int, count: int, work: Path) -> Iterator[tuple[str, str, str]]:
    """(what, against what, what came out), one after the other."""
    commit = f"build-nanogpt {outcomes.commit_of(checkout)}".strip()
    model, line = trained(checkout, steps)
    yield "training, nano in fp32", commit, line
    folder, path = work / "model", work / "items.jsonl"
    save_model(model, folder)
    ids = corpus("val")
    val = token_files.Tokens(ids, 0, "", 0, path)
    context = Context(choose_precision("fp32", CPU), 8, model.config.block_size)
    multiple_choice.write_hellaswag(multiple_choice.choice_items(val, ITEMS, seed=7), path)
    items = multiple_choice.hellaswag_items(path)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    nats = multiple_choice.ending_nats(model, items, context)
    own = predictions(nats, items)
    yield "multiple choice", commit, against_build_nanogpt(checkout, folder, rows, own)
    try:
        harness = f"lm-evaluation-harness {version('lm_eval')}"
        yield "multiple choice", harness, against_harness(folder, path, nats, items)
    except PackageNotFoundError:
        yield "multiple choice", "lm-evaluation-harness", "not installed: see --harness"
    theirs = f"transformers {version('transformers')}, float64"
    few = replace(val, ids=val.ids[:VAL_TOKENS])
    yield "bits per byte", theirs, against_transformers(model, folder, few, context)
    yield "rounding", "whole numbers", roundings(count)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build-nanogpt", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--harness", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--roundings", type=int, default=50_000, help="draws a format")
    asked = parser.parse_args(words)
    if asked.harness:
        sys.path.append(str(asked.harness))
    with tempfile.TemporaryDirectory() as work:
        for found in findings(asked.build_nanogpt, asked.steps, asked.roundings, Path(work)):
            print("| " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
