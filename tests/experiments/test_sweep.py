"""Sweeps: every member checked before any is queued, each end named, the rest compared."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main as command
from pipeline.commands import experiments as commands
from pipeline.compute import precision
from pipeline.errors import ConfigError, InputError
from pipeline.experiments import comparison, dvc_queue, sweep
from pipeline.experiments.dvc_queue import Watch
from pipeline.experiments.sweep import plan
from pipeline.records import dvc_history
from pipeline.records.dvc_history import Task
from pipeline.training import compiling
from tests.conftest import ROOT, Checkout, recipe, tiny_pipeline
from tests.experiments.test_comparison import run

# MLflow's client and DVC's libraries warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _repository(request, tmp_path: Path, monkeypatch) -> None:
    if "story" not in request.fixturenames:
        (tmp_path / ".dvc").mkdir()
        (tmp_path / "params.yaml").write_text(recipe(), "utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("DVC_ROOT", raising=False)


def test_a_member_for_each_value_with_the_settings_that_all_share() -> None:
    found = plan(["train.lr=0.0005,2e-3", "train.steps=100"])
    assert [(m.name, m.changes) for m in found.members] == [
        ("lr-0.0005", {"train.lr": 0.0005, "train.steps": 100}),
        ("lr-2e-3", {"train.lr": 0.002, "train.steps": 100}),
    ]
    assert [m.config.train.lr for m in found.members] == [0.0005, 0.002]
    assert found.base == 0.002, "the value of params.yaml is the base"


def test_seeds_are_more_experiments_of_the_base() -> None:
    found = plan(["precision=bf16,fp32"], seeds=[1, 2])
    assert found.base == "fp32"
    assert [(m.name, m.config.precision, m.config.train.seed) for m in found.members] == [
        ("precision-bf16", "bf16", 1337),
        ("precision-fp32", "fp32", 1337),
        ("precision-fp32-seed-1", "fp32", 1),
        ("precision-fp32-seed-2", "fp32", 2),
    ]


def test_a_name_that_exists_is_not_used_again() -> None:
    taken = ["lr-0.001", "lr-0.001-2", "lr-0.004"]
    found = plan(["train.lr=0.001,0.002"], taken=taken)
    assert [m.name for m in found.members] == ["lr-0.001-3", "lr-0.002"]
    assert plan(["train.lr=0.001,0.002"], prefix="warm").members[0].name == "warm-0.001"


@pytest.mark.parametrize("text", ["3e-05", "a/b c", "x..y.lock", ".hidden", "-1", "data/ü[1]~^:?*"])
def test_names_follow_the_rules_of_git_and_dvc(text: str) -> None:
    name = sweep.dvc_name(f"stem-{text}")
    assert "/" not in name
    ref = f"refs/exps/ab/cdef/{name}"
    assert subprocess.run(["git", "check-ref-format", ref], check=False).returncode == 0, name


@pytest.mark.parametrize(
    "value", ["fp32", True, 3e-05, 12, "a b, c", "it's", "C:\\new\\", "back\\'slash", "[x]", "a=b"]
)
def test_changes_reach_dvc_as_they_were_checked(value: Any) -> None:
    from dvc.utils.hydra import to_hydra_overrides

    member = sweep.Member("name", {"corpus.path": value}, None)  # type: ignore[arg-type]
    (override,) = to_hydra_overrides(member.words())
    assert override.value() == value and not override.is_sweep_override()


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (
            ["train.lr=0.001,abc,-1.5", "precision=fp4"],
            [
                "precision=fp4: expected one of fp32, tf32, bf16, fp16, fp8",
                "train.lr=abc: expected a number above 0",
                "train.lr=-1.5: expected a number above 0",
            ],
        ),
        (["model.n_head=3,4,5"], ["multiple of model.n_head=3", "multiple of model.n_head=5"]),
        (["train.lrr=1,2"], ["train.lrr: unknown setting; did you mean train.lr?"]),
        (["train.lr=1,2", "train.stepz=4"], ["train.stepz: unknown setting"]),
        (["train.lr=0.002,2e-3"], ["train.lr=0.002 and train.lr=2e-3 are the same experiment"]),
        (["train.lr=0.002", "precision=fp32"], ["one setting with several values", "got none"]),
        (["train.lr=1,2", "precision=fp32,bf16"], ["got train.lr, precision"]),
        (["train.lr=1,2", "train.lr=3"], ["train.lr=3: train.lr is given twice"]),
        (["train.lr", "precision=a,,b"], ["train.lr: expected SETTING=VALUE", "precision=a,,b: "]),
        (["sample.prompts=[a,b]"], ["sample.prompts=[a,b]: a list"]),
        (["train.seed=1,2"], ["train.seed: seeds are the noise"]),
        (["sample.top_k=1,2"], ["sample.top_k: "]),
    ],
)
def test_every_problem_of_every_member_is_in_one_error(words, problems) -> None:
    with pytest.raises(ConfigError) as error:
        plan(words)
    for problem in problems:
        assert problem in str(error.value)
    assert str(Path.cwd()) not in str(error.value)


def test_a_seed_that_the_base_has_already_is_the_same_experiment() -> None:
    with pytest.raises(ConfigError, match="are the same experiment"):
        plan(["train.lr=0.002,0.004"], seeds=[1337])


def test_what_would_not_be_in_effect_on_this_machine_is_not_queued(monkeypatch) -> None:
    monkeypatch.setitem(precision.DEVICES, "cpu", precision._elsewhere)
    monkeypatch.setattr(compiling, "why_not_compile", lambda chosen: "no compiler")
    with pytest.raises(ConfigError) as error:
        plan(["precision=fp32,tf32", "device=cpu", "train.compile=true"])
    assert str(error.value).splitlines() == [
        "train.compile=true: not in effect here, no compiler",
        "precision=tf32: not in effect here, cpu devices have no tf32: fp32 instead",
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda: not available here"):
        plan(["device=cpu,cuda"])


def test_every_sweep_that_the_documentation_shows_is_valid(monkeypatch) -> None:
    monkeypatch.setattr(sweep, "machine_problems", lambda config: [])  # of any machine
    pages = [
        ROOT / "pipeline/commands/experiments.py",
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    lines = [line for page in pages for line in page.read_text("utf-8").splitlines()]
    shown = [
        m[1]
        for line in lines
        if (m := re.match(r"(?:\$ |    )?python -m pipeline sweep (.+)", line))  # noqa: E501
    ]
    assert len(shown) >= 2
    for line in shown:
        words = line.partition("#")[0].split()
        asked = commands.sweep_words(argparse.ArgumentParser(), words)
        assert len(plan(asked.words, asked.seeds, asked.name).members) > 1, line


class Queue:
    """DVC's queue as a script: what each look at it finds, the last one for ever."""

    def __init__(self, monkeypatch, *looks: dict[str, str], workers: int = 1):
        self.looks, self.workers, self.said, self.now = list(looks), workers, [], 0.0
        monkeypatch.setattr(dvc_history, "queue", self.look)
        monkeypatch.setattr(dvc_history, "workers", lambda: self.workers)
        monkeypatch.setattr(dvc_queue, "dvc", self.dvc)
        monkeypatch.setattr(dvc_queue.time, "sleep", self.sleep)
        monkeypatch.setattr(dvc_queue.time, "monotonic", lambda: self.now)

    def look(self) -> list[Task]:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return [Task(name, f"rev-{name}", state) for name, state in found.items()]

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def dvc(self, *words: str) -> str:
        self.said.append(" ".join(words))
        return ""


