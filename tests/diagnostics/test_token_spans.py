"""Offsets, documents and the text of batches, held against the tokens that were really read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import config as configuration
from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.data import token_files, token_writer
from pipeline.data.batches import validation_windows
from pipeline.data.documents import Document
from pipeline.data.token_files import Tokens
from pipeline.data.tokenizer import EOT, encode
from pipeline.diagnostics import token_spans
from pipeline.diagnostics.nonfinite import Place
from pipeline.records.run_data import Experiment
from pipeline.training import loop


@pytest.fixture
def settings(make_config) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        small = {"train__batch_size": 3, "train__sequence_length": 16, "train__val_tokens": 150}
        return make_config(**small | changes).train

    return make


@pytest.fixture
def tokens() -> Tokens:
    """Some 20 documents of chance length, the first at token 0."""
    chance = np.random.default_rng(0)
    ids = chance.integers(0, 1000, 700).astype(np.uint16)
    ids[np.unique([0, *chance.integers(0, 700, 20)])] = EOT
    return Tokens(ids, 1, "", int((ids == EOT).sum()), Path("train.bin"))


def spans(text: str) -> list[tuple[int, int, int, int]]:
    """(first, last, first document, last document) of every sequence named in the text."""
    found = re.findall(r"(\d+)-(\d+) \(documents? (\d+)(?:-(\d+))? of \d+\)", text)
    return [(int(a), int(b), int(c), int(d or c)) for a, b, c, d in found]


@pytest.mark.parametrize("step", [0, 4, 9])  # the last reaches into the next epoch
def test_the_sequences_named_are_those_that_the_step_reads(settings, tokens, step: int) -> None:
    config = settings(train__accumulate=2)
    named = spans(token_spans.of_step(tokens, config, step))
    batches = loop.micro_batches(tokens, config, step)
    read = torch.cat([torch.cat([x, y[:, -1:]], 1) for x, y in batches]).tolist()
    assert [tokens.ids[a : b + 1].tolist() for a, b, *_ in named] == read


@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_documents_are_those_that_begin_up_to_the_token(
    settings, tokens, monkeypatch, chunk: int
) -> None:
    monkeypatch.setattr(token_spans, "CHUNK", chunk)
    for first, last, begin, end in spans(token_spans.of_step(tokens, settings(), 2)):
        assert begin == (tokens.ids[: first + 1] == EOT).sum()
        assert end == (tokens.ids[: last + 1] == EOT).sum()
    offsets = np.arange(700)
    expected = (tokens.ids == EOT).cumsum()
    assert np.array_equal(token_spans.documents_at(tokens, offsets), expected)


def test_the_sequences_at_fault_come_first_and_are_the_ones_to_read(settings, tokens) -> None:
    config = settings(train__accumulate=2)
    place = Place("the loss", rows=[2], batch=1)
    text = token_spans.of_step(tokens, config, 4, place)
    fault, *named = spans(text)
    assert "  at fault: " in text.splitlines()[1]
    assert fault == named[5]
    assert f"`python -m pipeline text {fault[0]}-{fault[1]}`" in text
    everywhere = token_spans.of_step(tokens, config, 4, Place("the loss", rows=[0, 1, 2], batch=1))
    assert "at fault" not in everywhere
    assert f"pipeline text {named[3][0]}-{named[3][1]}`" in everywhere


def test_a_large_step_is_named_in_part_and_says_so(settings, tokens) -> None:
    config = settings(train__accumulate=11, train__batch_size=20)
    text = token_spans.of_step(tokens, config, 0)
    assert len(spans(text)) == 8 * 8
    assert text.count("and 12 more") == 8 and "and 3 more micro-batches" in text


def test_the_batch_of_validation_is_named(settings, tokens) -> None:
    config = settings()
    text = token_spans.of_validation(tokens, config, Place("the loss", rows=[1], batch=2))
    ((first, last, *_),) = spans(text)
    x, y = list(validation_windows(tokens, batch_size=3, sequence_length=16, limit=150))[2]
    assert tokens.ids[first : last + 1].tolist() == [*x[1].tolist(), int(y[1, -1])]
    assert f"--split val {first}-{last}`" in text


@pytest.fixture
def said(tmp_path: Path, monkeypatch, caplog) -> Callable[..., str]:
    """The command in a workspace of two documents of training text."""
    texts = ["The first text.", "And the second one, which is longer than that."]
    made = [Document(f"{n}", "train", text) for n, text in enumerate(texts)]
    token_writer.write_tokens([*made, Document("v", "val", "Held out.")], tmp_path / paths.TOKENS)
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")

    def call(*words: str) -> str:
        command(["text", *words])
        return caplog.messages[-1]

    return call


def test_the_command_prints_the_text_of_tokens(said) -> None:
    second = len(encode("The first text.")) + 1
    text = said(f"0-{second}", "1-2")
    train = paths.TOKENS / "train.bin"
    assert text == (
        f"{train}, tokens: 0-{second} (documents 1-2 of 2)\n"
        "<|endoftext|>The first text.<|endoftext|>\n\n"
        f"{train}, tokens: 1-2 (document 1 of 2)\nThe first"
    )
    assert said("1-2", "--split", "val").endswith("(document 1 of 1)\nHeld")


def test_the_command_lists_every_sequence_of_a_step(said, monkeypatch, make_config) -> None:
    changes = {"train__batch_size": 10, "train__sequence_length": 4, "train__accumulate": 9}
    config = make_config(**changes, evaluate__choice_items=0)
    monkeypatch.setattr(token_spans.configuration, "load", lambda: config)
    text = said("--step", "3")
    assert len(spans(text)) == 90 and "step 3 by params.yaml" in text and "more" not in text


@pytest.fixture
def trained(said, make_config, monkeypatch) -> Callable[..., Experiment]:
    """An experiment on the tokens that are here, or on others; params.yaml has other settings."""
    small = {"train__sequence_length": 4, "train__batch_size": 1, "evaluate__choice_items": 0}
    monkeypatch.setattr(token_spans.configuration, "load", lambda: make_config(**small))
    here = token_files.open_tokens(paths.TOKENS, "train").sha256

    def make(name: str, rev: str, batch_size: int, digest: str = here) -> Experiment:
        settings = configuration.flatten(make_config(**small | {"train__batch_size": batch_size}))
        head = {"kind": "start", "time": 0, "name": name, "params": settings}
        tags = {"kind": "tags", "values": {"digest.train": digest}}
        return Experiment(name, rev, {"train": [head, tags]})

    return make


def test_a_step_is_that_of_the_run_it_is_asked_of(said, trained, monkeypatch) -> None:
    hot, here = trained("hot", "abc", 5), trained("last", "", 3)
    monkeypatch.setattr(token_spans, "experiments", lambda *_: [hot, here])
    monkeypatch.setattr(token_spans, "of_workspace", lambda *_: here)
    for words, count, whose in (
        ([], 3, "of workspace:"),
        (["--of", "hot"], 5, "of hot:"),
        (["--of", "last"], 3, "of last:"),
    ):
        text = said("--step", "3", *words)
        assert len(spans(text)) == count and whose in text


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--step", "3", "--of", "cold"], "--of cold: no trained experiment of that name"),
        (["--step", "3", "--of", "hot"], "not the tokens that hot was trained on"),
        (["--step", "3", "--of", "hot"], "...); `dvc exp apply hot` brings those of hot"),
        (["--step", "3"], "not the tokens that workspace was trained on"),
        (["0-5", "--tokens", "abc"], "other tokens than those asked for, abc"),
    ],
)
def test_the_text_of_other_tokens_is_refused(
    said, trained, monkeypatch, caplog, words: list[str], what: str
) -> None:
    hot, here = trained("hot", "abc", 5, "d" * 64), trained("last", "", 3, "e" * 64)
    monkeypatch.setattr(token_spans, "experiments", lambda *_: [hot, here])
    monkeypatch.setattr(token_spans, "of_workspace", lambda *_: here)
    with pytest.raises(SystemExit) as ended:
        said(*words)
    assert ended.value.code == 3 and what in caplog.text


def test_a_temporary_workspace_names_its_tokens(settings, tokens, tmp_path, monkeypatch) -> None:
    aside = tmp_path / ".dvc" / "tmp" / "exps" / "one"
    aside.mkdir(parents=True)
    monkeypatch.chdir(aside)
    monkeypatch.setenv("DVC_ROOT", str(aside))
    named = replace(tokens, sha256="f00d" * 16)
    text = token_spans.of_step(named, settings(), 4)
    assert " --tokens f00df00df00d`." in text and "--step" not in text
    text = token_spans.of_validation(named, settings(), Place("the loss", rows=[1], batch=2))
    assert " --tokens f00df00df00d`." in text


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["5-2"], 3, "tokens 5-2: expected FIRST-LAST from 0 to"),
        (["0-999"], 3, "tokens 0-999: expected FIRST-LAST from 0 to"),
        (["five"], 3, "five: expected FIRST-LAST, as 20480-20544"),
        ([], 2, "expected either FIRST-LAST or --step"),
        (["--step", "-1"], 2, "--step: -1: expected 0 or more"),
    ],
)
def test_the_command_says_what_it_takes(said, caplog, capsys, words, code: int, what: str) -> None:
    with pytest.raises(SystemExit) as ended:
        said(*words)
    assert ended.value.code == code
    assert what in caplog.text + capsys.readouterr().err
