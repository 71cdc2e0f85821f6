"""The lock: every pin of constraints.txt with hashes, but PyTorch's own."""

from __future__ import annotations

import re

from tests.conftest import ROOT
from tools.lock import LOCK, TORCH, blocks

HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")
TEXT = LOCK.read_text("utf-8")
LOCKED = {block.partition(" \\")[0].strip(): len(HASH.findall(block)) for block in blocks(TEXT)}
LINES = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
PINS = [line for line in LINES if not line.startswith("#")]


def test_the_lock_holds_every_pin_but_pytorchs_with_hashes_and_nothing_else() -> None:
    assert sorted(LOCKED) == sorted(pin for pin in PINS if not TORCH.match(pin))
    assert all(LOCKED.values())


def test_what_only_a_build_of_pytorch_needs_is_left_to_pip() -> None:
    assert "torch==2.13.0" in PINS and "torch==2.13.0" not in LOCKED
    assert not [pin for pin in LOCKED if re.match(r"torch|triton|nvidia-(?!ml-py)|cuda", pin)]


def test_the_lock_names_no_index() -> None:
    assert "://" not in TEXT
