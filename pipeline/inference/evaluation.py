"""Evaluation of a model: its tasks, the validation loss and bits per byte among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.compute.precision import Precision
from pipeline.compute.ranks import Ranks
from pipeline.data.batches import validation_windows
from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import token_byte_lengths
from pipeline.inference.multiple_choice import Choice, multiple_choice
from pipeline.model.gpt import GPT
from pipeline.model.loss import mean_loss, token_losses
from pipeline.published import EOT, VOCAB_SIZE

_CHUNK = 1 << 22  # tokens looked at together: bounds memory on a split of any size
COUNTED = 1 << 28  # training tokens at most, the first ones: more change no frequency to speak of


@dataclass(frozen=True)
class Context:
    """How a task runs the model: precision, sequences at a time, its share among processes.

    `sequence_length` is the longest context the model is judged at, as a rule the one it was
    trained at: later rows of the position embedding may never have been trained. `progress` hears
    the share of a task that is done, behind the task's name where there are several.

    Several processes all call `evaluate` on the same, and each has the results. They take whole
    batches, so what is summed is what one process sums, in double precision.
    """

    precision: Precision
    batch_size: int
    sequence_length: int
    ranks: Ranks = field(default_factory=Ranks)
    progress: Callable[..., None] = lambda *_: None


Task = Callable[[GPT, Any, Context], Iterator[tuple[str, float]]]


def evaluate(model: GPT, tasks: Mapping[str, Any], context: Context) -> dict[str, float]:
    """Run `tasks`, {name in TASKS: the tokens or items that it works on} -> {"task/metric": value}.

    Nothing is drawn from any random generator, and the model's training flag is as before.
    """
    context.precision.prepare(model)
    results = {}
    for name, material in tasks.items():
        its = replace(context, progress=partial(context.progress, name))
        for key, value in TASKS[name](model, material, its):
            results[f"{name}/{key}"] = value
    return results


# --- validation


def validation(model: GPT, tokens: Tokens, context: Context) -> Iterator[tuple[str, float]]:
    """Mean loss in nats over every token but the first, perplexity, and bits per byte.

    Of conversations all three are over the answers' tokens alone.

    perplexity = exp(loss); bits per byte = nats of the targets that are text / ln 2 / their bytes,
    which makes models with different tokenizers comparable (Gao et al. 2020, The Pile, 3.1).
    End-of-text is no text: as in nanochat, neither its nats nor a byte for it are counted.
    """
    size, length, ranks = context.batch_size, context.sequence_length, context.ranks
    windows = validation_windows(tokens, batch_size=size, sequence_length=length)
    mine = islice(enumerate(windows, 1), ranks.rank, None, ranks.world)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in mine:
            yield batch
            context.progress(min(1.0, number * size * length / len(tokens)))

    borders = 0.0  # nats of the targets that are end-of-text

    def look(hidden: Tensor, targets: Tensor) -> None:
        nonlocal borders
        wanted = targets == EOT  # (B, T)
        logits = model.logits(hidden[wanted])  # (M, V): one a document, so M is small
        borders += token_losses(logits, targets[wanted]).sum().item()

    precision = context.precision
    loss = mean_loss(model, batches(), precision, precision.device, look, ranks.sums)
    [borders] = ranks.sums([borders])
    yield "loss", loss
    yield "perplexity", math.exp(loss) if loss < 700 else math.inf  # exp(710) is no double
    nats = loss * tokens.targets - borders
    yield "bits_per_byte", nats / math.log(2) / target_bytes(tokens)


def target_bytes(tokens: Tokens) -> int:
    """Bytes of text that the targets of `validation` decode to; end-of-text is none."""
    lengths = token_byte_lengths()
    return sum(int(lengths[part].sum()) for part in _learned(tokens, 1))


def unigram_loss(train: Tokens, val: Tokens) -> float:
    """Loss in nats/target of a model that knows token frequencies and nothing else.

    Cross-entropy of the counts among the first COUNTED training tokens, one added to each of them
    (Laplace), on the same targets as `validation`: what a trained model has to beat to have learnt
    any order.
    """
    seen = _counts(_learned(train, 0, COUNTED)) + 1
    nats = np.log(seen.sum()) - np.log(seen)
    targets = _counts(_learned(val, 1))
    return float(targets @ nats / targets.sum())


def _counts(parts: Iterator[np.ndarray]) -> np.ndarray:
    """(VOCAB_SIZE,) int64: how often each token occurs."""
    total = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for part in parts:
        total += np.bincount(part, minlength=VOCAB_SIZE)
    return total


def _learned(tokens: Tokens, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """The tokens from `start` to `stop`, of conversations the answers' alone, a part at a time."""
    end = min(len(tokens), len(tokens) if stop is None else stop)
    for first in range(start, end, _CHUNK):
        part = slice(first, min(first + _CHUNK, end))
        ids = tokens.ids[part]
        yield ids if tokens.answers is None else ids[tokens.answers[part] != 0]


TASKS: dict[str, Task] = {
    "validation": validation,
    "choice": partial(
        multiple_choice, norms={"acc_norm": Choice.characters, "acc_per_token": Choice.tokens}
    ),
    # HellaSwag by two methods, with what each calls acc_norm: of GPT-2 124M build-nanogpt's
    # hellaswag.py says 0.2859 and 0.2955, lm-evaluation-harness 0.2892 and 0.3114.
    "hellaswag_nanogpt": partial(multiple_choice, norms={"acc_norm": Choice.tokens}),
    "hellaswag_harness": partial(multiple_choice, norms={"acc_norm": Choice.characters}),
}
