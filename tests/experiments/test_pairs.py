"""Any runs side by side: outcomes, where curves part, the noise of seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.experiments.comparison import pairs
from pipeline.records.run_data import Experiment
from pipeline.reports.report import differing
from tests.experiments.test_comparison import run


def named(name: str, *words: object, **changes: object):
    return replace(run(*words, **changes), name=name, record=name)


BASE = named("base", final=5.0)
SEEDS = [named("two", seed=2, final=5.1), named("three", seed=3, final=4.9)]


def test_every_run_is_compared_with_the_first_one() -> None:
    other = named("other", "bf16", final=5.25, losses=[10.0, 9.0, 8.2, 7.3])
    base, pair = pairs([BASE, other], [])
    assert (base.difference, base.apart, base.gap) == (0, None, 0)
    assert (pair.difference, pair.apart) == (0.25, 2)  # 8.2 against 8.0 is more than one percent
    assert pair.gap == pytest.approx(0.3)
    assert pair.words() == (
        "+0.25 nats/token from base, the noise of seeds unknown; "
        "the curves are first more than 1% apart at step 2"
    )


@pytest.mark.parametrize(("final", "where"), [(5.19, "inside"), (5.21, "beyond")])
def test_a_difference_is_compared_with_two_std_of_the_bases_seeds(final: float, where: str) -> None:
    _, pair = pairs([BASE, named("other", "bf16", final=final)], SEEDS)
    assert pair.seeds is not None and pair.seeds.std == pytest.approx(0.1)
    assert f"{where} two std of the noise of 3 seeds" in pair.words()
    assert (
        pair.seeds.words()
        == "3 seeds (base, two, three) have outcomes with a std of 0.1 nats/token"
    )


def test_seeds_of_the_run_itself_serve_where_the_base_has_none() -> None:
    other, sibling = named("other", "bf16", final=5.3), named("b2", "bf16", seed=2, final=5.5)
    _, pair = pairs([BASE, other], [sibling])
    assert {one.name for one in pair.seeds.runs} == {"other", "b2"}


def test_seeds_of_runs_that_are_not_shown_and_not_alike_say_nothing() -> None:
    strangers = [named(f"s{n}", "fp16", seed=n) for n in (1, 2, 3)]
    assert [one.seeds for one in pairs([BASE, named("other", "bf16")], strangers)] == [None] * 2


def test_another_seed_of_the_base_is_called_that() -> None:
    _, pair = pairs([BASE, SEEDS[0]], SEEDS)
    assert "another seed of the same settings" in pair.words()


def test_two_experiments_with_one_training_are_called_that() -> None:
    _, pair = pairs([BASE, replace(BASE, name="again")], [])
    assert pair.words() == "shares its training with base"


def test_all_are_judged_by_what_every_one_has() -> None:
    base, pair = pairs([BASE, named("other", "bf16", final=None)], [])
    assert [one.run.judged_by() for one in (base, pair)] == ["validation loss while training"] * 2
    assert pair.difference == 0


def experiment(name: str, **params: object) -> Experiment:
    head = {"kind": "start", "time": 1, "stage": "tokenize", "params": params}
    return Experiment(name, name, {"tokenize": [head]})


def test_only_settings_that_differ_are_named_and_a_lacking_one_differs() -> None:
    found = [experiment("a", lr=0.1, steps=5), experiment("b", lr=0.2, steps=5, new=True)]
    assert differing(found) == {"lr": [0.1, 0.2], "new": [None, True]}
    assert differing([found[0], found[0]]) == {}
