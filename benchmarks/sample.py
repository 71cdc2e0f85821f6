"""Greedy sampling of this pipeline and of its peers, side by side.

    python benchmarks/sample.py [--size 124m] [--batch 1 8] [--new 64] [--rounds N]
                                [--nanogpt CHECKOUT]

Same weights (random ones: what they are changes no time), same prompts, one token after another
until all are there; a turn is the whole continuation, prompt included. A time counts only for who
has the tokens of transformers' `generate`. Weights that are rounded (int8) give a text of their
own from the first token on that differs: there the table says how often they choose the token that
exact ones do after the same text, and refuses below half.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import checkouts, outcomes, side_by_side
from benchmarks.checkouts import NANOGPT
from benchmarks.outcomes import OURS
from benchmarks.peers import HF, Task, hf_model, nanogpt_model
from benchmarks.side_by_side import Contestant, Turn, Verdict, in_a_fresh_process
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.config import SampleConfig
from pipeline.data.tokenizer import EOT
from pipeline.inference import generation
from pipeline.inference.decoding import Decoder

PROMPT = 32  # tokens
EQUAL = 0.5  # how often rounded weights have to choose the token that exact ones do
EXACT = ("", "fp32")  # settings of sample.weights that change no token

# Share of next tokens chosen as exact weights do, None for exact ones; tokens (B, PROMPT + new).
Answer = tuple[float | None, list[list[int]]]


def ours(task: Task, batch: int, new: int, weights: str) -> Turn:
    """`generation.generate` with sample.weights as given, where there is such a setting."""
    # In a process of its own: what the comparison holds is no part of sampling's memory.
    exact = weights in EXACT
    share = None if exact else in_a_fresh_process(chosen_as_exactly, task, batch, new, weights)
    model, settings = task.model().eval(), greedy(task, new)
    if weights:
        settings = replace(settings, weights=weights)
    idx, draws = task.ids(0, batch, PROMPT), runtime.generator(0, "sample")
    return lambda: (share, generation.generate(model, idx, settings, draws).tolist())


def greedy(task: Task, new: int) -> SampleConfig:
    return replace(task.config().sample, temperature=0.0, max_new_tokens=new)


@torch.no_grad()
def chosen_as_exactly(task: Task, batch: int, new: int, weights: str) -> float:
    """How often rounded weights choose the next token of exact weights' greedy text."""
    model, exact = task.model().eval(), replace(greedy(task, new), weights="fp32")
    idx, draws = task.ids(0, batch, PROMPT), runtime.generator(0, "sample")
    text = generation.generate(model, idx, exact, draws)
    read = text[:, :-1]
    precision = choose_precision(exact.precision, idx.device)
    rounded = Decoder(model, precision, weights, rows=read.numel())
    behind = PROMPT - 1  # the prompt was chosen by nobody
    chosen = rounded.logits(rounded.hidden(read)[:, behind:]).argmax(-1)
    return (chosen == text[:, behind + 1 :]).float().mean().item()


def transformers(
    task: Task, batch: int, new: int, cache: str | None, compiled: bool = False
) -> Turn:
    model = hf_model(task).eval()
    if compiled:  # as its guide to static caches has it
        model.forward = torch.compile(model.forward)
    model.generation_config.eos_token_id = None  # as ours: nothing stops at end-of-text
    idx = task.ids(0, batch, PROMPT)
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": EOT}
    settings |= {"cache_implementation": cache, "attention_mask": torch.ones_like(idx)}
    return lambda: (None, model.generate(idx, **settings).tolist())


def nanogpt(task: Task, batch: int, new: int, checkout: Path) -> Turn:
    model, idx = nanogpt_model(task, checkout).eval(), task.ids(0, batch, PROMPT)
    return lambda: (None, model.generate(idx, new, top_k=1).tolist())


def weights_settings() -> tuple[str, ...]:
    """What sample.weights may be; one nameless setting where it is none yet."""
    found = [f.metadata["choices"] for f in fields(SampleConfig) if f.name == "weights"]
    return tuple(found[0]) if found else ("",)


def agree(answers: list[Answer], others: list[Answer]) -> Verdict:
    """Refuses exact weights with other tokens than the reference's, and too coarse ones."""
    (share, tokens), (_, theirs) = answers[0], others[0]
    if share is not None:
        words = f"chooses {share:.0%} of the tokens as exact weights do"
        return Verdict(remark=words) if share >= EQUAL else Verdict(words)
    pairs = [
        (a, b)
        for own, other in zip(tokens, theirs, strict=True)
        for a, b in zip(own[PROMPT:], other[PROMPT:], strict=True)
    ]
    equal = sum(a == b for a, b in pairs) / len(pairs)
    return Verdict("" if equal == 1 else f"{equal:.0%} of the tokens are those of {HF}")


def contestants(task: Task, batch: int, new: int, nano: str | None) -> list[Contestant]:
    settings = weights_settings()
    names = [f"{OURS}, {weights}" if weights else OURS for weights in settings]
    given, checkout = (task, batch, new), Path(nano or "")
    return [
        *(
            Contestant(name, partial(ours, *given, weights))
            for name, weights in zip(names, settings, strict=True)
        ),
        Contestant(HF, partial(transformers, *given, None), version(HF)),
        Contestant(f"{HF}, static cache", partial(transformers, *given, "static"), version(HF)),
        Contestant(
            f"{HF}, static cache, compiled",
            partial(transformers, *given, "static", compiled=True),
            version(HF),
        ),
        Contestant(
            f"{NANOGPT}, no cache",
            partial(nanogpt, *given, checkout),
            **checkouts.part_in(NANOGPT, nano),
        ),
    ]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["124m"], help="nano, mini, 124m")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=64, help="tokens a continuation")
    parser.add_argument("--rounds", type=int, default=5)
    checkouts.add_arguments(parser)
    asked = parser.parse_args(words)
    for size, batch in ((size, batch) for size in asked.size for batch in asked.batch):
        results = side_by_side.measure(
            contestants(Task(size), batch, asked.new, asked.nanogpt),
            agree,
            reference=HF,
            rounds=asked.rounds,
            tell=lambda line: print(f"sample: {line}", file=sys.stderr),
        )
        about = f"{asked.new} greedy tokens behind a prompt of {PROMPT}, fp32, tokens equal."
        name, work = f"{size}, batch {batch}", batch * asked.new
        case = outcomes.Case(name, work, "tokens", HF, results, about)
        print(outcomes.publish("sample", case))


if __name__ == "__main__":
    main(sys.argv[1:])
