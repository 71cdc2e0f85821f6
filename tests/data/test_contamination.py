"""What the validation split shares with the training split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import contamination
from pipeline.data.token_files import Tokens


def tokens(ids: np.ndarray) -> Tokens:
    return Tokens(ids.astype("<u2"), 0, "", 0, Path())


def by_hand(train: np.ndarray, val: np.ndarray) -> float:
    n = contamination.LENGTH
    known = {tuple(train[i : i + n]) for i in range(len(train) - n + 1)}
    passages = [tuple(val[i : i + n]) for i in range(0, len(val) - n + 1, n)]
    return sum(p in known for p in passages) / len(passages)


@pytest.mark.parametrize("shift", [0, 1, 17])
def test_the_share_equals_a_search_by_hand_wherever_the_copy_lies(shift: int, monkeypatch) -> None:
    monkeypatch.setattr(contamination, "PIECE", 64)  # copies lie across the seams, too
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 50, 1000), rng.integers(0, 50, 320)
    train[300 + shift : 300 + shift + 96] = val[64:160]
    found = contamination.overlap(tokens(train), tokens(val))
    assert found == by_hand(train, val) == 0.3


def test_one_other_token_makes_another_passage() -> None:
    val = np.random.default_rng(1).integers(0, 50257, contamination.LENGTH)
    assert contamination.overlap(tokens(val), tokens(val)) == 1
    for place in (0, 15, 31):
        other = val.copy()
        other[place] += 1
        assert contamination.overlap(tokens(other), tokens(val)) == 0


def test_splits_too_short_for_a_passage_share_nothing() -> None:
    short, long = np.arange(contamination.LENGTH - 1), np.arange(100)
    assert contamination.overlap(tokens(long), tokens(short)) == 0
    assert contamination.overlap(tokens(short), tokens(long)) == 0


def test_a_long_split_is_judged_by_passages_spread_over_all_of_it(monkeypatch) -> None:
    monkeypatch.setattr(contamination, "PASSAGES", 10)
    val = np.random.default_rng(2).integers(0, 50257, 100 * contamination.LENGTH)
    half = val[: len(val) // 2]
    assert contamination.overlap(tokens(half), tokens(val)) == 0.5
