"""Sweeps: every member checked before any is run, each failure named, the rest compared."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from configobj import ConfigObj

from pipeline.__main__ import main as command
from pipeline.compute import precision
from pipeline.errors import ConfigError, InputError
from pipeline.experiments import comparison, sweep
from pipeline.experiments.sweep import Member, plan
from pipeline.records import dvc_history
from pipeline.training import compiling
from tests.conftest import ROOT, Checkout, recipe, tiny_pipeline, wait_for
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
    "value",
    [
        *("fp32", True, 3e-05, 12, "a b, c", "it's", "C:\\new\\", "back\\'slash", "[x]", "a=b"),
        *(
            "data/forks/a.b-100-0e1f",
            "1e5",
            "nan",
            "Inf",
            "True",
            "null",
            "-1",
            "/a",
            "",
            "a/",
            "a.",
        ),
    ],
)
def test_changes_reach_dvc_as_they_were_checked(value: Any) -> None:
    from dvc.utils.hydra import to_hydra_overrides

    member = sweep.Member("name", {"corpus.path": value}, None)  # type: ignore[arg-type]
    (override,) = to_hydra_overrides(member.words())
    assert override.value() == value and not override.is_sweep_override()


def test_the_line_for_dvcs_queue_has_no_more_quotes_than_it_needs() -> None:
    changes = {"train.schedule": "wsd", "train.fork": "data/forks/long-100-8a8bf7b0"}
    line = shlex.join(sweep.Member("h", changes, None).command("--queue"))  # type: ignore[arg-type]
    assert line.endswith("-S train.schedule=wsd -S train.fork=data/forks/long-100-8a8bf7b0")


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


def test_what_would_not_be_in_effect_on_this_machine_is_not_run(monkeypatch) -> None:
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


def test_a_cache_that_dvc_cannot_name_to_its_copies_is_refused_with_the_way_out(
    monkeypatch,
) -> None:
    with pytest.raises(UnicodeEncodeError):  # as DVC writes it; else nothing need be refused
        ConfigObj({"cache": {"dir": "/home/Jürgen/.dvc/cache"}}).write(io.BytesIO())
    for home, refused in (("Jürgen", True), ("two words", False)):
        cache = Path(f"/home/{home}/.dvc/cache")
        monkeypatch.setattr(dvc_history, "cache_folder", lambda at=cache: at / "files" / "md5")
        said = sweep.no_copies()
        assert bool(said) == refused == (str(cache) in said)
    assert plan(["train.lr=0.001,0.002"]).members
    monkeypatch.setattr(dvc_history, "cache_folder", lambda: Path("/ü/.dvc/cache/files/md5"))
    with pytest.raises(ConfigError, match="^/ü/.dvc/cache: DVC makes no .*`dvc cache dir --local"):
        plan(["train.lr=0.001,0.002"])


def test_every_sweep_that_the_documentation_shows_is_valid(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(dvc_history, "names", set)
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
        caplog.clear()
        command(["sweep", *line.partition("#")[0].split(), "--dry-run"])
        assert " experiments, checked; baseline " in caplog.text, line


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


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The names of the members that were run, in order; one called lr-5 fails."""
    names: list[str] = []

    def run(member: Member) -> int:
        names.append(member.name)
        return 255 if member.name == "lr-5" else 0

    monkeypatch.setattr(sweep, "run", run)
    return names


def test_the_members_that_ran_are_compared_and_the_others_named(compared, ran, caplog) -> None:
    assert run_main("train.lr=0.001,5,0.002") == InputError.exit_code
    assert ran == ["lr-0.001", "lr-5", "lr-0.002"] and compared == ["train.lr"]
    assert "2/3 lr-5: train.lr=5.0\n" in caplog.text
    assert "error: lr-5: failed (exit code 255), see its output above" in caplog.text
    assert "dvc plots diff lr-0.001 lr-0.002\n" in caplog.text


def test_a_sweep_whose_members_all_ran_ends_well(compared, ran) -> None:
    assert run_main("train.lr=0.001,0.002") == 0 and compared == ["train.lr"]


def test_a_sweep_of_which_one_member_ran_says_that_there_is_nothing_to_compare(
    monkeypatch, compared, ran, caplog
) -> None:
    def refuse(setting: str, like: dict[str, Any]) -> None:
        raise InputError(f"no two runs differ in {setting}")

    monkeypatch.setattr(comparison, "conclude", refuse)
    assert run_main("train.lr=0.001,0.002") == InputError.exit_code
    assert "error: no two runs differ in train.lr" in caplog.text


