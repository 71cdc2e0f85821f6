"""What is said to somebody who has just begun: the wrong Python, no git, nothing run yet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.data import token_files
from pipeline.errors import InputError
from pipeline.model import model_dir
from pipeline.records import dvc_history
from pipeline.regular import read_json
from pipeline.resume.snapshot import read_facts
from tests.conftest import ROOT
from tools.lock import LOCK

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make here")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The project's Makefile with nothing to install, in no git repository."""
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    asked = ("requirements.txt", "requirements-dev.txt", "requirements-plays.txt")
    for name in (*asked, "constraints.txt", LOCK.name):
        (tmp_path / name).touch()
    (tmp_path / ".dvc").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_repro(folder: Path, version: str = "3, 11, 7") -> str:
    """What `make repro` says with a Python of this version, which makes no environment."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && {{ echo "python $*"; exit 7; }}\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = ({version})\n$2"\n'
    )
    python.chmod(0o755)
    words = ["make", "repro", f"PYTHON={python}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode != 0
    return done.stdout + done.stderr


@needs_make
@pytest.mark.parametrize("version", ["2, 7, 18", "3, 10, 13", "3, 14, 0"])
def test_make_refuses_another_python_before_it_installs(folder: Path, version: str) -> None:
    subprocess.run(["git", "init", "--quiet"], check=True)
    said = make_repro(folder, version)
    short = ".".join(version.split(", ")[:2])
    assert f"Python {short} found, 3.11 to 3.13 needed: make repro PYTHON=python3.12\n" in said
    assert "python -m" not in said


@needs_make
@pytest.mark.parametrize("version", ["3, 11, 0", "3, 12, 4", "3, 13, 0"])
def test_make_takes_the_supported_pythons(folder: Path, version: str) -> None:
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert "python -m venv .venv" in make_repro(folder, version)


@needs_make
def test_make_says_that_there_is_no_git_before_it_installs(folder: Path) -> None:
    said = make_repro(folder)
    assert "no git repository here" in said and "git init && git add --all" in said
    assert "python -m" not in said


@needs_make
def test_make_goes_on_where_dvc_is_told_to_do_without_git(folder: Path) -> None:
    (folder / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    assert "python -m venv .venv" in make_repro(folder)


@pytest.mark.parametrize("no_scm", [False, True])
def test_a_sweep_without_git_ends_in_one_message(folder: Path, caplog, no_scm: bool) -> None:
    if no_scm:
        (folder / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    with pytest.raises(SystemExit) as ended:
        command(["sweep", "train.lr=0.1,0.2"])
    assert ended.value.code == InputError.exit_code
    assert f"error: {folder}: no git repository here" in caplog.text
    with pytest.raises(InputError, match="git init && git add --all"):
        dvc_history.names()


def test_what_is_missing_is_not_called_damaged(folder: Path) -> None:
    looks = {
        f"{paths.INIT}: no initial model yet": lambda: model_dir.load_model(paths.INIT),
        f"{paths.MODEL}: no trained model yet: `make repro`": (
            lambda: model_dir.load_model(paths.MODEL)
        ),
        "nowhere: no such folder": lambda: model_dir.load_model(Path("nowhere")),
        f"{paths.TOKENS / 'meta.json'}: no such file; tokenize first": (
            lambda: token_files.open_tokens(paths.TOKENS, "train")
        ),
        "nowhere: no snapshot of a training step is there": lambda: read_facts(Path("nowhere")),
        "nowhere/config.json: no such file": lambda: read_json(Path("nowhere/config.json")),
    }
    for said, look in looks.items():
        with pytest.raises(InputError) as refused:
            look()
        assert str(refused.value).startswith(said)
        assert not any(word in str(refused.value) for word in ("Errno", "cannot be read", "again"))


def test_what_is_damaged_is_not_called_missing(folder: Path) -> None:
    for path in (paths.TOKENS / "meta.json", paths.MODEL / "config.json"):
        path.parent.mkdir(parents=True)
        path.write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read as JSON"):
        model_dir.load_model(paths.MODEL)
    with pytest.raises(InputError, match=r"meta\.json: cannot be read as JSON: .*tokenize again"):
        token_files.open_tokens(paths.TOKENS, "train")


@pytest.mark.parametrize("verb", ["report", "doctor"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_before_anything_is_trained_the_commands_say_so(folder: Path, caplog, verb: str) -> None:
    with pytest.raises(SystemExit) as ended:
        command([verb])
    assert ended.value.code == InputError.exit_code
    assert "nothing trained yet: `dvc repro` or `make repro` trains" in caplog.text


def test_a_cache_that_is_not_there_yet_is_said_to_be_none(folder: Path, caplog) -> None:
    with pytest.raises(SystemExit):
        command(["verify", "cache"])
    assert "nothing is cached yet" in caplog.text


def test_the_texts_of_a_step_say_that_nothing_is_tokenized(folder: Path, caplog) -> None:
    shutil.copyfile(ROOT / "recipes" / "nano.yaml", "params.yaml")
    for words in (["--step", "3"], ["0-5"]):
        with pytest.raises(SystemExit):
            command(["text", *words])
        assert "tokenize first: `dvc repro tokenize`" in caplog.messages[-1]


def test_one_text_before_training_says_what_makes_a_model(folder: Path, caplog) -> None:
    shutil.copyfile(ROOT / "recipes" / "nano.yaml", "params.yaml")
    with pytest.raises(SystemExit) as ended:
        command(["sample", "--prompt", "hi"])
    assert ended.value.code == InputError.exit_code
    assert caplog.messages == [f"error: {paths.MODEL}: {paths.MISSING[paths.MODEL]}"]


def test_a_stage_that_is_given_words_says_so_and_does_no_work(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages.sample", "--prompt", "hi"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --prompt hi: a stage takes no options; ")
