"""Claims about the benchmarks: who disagrees gets no time, and what was found is what is shown."""

from __future__ import annotations

import itertools
import json
import operator
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import checkouts, outcomes, sample, side_by_side, summary, tokenizing, train
from benchmarks.outcomes import OURS, Case
from benchmarks.peers import HF, Task
from benchmarks.side_by_side import Contestant, Result, Verdict, measure
from pipeline.data import tokenizer

NANO = Task("test")

# A peer as a script that works when imported, and needs a neighbour that is not installed.
SCRIPT = """
import math
import neighbour_of_the_script
from dataclasses import dataclass

@dataclass
class Config:
    width: int = 3

def area(side):
    return math.prod([side, scale])

scale = 7
raise SystemExit("this script works when imported")

if __name__ == "__main__":
    def inner(text):
        return text.upper()
"""


def equal(answers, others):
    return Verdict("" if answers == others else f"{answers[-1]} instead of {others[-1]}")


def counting(answer=None):
    """A turn that says how often it was called, or `answer`."""
    calls = itertools.count(1)
    return partial(next, calls) if answer is None else lambda: answer


def turns(*answers):
    """start() of a contestant that gives one answer a turn."""
    return partial(partial, next, iter(answers))


def fixed(answer):
    return partial(partial, operator.pos, answer)


# --- the core


def test_a_contestant_that_disagrees_has_no_time_and_the_reason_is_told() -> None:
    found = measure(
        [
            Contestant("right", fixed(4)),
            Contestant("wrong", fixed(5)),
            Contestant("broken", fixed("text")),
            Contestant("gone", partial(partial, os._exit, 3)),
            Contestant("absent", fixed(4), missing="not installed"),
        ],
        equal,
        reference="right",
        rounds=3,
    )
    assert [len(result.seconds) for result in found] == [3, 0, 0, 0, 0]
    reasons = [result.refused for result in found]
    assert reasons[:2] == ["", "5 instead of 4"]
    assert reasons[2].startswith("TypeError: bad operand type")
    assert reasons[3:] == ["its process ended with exit code 3", "not installed"]
    assert found[0].memory_mib is None or found[0].memory_mib >= 0


def test_a_contestant_that_breaks_half_way_keeps_no_time() -> None:
    found = measure(
        [Contestant("steady", fixed(1)), Contestant("tired", turns(1, 1, 1))],
        equal,
        reference="steady",
        rounds=4,
    )
    assert [len(result.seconds) for result in found] == [4, 0]
    assert found[1].refused.startswith("StopIteration")


def test_without_the_reference_nothing_is_compared() -> None:
    with pytest.raises(ValueError, match="a gives the answers: not here"):
        measure([Contestant("a", fixed(1), missing="not here")], equal, reference="a", rounds=1)


def test_a_turn_is_timed_whole_and_alone() -> None:
    found = measure(
        [Contestant(name, partial(partial, time.sleep, 0.05)) for name in "ab"],
        equal,
        reference="a",
        rounds=2,
    )
    assert all(seconds >= 0.05 for result in found for seconds in result.seconds)


def test_memory_is_that_of_the_turns() -> None:
    hold = partial(partial, hold_memory, 60_000_000)
    small = Contestant("small", partial(partial, time.sleep, 0.1))
    found = measure([Contestant("large", hold), small], lambda a, b: Verdict(), "small", rounds=1)
    assert found[0].memory_mib - found[1].memory_mib > 40


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process's peak")
def test_memory_that_is_held_between_two_looks_counts(monkeypatch) -> None:
    monkeypatch.setattr(side_by_side, "LOOK_EVERY", 30.0)
    peak, none = (
        Contestant(f"{size}", partial(partial, hold_for_a_moment, size))
        for size in (100_000_000, 1)
    )
    found = measure([peak, none], lambda a, b: Verdict(), "1", rounds=1)
    assert 80 < found[0].memory_mib - found[1].memory_mib < 120


def hold_for_a_moment(size: int) -> int:
    return len(b"x" * size)


