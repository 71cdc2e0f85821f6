"""Greedy sampling on a GPU: ours by eager and by compiled CUDA graphs, beside transformers.

    python benchmarks/sample_gpu.py [--batch 1 8 64] [--precision fp32 bf16] [--new 256]
                                    [--rounds 5] [--minutes 4]
    python benchmarks/sample_gpu.py --device cpu --size test     all of it, where there is no GPU

Same weights (random ones), same prompts; a turn is the whole continuation, prompt included, and
turns alternate. transformers compiles its step by itself where its cache is static. The roof is
the time in which weights and filled cache pass through memory, at the rate that a large sum was
measured at. Greedy tokens are held against those of transformers: at the first place where a text
differs, the page tells how far apart, by our model in fp32, its token and the other one are, in
units in the last place of the format at the largest logit. Beyond `NEAR` of them no time counts.

Each case (a precision, a batch) is kept in sample_gpu.json as soon as it is measured. After
`--minutes` none is begun; the same command again goes on, on the same card with the same torch and
code. On CUDA it writes benchmarks/results/sample_gpu.md, elsewhere it only prints.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import outcomes
from benchmarks.gpu import afterwards_empty, chosen_device
from benchmarks.kept import Kept, facts_of
from benchmarks.outcomes import OURS, RESULTS
from benchmarks.peers import HF, SIZES, Task, hf_model
from pipeline.compute import runtime, throughput
from pipeline.compute.precision import Precision, choose_precision
from pipeline.data.tokenizer import EOT
from pipeline.errors import UserError
from pipeline.inference import generation
from pipeline.model.gpt import GPT
from pipeline.studies import roofline
from pipeline.tables import markdown

PROMPT = 32  # tokens
NEAR = 8  # units in the last place: products that add in another order are off by some
Turn = Callable[[], Tensor]  # gives tokens (B, PROMPT + new)
COLUMNS = ("precision", "batch", "contestant", "tokens/s", "least", "most", f"of {HF}")
COLUMNS += ("of the roof", "first turn s", "texts equal", "most units apart", "remark")


def ours(
    model: GPT, task: Task, idx: Tensor, precision: str, new: int, weights: str, compiled: bool
) -> Turn:
    settings = replace(
        task.config().sample,
        temperature=0.0,
        max_new_tokens=new,
        precision=precision,
        weights=weights,
        compile=compiled,
    )
    draws = runtime.generator(0, "sample", idx.device)
    return lambda: generation.generate(model, idx, settings, draws)


def transformers(
    task: Task, idx: Tensor, precision: Precision, new: int, cache: str | None
) -> Turn:
    model = hf_model(task).eval().to(idx.device, precision.dtype)
    model.generation_config.eos_token_id = None  # as ours: nothing stops at end-of-text
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": EOT}
    settings |= {"cache_implementation": cache, "attention_mask": torch.ones_like(idx)}

    def turn() -> Tensor:
        with precision.products():
            return model.generate(idx, **settings)

    return turn


def contestants(task: Task, batch: int, precision: Precision, new: int) -> dict[str, Turn]:
    """By name; the first gives the tokens, the second the time that others are held against."""
    device = precision.device
    idx, model = task.ids(0, batch, PROMPT).to(device), task.model().eval().to(device)
    given = (model, task, idx, precision.asked, new)
    return {
        HF: transformers(task, idx, precision, new, None),
        f"{HF}, static cache, compiled": transformers(task, idx, precision, new, "static"),
        f"{OURS}, captured": ours(*given, "fp32", False),
        f"{OURS}, compiled": ours(*given, "fp32", True),
        f"{OURS}, compiled, int8": ours(*given, "int8", True),
    }


def bytes_of_a_step(task: Task, batch: int, new: int, size: int, weights: int) -> float:
    """What a step reads at least: each weight of a product once, the cache as it is filled.

    `size` and `weights` are bytes of a number in the cache and of a weight.
    """
    shape = task.shape()
    with torch.device("meta"):
        model = GPT(shape)
    products = model.parameter_count() - model.transformer.wpe.weight.numel()
    filled = PROMPT + (new - 1) / 2  # columns, on average
    return products * weights + 2 * shape.n_layer * shape.n_embd * batch * filled * size


@torch.inference_mode()
def apart(model: GPT, own: Tensor, other: Tensor, dtype: torch.dtype) -> tuple[int, float]:
    """How many texts (B, T) are equal; of the others the most units between the first two tokens
    that differ: the distance of their logits by `model` in fp32 after what was the same."""
    most, equal = 0.0, 0
    for mine, theirs in zip(own, other, strict=True):
        places = (mine != theirs).nonzero()[:, 0].tolist()
        if not places:
            equal += 1
            continue
        place = places[0]
        with choose_precision("fp32", own.device).products():
            logits = model(mine[None, :place])[0, -1].float()
        distance = (logits[mine[place]] - logits[theirs[place]]).abs().item()
        unit = torch.finfo(dtype).eps * logits.abs().max().item()
        most = max(most, distance / unit)
    return equal, most


def measure(task: Task, batch: int, precision: Precision, new: int, rounds: int) -> list[dict]:
    """A dict a contestant: seconds of its turns, what its tokens are, or why no time counts."""
    found: list[dict[str, Any]] = []
    turns, tokens, watch = [], None, throughput.Stopwatch(precision.device)
    judge = task.model().eval().to(precision.device)
    for name, turn in contestants(task, batch, precision, new).items():
        result: dict[str, Any] = {"name": name, "seconds": [], "remark": ""}
        found.append(result)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            watch.start()
            answer = turn()
            result["first"] = watch.stop()
        eagerly = [str(w.message) for w in said if "runs eagerly" in str(w.message)]
        tokens = answer if tokens is None else tokens
        if name.endswith("int8"):  # a text of its own from the first rounding that decides
            result["remark"] = "a text of its own"
        else:
            result["equal"], result["units"] = apart(judge, answer, tokens, precision.dtype)
        if eagerly:
            result["remark"] = eagerly[0]
        elif result.get("units", 0) > NEAR:
            result["remark"] = f"no time counts: other tokens than {HF}, and no near tie"
        else:
            turns.append((result, turn))
    for number in range(rounds):
        for result, turn in turns[:: 1 - 2 * (number % 2)]:
            watch.start()
            turn()
            result["seconds"].append(watch.stop())
    return found


def rows(case: dict[str, Any], task: Task, rate: float) -> list[tuple[Any, ...]]:
    """One tuple of COLUMNS for each contestant of a case; `rate` in bytes/s."""
    batch, new, size = case["batch"], case["new"], case["size"]
    base = case["found"][0]["seconds"]
    shown = []
    for r in case["found"]:
        head = (case["precision"], batch, r["name"])
        equal = f"{r['equal']} of {batch}" if "equal" in r else "-"
        tail = (r["first"], equal, r.get("units"), r["remark"])
        if not r["seconds"]:
            shown.append((*head, *[None] * 5, *tail))
            continue
        weights = 1 if r["name"].endswith("int8") else size
        least = bytes_of_a_step(task, batch, new, size, weights) / rate * new
        middle = statistics.median(r["seconds"])
        speed = statistics.median(a / b for a, b in zip(base, r["seconds"], strict=True))
        rates = [batch * new / s for s in (middle, max(r["seconds"]), min(r["seconds"]))]
        shown.append((*head, *rates, speed, f"{least / middle:.0%}", *tail))
    return shown


def main(words: list[str], folder: Path | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="124m", choices=SIZES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--new", type=int, default=256, help="tokens a continuation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="after them begin no more; 0: no limit"
    )
    asked = parser.parse_args(words)
    device = chosen_device(asked.device)
    folder = folder or (RESULTS if device.type == "cuda" else None)
    said = outcomes.circumstances()
    facts = facts_of(device, "sample", size=asked.size, new=asked.new, rounds=asked.rounds)
    task, rate, cases = Task(asked.size, device=device.type), roofline.bandwidth(device), []
    kept = Kept(folder / "sample_gpu.json" if folder else None, facts, asked.minutes)
    for name, batch in ((p, b) for p in asked.precision for b in asked.batch):
        precision = choose_precision(name, device)
        call = partial(measure, task, batch, precision, asked.new, asked.rounds)
        found = kept.get(f"{name}, batch {batch}", 0, afterwards_empty()(call))
        if found is None:
            continue
        case = {"size": precision.result_bytes, "precision": name, "batch": batch}
        cases.append(case | {"new": asked.new, "found": found})
        print(f"sample_gpu: {name}, batch {batch}", file=sys.stderr)
    left = "; ".join(kept.missing)
    more = f"**Not measured yet: {left}. The same command goes on.**\n\n" if left else ""
    page = (
        f"# Sampling on {facts['card']}\n\n"
        f"{asked.new} greedy tokens behind a prompt of {PROMPT}, GPT-2 {asked.size}, random "
        f"weights. The roof is by {rate / 1e9:,.0f} GB/s, as a large sum was measured. A text that "
        f"differs does so first between two tokens that are so many units in the last place of "
        f"the format apart; up to {NEAR} count as a near tie.\n\n{more}"
        f"`{said['command']}` on {said['date']} at {said['commit'] or 'no commit'}\n\n"
        f"{said['machine']}; {said['versions']}; CUDA {torch.version.cuda or 'none'}\n\n"
        + markdown(COLUMNS, [row for case in cases for row in rows(case, task, rate)])
    )
    print(page)
    if folder:
        (folder / "sample_gpu.md").write_text(page, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
