"""Where a step's sequences lie in the token files, in which documents, and what they say."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import config as configuration
from pipeline import paths
from pipeline.config import TrainConfig
from pipeline.data import token_files
from pipeline.data.batches import check_length
from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import EOT, gpt2
from pipeline.errors import InputError
from pipeline.records.dvc_history import WORKSPACE, experiments, of_workspace
from pipeline.records.run_data import Experiment, RunData
from pipeline.training import loop, validation

if TYPE_CHECKING:
    from pipeline.compute.ranks import Ranks
    from pipeline.diagnostics.nonfinite import Place
    from pipeline.training.training_step import Batch

log = logging.getLogger(__name__)

CHUNK = 1 << 22  # tokens looked at together: documents are counted in files of any size
SHA_DIGITS = 12
SHOWN = 8  # micro-batches, and sequences of each, that an error message names

Span = tuple[int, int]  # the first token of a sequence and its last target, from 0


class _Positions:
    """Stands in for a split's ids: every token is its own position."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return places


def _positions(tokens: Tokens) -> Tokens:
    """`tokens` with positions for ids, so that the inputs of batches of them are offsets."""
    return replace(tokens, ids=_Positions(len(tokens)))  # type: ignore[arg-type]


def of_step(
    tokens: Tokens,
    config: TrainConfig,
    step: int,
    place: Place | None = None,
    ranks: Ranks | None = None,
) -> str:
    """Lines for an error message: the sequences at fault and the others of the step."""
    batches = _by_micro_batch(tokens, config, step, ranks)
    suspects = list(batches.values())[place.batch if place else 0]
    fault = _at_fault(suspects, place)
    shown = ({"at fault": fault} if fault else {}) | dict(islice(batches.items(), SHOWN))
    lines = _lines(tokens, shown, SHOWN)
    more = len(batches) - SHOWN
    lines += [f"  and {more:,} more micro-batches"] if more > 0 else []
    other = "" if _aside() else f"; `--step {step}` instead of the numbers lists all sequences"
    lines.append(f"Read a sequence with {_command(tokens, (fault or suspects)[0])}{other}.")
    return "\n".join([f"The step's tokens in {tokens.path}:", *lines])


def of_validation(held_out: Tokens, config: TrainConfig, place: Place) -> str:
    """Lines for an error message: the sequences of the validation batch at fault."""
    windows = validation.windows(_positions(held_out), config)
    spans = _spans(next(islice(windows, place.batch, None)))
    spans = _at_fault(spans, place) or spans
    (line,) = _lines(held_out, {f"Its tokens in {held_out.path}": spans}, SHOWN)
    return f"{line.strip()}\nRead them with {_command(held_out, spans[0], '--split val ')}."


def _aside() -> bool:
    """Whether this is a temporary workspace of DVC's, where nobody can look later."""
    return paths.root().resolve() != Path.cwd().resolve()


def _command(tokens: Tokens, span: Span, options: str = "") -> str:
    """How to read these tokens; where others may lie at the main root, it refuses those."""
    only = f" --tokens {tokens.sha256[:SHA_DIGITS]}" if _aside() else ""
    return f"`python -m pipeline text {options}{span[0]}-{span[1]}{only}`"


def documents_at(tokens: Tokens, offsets: np.ndarray) -> np.ndarray:
    """(n,) the number, from 1, of the document that each of the (n,) offsets lies in.

    Every document begins with an end-of-text token that ends no answer: these are counted up to the
    last offset, CHUNK tokens at a time.
    """
    numbers, before = np.zeros(len(offsets), dtype=np.int64), 0
    for start in range(0, int(offsets.max()) + 1, CHUNK):
        part = slice(start, start + CHUNK)
        ends = tokens.ids[part] == EOT
        if tokens.answers is not None:
            ends &= tokens.answers[part] == 0
        begins = start + np.flatnonzero(ends)
        inside = (offsets >= start) & (offsets < start + CHUNK)
        numbers[inside] = before + np.searchsorted(begins, offsets[inside], side="right")
        before += len(begins)
    return numbers


def text(tokens: Tokens, first: int, last: int) -> str:
    """The text of the tokens from `first` to `last`, below a line with their documents.

    Raises InputError where the split has no such tokens.
    """
    if not 0 <= first <= last < len(tokens):
        raise InputError(
            f"{tokens.path}: tokens {first}-{last}: expected FIRST-LAST from 0 to {len(tokens) - 1}"
        )
    said = gpt2().decode(tokens.ids[first : last + 1].tolist())
    (line,) = _lines(tokens, {f"{tokens.path}, tokens": [(first, last)]})
    return f"{line.strip()}\n{said}"


def of_sequences(tokens: Tokens, config: TrainConfig, step: int) -> list[Span]:
    """Where the sequences of a step lie, in their order."""
    return [span for spans in _by_micro_batch(tokens, config, step).values() for span in spans]


def place(tokens: Tokens, span: Span) -> str:
    """Such as 224-256 (document 3 of 8)."""
    (line,) = _lines(tokens, {"": [span]})
    return line.strip(" :")


