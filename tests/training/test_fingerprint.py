"""Fingerprints tell any bit apart, and are the same wherever the bits are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import paths
from pipeline.compute import sharding
from pipeline.compute.ranks import Ranks
from pipeline.records import record_file
from pipeline.records.run_data import RunData
from pipeline.resume import fork
from pipeline.training import fingerprint, loop, training_step
from pipeline.training.fingerprint import CHUNK, METRIC, PARTS
from stages import train
from tests.conftest import recipe
from tests.helpers.ranks import needs_fork, together
from tests.resume.test_checkpoints import (  # noqa: F401
    at_step,
    in_a_child,
    kill,
    prepared,
    settings,
    workspace,
)
from tests.training import test_ranks
from tests.training.test_ranks import CPU, fit, model, start, tokens  # noqa: F401

forking = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def sums(*parameters: torch.Tensor) -> list[int]:
    return fingerprint.weight_sums(parameters, Ranks()).tolist()


# --- of weights


def test_each_bit_of_each_parameter_changes_the_sums() -> None:
    given = [torch.randn(3, 5), torch.zeros(4), torch.randn(2, 2, dtype=torch.bfloat16)]
    before = sums(*given)
    for number, parameter in enumerate(given):
        bits = parameter.view(-1).view(fingerprint.BITS[parameter.element_size()])
        for at in range(len(bits)):
            for bit in range(8 * bits.element_size()):
                mask = torch.ones((), dtype=torch.int64) << bit
                flipped = bits[at] ^ mask.to(bits.dtype)
                kept, bits[at] = bits[at].clone(), flipped
                changed = [a != b for a, b in zip(sums(*given), before, strict=True)]
                assert changed == [n == number for n in range(3)], (number, at, bit)
                bits[at] = kept
    assert sums(*given) == before


@pytest.mark.parametrize("other", [1, 1 << 15, CHUNK - 1, CHUNK, CHUNK + 7])
def test_two_numbers_in_each_others_place_change_the_sums(other: int) -> None:
    parameter = torch.zeros(CHUNK + 9)
    parameter[0], parameter[other] = 1.0, 2.0
    before = sums(parameter), fingerprint.mark_of(parameter)
    parameter[0], parameter[other] = 2.0, 1.0
    assert sums(parameter) != before[0] and fingerprint.mark_of(parameter) != before[1]


def test_sums_are_those_of_python_integers_and_of_any_number_of_threads() -> None:
    parameter = torch.randn(CHUNK + 1000, generator=torch.Generator().manual_seed(0))
    bits = parameter.view(torch.int32).tolist()
    parts = bits[:CHUNK], bits[CHUNK:]
    wanted = [sum(b * (2 * i + 1) for i, b in enumerate(part)) for part in parts]
    assert sums(parameter) == [fingerprint._signed(number) for number in wanted]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert sums(parameter) == [fingerprint._signed(number) for number in wanted]
    finally:
        torch.set_num_threads(threads)


def test_a_weight_in_parts_has_the_sums_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "CHUNK", 16)
    whole = torch.randn(7, 5)
    total, scratch = 0, fingerprint._scratch(whole)
    for first in (0, 4):  # rows, as two processes have them
        part = whole[first : first + 4]
        total += torch.stack(fingerprint._sums(part, 5 * first, whole.numel(), scratch))
    assert total.tolist() == sums(whole)


# --- of steps

Batches = Callable[[int], list[training_step.Batch]]


@pytest.fixture
def config(make_config):
    """config(fingerprint_every=3) -> six steps of four sequences, 1 a micro-batch."""
    return lambda **changes: test_ranks.settings(make_config, **{"fingerprint_every": 2} | changes)


@pytest.fixture
def trained(config, model):  # noqa: F811
    """trained(precision, other batches, seed=...) -> the fingerprint of each step, or None."""

    def made(name: str = "fp32", other: Batches | None = None, seed: int = 0, **changes: Any):
        torch.manual_seed(seed)
        own = config(**changes)
        of = other or partial(loop.micro_batches, tokens(), own)
        return [one.fingerprint for one in fit(start(model, own, Ranks(), name), own, of)]

    return made


def test_every_nth_step_has_one_of_what_it_begins_with(trained, model) -> None:  # noqa: F811
    found = trained()
    assert [one is not None for one in found] == [True, False] * 3
    assert found[0].weights == fingerprint._joined(sums(*model.parameters()))
    for part in PARTS[:2]:  # without dropout nothing is drawn
        assert len({getattr(one, part) for one in found[::2]}) == 3
    assert trained(fingerprint_every=0) == [None] * 6


def test_it_changes_no_loss_no_weight_and_no_chance(config, model) -> None:  # noqa: F811
    ends = []
    for every in (0, 1):
        torch.manual_seed(0)
        own = config(fingerprint_every=every)
        state = start(model, own, Ranks())
        reports = fit(state, own, partial(loop.micro_batches, tokens(), own))
        chance = torch.get_rng_state().tolist()
        ends.append(([r.loss for r in reports], sums(*state.model.parameters()), chance))
    assert ends[0] == ends[1]


def test_the_batch_is_told_by_its_sequences_however_the_step_is_cut(trained, config) -> None:
    def usual(step: int) -> list[training_step.Batch]:
        return loop.micro_batches(tokens(), config(), step)

    def cut(step: int) -> list[training_step.Batch]:
        x, y = (torch.cat(part) for part in zip(*usual(step), strict=True))
        return [(x[:3].flip(0), y[:3].flip(0)), (x[3:], y[3:])]

    def other(step: int) -> list[training_step.Batch]:
        made = [(x.clone(), y.clone()) for x, y in usual(step)]
        made[-1][1][-1, -1] ^= 1
        return made

    assert trained(other=cut)[0] == trained()[0]
    assert trained(other=other)[0].batch != trained()[0].batch
    assert trained(other=other)[0].weights == trained()[0].weights


def test_another_random_state_and_another_precision_are_told(trained) -> None:
    usual, other, low = trained(), trained(seed=1), trained("bf16")
    assert other[0].random != usual[0].random
    assert replace(other[0], random=0) == replace(usual[0], random=0)
    assert low[0] == usual[0], "the precision of a step is none of its beginning"
    assert low[2].weights != usual[2].weights and low[2].batch == usual[2].batch


@needs_fork
@forking
@pytest.mark.parametrize("sharded", [False, True])
def test_several_processes_have_the_fingerprint_of_one(
    trained,
    config,
    model,  # noqa: F811
    sharded: bool,
) -> None:
    own, one = config(fingerprint_every=3), trained(fingerprint_every=3)

    def work(ranks: Ranks) -> list[list[int]]:
        state = start(model, own, ranks)
        of = partial(loop.micro_batches, tokens(), own, ranks=ranks)
        found = [report.fingerprint for report in fit(state, own, of)][::3]
        whole = [sharding.whole(p.detach()) for p in state.model.parameters()]
        last = fingerprint.weight_sums(state.model.parameters(), ranks).tolist()
        return [[f.weights, f.batch] for f in found] + [sums(*whole), last]

    first, second = together(2, work, sharded=sharded)
    assert first == second
    assert first[0] == [one[0].weights, one[0].batch] and first[1][1] == one[3].batch
    assert first[2] == first[3], "parts have the sums of the whole after an update, too"


# --- in the record


def recorded() -> dict[str, dict[int, float]]:
    curves = RunData({"train": record_file.read(paths.record("train"))}).curves
    return {name: dict(curves[METRIC + name]) for name in PARTS}


@forking
def test_the_record_has_it_every_n_steps_equal_across_a_kill_and_in_a_fork(
    workspace: Path,  # noqa: F811
    settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"train__fingerprint_every": 2, "checkpoint__keep_every": 3}
    Path("params.yaml").write_text(recipe(), "utf-8")
    train.main(settings(**own))
    unbroken = recorded()
    assert {step for part in unbroken.values() for step in part} == set(range(0, 12, 2))
    assert all(value == int(value) < 1 << 48 for p in unbroken.values() for value in p.values())
    kept = fork.Kept(
        "base", record_file.read(paths.record("train")), (3, 6, 9), paths.CHECKPOINTS.absolute()
    )
    place = fork.export(kept, 6)
    train.main(settings(**own, train__fork=place.as_posix()))
    forked = recorded()
    assert forked == unbroken, "the same settings: the same steps"

    def killed() -> None:
        with at_step(8, kill):
            train.main(settings(**own, train__val_every=6))

    assert in_a_child(killed) == -9
    train.main(settings(**own, train__val_every=6))
    assert recorded() == unbroken