def watch(*names: str, jobs: int = 1) -> Watch:
    found = Watch({f"rev-{name}": name for name in names}, jobs)
    found.wait()
    return found


def test_only_the_sweeps_own_members_are_waited_for(monkeypatch) -> None:
    Queue(
        monkeypatch,
        {"a": "running", "b": "queued", "other": "running"},
        {"a": "success", "b": "running", "other": "running"},
        {"a": "success", "b": "success", "other": "running"},
    )
    found = watch("a", "b")
    assert found.named("success") == ["a", "b"]


def test_a_member_on_its_way_to_a_worker_is_not_taken_for_removed(monkeypatch) -> None:
    Queue(monkeypatch, {"a": "queued"}, {}, {"a": "running"}, {"a": "success"})
    assert watch("a").named("success") == ["a"]
    Queue(monkeypatch, {"a": "queued"}, {})
    assert watch("a").problems() == ["a: taken out of the queue"]


def test_a_worker_that_a_kill_took_along_is_replaced(monkeypatch) -> None:
    queue = Queue(
        monkeypatch,
        {"a": "running", "b": "queued"},
        {"a": "failed", "b": "queued"},
        {"a": "failed", "b": "running"},
        {"a": "failed", "b": "success"},
        workers=0,
    )
    found = watch("a", "b")
    assert queue.said == ["queue logs rev-a -e utf-8", "queue start --jobs 1"]
    assert (found.named("failed"), found.named("success")) == (["a"], ["b"])


