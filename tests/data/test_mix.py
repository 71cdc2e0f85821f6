"""A mix of sources: the shares asked for, in all of the tokens and at their beginning."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import corpus, token_files, token_writer, tokenizer
from pipeline.errors import ConfigError, InputError
from stages import tokenize_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Long documents of words, and a fifth as much text in short ones of numbers."""
    lines = [json.dumps({"text": f"some words about {n} " + "word " * 300}) for n in range(200)]
    (tmp_path / "web.jsonl").write_text("\n".join(lines), "utf-8")
    (tmp_path / "sums").mkdir()
    for number in range(300):
        (tmp_path / "sums" / f"{number}.txt").write_text("7+8=15; " * 25 + f"{number}", "utf-8")
    return tmp_path


def mixed(make_config, folder: Path, mix: str):
    changes = {"corpus__source": "mix", "corpus__path": str(folder), "corpus__mix": mix}
    return make_config(**changes, corpus__val_fraction=0.2).corpus


def written(config, place: Path, **how) -> dict:
    return token_writer.write_tokens(corpus.documents(config), place, **how)


def share(meta: dict, split: str, name: str) -> float:
    counts = meta["splits"][split]
    return counts[f"tokens of {name}"] / counts["tokens"]


@pytest.mark.parametrize("asked", [0.2, 0.5, 0.9])
def test_shares_of_tokens_are_those_asked_for_from_the_beginning(
    make_config, folder: Path, asked: float
) -> None:
    config = mixed(make_config, folder, f"{asked} text:sums + {1 - asked:g} jsonl:web.jsonl")
    meta = written(config, folder / "tokens")
    assert share(meta, "train", "text:sums") == pytest.approx(asked, abs=0.03)
    assert share(meta, "val", "text:sums") == pytest.approx(asked, abs=0.15)  # by documents' names
    # By what the tokens say, not by the count: the first ones, and the last ones.
    ids = token_files.open_tokens(folder / "tokens", "train").ids
    for part in (ids[: len(ids) // 4], ids[-len(ids) // 4 :]):
        texts = tokenizer.gpt2().decode(part.tolist()).split(tokenizer.EOT_TEXT)
        sizes = {k: 0 for k in (True, False)}
        for text in texts:
            sizes["=" in text] += len(tokenizer.encode(text)) + 1
        assert sizes[True] / sum(sizes.values()) == pytest.approx(asked, abs=0.06)


def test_every_text_is_there_and_only_the_source_that_ends_early_comes_again(
    make_config, folder: Path
) -> None:
    config = mixed(make_config, folder, "0.8 text:sums + 0.2 jsonl:web.jsonl")
    every = [d for d in corpus.documents(config) if d.starts]
    times = corpus.times_read(config, corpus.check(config))
    names = {name: [d.name for d in every if d.source == name] for name in times}
    assert len(names["jsonl:web.jsonl"]) == len(set(names["jsonl:web.jsonl"])) == 200
    assert times["jsonl:web.jsonl"] == 1 and len(set(names["text:sums"])) == 300
    assert times["text:sums"] > 2
    assert len(names["text:sums"]) / 300 == pytest.approx(times["text:sums"], rel=0.05)
    assert {d.split for d in every if d.name == every[0].name} == {every[0].split}


def test_documents_of_several_parts_stay_whole(make_config, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.data.documents.PART_CHARACTERS", 64)
    config = mixed(make_config, folder, "0.5 text:sums + 0.5 jsonl:web.jsonl")
    for (source, name), parts in groupby(corpus.documents(config), lambda d: (d.source, d.name)):
        assert [part.starts for part in parts].count(True) == 1, (source, name)


def test_a_mix_that_was_stopped_goes_on_to_the_same_bytes(
    make_config, folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr(token_writer, "KEPT_EVERY", 1)
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 1 << 12)
    config = mixed(make_config, folder, "0.3 text:sums + 0.7 jsonl:web.jsonl")
    whole = written(config, folder / "whole")
    kept = folder / "kept"
    kept.mkdir()

    calls = iter(range(20))

    def stopping(done: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(config, folder / "other", kept=kept, progress=stopping)
    assert token_writer.begun(kept)
    assert written(config, folder / "other", kept=kept) == whole
    for name in ("train.bin", "val.bin"):
        paths = [folder / place / name for place in ("whole", "other")]
        assert np.array_equal(*(np.fromfile(path, np.uint16) for path in paths))


def test_files_and_what_is_passed_over_are_those_of_all_sources(make_config, folder: Path) -> None:
    (folder / "sums" / "x.csv").touch()
    config = mixed(make_config, folder, "0.3 text:sums + 0.7 jsonl:web.jsonl")
    assert len(corpus.files(config)) == 301 and corpus.reads_files(config)
    assert corpus.left_out(config).startswith("text:sums: left out 1 .csv (x.csv)")
    assert corpus.describe(config)["mix"] == config.mix


def test_a_source_without_text_is_refused(make_config, folder: Path) -> None:
    (folder / "none.jsonl").write_text('{"text": ""}\n', "utf-8")
    config = mixed(make_config, folder, "0.3 text:sums + 0.7 jsonl:none.jsonl")
    with pytest.raises(InputError, match="corpus.mix: jsonl:none.jsonl: no text is there"):
        next(corpus.documents(config))


@pytest.mark.parametrize(
    "mix",
    [
        *("none", "1.0 shakespeare", "0.5 shakespeare + 0.6 python-docs", "shakespeare"),
        *("1.5 shakespeare + -0.5 python-docs", "0.5 shakespeare + 0.5 shakespeare"),
        *("0.5 shakespeare + 0.5 chat:a", "0.5 shakespeare + 0.5 jsonl:../a", "nan shakespeare"),
        *("half shakespeare + 0.5 python-docs", "0.5 jsonl + 0.5 shakespeare", "0.5 + 0.5"),
    ],
)
def test_shares_that_make_no_sense_get_one_error(make_config, mix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(corpus__source="mix", corpus__mix=mix, corpus__path="tests")
    assert str(caught.value).count("\n") == 0
    assert f"corpus.mix={mix}: with corpus.source=mix, shares above 0" in str(caught.value)


def test_a_mix_is_refused_where_it_would_not_be_read(make_config) -> None:
    with pytest.raises(ConfigError, match="expected corpus.source=mix, or none"):
        make_config(corpus__mix="0.5 shakespeare + 0.5 python-docs")
    with pytest.raises(ConfigError, match="corpus.path=data/unset: expected a file or folder"):
        make_config(corpus__source="mix", corpus__mix="0.5 shakespeare + 0.5 text:a")


def test_its_files_are_told_as_git_knows_them(make_config, folder: Path) -> None:
    config = mixed(make_config, folder, "0.5 text:sums + 0.5 jsonl:web.jsonl")
    names = tokenize_corpus.names(config, str(folder))
    assert sorted(names)[-1] == "web.jsonl" and "sums/7.txt" in names and len(names) == 301
