"""The trainings of a ladder: their settings, and which of them are run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import config as configuration
from pipeline.errors import ConfigError, InputError
from pipeline.experiments.sweep import Member
from pipeline.ladders import ladder, page, plan, registered
from pipeline.ladders.ladder import Trained
from pipeline.ladders.plan import Ladder, Rung
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.records import record_file, stage_graph
from pipeline.resume import fork, run_folder
from pipeline.storage.digests import dvc_md5
from pipeline.training.optimizers import learning_rate
from tests.conftest import ROOT
from tests.helpers.rungs import trained

SIZES, HORIZONS = ("1x16", "2x32", "2x48"), (100, 200, 400)


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
        ("rung-2x48-400", 400, 0, None),
        ("rung-2x48-100", 100, 80, "rung-2x48-400"),
        ("rung-2x48-200", 200, 160, "rung-2x48-400"),
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
    same = asked(changes=["init.scheme=mup", "train.lr=0.004"])
    assert {rung.config.train.lr for rung in same} == {0.004}


def test_the_next_size_is_one_up_or_the_one_asked_for() -> None:
    assert (asked().next.size, asked().next.steps) == ("3x96", 400)
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
        ({"sizes": ["1x16", "2x32"]}, "--sizes 1x16,2x32: a law of size and length takes three"),
        (
            {"sizes": ["124m", "gpt2", "12x768"]},
            "--sizes 124m: a law of size and length takes three different ones or more",
        ),
        ({"horizons": [200, 100, 100]}, "--horizons 100,200: a law of size and length takes three"),
        (
            {"horizons": [333, 666, 1000]},
            "have only every 1 steps in common, so 1000 steps would keep 999 of them; expected 64 "
            "at most, as multiples of the shortest give, such as 334,668,1002",
        ),
        ({"seeds": [1, 1337]}, "--seeds 1337: train.seed=1337 is the base's own"),
        ({"seeds": [42]}, "--seeds 42: init.seed=42 is the base's own"),
        (
            {"horizons": [50, 100, 200]},
            "train.warmup_steps=60 train.cooldown=0.2: the horizon of 50",
        ),
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


def test_one_message_names_all_that_makes_no_ladder() -> None:
    with pytest.raises(ConfigError) as error:
        asked(
            **{"sizes": ["1x16", "2by32"], "horizons": [50, 100], "beyond": "x:long"},
            **{"seeds": [42], "changes": ["train.steps=5", "checkpoint.resume=require"]},
        )
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        *("train.steps=5", "--horizons 50,100", "--next x:long", "checkpoint.resume=require"),
        *("--seeds 42", "--sizes 2by32", "--next x", "train.warmup_steps=60 train.cooldown=0.2"),
    ]
    with pytest.raises(ConfigError) as error:
        asked(horizons=[], changes=["train.beta1=x"])
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        *("--horizons none", "train.beta1=x")
    ]
    with pytest.raises(ConfigError) as error:  # by 1 / width
        asked(beyond="2x8", changes=["train.lr=2", "train.min_lr=1"], seeds=[1337])
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        *("--seeds 1337", "train.lr=16.0", "train.lr=32.0", "train.min_lr=16.0")
    ]


def test_a_recipe_of_published_weights_makes_no_ladder() -> None:
    continued = (ROOT / "recipes/gpt2-124m-continue.yaml").read_text("utf-8")
    Path("params.yaml").write_text(continued, "utf-8")
    with pytest.raises(ConfigError, match="init.source=hf: a ladder trains fresh weights"):
        asked(horizons=(1000, 2000, 4000))


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
    assert [(head["name"], here) for head, here in ladder.begun([], "", "")] == [("stopped", True)]
    with pytest.raises(InputError, match="stopped: this very training has begun already"):
        registered.seen_before(own.settings, ladder.begun([], "", ""))
    with run_folder.claim(run_folder.identity("train", own.config, {"train": "theirs"})) as run:
        run.journal.write_text(json.dumps(start) + "\n", "utf-8")
    assert sorted(here for _, here in ladder.begun([], "", "ours")) == [False, True]


def test_a_cool_down_without_its_state_is_trained_from_the_first_step(monkeypatch) -> None:
    """200, 400 and 800 have been trained, whose states lie 160 apart; 300 needs that at 240."""
    found = asked(horizons=(200, 300, 400, 800))
    long, _, short, *_ = found.rungs
    parent = trained(long, long.name)
    steps: list[int] = [160, 320, 480, 640]
    record = parent.run.records["train"]
    kept = fork.Kept(long.name, record, tuple(steps), None)
    monkeypatch.setattr(fork, "find", lambda name: replace(kept, steps=tuple(steps)))
    monkeypatch.setattr(ladder, "seconds_of", lambda rungs: {one.name: 1.0 for one in rungs})
    monkeypatch.setattr(ladder.dvc_history, "names", set)
    planned: list[tuple[str, int]] = []

    def forked(state: fork.Kept, step: int, name: str, own: Sequence[str]) -> Member:
        planned.append((state.name, step))
        return Member(name, {}, short.config)

    monkeypatch.setattr(ladder.forks, "plan", forked)
    whole_run = ladder._member(short, [parent])
    assert "train.fork" not in whole_run.changes and whole_run.changes["train.steps"] == 300
    assert (planned, whole_run.stage) == ([], "train")
    said = page.planned(found, [parent], registering=True)
    (row,) = (line for line in said.splitlines() if line.startswith(f"| {short.name} "))
    assert row.split("|")[4].strip() == "300"
    assert f"{short.name}: from the first step" in said
    steps.append(240)
    ladder._member(short, [parent])
    assert planned == [(long.name, 240)]
    assert "from the first step" not in page.planned(found, [parent], registering=True)
    assert ladder.possible(short, []) == short, "a long run that is still to come keeps it"


def test_an_edited_corpus_makes_another_training(tmp_path: Path) -> None:
    corpus = tmp_path / "mine.txt"
    corpus.write_text("one", "utf-8")
    found = asked(changes=["corpus.source=text", f"corpus.path={corpus}"])
    before = trained(found.rungs[0], "before")
    assert ladder.find(found.rungs[0], [before])
    corpus.write_text("other", "utf-8")
    assert not ladder.find(found.rungs[0], [before])


MADE = ("data/tokens", "artifacts/init")  # by the stages before `train`


def test_what_dvc_vouches_for_is_the_code_and_the_corpus(tmp_path: Path) -> None:
    """A dvc.lock as DVC writes it has the same digest as the files that it was made from."""
    corpus = tmp_path / "mine"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one", "utf-8")
    found = asked(changes=["corpus.source=text", "corpus.path=mine"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/unset").touch()
    run = trained(found.rungs[0], "one").run
    stages = {}
    for name in (*stage_graph.upstream("train"), "train"):
        files = [*stage_graph.sources(name), *stage_graph.inputs(name, run.params)]
        deps = [
            {"path": path, "md5": dvc_md5(place)}
            for path in files
            for place in [(ROOT if path.startswith(("pipeline", "stages")) else tmp_path) / path]
            if place.exists()
        ]
        outs = stage_graph.stages()[name].outs
        deps += [{"path": path, "md5": path} for path in files if path.startswith(MADE)]
        stages[name] = {"deps": deps, "outs": [{"path": path, "md5": path} for path in outs]}
    lock = yaml.safe_dump({"stages": stages}).encode()
    assert ladder._locked_code(lock) == ladder.code_here(found.rungs[0].config)
    corpus.rename(tmp_path / "moved")
    (moved, *_) = asked(changes=["corpus.source=text", "corpus.path=moved"]).rungs
    code = ladder._locked_code(lock)
    assert code == ladder.code_here(moved.config)
    assert ladder.find(moved, [Trained(run, code)]), "its record names the folder of before"
    (tmp_path / "moved/a.txt").write_text("two", "utf-8")
    assert ladder._locked_code(lock) != ladder.code_here(moved.config)
    stages["tokenize"]["outs"][0]["md5"] = "of the edited corpus, which nobody trained on"
    assert not ladder._locked_code(yaml.safe_dump({"stages": stages}).encode())


def test_a_single_file_under_another_name_is_another_corpus(tmp_path: Path) -> None:
    """The split goes by the names of documents, which hold the file's."""
    digests = []
    for name in ("a.jsonl", "sub/a.jsonl", "b.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "one"}', "utf-8")
        own = asked(changes=["corpus.source=jsonl", f"corpus.path={path}"])
        digests.append(ladder.code_here(own.rungs[0].config))
    assert digests[0] == digests[1] != digests[2]


def test_no_run_is_made_for_a_forecast_of_other_tokens(monkeypatch) -> None:
    monkeypatch.setattr(ladder.scaling_law, "DRAWS", 2)
    monkeypatch.setattr(ladder.git, "state", lambda: {"commit": "c"})
    found = asked()
    known = whole(found)
    forecast = ladder.forecast_of(found.next, ladder.fitted(found, known))
    registered.write(replace(forecast, data="others"))
    monkeypatch.setattr(ladder, "run", lambda member: pytest.fail("it was run"))
    with pytest.raises(InputError, match="a forecast for other tokens"):
        ladder.forecast_and_run(found, known, register_only=False)


def test_a_plain_run_with_other_validations_is_the_same_training(make_config) -> None:
    own = asked().next
    params = own.settings | {"train.val_every": 100, "train.val_tokens": 7, "device": "cpu"}
    head = {"name": "plain", "id": "p", "params": params}
    with pytest.raises(InputError, match="plain: this very training has begun already"):
        registered.seen_before(own.settings, [(head, True)])
    assert registered.seen_before(own.settings, [(head, False)]) == ["plain"]
    reseeded = head | {"name": "reseeded", "params": params | {"train.seed": 9, "init.seed": 9}}
    assert registered.seen_before(own.settings, [(reseeded, True)]) == ["reseeded"]
    other = head | {"params": params | {"train.lr": 9.0}}
    assert registered.seen_before(own.settings, [(other, True)]) == []


def test_a_finite_training_is_preferred_and_an_infinite_outcome_is_one() -> None:
    """Each alone would otherwise block the command for good."""
    found = asked()
    rung, bad = found.rungs[0], float("nan")
    done = ladder.find(rung, [trained(rung, "bad", bad), trained(rung, "good")])
    assert done and done.name == "good"
    with pytest.raises(InputError, match=r"lower train.lr .*, or remove bad to have it trained"):
        ladder.find(rung, [trained(rung, "bad", bad)])


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


def test_rungs_that_saw_tokens_again_are_named_and_not_said_to_have_seen_each_once(
    monkeypatch,
) -> None:
    monkeypatch.setattr(ladder.scaling_law, "DRAWS", 2)
    found = asked()
    law = ladder.fitted(found, whole(found))
    once, again = (
        replace(law, done=tuple(replace(one, corpus=size) for one in law.done))
        for size in (204_800.0, 100_000.0)
    )
    assert "saw each token once" in page.answer("2x32:1M", once, ())
    assert "The rungs saw up to" not in page.law_words(once)
    for said in (page.answer("2x32:1M", again, ()), page.law_words(again)):
        assert "The rungs saw up to 2.0 times the corpus" in said and "each token once" not in said


def test_a_forecast_on_record_is_told_from_the_law_that_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(ladder.scaling_law, "DRAWS", 2)
    monkeypatch.setattr(ladder.git, "state", lambda: {"commit": "c"})
    found = asked()
    made = ladder.forecast_of(found.next, ladder.fitted(found, whole(found)))
    said = page.forecast_words(replace(made, time=0, points=made.points[:4]))
    assert "on record since 1970-01-01 00:00 UTC, made of 4 rungs" in said
    most = max(point["parameters"] for point in made.points[:4])
    assert f"({made.parameters / most:.2g} and 1 times the largest rung)" in said


def test_what_would_stop_a_training_here_is_named_before_the_first(monkeypatch) -> None:
    plan.check_here([*asked()])
    with pytest.raises(ConfigError, match="device=cuda"):
        plan.check_here([*asked(changes=["device=cuda"])])
    with pytest.raises(InputError, match="leads out of the repository"):
        plan.check_here([*asked(changes=["corpus.source=text", "corpus.path=../mine"])])


def test_a_question_is_answered_with_its_band_and_how_far_out_it_is(monkeypatch) -> None:
    monkeypatch.setattr(ladder.scaling_law, "DRAWS", 20)
    found = asked()
    law = ladder.fitted(found, whole(found))
    near = page.answer("2x48:100k", law, ())
    assert "1 times the parameters and 0.49 times the tokens" in near and "So far out" not in near
    far = page.answer("124m:3h", law, ())
    assert "So far out the band holds only if the law does" in far
    assert "The same time on 2x48 is 10,800,000 tokens" in far
    for word in ("124m", "124m:", "124m:0", "124m:3d", ":5"):
        with pytest.raises(ConfigError, match="expected SIZE:TOKENS or SIZE:TIME"):
            page.answer(word, law, ())