def test_workers_that_were_stopped_on_purpose_stay_so_and_the_wait_ends(monkeypatch) -> None:
    queue = Queue(monkeypatch, {"a": "success", "b": "queued"}, workers=0)
    found = watch("a", "b")
    assert queue.said == []
    assert dvc_queue.ALONE_SECONDS < queue.now < 2 * dvc_queue.ALONE_SECONDS
    assert found.problems() == ["b: waits, and no worker is left: `dvc queue start` goes on"]


@pytest.mark.parametrize(
    ("logged", "expected"),
    [
        ("train: 3%\rtrain: 9%\ninterrupted\nERROR: failed\n", "killed (dvc"),
        ("ERROR: interrupted by the user\n", "killed (dvc"),
        (
            "error: step 1: the loss is nan\nbye\nERROR: failed\n",
            "failed, step 1: the loss is nan (dvc",
        ),
        (
            "Traceback\n  ...\nKeyError: 'x'\nERROR: failed\nERROR: failed\n",
            "failed, KeyError: 'x'",
        ),
        ("", "failed, without a word (dvc"),
    ],
)
def test_the_log_of_a_failed_member_says_why(monkeypatch, logged: str, expected: str) -> None:
    monkeypatch.setattr(dvc_queue, "dvc", lambda *words: logged)
    found = dvc_queue.why("lr-1", "rev")
    assert expected in found and found.endswith("(dvc queue logs lr-1)")


def test_members_that_dvc_refuses_leave_no_half_a_sweep_in_the_queue(monkeypatch) -> None:
    queue = Queue(monkeypatch, {})

    def refuse(*words: str) -> str:
        if "b" in words and "--queue" in words:
            raise InputError("dvc exp run: no")
        return queue.dvc(*words)

    monkeypatch.setattr(dvc_queue, "dvc", refuse)
    with pytest.raises(InputError, match="dvc exp run: no"):
        dvc_queue.enqueue({"a": ["train.lr=1"], "b": ["train.lr=2"]})
    assert queue.said == ["exp run --queue --name a -S train.lr=1", "queue remove a"]


@pytest.fixture
def compared(monkeypatch, caplog) -> list[str]:
    """What has been compared; nothing here reaches DVC."""
    caplog.set_level(logging.INFO)
    done: list[str] = []
    monkeypatch.setattr(comparison, "conclude", lambda setting, like: done.append(setting))
    monkeypatch.setattr(dvc_history, "names", set)
    return done


