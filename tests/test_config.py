"""Settings: strict, complete, and every problem named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config as configuration
from pipeline.errors import ConfigError
from tests.conftest import NANO, params


def problems(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        configuration.from_dict(params(**changes))
    return str(caught.value)


def test_the_default_recipe_is_complete_and_valid() -> None:
    config = configuration.load(NANO)
    assert config.precision == "fp32"
    assert set(configuration.flatten(config)) == {name for name, _, _ in configuration.describe()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, "precision=fp8: expected one of fp32, tf32, bf16, fp16"),
        ({"train__lr": "abc"}, "train.lr=abc: expected a number above 0 and at most 10"),
        ({"train__lr": float("nan")}, "train.lr=nan: expected a number"),
        ({"train__lr": float("inf")}, "train.lr=inf: expected a number"),
        ({"train__steps": 0}, "train.steps=0: expected a whole number at least 1"),
        ({"train__steps": 2.5}, "train.steps=2.5: expected a whole number"),
        ({"train__steps": True}, "train.steps=True: expected a whole number"),
        ({"train__compile": "off"}, "train.compile=off: expected true or false"),
        ({"init__hf_model": ""}, "init.hf_model=: expected text"),
        ({"sample__prompts": []}, "sample.prompts=[]: expected a list of texts"),
        ({"model__n_head": 3}, "model.n_embd=128: expected a multiple of model.n_head=3"),
        ({"train__sequence_length": 129}, "train.sequence_length=129: expected at most"),
        ({"train__min_lr": 1.0}, "train.min_lr=1.0: expected at most train.lr=0.002"),
        ({"train__warmup_steps": 200}, "train.warmup_steps=200: expected less than"),
        ({"train__sequence_length": 8}, "train.sequence_length=8: expected at least 16"),
        ({"corpus__pattern": "/a/*"}, "corpus.pattern=/a/*: expected a glob inside corpus.path"),
        ({"corpus__source": "text"}, "corpus.path=data/unset: expected a file or folder"),
        ({"train": 3}, "train: settings by name are expected, got 3"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(changes: dict, message: str) -> None:
    assert message in problems(**changes)


def test_the_shortest_sequence_is_the_ending_that_evaluate_makes() -> None:
    from pipeline.evaluation import ENDING_TOKENS

    assert configuration.CHOICE_ENDING == ENDING_TOKENS


def test_an_unknown_key_is_named_with_the_nearest_one() -> None:
    assert "train.lrr: unknown setting; did you mean train.lr?" in problems(train__lrr=1)


def test_all_problems_stand_in_one_error() -> None:
    said = problems(precision="fp8", train__lr="abc", model__dropout=2)
    assert len(said.splitlines()) == 3


def test_a_missing_setting_is_named() -> None:
    raw = params()
    del raw["train"]["lr"]
    with pytest.raises(ConfigError, match="train.lr: missing"):
        configuration.from_dict(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing"),
        ("- a\n- b\n", "not a list"),
        ("a: [\n", "line"),
        ("train: {lr: 1, lr: 2}\n", "duplicate"),
    ],
)
def test_a_broken_file_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message):
        configuration.load(path)


def test_numbers_that_dvc_rewrites_are_read_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = NANO.read_text("utf-8").replace("lr: 0.002 ", "lr: 0.002")
    path.write_text(text.replace("  lr: 0.002", "  lr: 2e-03"), "utf-8")
    assert configuration.load(path).train.lr == 0.002


def test_a_local_folder_of_weights_has_to_be_watched(tmp_path: Path) -> None:
    said = problems(init__source="hf", init__hf_model=str(tmp_path))
    assert said.startswith("params: init.hf_watch=data/unset: expected " + str(tmp_path))


def test_the_environment_cannot_reach_params(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    path = tmp_path / "params.yaml"
    text = NANO.read_text("utf-8")
    path.write_text(text.replace("experiment: gpt2", "experiment: ${oc.env:SECRET}"), "utf-8")
    assert "42" not in configuration.load(path).tracking.experiment
