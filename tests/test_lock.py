"""The locks: every pin of constraints.txt with hashes, PyTorch's own apart from the rest."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tools.lock import LOCKS, TORCH, blocks

HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")


def locked(name: str) -> dict[str, int]:
    """What a lock requires, with how many files of it are known."""
    found = blocks((ROOT / name).read_text("utf-8"))
    return {block.partition(" \\")[0].strip(): len(HASH.findall(block)) for block in found}


def test_the_locks_hold_every_pin_once_with_a_hash_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    required = [pin for name in LOCKS for pin in locked(name)]
    assert sorted(required) == sorted(pins)
    assert all(files for name in LOCKS for files in locked(name).values())


@pytest.mark.parametrize(("name", "torch"), LOCKS.items())
def test_what_only_a_cuda_build_needs_is_with_torch(name: str, torch: bool) -> None:
    assert all(bool(TORCH.match(pin)) == torch for pin in locked(name))
    assert ("torch==2.13.0" in locked(name)) == torch


def test_the_locks_name_no_index() -> None:
    assert not [name for name in LOCKS if "://" in (ROOT / name).read_text("utf-8")]