def _by_micro_batch(
    tokens: Tokens, config: TrainConfig, step: int, ranks: Ranks | None = None
) -> dict[str, list[Span]]:
    """Every sequence of a step."""
    batches = loop.micro_batches(_positions(tokens), config, step, ranks)
    return {f"micro-batch {number}": _spans(batch) for number, batch in enumerate(batches, 1)}


def _spans(batch: Batch) -> list[Span]:
    x, _ = batch  # (B, T) offsets; targets may be IGNORE
    return [(first, last + 1) for first, last in x[:, [0, -1]].tolist()]


def _at_fault(spans: list[Span], place: Place | None) -> list[Span]:
    """The sequences that the place tells apart from the rest of their batch, if it does."""
    return [spans[row] for row in place.rows] if place and len(place.rows) < len(spans) else []


def _lines(tokens: Tokens, named: dict[str, list[Span]], most: int | None = None) -> list[str]:
    """`  NAME: 224-256 (document 3 of 8), ...`, at most `most` spans a line."""
    ends = np.array([span for spans in named.values() for span in spans[:most]])  # (spans, 2)
    numbers = iter(documents_at(tokens, ends.ravel()).reshape(ends.shape).tolist())
    lines = []
    for name, spans in named.items():
        shown = []
        for (first, last), (begin, end) in zip(spans[:most], numbers, strict=False):
            documents = f"document {begin}" if begin == end else f"documents {begin}-{end}"
            shown.append(f"{first}-{last} ({documents} of {tokens.documents:,})")
        shown += [f"and {len(spans) - most:,} more"] if most and len(spans) > most else []
        lines.append(f"  {name}: {', '.join(shown)}")
    return lines


def of_spans(spans: list[str], split: str, sha256: str = "") -> str:
    """The text of each FIRST-LAST; raises InputError for tokens that are not there."""
    tokens = token_files.open_tokens(paths.TOKENS, split, verify=False)
    if not tokens.sha256.startswith(sha256):
        raise InputError(
            f"{tokens.path}: SHA-256 {tokens.sha256[:SHA_DIGITS]}...: these are other tokens than "
            f"those asked for, {sha256}..."
        )
    texts = []
    for span in spans:
        if not (match := re.fullmatch(r"(\d+)-(\d+)", span)):
            raise InputError(f"{span}: expected FIRST-LAST, as 20480-20544")
        texts.append(text(tokens, int(match[1]), int(match[2])))
    return "\n\n".join(texts)


def tokens_of(run: RunData, name: str, rev: str) -> token_files.Tokens:
    """The workspace's training tokens, which are to be those of a run.

    Raises InputError where they are others or there are none, with what brings those of an
    experiment of DVC, which has a `rev`.
    """
    way = f"; `dvc exp apply {name}` brings those of {name}" if rev else ""
    if way and not (paths.TOKENS / "meta.json").exists():
        raise InputError(f"{paths.TOKENS}: no tokens in this workspace{way}")
    tokens = token_files.open_tokens(paths.TOKENS, "train", verify=False)
    if (theirs := run.tags.get("digest.train", "")) != tokens.sha256:
        raise InputError(
            f"{tokens.path}: not the tokens that {name} was trained on (SHA-256 "
            f"{tokens.sha256[:SHA_DIGITS]}..., there {theirs[:SHA_DIGITS] or 'not known'}...){way}"
        )
    return tokens


def of_run(step: int, name: str | None) -> str:
    """Every sequence of a step, by the settings that the run was trained with.

    Without a `name` that is the workspace's run; before anything is trained there, params.yaml
    decides. Raises InputError where there is no such run, or it was trained on other tokens.
    """
    run = _run(name)
    config, whose = configuration.load().train, "by params.yaml, as nothing is trained yet"
    if not run:
        tokens = token_files.open_tokens(paths.TOKENS, "train", verify=False)
    else:
        deciding = ("seed", "batch_size", "accumulate", "sequence_length")  # for micro_batches
        config = replace(config, **{key: run.params[f"train.{key}"] for key in deciding})
        whose = f"of {name or WORKSPACE}"
        tokens = tokens_of(run, name or WORKSPACE, run.rev)
    check_length(tokens, config.sequence_length)
    lines = _lines(tokens, _by_micro_batch(tokens, config, step))
    return "\n".join([f"{tokens.path}, step {step} {whose}:", *lines])


def _run(name: str | None) -> Experiment | None:
    """The run of this name, which may still be at work here, or else the workspace's.

    None where the workspace has no training; raises InputError for a name that is not there.
    """
    here = of_workspace(paths.root())
    if name is None:
        return here if "train" in here.records else None
    known = {one.name: one for one in experiments(("train",))}
    if "train" in here.records and (now := here.records["train"][0]["name"]):
        known.setdefault(now, here)
    if name not in known or "train" not in known[name].records:
        there = ", ".join(n for n, one in known.items() if "train" in one.records) or "none"
        raise InputError(f"--of {name}: no trained experiment of that name; there are: {there}")
    return known[name]
