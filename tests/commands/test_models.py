"""`sample`: a prompt continued, a session of them, and whose model it is."""

from __future__ import annotations

import builtins
import io
import sys
from pathlib import Path

import pytest

from pipeline import config as configuration
from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.model.model_dir import save_model
from pipeline.records import dvc_history
from pipeline.records.run_data import Experiment
from stages import import_hf_weights
from tests.conftest import recipe

SMALL = {"model__n_layer": 1, "model__n_head": 1, "model__n_embd": 8, "model__block_size": 16}
SMALL |= {"train__sequence_length": 16, "init__std": 0.5}


@pytest.fixture
def say(tmp_path: Path, monkeypatch, capsys, make_config):
    """The verb where a model lies, and another one in DVC's cache."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / paths.PARAMS).write_text(recipe(), "utf-8")
    assert configuration.load()
    for seed, folder in ((1, paths.MODEL), (2, Path("other"))):
        made = import_hf_weights.build(make_config(**SMALL, init__seed=seed))
        save_model(made, folder)
    monkeypatch.setattr(
        dvc_history,
        "experiments",
        lambda *_: [Experiment("hot", "rev", {}), Experiment("w", "", {})],
    )
    kept = {("rev", "artifacts/model"): Path("other")}
    monkeypatch.setattr(dvc_history, "copy_of", lambda rev, path, _: kept.get((rev, path)))

    def call(*words: str) -> str:
        command(["sample", "--tokens", "6", *words])
        return capsys.readouterr().out

    return call


def test_a_prompt_is_continued_as_often_as_asked_and_the_seed_repeats_it(say) -> None:
    text = say("--prompt", "To be", "-n", "2")
    assert text.startswith("To be") and text.count("To be") == 2
    assert text == say("--prompt", "To be", "-n", "2")
    assert text == say("--prompt", "To be", "-n", "2", "--seed", "1234")  # the recipe's
    assert text != say("--prompt", "To be", "-n", "2", "--seed", "5")
    greedy = (
        say("--prompt", "To be", "-n", "2", "--temperature", "0").rstrip("\n").split("\n\nTo be")
    )
    assert greedy[0].removeprefix("To be") == greedy[1]


def test_the_model_is_that_of_the_experiment_that_is_named(say, caplog) -> None:
    theirs = say("--prompt", "To be", "--of", "hot")
    assert theirs == say("--prompt", "To be", "--model", "other")
    assert theirs != say("--prompt", "To be") == say("--prompt", "To be", "--of", "workspace")
    with pytest.raises(SystemExit) as ended:
        say("--prompt", "To be", "--of", "cold")
    assert ended.value.code == 3
    assert caplog.messages == ["error: --of cold: no experiment of that name; known: hot"]


def test_a_session_asks_until_an_empty_line_and_ctrl_c_ends_a_text_alone(say, monkeypatch) -> None:
    typed = iter(["ONE", "TWO", ""])
    monkeypatch.setattr(
        sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})()
    )
    monkeypatch.setattr(builtins, "input", lambda _: next(typed))
    said = say()
    assert said.startswith("ONE") and "\nTWO" in said

    def interrupted(*_: object):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.inference.generation.stream_text", interrupted)
    typed = iter(["ONE", "TWO", ""])
    assert say() == "ONEhalf\nTWOhalf\n"


def test_without_a_prompt_and_a_terminal_it_says_what_is_missing(say, monkeypatch, caplog) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for words in ([], ["--prompt", "x", "--of", "hot", "--model", "other"]):
        with pytest.raises(SystemExit) as ended:
            say(*words)
        assert ended.value.code == 2
    assert "--prompt: expected a text: no terminal asks for one here" in caplog.messages[0]
    assert "expected --of or --model, not both" in caplog.text


def test_what_sampling_does_not_take_is_refused_by_its_setting(say, caplog) -> None:
    with pytest.raises(SystemExit) as ended:
        say("--prompt", "x", "--top-p", "0")
    assert ended.value.code == 2 and "sample.top_p=0.0: expected" in caplog.text