@pytest.mark.parametrize("file", ["params.yaml", "pipeline/model/gpt.py"])
def test_members_after_an_edit_are_not_run(monkeypatch, compared, ran, caplog, file: str) -> None:
    """DVC would copy the edited workspace, and the earlier members ran on another one."""
    first = sweep.run

    def edit(member: Member) -> int:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as edited:
            edited.write("# an edit\n")
        return first(member)

    monkeypatch.setattr(sweep, "run", edit)
    assert run_main("train.lr=0.001,0.002") == InputError.exit_code
    assert ran == ["lr-0.001"] and compared == ["train.lr"]
    assert f"lr-0.002: not run, since {file} was edited during the sweep" in caplog.text


def test_the_comparison_is_of_the_sweeps_own_set_though_another_is_newer() -> None:
    other = {"train.lr": 0.2}
    runs = [
        *(run(name, time=1) for name in ("fp32", "bf16")),
        *(run(name, time=9, params=other) for name in ("fp32", "bf16")),
    ]
    found = comparison.compare(runs, "precision", "fp32", like=run("fp16").params)
    assert {r.params["train.lr"] for values in found.runs.values() for r in values} == {0.1}


def test_a_dry_run_runs_nothing(compared, ran, caplog) -> None:
    assert run_main("train.lr=0.001,0.002", "--dry-run", "--seeds", "5") == 0
    assert ran == [] and compared == []
    assert "3 experiments, checked; baseline train.lr=0.002:" in caplog.text
    assert "lr-0.002-seed-5  train.lr=0.002 train.seed=5" in caplog.text


def test_ctrl_c_ends_the_sweep_and_says_how_to_go_on(monkeypatch, compared, caplog) -> None:
    def interrupted(member: Member) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", interrupted)
    assert run_main("train.lr=0.001,0.002") == 130
    assert "Stopped in lr-0.001, 1/2" in caplog.text and compared == []
    assert "python -m pipeline compare train.lr" in caplog.text and "2/2" not in caplog.text


