"""How much of the validation text stands in the training text, word for word."""

from __future__ import annotations

import numpy as np

from pipeline.data.token_files import Tokens

LENGTH = 32  # tokens of a passage, a power of two: long enough not to recur by chance
PASSAGES = 20_000  # of the validation split at most, evenly spread
SEARCHED = 50_000_000  # training tokens at most, the first ones
PIECE = 1 << 20  # training tokens hashed at a time: 8 MB

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes modulo 2^64


def overlap(train: Tokens, val: Tokens) -> float:
    """Share of validation passages of 32 tokens that occur anywhere in the training tokens.

    Passages are compared by a 64-bit hash: a chance match among 50 million is one in ten
    thousand. 0 where the validation split has no whole passage.
    """
    starts = np.arange(0, len(val.ids) - LENGTH + 1, LENGTH)
    if len(starts) > PASSAGES:
        starts = starts[np.linspace(0, len(starts) - 1, PASSAGES).astype(int)]
    if not len(starts):
        return 0.0
    passages = np.stack([val.ids[start : start + LENGTH] for start in starts])  # (n, LENGTH)
    wanted, times = np.unique(passage_hashes(passages)[:, 0], return_counts=True)
    seen = np.zeros(len(wanted), dtype=bool)
    for start in range(0, min(len(train.ids), SEARCHED), PIECE):
        hashes = passage_hashes(train.ids[start : start + PIECE + LENGTH - 1])
        # Looking the many up among the few needs no sort of the many.
        places = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
        seen[places[wanted[places] == hashes]] = True
    return float(times[seen].sum() / times.sum())


def passage_hashes(ids: np.ndarray) -> np.ndarray:
    """(..., n) token ids -> (..., n - LENGTH + 1) uint64: the hash of the passage at each place.

    Polynomial in the tokens, built by doubling: a hash of 2 k tokens is one of the first k times
    base^k plus one of the others.
    """
    hashes = ids.astype(np.uint64) + np.uint64(1)
    power, length = _BASE, 1
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        while length < LENGTH and hashes.shape[-1] > length:
            hashes = hashes[..., :-length] * power + hashes[..., length:]
            power, length = power * power, 2 * length
    return hashes if length == LENGTH else hashes[..., :0]
