"""Multiple choice: the task, items made from a split, and HellaSwag's file format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.data import text_files
from pipeline.data.tokenizer import encode, gpt2
from pipeline.errors import InputError, collecting, quoted, refusing
from pipeline.model.loss import IGNORE, evaluating, token_losses
from pipeline.published import EOT

if TYPE_CHECKING:
    from pipeline.data.token_files import Tokens
    from pipeline.inference.evaluation import Context
    from pipeline.model.gpt import GPT

CHOICES = 4  # endings an item, as in HellaSwag; guessing scores 0.25
# 64 tokens an item fit every recipe's sequence, and 200 items use a fifth of the default
# validation split. An ending of 16 tokens is about a line: long enough to carry a subject, short
# enough that no single likely phrase decides. A context of three times as much sets the subject.
CONTEXT_TOKENS = 48
ENDING_TOKENS = 16
_POOL = 4  # endings gathered for each item asked for, so that wrong ones come from far and wide
HELLASWAG_BYTES = 1 << 28  # its largest split has 48 MB


@dataclass(frozen=True)
class Choice:
    """One multiple-choice item as tokens; each ending continues the context as it stands."""

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    label: int  # which ending is the true one


def multiple_choice(
    model: GPT, items: Sequence[Choice], context: Context
) -> Iterator[tuple[str, float]]:
    """Share of items whose true ending is the likeliest, with standard errors and their number.

    `acc` takes the ending of the smallest summed loss. `acc_norm` divides that by the ending's
    characters, without the space before it, as lm-evaluation-harness does, `acc_per_token` by its
    tokens, which build-nanogpt's hellaswag.py calls acc_norm. Standard errors are
    sqrt(p (1 - p) / n). A context that does not fit is cropped from the left. Without items, only
    their number.

    Raises InputError for an ending longer than `context.sequence_length`.
    """
    yield "count", float(len(items))
    if not items:
        return
    nats = ending_nats(model, items, context)  # (N, 4)
    tokens = np.array([[len(ending) for ending in item.endings] for item in items])
    texts = [[gpt2().decode(ending) for ending in item.endings] for item in items]
    characters = np.array([[len(text.removeprefix(" ")) for text in four] for four in texts])
    labels = np.array([item.label for item in items])
    scored = {"acc": nats, "acc_norm": nats / characters, "acc_per_token": nats / tokens}
    for name, scores in scored.items():
        share = float((scores.argmin(axis=1) == labels).mean())
        yield name, share
        yield f"{name}_stderr", math.sqrt(share * (1 - share) / len(items))


def ending_nats(model: GPT, items: Sequence[Choice], context: Context) -> np.ndarray:
    """(N, 4) float64: the summed loss of each ending behind its context, in nats.

    Rows of like length run together, so that little is padding; which rows meet in a batch
    changes nothing. Raises InputError as `multiple_choice` does.
    """
    rows = [(item.context, ending) for item in items for ending in item.endings]
    assert all(start for start, _ in rows), "an ending's first token needs one before it"
    check_endings(items, context.sequence_length)
    nats = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
    precision = context.precision
    for first in range(0, len(rows), context.batch_size):
        batch = order[first : first + context.batch_size]
        padded = _pad([rows[row] for row in batch], context.sequence_length)
        x, y = (ids.to(precision.device) for ids in padded)
        wanted = y != IGNORE  # (B, T): the head sees these places only
        with evaluating(model), precision.products(), precision.autocast():
            logits = model.logits(model.hidden(x)[wanted])  # (M, V)
            losses = token_losses(logits, y[wanted])  # (M,)
        owners = wanted.nonzero()[:, 0].cpu().numpy()
        nats[batch] = np.bincount(owners, weights=losses.cpu().numpy(), minlength=len(batch))
    return nats.reshape(len(items), -1)


def check_endings(items: Sequence[Choice], sequence_length: int) -> None:
    """Raise InputError where an ending does not fit, whatever is cropped of its context."""
    longest = max((len(ending) for item in items for ending in item.endings), default=0)
    if longest > sequence_length:
        raise InputError(
            f"multiple choice: an ending has {longest} tokens, "
            f"expected at most sequence_length={sequence_length}"
        )


def _pad(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], sequence_length: int
) -> tuple[Tensor, Tensor]:
    """(context, ending) pairs -> inputs and targets, (B, T) int64 each.

    Padding is on the right, where no earlier token sees it; only endings are targets.
    """
    x, y = [], []
    for start, ending in rows:
        text = [*start, *ending][-(sequence_length + 1) :]
        x.append(torch.tensor(text[:-1]))
        y.append(torch.tensor([IGNORE] * (len(text) - 1 - len(ending)) + list(ending)))
    return pad_sequence(x, True), pad_sequence(y, True, IGNORE)


# --- items


def choice_items(tokens: Tokens, count: int, seed: int) -> list[Choice]:
    """Up to `count` items made from a split's documents: what comes next, among three strangers.

    A context of CONTEXT_TOKENS, its true continuation of ENDING_TOKENS, and three continuations
    of other such contexts, from other documents as long as there are any. Contexts and true
    endings never overlap, nothing holds end-of-text, and every item reads the same through
    HellaSwag's file format (`write_hellaswag`). The same tokens, count and seed give the same
    items; fewer than asked, or none, where the split is too short or sets no words off by spaces.
    """
    random = np.random.default_rng(seed)
    pool = list(islice(_passages(tokens.ids, random), _POOL * count))
    items = []
    for index in random.permutation(len(pool))[:count]:
        document, context, ending = pool[index]
        others = _strangers(pool, document, ending, random)
        if len(others) == CHOICES - 1:
            label = int(random.integers(CHOICES))
            endings = (*others[:label], ending, *others[label:])
            items.append(Choice(context, endings, label))
    return items


_Passage = tuple[int, tuple[int, ...], tuple[int, ...]]  # document, context, ending


def _passages(ids: np.ndarray, random: np.random.Generator) -> Iterator[_Passage]:
    """Passages that do not overlap, document by document in random order.

    An ending starts with a space, as HellaSwag's do, and both parts come back unchanged when
    their text is encoded alone: a cut inside a character or a run of blanks would not. Neither
    ends in white space, which others' harnesses strip or score with the ending.
    """
    starts = np.flatnonzero(ids == EOT)
    ends = np.append(starts[1:], len(ids))
    spaced = _begins_with_space()
    for document in random.permutation(len(starts)):
        text = ids[starts[document] + 1 : ends[document]]
        free = 0  # where the passage before ended
        for cut in np.flatnonzero(spaced[text[: len(text) - ENDING_TOKENS + 1]]):
            if cut - free < CONTEXT_TOKENS:
                continue
            context = tuple(text[cut - CONTEXT_TOKENS : cut].tolist())
            ending = tuple(text[cut : cut + ENDING_TOKENS].tolist())
            if _survives(context) and _survives(ending):
                free = int(cut) + ENDING_TOKENS
                yield int(document), context, ending


def _begins_with_space() -> np.ndarray:
    """(VOCAB_SIZE,) bool: does the token start with a space and go on with something visible?"""
    words = [gpt2().decode_single_token_bytes(token) for token in range(EOT)]
    return np.array([word[:1] == b" " and bool(word[1:].strip()) for word in words] + [False])


def _survives(tokens: tuple[int, ...]) -> bool:
    text = gpt2().decode(tokens)
    return text == text.rstrip() and tuple(encode(text).tolist()) == tokens


def _strangers(
    pool: Sequence[_Passage], document: int, ending: tuple[int, ...], random: np.random.Generator
) -> list[tuple[int, ...]]:
    """Up to three endings unlike `ending` and one another, from other documents if possible."""
    order = random.permutation(len(pool))
    others: list[tuple[int, ...]] = []
    for elsewhere in (True, False):
        for index in order:
            if len(others) == CHOICES - 1:
                return others
            home, _, other = pool[index]
            if (home != document) == elsewhere and other != ending and other not in others:
                others.append(other)
    return others


# --- HellaSwag's file format


def hellaswag_items(path: str | Path) -> list[Choice]:
    """Items of a HellaSwag .jsonl file (Zellers et al. 2019): ind, ctx, endings, label.

    A missing or empty `ctx` is `ctx_a`, a space and `ctx_b`, as the data set defines it; an ending
    is encoded with the space before it. The file may be packed (`.gz`, `.zst`). Raises one
    InputError naming path, line and field of all that cannot be used (see `collecting`).
    """
    path = Path(path)
    items = []
    with collecting() as refuse, refusing(refuse, path):
        for line in text_files.lines(path):
            if line.start > HELLASWAG_BYTES:
                raise InputError(f"{path}: expected at most {HELLASWAG_BYTES:,} bytes")
            with refusing(refuse, path):
                items.append(_hellaswag_item(line))
    if not items:
        raise InputError(f"{path}: no items in it; expected one JSON object a line")
    return items


def _hellaswag_item(line: text_files.Line) -> Choice:
    item, where = text_files.json_object(line), line.where
    context = item.get("ctx")
    if context is None or context == "":
        parts = [item.get(name) or "" for name in ("ctx_a", "ctx_b")]
        if all(isinstance(part, str) for part in parts):
            context = " ".join(parts).strip()
    if not isinstance(context, str) or not context:
        raise InputError(f"{where}: ctx={quoted(context)}: expected text, or ctx_a and ctx_b")
    endings = item.get("endings")
    if (
        not isinstance(endings, list)
        or len(endings) != CHOICES
        or not all(isinstance(e, str) and e for e in endings)
    ):
        raise InputError(f"{where}: endings={quoted(endings)}: expected a list of {CHOICES} texts")
    label = item.get("label")
    if str(label) not in map(str, range(CHOICES)):
        raise InputError(
            f"{where}: label={quoted(label)}: expected 0 to {CHOICES - 1}; "
            "the test split has no labels"
        )
    start = _tokens(context, f"{where}: ctx")
    texts = (_tokens(f" {e}", f"{where}: endings") for e in endings)
    return Choice(start, tuple(texts), int(str(label)))


def _tokens(text: str, where: str) -> tuple[int, ...]:
    return tuple(encode(text_files.checked(text, where)).tolist())


def write_hellaswag(items: Sequence[Choice], path: str | Path) -> None:
    """Write items as HellaSwag's own .jsonl, for `hellaswag_items` or anybody else's harness."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for index, item in enumerate(items):
            context = gpt2().decode(item.context)
            endings = [gpt2().decode(ending) for ending in item.endings]
            assert all(ending.startswith(" ") for ending in endings), "the format adds this space"
            row = {"ind": index, "ctx_a": context, "ctx_b": "", "ctx": context, "split": "val"}
            row |= {"endings": [ending[1:] for ending in endings], "label": item.label}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