STAGE = """
import os, signal, sys, time
from pathlib import Path
number = int(Path("params.yaml").read_text().split()[1])
if number == 2:
    sys.exit("error: two is too many")
if number == 3:
    try:
        os.killpg(0, signal.SIGINT)  # as Ctrl-C does
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)  # a checkpoint takes its time
        Path(sys.argv[1], "saved.txt").write_text("3")
        sys.exit(130)
Path("out.txt").write_text(Path("local.txt").read_text() + str(number))
"""
MEMBER = """
import sys
from pipeline.experiments.sweep import Member, run
member = Member("m", {"number": int(sys.argv[1])}, None, ("local.txt",))
try:
    sys.exit(run(member))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def small_repo(tmp_path: Path) -> Checkout:
    """A pipeline of one stage that takes no time, and that reads a file that git does not carry."""
    repo = Checkout(tmp_path)
    repo.run("git", "init", "--quiet", "--initial-branch=main")
    repo.dvc("init", "--quiet", "--force")
    (tmp_path / "stage.py").write_text(STAGE, "utf-8")
    (tmp_path / "params.yaml").write_text("number: 0\n", "utf-8")
    cmd = f"python stage.py {tmp_path}"
    (tmp_path / "dvc.yaml").write_text(
        f"stages:\n  one: {{cmd: {cmd}, params: [number], outs: [out.txt]}}\n", "utf-8"
    )
    repo.run("git", "add", "--all")
    repo.run("git", "commit", "--quiet", "--message", "start")
    (tmp_path / "local.txt").write_text("number ", "utf-8")
    return repo


def run_member(repo: Checkout, number: int) -> tuple[int, str]:
    """Exit code and output of `sweep.run`, in a terminal's foreground group of its own.

    Through a file: a pipe would be waited for until every process behind it has ended.
    """
    command = [sys.executable, "-c", MEMBER, str(number)]
    env = repo.env | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        out = {"stdout": said, "stderr": subprocess.STDOUT, "start_new_session": True}
        code = subprocess.Popen(command, cwd=repo.folder, env=env, **out).wait(120)
        said.seek(0)
        return code, said.read()


def test_a_member_is_an_experiment_of_dvc_and_the_workspace_stays_as_it_is(small_repo) -> None:
    assert run_member(small_repo, 1)[0] == 0
    assert not (small_repo.folder / "out.txt").exists()
    assert "number: 0" in (small_repo.folder / "params.yaml").read_text("utf-8")
    small_repo.dvc("exp", "apply", "m")
    assert (small_repo.folder / "out.txt").read_text("utf-8") == "number 1"


def test_a_member_that_fails_says_so_and_leaves_no_experiment(small_repo) -> None:
    code, said = run_member(small_repo, 2)
    assert code == 255 and "two is too many" in said
    assert "m" not in small_repo.dvc("exp", "list", "--name-only").split()


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
def test_ctrl_c_waits_until_the_training_has_saved(small_repo) -> None:
    assert run_member(small_repo, 3)[0] == 130
    assert (small_repo.folder / "saved.txt").read_text("utf-8") == "3"
    assert not small_repo.at_work()


# One sweep as people live through it: a member crashes, Ctrl-C ends it, the same command goes on.


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

    def wait_until_trained(self, name: str, steps: int) -> None:
        """Until this member has done some steps."""
        parts = lambda: self.repo.folder.glob(".dvc/tmp/exps/standalone/*/records/train.jsonl.part")  # noqa: E731
        count = lambda: sum(p.read_text("utf-8").count("train/loss") for p in parts())  # noqa: E731
        wait_for(lambda: f" {name}: " in self.said.read_text("utf-8") and count() >= steps, 900)

    def rows(self) -> list[tuple[str, str, int]]:
        """(name, status, points of its training loss) of every row."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.repo.folder.as_posix()}/mlflow.db")
        experiment = client.get_experiment_by_name("gpt2")
        return sorted(
            (
                row.info.run_name,
                row.info.status,
                len(client.get_metric_history(row.info.run_id, "train/loss")),
            )
            for row in client.search_runs([experiment.experiment_id])
        )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    told = Story(tiny_pipeline(tmp_path_factory.mktemp("sweep")))
    # In fp16 a first step of 10 makes activations that no fp16 holds.
    words = ("train.lr=0.002,0.004,10", "precision=fp16", "train.steps=100")
    words += ("train.warmup_steps=0", "train.val_every=50")
    process = told.sweep(*words)
    told.wait_until_trained("lr-0.004", 5)
    os.killpg(process.pid, signal.SIGINT)
    told.code = process.wait(120)  # type: ignore[attr-defined]
    told.first = told.said.read_text("utf-8")  # type: ignore[attr-defined]
    told.left = told.repo.at_work()  # type: ignore[attr-defined]
    process = told.sweep(*words)
    told.second_code = process.wait(900)  # type: ignore[attr-defined]
    told.second = told.said.read_text("utf-8")  # type: ignore[attr-defined]
    return told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
def test_ctrl_c_stops_the_member_and_the_sweep(story: Story) -> None:
    assert story.code == 130 and story.left == []
    assert "1/3 lr-0.002: train.lr=0.002 precision=fp16" in story.first
    assert "Stopped in lr-0.004, 2/3" in story.first and "Traceback" not in story.first
    assert "3/3" not in story.first


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
def test_the_same_command_goes_on_and_trains_nothing_twice(story: Story) -> None:
    assert story.second_code == InputError.exit_code and "Traceback" not in story.second
    assert "3/3 lr-10: train.lr=10.0" in story.second and "the loss is nan" in story.second
    assert "error: lr-10: failed (exit code 255), see its output above" in story.second
    names = set(story.repo.dvc("exp", "list", "--name-only").split())
    assert {"lr-0.002", "lr-0.002-2", "lr-0.004"} <= names and "lr-10" not in names
    assert [row for row in story.rows() if row[1] == "FINISHED"] == [
        ("lr-0.002", "FINISHED", 100),
        ("lr-0.004", "FINISHED", 100),
    ]
    assert [name for name, status, _ in story.rows() if status != "FINISHED"] == ["lr-10"]
    page = (story.repo.folder / "comparisons/train.lr/comparison.md").read_text("utf-8")
    assert page in story.second
    assert {"0.002", "0.004"} <= set(re.findall(r"^\| (\S+) ", page, re.MULTILINE))
