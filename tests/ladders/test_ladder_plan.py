"""The trainings of a ladder: their settings, and which of them are run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configuration
from pipeline.errors import ConfigError, InputError
from pipeline.experiments.sweep import Member
from pipeline.ladders import ladder, page, plan, registered
from pipeline.ladders.ladder import Trained
from pipeline.ladders.plan import Ladder, Rung
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.records import record_file
from pipeline.resume import run_folder
from pipeline.training.optimizers import learning_rate
from tests.conftest import ROOT, recipe
from tests.helpers.rungs import trained

SIZES, HORIZONS = ("1x16", "2x32"), (100, 200, 400)


@pytest.fixture(autouse=True)
def _repository(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text(recipe(), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)


def asked(**changes: Any) -> Ladder:
    return plan.plan(**{"sizes": SIZES, "horizons": HORIZONS, "seeds": (1,)} | changes)


def test_each_size_has_a_long_run_that_keeps_what_its_cool_downs_begin_with() -> None:
    found = asked()
    assert [(r.name, r.steps, r.begins, r.parent and r.parent.name) for r in found.rungs] == [
        ("rung-1x16-400", 400, 0, None),
        ("rung-1x16-100", 100, 80, "rung-1x16-400"),
        ("rung-1x16-200", 200, 160, "rung-1x16-400"),
        ("rung-2x32-400", 400, 0, None),
        ("rung-2x32-100", 100, 80, "rung-2x32-400"),
        ("rung-2x32-200", 200, 160, "rung-2x32-400"),
    ]
    for rung in (*found, found.next):
        train, model = rung.config.train, rung.config.model
        assert (train.schedule, train.val_every) == ("wsd", rung.steps)
        assert rung.tokens == rung.steps * 4 * 128
        assert rung.parameters == GPT(GPTConfig(**vars(model))).parameter_count()
    long = found.rungs[0].config
    assert long.checkpoint.keep_every == 80 and (long.model.n_layer, long.model.n_embd) == (1, 16)
    assert [one.config.checkpoint.keep_every for one in (*found.seeds, found.next)] == [0] * 3


@pytest.mark.parametrize("cooldown", [0.1, 0.2, 0.35])
def test_a_cool_down_has_the_rates_of_a_run_of_its_length(cooldown: float, make_config) -> None:
    train = make_config(
        train__schedule="wsd", train__cooldown=cooldown, train__steps=400, train__warmup_steps=0
    )
    short = configuration.load(
        "params.yaml", ["train.steps=150"], configuration.flatten(train)
    ).train
    begins = plan.stable_steps(train, 150)
    rates = [
        [learning_rate(step, one, one.steps) for step in range(150)] for one in (train.train, short)
    ]
    assert rates[0][:begins] == rates[1][:begins]
    assert rates[1][begins] < train.train.lr


def test_learning_rates_are_those_of_params_yaml_at_its_width_and_go_with_one_by_width() -> None:
    found = asked(beyond="4x128", changes=["train.lr=0.004"])
    rungs = [found.rungs[0], found.seeds[1], found.rungs[3], found.next]
    assert [rung.config.train.lr for rung in rungs] == [0.032, 0.032, 0.016, 0.004]
    assert [rung.config.train.min_lr for rung in rungs] == [0.0016, 0.0016, 0.0008, 0.0002]


def test_the_next_size_is_one_up_or_the_one_asked_for() -> None:
    assert (asked().next.size, asked().next.steps) == ("3x64", 400)
    other = asked(beyond="4x128:800").next
    assert (other.name, other.steps, other.config.model.n_head) == ("next-4x128-800", 800, 4)


def test_seeds_are_of_the_smallest_rung_with_other_data_order_and_weights() -> None:
    first, second = asked().seeds
    assert (first.name, second.name) == ("rung-1x16-100", "rung-1x16-100-seed-1")
    assert (second.config.train.seed, second.config.init.seed) == (1, 1)
    assert second.parent is None and second.steps == first.steps


def test_a_size_is_blocks_by_channels_or_a_published_one(make_config) -> None:
    base = make_config()
    assert plan.shape("3x48", base) == {"n_layer": 3, "n_head": 1, "n_embd": 48}
    assert plan.shape("2x96", base) == {"n_layer": 2, "n_head": 3, "n_embd": 96}
    assert plan.shape("124m", base) == {"n_layer": 12, "n_head": 12, "n_embd": 768}
    for word in ("x", "0x16", "3x", "125m", "3x64x2"):
        with pytest.raises(ConfigError, match=f"{word}: expected a size as BLOCKSxCHANNELS"):
            plan.shape(word, base)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"changes": ["train.steps=5"]}, "train.steps=5: the ladder sets it itself"),
        ({"changes": ["model.n_embd=8"]}, "model.n_embd=8: the ladder sets it itself"),
        ({"sizes": ["1x16"]}, "two --sizes and two --horizons or more"),
        ({"horizons": [50, 100]}, "train.warmup_steps=60 train.cooldown=0.2: the horizon of 50"),
        (
            {"changes": ["train.cooldown=1", "train.warmup_steps=0"]},
            "train.warmup_steps=0 train.cooldown=1: the horizon of 100 steps begins to cool down "
            "after 0",
        ),
        ({"beyond": "4x128:70"}, "the horizon of 70 steps begins to cool down after 56"),
        ({"beyond": "4x128:long"}, "--next 4x128:long: expected SIZE or SIZE:STEPS"),
        ({"beyond": "2x32:200"}, "--next 2x32:200: a rung already, so nothing to forecast"),
        ({"changes": ["checkpoint.resume=require"]}, "checkpoint.resume=require: a ladder begins"),
        ({"changes": ["train.lr=x"]}, "train.lr=x: expected a number above 0"),
    ],
)
def test_what_makes_no_ladder_is_refused_before_any_run(changes, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        asked(**changes)
    assert problem in str(error.value)


def test_a_recipe_of_published_weights_makes_no_ladder() -> None:
    continued = (ROOT / "recipes/gpt2-124m-continue.yaml").read_text("utf-8")
    Path("params.yaml").write_text(continued, "utf-8")
    with pytest.raises(ConfigError, match="init.source=hf: a ladder trains fresh weights"):
        asked(horizons=(1000, 2000))


# --- what has been trained already


def test_a_ladder_that_was_stopped_runs_only_what_is_missing(monkeypatch, caplog) -> None:
    found, there, ran, stopped = asked(), [], [], []

    def run(member: Member) -> None:
        if len(there) == 3 and not stopped:
            stopped.append(member.name)
            raise KeyboardInterrupt
        (rung,) = [one for one in found if one.name == member.name]
        ran.append(member.name)
        there.append(trained(rung, member.name))

    def member(rung: Rung, known: Sequence[Trained]) -> Member:
        return Member(rung.name, {}, rung.config)

    monkeypatch.setattr(ladder.forks, "run", run)
    monkeypatch.setattr(ladder, "_member", member)
    monkeypatch.setattr(ladder, "trained", lambda: list(there))
    with pytest.raises(KeyboardInterrupt):
        ladder.run_missing(list(found), [])
    assert len(there) == 3
    done = ladder.run_missing(list(found), list(there))
    assert ran == [rung.name for rung in found], "the first three are not run again"
    assert [one.rung for one in done] == list(found)


def test_a_training_counts_by_settings_code_and_the_state_it_began_with() -> None:
    found = asked()
    long, short = found.rungs[:2]
    one, parent = trained(short, "any-name"), trained(long, long.name)
    assert ladder.find(short, [one, parent]) and not ladder.find(long, [one])
    assert not ladder.find(short, [trained(short, "x", code="another"), parent])
    assert not ladder.find(short, [trained(short, "late", begins=90), parent])
    assert not ladder.find(short, [one, trained(long, "of-other-settings")]), "another's fork"
    direct = trained(Rung("", short.size, short.config), "whole")
    assert ladder.find(short, [direct]), "a run of that length has the same bits as the fork"


def test_a_training_that_was_stopped_has_begun_as_well(monkeypatch) -> None:
    """A forecast made then could know the first part of its curve."""
    own = asked().next
    identity = run_folder.identity("train", own.config, {})
    with run_folder.claim(identity) as run:
        monkeypatch.setenv("DVC_EXP_NAME", "stopped")
        start = record_file.start_event("train", own.config)
        run.journal.write_text(json.dumps(start) + "\n", "utf-8")
    assert [head["name"] for head in ladder.begun([])] == ["stopped"]
    with pytest.raises(InputError, match="stopped: this very training has begun already"):
        registered.check_unseen(own.settings, ladder.begun([]))


def whole(found: Ladder) -> list[Trained]:
    """Every rung trained, by a law."""

    def loss(rung: Rung) -> float:
        return 3 + 60 / rung.parameters**0.25 + 900 / rung.tokens**0.6 + 0.001 * (rung.steps % 3)

    return [trained(rung, rung.name, loss(rung)) for rung in found]


def test_a_rung_that_is_missing_or_saw_other_tokens_is_named(monkeypatch) -> None:
    found = asked()
    known = whole(found)
    with pytest.raises(InputError, match="not trained yet: rung-2x32-200"):
        ladder.fitted(found, [one for one in known if one.run.name != "rung-2x32-200"])
    known = whole(found)
    known[2].run.records["train"][1]["values"]["digest.train"] = "others"
    with pytest.raises(InputError, match="trained on different tokens"):
        ladder.fitted(found, known)
    with pytest.raises(InputError, match="rung-1x16-400: its validation loss is inf"):
        ladder.find(found.rungs[0], [trained(found.rungs[0], "rung-1x16-400", float("inf"))])


def test_a_question_is_answered_with_its_band_and_how_far_out_it_is(monkeypatch) -> None:
    monkeypatch.setattr(ladder.scaling_law, "DRAWS", 20)
    found = asked()
    law = ladder.fitted(found, whole(found))
    near = page.answer("2x32:100k", law, ())
    assert "1 times the parameters and 0.49 times the tokens" in near and "So far out" not in near
    far = page.answer("124m:3h", law, ())
    assert "So far out the band holds only if the law does" in far
    assert "The same time on 2x32 is 10,800,000 tokens" in far
    for word in ("124m", "124m:", "124m:0", "124m:3d", ":5"):
        with pytest.raises(ConfigError, match="expected SIZE:TOKENS or SIZE:TIME"):
            page.answer(word, law, ())
