"""Git's own names, its owner's folder, and what it leaves out of temporary workspaces."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.experiments import sweep
from pipeline.records import dvc_history, git
from tests.conftest import NANO, ROOT, Checkout, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def say(*words: str | Path) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a repository of git and DVC with one commit."""
    root = tmp_path / "repo"
    (root / ".dvc").mkdir(parents=True)
    (root / "data/corpus").mkdir(parents=True)
    (root / "data/corpus/.gitkeep").touch()
    shutil.copyfile(NANO, root / "params.yaml")
    monkeypatch.chdir(root)
    for name in ("DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    say("init", "--quiet", "--initial-branch=main")
    say("add", "--all")
    say("commit", "--quiet", "--message", "one")
    return root


# --- names


def hex_of_an_object() -> str:
    return say("rev-parse", "--short=4", "HEAD")


@pytest.mark.fault(61, control=True)
def test_git_takes_four_hex_digits_for_an_object_of_the_history(repo: Path) -> None:
    assert say("cat-file", "-t", hex_of_an_object()) == "commit"


@pytest.mark.fault(61)
@pytest.mark.parametrize("name", ["bf16", "deadbeef", "FADE", "main", "HEAD", "v1", "lr-1-gHEX"])
def test_a_name_of_gits_own_or_one_that_may_become_it_is_taken(repo: Path, name: str) -> None:
    say("tag", "v1")
    assert git.taken(name.replace("HEX", hex_of_an_object()))


@pytest.mark.parametrize("name", ["1e3", "fp16", "alive-fern", "lr-0.001", "precision-bf16"])
def test_other_names_are_free(repo: Path, name: str) -> None:
    assert not git.taken(name)


@pytest.mark.fault(61)
def test_a_stage_warns_of_such_a_name_before_its_work_with_the_way_out(repo: Path) -> None:
    name = hex_of_an_object()
    code = (
        "from stages.common import run; run(lambda config: print('WARNING: at work', flush=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DVC_EXP_NAME": name, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert f"`dvc exp rename {name} OTHER`" in lines[0] and lines[1] == "WARNING: at work"


@pytest.mark.fault(61)
def test_a_sweep_chooses_names_that_git_does_not_know(repo: Path) -> None:
    say("tag", "lr-0.001")
    say("branch", "lr-0.001-2")
    found = sweep.plan(["train.lr=0.001,0.002"])
    assert [member.name for member in found.members] == ["lr-0.001-3", "lr-0.002"]


def test_no_name_of_an_experiment_in_the_documentation_is_one_of_gits() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*")]
    named = re.compile(r"dvc exp run\b.*?\s(?:-n|--name)[ =](\S+)")
    names = {m[1] for page in pages for m in named.finditer(page.read_text("utf-8"))}
    assert {"wild", "seven"} <= names
    assert not [name for name in names if git.taken(name)]


# --- the folder of another owner


@pytest.fixture
def foreign(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository belongs to somebody else, as one that a container has mounted."""
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("giving a folder away needs root")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("HOME", str(repo.parent))
    for path in [repo, *repo.rglob("*")]:
        os.chown(path, 1234, 1234)
    return repo


@pytest.mark.fault(65, control=True)
def test_git_refuses_the_folder_of_another_owner(foreign: Path) -> None:
    done = subprocess.run(["git", "log"], capture_output=True, text=True, check=False)
    assert done.returncode and "dubious ownership" in done.stderr


@pytest.mark.fault(65)
@pytest.mark.parametrize("read", [dvc_history.names, lambda: list(dvc_history.experiments())])
def test_what_reads_dvcs_experiments_says_how_to_trust_that_folder(foreign: Path, read) -> None:
    with pytest.raises(InputError) as error:
        read()
    assert f"git config --global --add safe.directory {foreign}" in str(error.value)


@pytest.mark.fault(65)
def test_a_stage_in_that_folder_warns_that_its_record_holds_no_commit(
    foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    git.warn()
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "safe.directory" in said and "no record holds its commit" in said


def test_nothing_is_said_of_a_folder_of_ones_own(
    repo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    git.warn()
    assert caplog.text == ""


# --- inputs that git does not carry


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text", "utf-8")


@pytest.fixture
def workspace(repo: Path, monkeypatch: pytest.MonkeyPatch):
    """make() enters a temporary workspace as DVC makes it: what is committed, and no more."""

    def make() -> Path:
        place = repo / ".dvc/tmp/exps/standalone/tmp1"
        say("clone", "--quiet", repo, place)
        monkeypatch.chdir(place)
        return place

    return make


def check(path: str) -> None:
    git.check_whole("corpus.path", path, git.files)


@pytest.mark.fault(63)
def test_a_temporary_workspace_with_part_of_a_folder_is_told_the_two_ways_out(
    repo: Path, workspace
) -> None:
    write("data/text/1.txt", "data/text/2.txt")
    say("add", "data/text/1.txt")
    say("commit", "--quiet", "--message", "text")
    write("data/corpus/my part.parquet")
    workspace()
    with pytest.raises(InputError) as error:
        check("data/text")
    assert "1 of its files, such as 2.txt" in str(error.value)
    assert f"-S corpus.path={repo}/data/text" in str(error.value)
    assert str(error.value).endswith("-C data/text/2.txt")
    with pytest.raises(InputError, match="-C 'data/corpus/my part.parquet'"):
        check("./data/corpus")


@pytest.mark.fault(63, control=True)
def test_what_git_carries_or_was_brought_or_has_an_absolute_path_is_whole(
    repo: Path, workspace
) -> None:
    write("data/text/1.txt", "data/corpus/part.parquet", "data/text/.hidden")
    say("add", "data/text/1.txt")
    say("commit", "--quiet", "--message", "text")
    check("data/corpus")  # the main workspace has what it has
    workspace()
    (repo / "data/text/later.txt").write_text("committed after this one was queued")
    say("-C", repo, "add", "data/text/later.txt")
    check("data/text")
    check(str(repo / "data/corpus"))
    shutil.copytree(repo / "data/corpus", "data/corpus", dirs_exist_ok=True)
    check("data/corpus")


@pytest.mark.fault(63)
def test_a_sweep_takes_along_what_git_does_not_carry(repo: Path, make_config) -> None:
    write("data/corpus/1.txt", "data/corpus/deep/2.txt", "data/hs/val.jsonl", "data/gpt2/x.json")
    config = make_config(
        corpus__source="text",
        corpus__path="data/corpus",
        evaluate__hellaswag="data/hs/val.jsonl",
        init__source="hf",
        init__hf_model="data/gpt2",
        init__hf_watch="data/gpt2",
    )
    assert sorted(git.to_take_along(config)) == [
        *("data/corpus/1.txt", "data/corpus/deep", "data/gpt2", "data/hs"),
    ]
    Path("data/hs.dvc").touch()  # `dvc add data/hs`: DVC brings it itself
    say("add", "data/corpus", "data/gpt2")
    assert git.to_take_along(config) == []
    assert git.to_take_along(make_config()) == []


@pytest.mark.fault(63)
def test_a_sweep_refuses_a_relative_path_that_leads_out_of_the_repository(
    repo: Path, make_config
) -> None:
    outside = make_config(corpus__source="text", corpus__path="../novels")
    with pytest.raises(InputError) as error:
        git.to_take_along(outside)
    assert f"give the absolute path: {repo.parent}/novels" in str(error.value)


def test_every_member_of_a_sweep_carries_its_inputs(repo: Path) -> None:
    write("data/corpus/1.txt")
    found = sweep.plan(["train.lr=0.001,0.002", "corpus.source=text", "corpus.path=data/corpus"])
    assert [member.inputs for member in found.members] == [("data/corpus/1.txt",)] * 2
    assert "each gets a copy of data/corpus/1.txt; an absolute path" in found.page()


# --- the same seen from outside


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clean clone's state: dvc.lock as it is committed, no cache, and text in data/corpus."""
    made = tiny_pipeline(tmp_path_factory.mktemp("fresh"))
    committed = subprocess.run(["git", "show", "HEAD:dvc.lock"], cwd=ROOT, capture_output=True)
    (made.folder / "dvc.lock").write_bytes(committed.stdout)
    made.run("git", "add", "--all")
    made.run("git", "commit", "--quiet", "--message", "as committed")
    for text in (made.folder / "data/text").iterdir():
        shutil.copyfile(text, made.folder / "data/corpus" / text.name)
    return made


OWN = ("-S", "corpus.path=data/corpus", "tokenize")


@pytest.mark.slow
def test_a_first_experiment_of_one_stage_in_a_clean_clone_is_kept(fresh: Checkout) -> None:
    fresh.dvc("exp", "run", "-n", "one", *OWN)
    assert "[one]" in fresh.dvc("exp", "list")
    changed = fresh.run("git", "status", "--porcelain").stdout
    assert changed == " M dvc.lock\n M params.yaml\n"


@pytest.mark.slow
@pytest.mark.fault(63)
def test_own_text_is_missed_in_a_temporary_workspace_and_can_be_brought_there(
    fresh: Checkout,
) -> None:
    said = fresh.dvc("exp", "run", "--temp", "-n", "two", *OWN, expect=255)
    assert "error: corpus.path=data/corpus: git does not carry 12 of its files" in said
    assert f"-S corpus.path={fresh.folder}/data/corpus" in said
    copied = [word for n in range(12) for word in ("-C", f"data/corpus/{n:02}.txt")]
    fresh.dvc("exp", "run", "--temp", "-n", "two", *copied, *OWN)
    absolute = f"corpus.path={fresh.folder}/data/corpus"
    fresh.dvc("exp", "run", "--temp", "-n", "three", "-S", absolute, "tokenize")
    listed = fresh.dvc("exp", "list")
    assert "[two]" in listed and "[three]" in listed