def run_main(*words: str) -> int:
    try:
        command(["sweep", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_members_that_ran_are_compared_and_the_others_named(
    monkeypatch, compared, caplog
) -> None:
    names = ("lr-0.001", "lr-0.002", "lr-5")
    ended = {"lr-0.001": "success", "lr-0.002": "success", "lr-5": "failed"}
    Queue(monkeypatch, {}, dict.fromkeys(names, "queued"), dict.fromkeys(names, "queued"), ended)
    assert run_main("train.lr=0.001,0.002,5") == InputError.exit_code
    assert compared == ["train.lr"]
    assert "lr-5: failed" in caplog.text and "dvc plots diff lr-0.001 lr-0.002\n" in caplog.text


def test_a_sweep_of_which_one_member_ran_says_that_there_is_nothing_to_compare(
    monkeypatch, compared, caplog
) -> None:
    def refuse(setting: str, like: dict[str, Any]) -> None:
        raise InputError(f"no two runs differ in {setting}")

    monkeypatch.setattr(comparison, "conclude", refuse)
    ended = {"lr-0.001": "success", "lr-0.002": "success"}
    queued = dict.fromkeys(ended, "queued")
    Queue(monkeypatch, {}, queued, queued, ended)
    assert run_main("train.lr=0.001,0.002") == InputError.exit_code
    assert "error: no two runs differ in train.lr" in caplog.text


def test_the_comparison_is_of_the_sweeps_own_set_though_another_is_newer() -> None:
    other = {"train.lr": 0.2}
    runs = [
        *(run(name, time=1) for name in ("fp32", "bf16")),
        *(run(name, time=9, params=other) for name in ("fp32", "bf16")),
    ]
    found = comparison.compare(runs, "precision", "fp32", like=run("fp16").params)
    assert {r.params["train.lr"] for values in found.runs.values() for r in values} == {0.1}


def test_a_dry_run_queues_nothing(monkeypatch, compared, caplog) -> None:
    queue = Queue(monkeypatch, {})
    assert run_main("train.lr=0.001,0.002", "--dry-run", "--seeds", "5") == 0
    assert queue.said == [] and compared == []
    assert "lr-0.002-seed-5  train.lr=0.002 train.seed=5" in caplog.text


def test_ctrl_c_while_waiting_says_how_to_go_on(monkeypatch, compared, caplog) -> None:
    Queue(monkeypatch, {})
    monkeypatch.setattr(dvc_queue.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sweep, "enqueue", lambda changes, inputs: {"rev-a": "a"})
    assert run_main("train.lr=0.001,0.002") == 130
    assert "python -m pipeline compare train.lr" in caplog.text and compared == []


def test_a_queue_that_changes_under_the_readers_eyes_is_looked_at_again(
    tmp_path, monkeypatch
) -> None:
    from dvc.repo.experiments.queue.celery import LocalCeleryQueue

    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    looks: list[int] = []

    def status(_queue: Any) -> list[dict[str, str]]:
        looks.append(1)
        if len(looks) < 3:
            raise FileNotFoundError("moved away")
        return [{"name": "a", "rev": "abc", "status": "Running"}]

    monkeypatch.setattr(dvc_history.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(LocalCeleryQueue, "status", status)
    assert dvc_history.queue() == [Task("a", "abc", "running")]
    looks.clear()
    monkeypatch.setattr(LocalCeleryQueue, "status", lambda _queue: looks[0])
    with pytest.raises(IndexError):
        dvc_history.queue()


STAGE = """
import time
from pathlib import Path
number = int(Path("params.yaml").read_text().split()[1])
if number == 2:
    raise SystemExit("error: two is too many")
if number == 3:
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
Path("out.txt").write_text(str(number))
"""


@pytest.fixture
def small_repo(tmp_path: Path, monkeypatch) -> Checkout:
    """A pipeline of one stage that takes no time, to meet the real queue."""
    repo = Checkout(tmp_path)
    for name in ("PATH", *(name for name in repo.env if name.startswith("GIT_"))):
        monkeypatch.setenv(name, repo.env[name])
    repo.run("git", "init", "--quiet", "--initial-branch=main")
    shutil.copyfile(ROOT / ".dvc/.gitignore", tmp_path / ".dvc/.gitignore")
    shutil.copyfile(ROOT / ".dvc/config", tmp_path / ".dvc/config")
    (tmp_path / "stage.py").write_text(STAGE, "utf-8")
    (tmp_path / "params.yaml").write_text("number: 0\n", "utf-8")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  one: {cmd: python stage.py, params: [number], outs: [out.txt]}\n", "utf-8"
    )
    repo.run("git", "add", "--all")
    repo.run("git", "commit", "--quiet", "--message", "start")
    return repo


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
def test_the_real_queue_goes_on_after_a_kill_and_a_crash(small_repo, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    names = ["killed", "crashed", "fine"]
    members = {name: [f"number={number}"] for name, number in zip(names, (3, 2, 1), strict=True)}
    found = Watch(dvc_queue.enqueue(members), 1)
    found.start()
    assert sorted(found.names.values()) == sorted(names) and dvc_history.names() == set(names)
    sleep = time.sleep

    def kill_the_first(seconds: float) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", sleep)
            if found.named("running") == ["killed"]:
                small_repo.dvc("queue", "kill", "killed", expect=None)  # it may just be starting
            sleep(seconds)

    monkeypatch.setattr(dvc_queue.time, "sleep", kill_the_first)
    found.wait()
    assert found.named("success") == ["fine"], caplog.text
    assert sorted(found.problems()) == [
        "crashed: failed, two is too many (dvc queue logs crashed)",
        "killed: killed (dvc queue logs killed)",
    ]
    with pytest.raises(InputError, match="dvc queue kill nobody: exit 255"):
        dvc_queue.dvc("queue", "kill", "nobody")


# One sweep as people live through it: a member is killed, one crashes, and Ctrl-C ends the wait.


class Story:
    def __init__(self, repo: Checkout):
        self.repo = repo
        self.said = repo.folder / "said.txt"

    def sweep(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "pipeline", "sweep", *words]
        with open(self.said, "wb") as said:
            return subprocess.Popen(
                command,
                cwd=self.repo.folder,
                env=self.repo.env,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's foreground group
            )

    def wait_for(self, text: str) -> None:
        self._until(lambda: text in self.said.read_text("utf-8"), text)

    def wait_until_trained(self, steps: int) -> None:
        """Until the experiment at work has done some steps."""
        parts = lambda: self.repo.folder.glob(".dvc/tmp/exps/*/records/train.jsonl.part")  # noqa: E731
        count = lambda: sum(p.read_text("utf-8").count("train/loss") for p in parts())  # noqa: E731
        self._until(lambda: count() >= steps, f"{steps} steps")

    def _until(self, happened, what: str) -> None:
        deadline = time.monotonic() + 300
        while not happened():
            assert time.monotonic() < deadline, f"{what}: {self.said.read_text('utf-8')}"
            time.sleep(0.5)

    def statuses(self) -> dict[str, str]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.repo.folder.as_posix()}/mlflow.db")
        experiment = client.get_experiment_by_name("gpt2")
        return {
            r.info.run_name: r.info.status for r in client.search_runs([experiment.experiment_id])
        }


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    told = Story(tiny_pipeline(tmp_path_factory.mktemp("sweep")))
    # In fp16 a first step of 10 makes activations that no fp16 holds.
    common = ("precision=fp16", "train.steps=100", "train.warmup_steps=0", "train.val_every=50")
    process = told.sweep("train.lr=0.002,10,0.004,0.008", *common)
    told.wait_for("lr-0.002: running")
    told.wait_until_trained(5)
    told.repo.dvc("queue", "kill", "lr-0.002")
    told.wait_for("lr-0.004: running")
    os.killpg(process.pid, signal.SIGINT)
    told.code = process.wait(30)  # type: ignore[attr-defined]
    told.first = told.said.read_text("utf-8")  # type: ignore[attr-defined]
    told.repo.wait_for_queue(4)
    process = told.sweep("train.lr=10,0.004,0.008", *common, "--jobs", "2")
    told.second_code = process.wait(300)  # type: ignore[attr-defined]
    return told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
def test_a_kill_a_crash_and_ctrl_c_leave_the_rest_running(story: Story) -> None:
    assert story.code == 130
    assert "lr-0.002: killed" in story.first
    assert "lr-10: failed, step 1: the loss is nan" in story.first
    assert "go on without this command" in story.first and "Traceback" not in story.first
    statuses = story.statuses()  # after the second sweep, which tried lr-10 again, in its row
    assert {name: statuses[name] for name in ("lr-0.002", "lr-10-2", "lr-0.004", "lr-0.008")} == {
        "lr-0.002": "KILLED",
        "lr-10-2": "FAILED",
        "lr-0.004": "FINISHED",
        "lr-0.008": "FINISHED",
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
def test_a_sweep_ends_in_a_comparison_and_names_what_failed(story: Story) -> None:
    said = story.said.read_text("utf-8")
    assert story.second_code == InputError.exit_code
    assert "lr-0.004-2: success" in said and "Traceback" not in said
    assert "error: lr-10-2: failed, step 1: the loss is nan" in said
    page = (story.repo.folder / "comparisons/train.lr/comparison.md").read_text("utf-8")
    assert page in said
    assert {"0.004", "0.008"} <= set(re.findall(r"^\| (\S+) ", page, re.MULTILINE))
