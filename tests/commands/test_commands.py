"""`python -m pipeline VERB`: one table of verbs, one way to fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline import __main__ as cli
from pipeline.errors import InputError
from tests.helpers.imports import ROOT


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_without_a_verb_every_verb_is_listed_with_what_it_does(words, caplog) -> None:
    caplog.set_level("INFO")
    cli.main(words)
    for name in cli.VERBS.keys() - cli.INTERNAL:
        assert f"  {name:<10}{(cli.VERBS[name].__doc__ or '').splitlines()[0][:-1]}" in caplog.text


def test_a_mistyped_verb_is_named_with_the_nearest_one(caplog) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["docter"])
    assert ended.value.code == 2
    assert "error: docter: no such command; did you mean doctor?" in caplog.text


@pytest.mark.parametrize("name", sorted(cli.VERBS.keys() - cli.INTERNAL))
def test_help_shows_what_a_verb_does_and_how_it_is_called(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m pipeline {name}" in capsys.readouterr().out.partition("\n\n")[2]


def test_a_mistake_of_the_user_is_one_message_and_ctrl_c_none(monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise InputError("no such thing")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for verb, code in ((refuse, InputError.exit_code), (interrupt, 130)):
        monkeypatch.setitem(cli.VERBS, "doctor", verb)
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor"])
        assert ended.value.code == code
    assert caplog.messages == ["error: no such thing"]


def test_results_go_to_standard_output_and_errors_to_the_other_stream() -> None:
    def called(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert called().stdout.startswith("usage: ") and not called().stderr
    wrong = called("sweeep")
    assert wrong.stderr.startswith("error: sweeep") and not wrong.stdout
