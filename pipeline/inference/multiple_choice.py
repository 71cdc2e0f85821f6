"""Multiple choice: the task, items made from a split, and HellaSwag's file format."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from pipeline.data import text_files
from pipeline.data.tokenizer import encode, gpt2
from pipeline.errors import InputError, collecting, quoted, refusing
from pipeline.model.gpt import KVCache
from pipeline.model.loss import IGNORE, evaluating, token_losses
from pipeline.published import EOT

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
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
EDITED = ("activity_label", "ctx_a", "ctx_b")  # what lm-evaluation-harness makes a context of
HEAD_ROWS = 256  # of logits held at once, 51 MB: more take longer on a CPU

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """One multiple-choice item as tokens; each ending continues the context as it stands.

    `moved` characters of white space before an ending's own are scored and not counted: those that
    lm-evaluation-harness takes from the context's end.
    """

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    label: int  # which ending is the true one
    moved: int = 0

    def tokens(self) -> list[int]:
        return [len(ending) for ending in self.endings]

    def characters(self) -> list[int]:
        """Of each ending, without the space before it."""
        texts = (gpt2().decode(ending)[self.moved :] for ending in self.endings)
        return [len(text.removeprefix(" ")) for text in texts]


def multiple_choice(
    model: GPT,
    items: Sequence[Choice],
    context: Context,
    norms: Mapping[str, Callable[[Choice], list[int]]],
) -> Iterator[tuple[str, float]]:
    """Share of items whose true ending is the likeliest, with standard errors and their number.

    `acc` takes the ending of the smallest summed loss, each of `norms` divides that by a size of
    the ending. Standard errors are sqrt(p (1 - p) / n). A context that does not fit is cropped
    from the left. Without items, only their number.

    Raises InputError for an ending longer than `context.sequence_length`.
    """
    yield "count", float(len(items))
    if not items:
        return
    nats = ending_nats(model, items, context)  # (N, 4)
    labels = np.array([item.label for item in items])
    sizes = {name: np.array([of(item) for item in items]) for name, of in norms.items()}
    with np.errstate(divide="ignore"):  # an ending of which nothing is left is never chosen
        scored = {"acc": nats, **{name: nats / size for name, size in sizes.items()}}
    for name, scores in scored.items():
        share = float((scores.argmin(axis=1) == labels).mean())
        yield name, share
        yield f"{name}_stderr", math.sqrt(share * (1 - share) / len(items))


class _Behind(NamedTuple):
    """Endings behind the same tokens: all of an item, or one whose context had to be cropped."""

    start: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    rows: range  # where their losses go

    def order(self) -> tuple[Any, ...]:
        longest = max(map(len, self.endings))
        return len(self.start), len(self.endings), longest, self.start, self.endings


def ending_nats(model: GPT, items: Sequence[Choice], context: Context) -> np.ndarray:
    """(N, 4) float64: the summed loss of each ending behind its context, in nats.

    A context is computed once for its endings. What is computed together has starts of one length,
    the longest first, so that padding is at the end of endings alone, and holds as many tokens as
    `context.batch_size` sequences. The order of the items changes no bit, and several processes
    take whole batches. Raises InputError as `multiple_choice` does.
    """
    assert all(item.context for item in items), "an ending's first token needs one before it"
    check_endings(items, context.sequence_length)
    parts = [*_parts(items, context.sequence_length)]
    batches = [*_batches(parts, context.batch_size * context.sequence_length)]
    work = np.cumsum([sum(len(p.start) + sum(map(len, p.endings)) for p in b) for b in batches])
    nats = np.zeros(parts[-1].rows.stop)
    precision, ranks = context.precision, context.ranks
    for number in range(ranks.rank, len(batches), ranks.world):
        with evaluating(model), precision.products(), precision.autocast():
            found = _nats(model, batches[number], precision)
        nats[[row for part in batches[number] for row in part.rows]] = found
        context.progress(work[number] / work[-1])
    return np.array(ranks.sums(nats.tolist())).reshape(len(items), -1)


def _parts(items: Sequence[Choice], length: int) -> Iterator[_Behind]:
    """What is computed of each item, at most `length` tokens and the one that is only predicted."""
    first = 0
    for item in items:
        rows = range(first, first := first + len(item.endings))
        if len(item.context) + max(item.tokens()) <= length + 1:
            yield _Behind(item.context, item.endings, rows)
            continue
        for row, ending in zip(rows, item.endings, strict=True):
            start = item.context[-(length + 1 - len(ending)) :]
            yield _Behind(start, (ending,), range(row, row + 1))


def _batches(parts: Sequence[_Behind], most: int) -> Iterator[list[_Behind]]:
    """Parts alike in their starts' length and endings' number; `most` tokens, or a single part."""
    ordered = sorted(parts, key=_Behind.order, reverse=True)
    for (start, endings), alike in groupby(ordered, key=lambda part: part.order()[:2]):
        left = [*alike]
        while left:
            tokens = endings * (start + max(map(len, left[0].endings)))
            size = max(1, most // tokens)
            yield left[:size]
            left = left[size:]


def _nats(model: GPT, batch: Sequence[_Behind], precision: Precision) -> np.ndarray:
    """The summed loss of every ending, part by part."""
    device, dtype = precision.device, precision.dtype  # of keys and values, which products give
    starts = torch.tensor([part.start for part in batch], device=device)  # (N, S)
    each = len(batch[0].endings)
    endings = [torch.tensor(ending) for part in batch for ending in part.endings]
    y = pad_sequence(endings, True, IGNORE).to(device)  # (M, E): M = N * each
    more = y[:, :-1].clamp(min=0)  # the last one is only predicted; padding is seen by no ending
    config, length = model.config, starts.size(1)
    cache = KVCache(config, len(batch), device, dtype, capacity=length)
    wide = KVCache(config, len(y), device, dtype, capacity=length + more.size(1))
    hidden = model.hidden(starts, cache)[:, -1:].repeat_interleave(each, 0)  # (M, 1, C)
    if more.size(1):
        both = zip(cache.keys + cache.values, wide.keys + wide.values, strict=True)
        for narrow, copies in both:
            copies[:, :, :length] = narrow.repeat_interleave(each, 0)
        wide.length = length
        hidden = torch.cat([hidden, model.hidden(more, wide)], 1)  # (M, E, C)
    wanted = y != IGNORE  # the head sees these places only
    seen = zip(hidden[wanted].split(HEAD_ROWS), y[wanted].split(HEAD_ROWS), strict=True)
    losses = torch.cat([token_losses(model.logits(rows), targets) for rows, targets in seen])
    owners = wanted.nonzero()[:, 0].cpu().numpy()
    return np.bincount(owners, weights=losses.cpu().numpy(), minlength=len(y))


def check_endings(items: Sequence[Choice], sequence_length: int) -> None:
    """Raise InputError where an ending does not fit, whatever is cropped of its context."""
    longest = max((len(ending) for item in items for ending in item.endings), default=0)
    if longest > sequence_length:
        raise InputError(
            f"multiple choice: an ending has {longest} tokens, "
            f"expected at most sequence_length={sequence_length}"
        )


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


def hellaswag_items(path: str | Path, *, edited: bool = False) -> list[Choice]:
    """Items of a HellaSwag .jsonl file (Zellers et al. 2019): ind, ctx, endings, label.

    A missing or empty `ctx` is `ctx_a`, a space and `ctx_b`, as the data set defines it; an ending
    is encoded with the space before it. `edited` gives the texts that lm-evaluation-harness makes
    of activity_label, ctx_a, ctx_b and endings; none, with a warning, where an item lacks one.

    The file may be packed (`.gz`, `.zst`). Raises one InputError naming path, line and field of
    all that cannot be used (see `collecting`).
    """
    path, lacking = Path(path), ""
    items: list[Choice | None] = []
    with collecting() as refuse, refusing(refuse, path):
        for line in text_files.lines(path):
            if line.start > HELLASWAG_BYTES:
                raise InputError(f"{path}: expected at most {HELLASWAG_BYTES:,} bytes")
            with refusing(refuse, path):
                items.append(_hellaswag_item(line, edited))
                if items[-1] is None and not lacking:
                    lacking = f"{line.where}: expected {', '.join(EDITED)} as texts"
    if not items:
        raise InputError(f"{path}: no items in it; expected one JSON object a line")
    if lacking:
        log.warning("%s; without them no hellaswag_harness_acc and _acc_norm", lacking)
    return [] if lacking else [item for item in items if item]


def _hellaswag_item(line: text_files.Line, edited: bool) -> Choice | None:
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
    space = ""
    if edited:
        parts = [item.get(name) for name in EDITED]
        if not all(isinstance(part, str) for part in parts):
            return None
        activity, a, b = parts
        whole = _without_marks(f"{activity}: {a} {b.capitalize()}")
        endings = [_without_marks(ending) for ending in endings]
        # It has white space at the context's end go before each ending.
        context = whole.rstrip()
        space = whole[len(context) :]
        if not context:
            raise InputError(f"{where}: ctx_a: expected text that does not stand in brackets")
    texts = (_tokens(f"{space} {ending}", f"{where}: endings") for ending in endings)
    return Choice(_tokens(context, f"{where}: ctx"), tuple(texts), int(str(label)), len(space))


def _without_marks(text: str) -> str:
    """As lm-evaluation-harness's task `hellaswag`, version 1.0, takes out the marks of WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


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
