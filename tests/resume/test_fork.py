"""A fork starts from another training's state, to the bit, and goes on as its own settings say."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import config as configuration
from pipeline import paths
from pipeline.compute import precision
from pipeline.diagnostics import forecast
from pipeline.errors import ConfigError, InputError
from pipeline.records import record_file
from pipeline.records.run_data import Log, RunData
from pipeline.resume import fork, snapshot
from pipeline.resume.checkpoints import name_of
from pipeline.storage import folders
from pipeline.training import training_step
from stages import train
from tests.resume.test_checkpoints import (  # noqa: F401
    Seen,
    at_step,
    in_a_child,
    kill,
    needs_fork,
    prepared,
    recorded,
    settings,
    the_run,
    workspace,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork
Make = Callable[..., configuration.Config]


def parent(settings: Make, **changes: Any) -> fork.Kept:  # noqa: F811
    """A training of twelve steps that has ended, and what it kept."""
    train.main(settings(checkpoint__keep_every=3, **changes))
    record = record_file.read(paths.record("train"))
    steps = tuple(json.loads((paths.CHECKPOINTS / "kept.json").read_text()))
    kept = Path("kept").absolute()
    folders.copy(paths.CHECKPOINTS, kept)  # DVC deletes the outputs before the next training
    folders.discard(the_run())
    return fork.Kept("base", record, steps, kept)


def forked(kept: fork.Kept, step: int) -> str:
    return fork.export(kept, step).as_posix()


@pytest.mark.parametrize(
    ("precision", "optimizer", "schedule"),
    [("fp32", "adamw", "cosine"), ("fp16", "muon", "wsd")],
)
def test_a_fork_of_unchanged_settings_equals_its_parents_continuation_to_the_bit(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
    monkeypatch,
    precision: str,
    optimizer: str,
    schedule: str,
) -> None:
    seen = Seen(workspace, monkeypatch)
    same = {"precision": precision, "train__optimizer": optimizer, "train__schedule": schedule}
    kept = parent(settings, **same)
    assert kept.steps == (3, 6, 9)
    losses, sums, best = seen.take()
    train.main(settings(train__fork=forked(kept, 6), **same))
    assert seen.take() == ({step: losses[step] for step in range(6, 12)}, sums, best)
    again = record_file.read(paths.record("train"))
    curves = [RunData({"train": one}).curves for one in (kept.record, again)]
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/val_loss"):
        assert curves[0][name] == curves[1][name], name
    assert RunData({"train": again}).tags["fork"] == "base@6"


@needs_fork
def test_a_fork_that_was_killed_goes_on_to_the_bit(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
    monkeypatch,
) -> None:
    seen = Seen(workspace, monkeypatch)
    kept = parent(settings)
    config = settings(train__fork=forked(kept, 3), train__lr=0.01)
    seen.take()
    train.main(config)
    unbroken = seen.take()
    folders.discard(the_run())
    for step in (4, 8):  # before its first own checkpoint, and after it
        with at_step(step, kill):
            assert in_a_child(lambda: train.main(config)) == -signal.SIGKILL
    train.main(config)
    assert seen.take() == unbroken
    assert recorded() == list(range(12))


def test_a_fork_may_change_its_steps_schedule_rate_and_batch(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
) -> None:
    kept = parent(settings, train__schedule="wsd", train__cooldown=0.25)
    place = forked(kept, 6)
    other = {"train__steps": 8, "train__schedule": "linear", "train__lr": 0.01}
    train.main(settings(train__fork=place, **other, train__batch_size=3))
    run = RunData({"train": record_file.read(paths.record("train"))})
    assert recorded() == list(range(8))
    rates = run.values("train/learning_rate")
    assert rates[:6] == RunData({"train": kept.record}).values("train/learning_rate")[:6]
    assert rates[6] > 0.001 and rates[7] == pytest.approx(0.0002)  # of the linear one, and its end
    assert run.last("train/tokens") == 6 * 2 * 2 * 16 + 2 * 3 * 2 * 16
    assert fork.Kept("b", run.records["train"], (), None).params["train.fork"] == place


def test_a_fork_of_a_fork_knows_both_parents(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
) -> None:
    kept = parent(settings)
    child = parent(settings, train__fork=forked(kept, 3), train__seed=5)
    first = child.steps[0]  # that which it was forked from, if it has kept it
    train.main(settings(train__fork=forked(replace(child, name="child"), first), train__seed=6))
    run = RunData({"train": record_file.read(paths.record("train"))})
    lineage = json.loads(run.tags["fork.lineage"])
    assert [(one["name"], one["step"]) for one in lineage] == [("base", 3), ("child", first)]
    assert [one["record"] for one in lineage] == [kept.record[0]["id"], child.record[0]["id"]]
    assert recorded() == list(range(12))


def test_another_optimizer_keeps_the_moments_that_mean_the_same_and_says_which_begin_at_zero(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
    monkeypatch,
    caplog,
) -> None:
    kept = parent(settings)
    first = {}
    original = training_step.launch

    def launch(state: training_step.TrainState, *rest: Any) -> Any:
        named = {id(p): name for name, p in state.model.named_parameters()}
        first.setdefault("had", {named[id(p)] for p, s in state.optimizer.state.items() if s})
        return original(state, *rest)

    monkeypatch.setattr("pipeline.training.loop.launch", launch)
    with caplog.at_level(logging.WARNING):
        train.main(settings(train__fork=forked(kept, 6), train__optimizer="muon"))
    names = json.loads((kept.folder / name_of(6) / "snapshot.json").read_text())["optimizer"]
    matrices = {n for n in names["state"] if ".h." in n and n.endswith("weight") and "ln" not in n}
    assert first["had"] == names["state"].keys() - matrices and matrices
    assert f"{len(matrices)} of {len(names['state'])} parameters begin with moments at zero" in (
        caplog.text
    )


def test_what_does_not_fit_a_state_is_named_before_any_step(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
) -> None:
    kept = parent(settings)
    with pytest.raises(InputError, match=r"base@5: no checkpoint of that step; .* 3, 6, 9 steps"):
        fork.export(kept, 5)
    place = forked(kept, 6)
    with pytest.raises(ConfigError, match=r"model.n_head=2: .* is of model.n_head=1"):
        train.main(settings(train__fork=place, model__n_head=2))
    with pytest.raises(ConfigError, match=r"train.steps=6: expected more than 6"):
        train.main(settings(train__fork=place, train__steps=6))
    with pytest.raises(InputError, match="train.fork=data/forks/gone: no state is there"):
        train.main(settings(train__fork="data/forks/gone"))
    tensors = Path(place, "exp_avg.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="damaged"):
        train.main(settings(train__fork=place, train__seed=9))


def test_before_a_step_is_the_newest_state_from_which_it_is_still_to_come(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
) -> None:
    kept = parent(settings)
    assert [kept.before(step) for step in (3, 5, 6, 11)] == [3, 3, 6, 9]
    with pytest.raises(InputError, match=r"no checkpoint before step 2; .*checkpoint.keep_every=2"):
        kept.before(2)


def test_the_same_state_has_the_same_name(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
) -> None:
    kept = parent(settings)
    place = fork.export(kept, 6)
    made = (place / "sha256.json").stat().st_mtime_ns
    assert fork.export(kept, 6) == place and (place / "sha256.json").stat().st_mtime_ns == made
    assert fork.export(kept, 3) != place
    assert snapshot.read_facts(place)["step"] == 6


def test_of_two_trainings_of_a_name_the_newest_is_meant(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = parent(settings)
    old, new = (Log([{**kept.record[0], "time": time}]) for time in (1, 2))
    found = [replace(kept, record=record) for record in (new, old)]
    left = [SimpleNamespace(identity={"stage": "train"}, status={}, folder=Path("x"))] * 2
    monkeypatch.setattr(fork.run_folder, "every", lambda: left)
    monkeypatch.setattr(fork, "_of_folder", lambda name, _: [found.pop()])
    monkeypatch.setattr(fork.dvc_history, "experiments", lambda _: [])
    assert fork.find("workspace").record[0]["time"] == 2


def test_the_forecast_of_a_fork_has_its_own_steps_and_checkpoints(
    workspace: Path,  # noqa: F811
    settings: Make,  # noqa: F811
) -> None:
    place = forked(parent(settings), 6)
    mode = precision.choose_precision("fp32", torch.device("cpu"))

    def told(**changes: Any) -> str:
        config = settings(train__fork=place, checkpoint__keep_every=3, **changes)
        return "\n".join(forecast.forecast(config, mode, corpus_tokens=384).lines())

    assert "; 6 steps from step 6 on are 384 tokens, 1.00 epochs\n" in told()
    assert "\n2 checkpoints stay to fork from: " in told()  # that which it begins with, and 9
    assert "\n1 checkpoint stays to fork from: " in told(train__steps=9)
    with pytest.raises(ConfigError, match="train.steps=6: expected more than 6"):
        told(train__steps=6)
