"""What the benchmarks of learning conclude from losses, and what the claim for 124M trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fast, learning
from pipeline import config as configuration
from pipeline.data.token_files import Tokens
from pipeline.ladders.ladder import Done
from pipeline.ladders.plan import Rung, stable_steps, tokens_per_step


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ([6.0, 4.5, 4.0], 0.4 + 0.1 * 1.25 / 1.5),
        ([4.5, 4.0, 3.0], 0.4),  # at most: nobody tried fewer
        ([7.0, 6.0, 5.0], math.inf),
        ([math.inf, 4.5, 4.0], 0.5),  # at most: the one before broke
        ([6.0, 4.5, 4.75], 0.4 + 0.1 * 1.25 / 1.5),  # the first time that it is as low
        ([6.0, math.nan, 4.0], math.nan),
    ],
)
def test_the_share_lies_where_the_losses_come_down_to_the_other(
    losses: Sequence[float], share: float
) -> None:
    ends = list(zip((0.4, 0.5, 0.6), losses, strict=True))
    assert learning.crossed(ends, 4.75) == pytest.approx(share, nan_ok=True)


def test_a_gain_is_one_beyond_the_noise_of_three_seeds() -> None:
    assert learning.sure([0.10, 0.11, 0.12])
    assert not learning.sure([0.02, 0.10, 0.12]), "by two standard errors it would be"
    assert not learning.sure([0.10, 0.11, math.nan])


def test_the_rate_is_one_whose_neighbours_are_worse() -> None:
    assert learning.best(lambda at: (math.log2(at) + 9) ** 2, 1 / 64) == 1 / 512
    assert learning.best(lambda at: math.nan, 1 / 64) == 1 / 64


@pytest.mark.parametrize("lever", [{}, *learning.LEVERS.values()], ids=["none", *learning.LEVERS])
def test_a_training_with_each_lever_sees_the_same_tokens(
    lever: learning.Changes, monkeypatch
) -> None:
    small = {"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16, "model.block_size": 16}
    sizes = {"train.sequence_length": 16, "train.val_tokens": 64, "train.warmup_steps": 1}
    rates = {"train.steps": 10, "train.lr": 0.01, "train.min_lr": 0.001, "train.optimizer": "muon"}
    words = learning.said({**small, **sizes, **rates, **lever}).split()
    ids = np.random.default_rng(0).integers(0, 50257, 2000).astype(np.uint16)
    tokens = Tokens(ids, 1, "", 1, Path("made.bin"))
    seen: list[list[int]] = []
    real = learning.loop.micro_batches

    def noting(*given) -> list:
        batches = real(*given)
        seen.extend(row.tolist() for inputs, _ in batches for row in inputs)
        return batches

    monkeypatch.setattr(learning.loop, "micro_batches", noting)
    assert math.isfinite(learning.train(words, tokens, tokens)["loss"])
    config = configuration.load(
        fast.ROOT / "recipes" / "nano.yaml", words[: len(words) - len(lever)]
    )
    plain = [real(tokens, config.train, step) for step in range(10)]
    assert seen == [row.tolist() for batches in plain for inputs, _ in batches for row in inputs]


@pytest.mark.parametrize("steps", [0, 1907, 400])
def test_the_claims_trainings_differ_in_what_the_recipes_claim_alone(steps: int) -> None:
    base, rungs = fast.rungs(steps)
    long, *cooled = rungs
    assert base.steps == steps or base.steps == 19_073
    for one in rungs:
        assert tokens_per_step(one.config) == tokens_per_step(base.config)
        assert one.config.model == base.config.model and one.config.corpus == base.config.corpus
        assert one.config.train.val_tokens == base.config.train.val_tokens
        assert one.config.train.seed == base.config.train.seed
        assert one.config.train.val_every == one.steps, "validated at its end"
    for one in cooled:
        assert one.parent == long
        assert stable_steps(one.config, one.steps) % long.config.checkpoint.keep_every == 0
    assert long.steps / long.config.checkpoint.keep_every < 20, "states that fill a disk"
    shares = [one.steps / base.steps for one in rungs]
    assert sorted(shares) == pytest.approx(fast.LENGTHS, abs=0.01)


def test_the_fast_recipe_has_the_steps_that_it_claims() -> None:
    share = fast.recipe(fast.FAST).train.steps / fast.recipe(fast.BASE).train.steps
    assert share == pytest.approx(fast.CLAIM.share, abs=0.001)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([3.4, 3.2, 3.1, 3.0], "share is 0.45, claimed were 0.50 [0.40, 0.70]: inside the band"),
        ([3.3, 3.2, 3.1, 3.0], "at most 0.40, claimed were 0.50 [0.40, 0.70]: not inside the band"),
        ([3.6, 3.5, 3.4, 3.35], "More than 0.70 of the steps are needed: the claim was wrong"),
    ],
)
def test_the_claim_is_held_against_what_came(losses: Sequence[float], said: str) -> None:
    base, rungs = fast.rungs()
    ends = [done(one, loss) for one, loss in zip(sorted_by_steps(rungs), losses, strict=True)]
    assert said in fast.verdict(done(base, 3.3), ends[::-1])


def sorted_by_steps(rungs: Sequence[Rung]) -> list[Rung]:
    return sorted(rungs, key=lambda one: one.steps)


def done(rung: Rung, loss: float) -> Done:
    return Done(rung, rung.name, {}, loss, 1.0, "", None)
