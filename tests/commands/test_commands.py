"""`python -m pipeline VERB`: one table of verbs, one way to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import __main__ as cli
from pipeline import paths
from pipeline.errors import InputError
from tests.helpers.imports import ROOT


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_without_a_verb_every_verb_is_listed_with_what_it_does(words, capsys) -> None:
    cli.main(words)
    lines = capsys.readouterr().out.splitlines()
    for name, verb in cli.VERBS.items():
        says = (verb.__doc__ or "").splitlines()[0].removesuffix(".")
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line == f"  {name:<8}  {says}" and len(line) <= 80


def test_a_mistyped_verb_is_named_with_the_nearest_one(caplog) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["docter"])
    assert ended.value.code == 2
    assert "error: No such command 'docter'. Did you mean 'doctor'?" in caplog.text


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_shows_what_a_verb_does_and_how_it_is_called(name: str, capsys) -> None:
    cli.main([name, "--help"])
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"Usage: python -m pipeline {name}")
    example = [line for line in (cli.VERBS[name].__doc__ or "").splitlines() if name in line][-1]
    assert f"\n  {example.strip()}\n" in rest, "in a line of its own, as it was written"
    assert max(map(len, rest.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["doctor", "--bad"], "error: No such option: --bad"),
        (["compare"], "error: Missing argument 'SETTING'"),
        (["ls", "now"], "error: Got unexpected extra argument(s) (now)"),
        (["verify", "model"], "'model' is not one of 'tokens', 'models', 'cache'"),
        (
            ["verify", "cache", "data"],
            "expected folders of tokens or models, and none of the cache",
        ),
        (["sweep", "train.lr=1,2", "--seeds", "x"], "x: expected whole numbers, as 1,2"),
        (["ladder", "--horizons", "1h"], "1h: expected whole numbers, as 200,400,800"),
        (["sweep", "train.lr=1,2", "--name", "a/b"], "a/b: expected letters, digits, _ and -"),
    ],
)
def test_a_mistyped_word_is_one_error_that_says_where_help_is(words, what: str, caplog) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    error, more = caplog.messages
    assert what in error and more == f"`python -m pipeline {words[0]} --help` says more"


def test_a_mistake_of_the_user_is_one_message_and_ctrl_c_none(monkeypatch, caplog) -> None:
    def refuse() -> None:
        raise InputError("no such thing")

    def interrupt() -> None:
        raise KeyboardInterrupt

    for verb, code in ((refuse, InputError.exit_code), (interrupt, 130)):
        monkeypatch.setitem(cli.VERBS, "doctor", verb)
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor"])
        assert ended.value.code == code
    assert caplog.messages == ["error: no such thing"]


def test_a_verb_said_in_a_folder_below_works_on_the_checkout(tmp_path, monkeypatch) -> None:
    """A path among its words is one of that folder all the same."""
    for folder in (".dvc", "notes"):
        (tmp_path / folder).mkdir()
    (tmp_path / paths.PARAMS).touch()
    seen: list[Path] = []
    monkeypatch.setattr(cli.manage, "_models", lambda folder: seen.append(folder) or 0)
    monkeypatch.chdir(tmp_path / "notes")
    cli.main(["verify", "models", "mine", "../other"])
    assert Path.cwd() == tmp_path and seen == [tmp_path / "notes/mine", tmp_path / "other"]
    cli.main(["verify", "models", "mine"])
    assert seen[2:] == [Path("mine")]


def test_the_command_of_its_own_completes_verbs_in_a_shell() -> None:
    code = "import sys; sys.argv = ['gpt2']; from pipeline.__main__ import main; main()"
    words = {"_GPT2_COMPLETE": "complete_bash", "COMP_WORDS": "gpt2 comp", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | words, capture_output=True
    )
    assert done.stdout.decode().split() == ["compare"] and not done.stderr


def test_results_go_to_standard_output_and_errors_to_the_other_stream() -> None:
    def called(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert called().stdout.startswith("Usage: ") and not called().stderr
    wrong = called("sweeep")
    assert wrong.stderr.startswith("error: No such command 'sweeep'") and not wrong.stdout