def hold_memory(size: int) -> int:
    held = bytearray(os.urandom(size))
    time.sleep(0.2)
    return len(held)


def test_speed_is_by_medians_and_its_range_by_rounds() -> None:
    ours, theirs = Result("a", "", [1.0, 2.0, 4.0]), Result("b", "", [3.0, 3.0, 3.0])
    assert ours.speed(theirs) == (1.5, 0.75, 3.0)
    assert theirs.speed(Result("c", "")) is None


# --- checkouts


def test_a_script_is_not_run_for_its_definitions(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    theirs = checkouts.definitions(script, ("scale",))
    theirs.scale = 2
    assert theirs.area(5) == 10 and theirs.Config().width == 3 and theirs.inner("a") == "A"


def test_a_contestant_without_a_checkout_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "no checkout named" in checkouts.part_in("nanoGPT", None)["missing"]
    assert "no such folder" in checkouts.part_in("nanoGPT", str(tmp_path / "x"))["missing"]
    assert "missing" not in checkouts.part_in("nanoGPT", str(tmp_path))


# --- what is written


def case(name="small, fp32", **changes) -> Case:
    results = [
        Result(OURS, "", [1.0, 1.0, 2.0], memory_mib=100.0),
        Result("slow", "v1", [2.0, 2.0, 2.0], memory_mib=200.0),
        Result("wrong", "v2", refused="loss of step 0: 3 instead of 4"),
    ]
    return Case(
        **{"name": name, "work": 10, "unit": "tokens", "baseline": "slow"} | changes,
        results=results,
    )


def test_a_table_shows_ratios_and_why_there_is_no_time() -> None:
    text = outcomes.table(case())
    own, slow, wrong = text.splitlines()[2:]
    cells = [cell.strip() for cell in own.split("|")[1:-1]]
    assert cells == [OURS, "", "10", "1", "1", "2", "2", "1", "2", "100", "0.5", ""]
    assert "no time counts: loss of step 0: 3 instead of 4" in wrong
    assert slow.count(" 1 |") == 4


def test_a_benchmark_that_we_lose_says_so() -> None:
    lost = outcomes.table(case(baseline=OURS)).splitlines()[3]
    assert [cell.strip() for cell in lost.split("|")][7] == "0.5"
    turned = case()
    turned.results[0].seconds[:] = [4.0, 4.0, 4.0]
    assert "slow 0.50 (0.50 to 0.50)" in " ".join(summary._cells(turned, turned.results[0]))


def test_cases_are_kept_beside_one_another_and_replaced_alone(tmp_path: Path) -> None:
    outcomes.publish("train", case("a"), tmp_path)
    outcomes.publish("train", case("b"), tmp_path)
    outcomes.publish("train", case("a", work=30), tmp_path)
    kept = outcomes.read(tmp_path / "train.json")
    assert [(name, c.work) for name, (c, _) in kept.items()] == [("a", 30), ("b", 10)]
    assert kept["b"][0] == case("b")
    page = (tmp_path / "train.md").read_text("utf-8")
    assert "torch" in page and "GiB" in page and "## b" in page
    assert (tmp_path / "train.svg").read_bytes().startswith(b"<?xml")
    assert "slow 2.00 (1.00 to 2.00)" in summary.summary(tmp_path)


def test_the_command_names_no_place_of_a_checkout() -> None:
    words = [
        "/home/me/b/train.py",
        "--nanogpt",
        "/secret/a",
        "--build-nanogpt=/secret/b",
        "--size",
        "nano",
    ]
    shown = outcomes.command(words)
    assert shown == (
        "python benchmarks/train.py --nanogpt CHECKOUT --build-nanogpt=CHECKOUT --size nano"
    )


# --- train and sample


def test_the_first_losses_of_ours_are_those_of_transformers() -> None:
    ours, theirs = train.ours(NANO), train.transformers(NANO)
    answers, others = ([turn() for _ in range(3)] for turn in (ours, theirs))
    assert train.agree(answers, others) == Verdict()
    assert len(set(others)) == 3


@pytest.mark.parametrize("step", [0, 2])
def test_another_loss_is_refused(step: int) -> None:
    losses = [10.8, 10.7, 10.6]
    other = [loss * (1.003 if n == step else 1) for n, loss in enumerate(losses)]
    assert f"loss of step {step}: " in train.agree(losses, other).refused
    assert train.agree(losses, other, "bf16") == Verdict()


def test_a_batch_is_the_same_for_all_and_another_each_step() -> None:
    (x, y), (other, _) = NANO.batch(0), NANO.batch(1)
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(x, NANO.batch(0)[0])
    assert not torch.equal(x, other) and x.min() >= 0 and x.max() < 50257


def test_greedy_tokens_of_every_exact_way_are_equal() -> None:
    ways = [sample.transformers(NANO, 2, 6, None), sample.transformers(NANO, 2, 6, "static")]
    ways += [sample.ours(NANO, 2, 6, weights) for weights in sample.weights_settings()]
    answers = [turn() for turn in ways]
    assert {sample.agree([answer], [answers[0]]).refused for answer in answers} == {""}


def test_other_tokens_are_refused_and_rounded_weights_that_choose_by_chance() -> None:
    prompt = [0] * sample.PROMPT
    theirs = [(None, [prompt + [1, 2, 3, 4]])]
    near, far = [prompt + [1, 2, 3, 9]], [prompt + [1, 9, 9, 9]]
    assert sample.agree([(None, near)], theirs).refused == f"75% of the tokens are those of {HF}"
    assert sample.agree([(0.75, far)], theirs) == Verdict(
        "", "chooses 75% of the tokens as exact weights do"
    )
    assert sample.agree([(0.25, near)], theirs).refused


def test_tokens_are_compared_with_those_that_exact_weights_choose_after_the_same_text() -> None:
    assert sample.chosen_as_exactly(NANO, 2, 6, "fp32") == 1.0


# --- tokenizing


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / tokenizing.TEXT
    lines = [json.dumps({"text": f"document {n}, naïve 中文\n" * (n + 1)}) for n in range(40)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("way", [tokenizing.threads, tokenizing.hf_tokenizers, tokenizing.ours])
def test_every_way_writes_the_ids_of_tiktoken(text: Path, way) -> None:
    (text.parent / "reference").mkdir()
    (text.parent / "own").mkdir()
    reference = tokenizing.one_process(text, text.parent / "reference")()
    answer = way(text, text.parent / "own")()
    assert tokenizing.agree([answer], [reference]) == Verdict()


def test_one_wrong_id_is_refused(text: Path) -> None:
    layout, [file] = tokenizing.one_process(text, text.parent)()
    ids = tokenizing._in_order(layout, [file])
    for name, change in (("wrong.bin", ids.copy()), ("short.bin", ids[:-1])):
        change[17] += 1
        change.tofile(text.parent / name)
    wrong, short = (str(text.parent / name) for name in ("wrong.bin", "short.bin"))
    refused = tokenizing.agree([(layout, [wrong])], [(layout, [file])]).refused
    assert refused == "other ids from place 17 on"
    assert "ids instead of" in tokenizing.agree([(layout, [short])], [(layout, [file])]).refused


def test_end_of_text_behind_documents_counts_as_before_them(text: Path) -> None:
    layout, [file] = tokenizing.one_process(text, text.parent)()
    ids = tokenizing._in_order(layout, [file])
    (text.parent / "last.bin").write_bytes(ids[1:].tobytes() + ids[:1].tobytes())
    assert ids[0] == tokenizer.EOT
    last = ("last", [str(text.parent / "last.bin")])
    assert tokenizing.agree([last], [(layout, [file])]) == Verdict()


def test_the_text_is_not_the_same_one_again() -> None:
    words = [f"{n}word{n * n}" for n in range(1000)]
    first, other = tokenizing._other_words(words, 1), tokenizing._other_words(words, 2)
    assert tokenizing._other_words(words, 0) == {}
    assert len(first) == len(other) == 250 and first != other
    assert set(first.values()) - set(words)
