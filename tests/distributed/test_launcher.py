"""A training that another launcher starts, that Slurm stops and takes up, that loses a machine."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.distributed import start
from pipeline.errors import ConfigError
from tests.conftest import wait_for
from tests.distributed.test_start import Workspace
from tests.helpers import machines, slurm

slow = pytest.mark.slow
needs_slurm = pytest.mark.skipif(bool(slurm.lacking()), reason=slurm.lacking())
needs_machines = pytest.mark.skipif(bool(machines.lacking()), reason=machines.lacking())

# As docs/distributed.md has it, with the stage alone in the place of `dvc repro`.
JOB = f"""#!/bin/bash
#SBATCH --ntasks 2 --time 60 --signal TERM@60 --requeue --open-mode append --output job.log
{sys.executable} -m tests.helpers.rank_job
if grep -q '"preempted"' .runs/*/run_status.json; then scontrol requeue $SLURM_JOB_ID; fi
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def cluster() -> Iterator[None]:
    with slurm.cluster():
        yield


def held(workspace: Workspace, step: int) -> bool:
    """Whether the step before the one that is held has been told."""
    return (workspace.folder / "losses.txt").exists() and step - 1 in workspace.losses()


@slow
@needs_slurm
def test_srun_starts_the_processes_whose_failures_and_signals_end_as_ever(
    workspace: Workspace, cluster: None
) -> None:
    srun = {"distributed__launcher": "srun --ntasks 2", "distributed__timeout": 10.0}
    code, said = workspace.train(1, "1:4:crash", **srun)
    assert code == 1 and "error: rank 1 of 2 (" in said and "): KeyError: 'a bug'" in said, said
    assert workspace.saved() == [3]
    process = workspace.start(1, "0:7:hold", **srun)
    wait_for(lambda: held(workspace, 7), 120)
    process.send_signal(signal.SIGINT)
    (workspace.folder / "go").touch()
    code, said = workspace.end(process)
    assert code == 143 and "resuming from step 3/14" in said, said
    done = max(workspace.losses()) + 1
    assert workspace.status()["state"] == "preempted" and workspace.saved()[-1] == done
    code, said = workspace.train(1, **srun)
    assert code == 0 and f"resuming from step {done}/14" in said, said
    assert list(workspace.losses()) == list(range(14))


@slow
@needs_slurm
def test_a_slurm_job_that_is_warned_of_its_end_saves_and_goes_on_when_it_is_requeued(
    workspace: Workspace, cluster: None
) -> None:
    workspace.configure(1, distributed__launcher="srun", distributed__timeout=10.0)
    (workspace.folder / "job.sh").write_text(JOB)
    env = workspace.environment("0:7:hold")
    job = slurm.said("sbatch", "--parsable", "job.sh", cwd=workspace.folder, env=env).strip()
    log = workspace.folder / "job.log"
    wait_for(lambda: held(workspace, 7), 120)
    # The clock need not be waited for: of the job's time two minutes are left.
    elapsed = slurm.said("squeue", "--noheader", f"--jobs={job}", "--format=%M").strip()
    minutes = int(elapsed.split(":")[-2]) + 2
    slurm.said("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_for(lambda: "SIGTERM: this step and a checkpoint first" in log.read_text(), 180)
    (workspace.folder / "go").touch()
    wait_for(lambda: "Restarts=1 " in slurm.said("scontrol", "show", "job", job), 120)
    slurm.said("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for(lambda: "JobState=COMPLETED" in slurm.said("scontrol", "show", "job", job), 300)
    said = log.read_text()
    assert "stopped; the same command resumes from step 8" in said, said
    assert "resuming from step 8/14" in said and not workspace.saved(), said
    assert list(workspace.losses()) == list(range(14))


@slow
def test_any_command_that_tells_each_process_its_place_may_start_them(workspace: Workspace) -> None:
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --no-python"
    launcher = f"{torchrun} --nproc-per-node 2"
    changes = {"distributed__launcher": launcher, "distributed__timeout": 10.0}
    process = workspace.start("auto", "0:4:hold", **changes)
    wait_for(lambda: held(workspace, 4), 120)
    process.send_signal(signal.SIGTERM)
    (workspace.folder / "go").touch()
    code, said = workspace.end(process)
    done = max(workspace.losses()) + 1
    assert code == 1 and f"resumes from step {done}" in said, said  # as torchrun ends
    code, said = workspace.train("auto", **changes)
    assert code == 0 and "2 processes (2 x cpu" in said, said
    assert list(workspace.losses()) == list(range(14))


@slow
@needs_machines
def test_of_two_machines_cut_off_from_one_another_both_end_and_the_training_goes_on(
    workspace: Workspace,
) -> None:
    workspace.configure(1, distributed__timeout=0.5)
    job = ["-m", "tests.helpers.rank_job"]
    torchrun = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d"
    meet = [*torchrun.split(), "--rdzv-endpoint", f"{machines.NAMES[0]}:29400"]
    env = {"MASTER_ADDR": machines.NAMES[0], "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    env |= workspace.environment("1:7:hold") | {"LOCAL_RANK": "0"}
    with machines.Machines(workspace.folder).made() as two:
        both = [two.start(n, [sys.executable, *job], env | {"RANK": str(n)}) for n in (0, 1)]
        wait_for(lambda: held(workspace, 7), 120)
        two.cable("down")
        (workspace.folder / "go").touch()
        (first, said), (second, beyond) = map(workspace.ended, both)
        assert first == second == 1
        assert "error: step 7: rank 1 of 2 (second, process" in said, said
        assert "gave no answer (within 0.5 min)" in said and said.count("error:") == 1, said
        assert "error: rank 1 of 2: rank 0 of 2 is out of reach" in beyond, beyond
        assert beyond.count("error:") == 1 and "Traceback" not in said + beyond
        assert workspace.saved() == [3, 6] and not workspace.at_work()
        two.cable("up")
        workspace.configure(1)
        env = workspace.environment()
        both = [two.start(n, [sys.executable, *meet, *job], env) for n in (0, 1)]
        (first, said), (second, beyond) = map(workspace.ended, both)
    assert first == second == 0 and "resuming from step 6/14" in said, said + beyond
    assert "2 processes (1 x cpu" in said and "on second)" in said, said
    assert list(workspace.losses()) == list(range(14)) and not workspace.at_work()


# --- without starting any


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"launcher": "slurm"}, "launcher=slurm: expected local or a command; there is none of"),
        ({"launcher": "srun 'a"}, "launcher=srun 'a: expected local or a command: No closing"),
        (
            {"launcher": "git", "processes": 2},
            "processes=2: expected 1 or auto, since distributed.",
        ),
    ],
)
def test_a_launcher_that_cannot_be_used_is_one_error(
    make_config, monkeypatch, changes: dict[str, str | int], words: str
) -> None:
    given = make_config(**{f"distributed__{name}": value for name, value in changes.items()})
    with pytest.raises(ConfigError, match=re.escape(words)):
        start.run(given, lambda: pytest.fail("began"))
    monkeypatch.setenv(start.LAUNCHED, "1")
    with pytest.raises(ConfigError, match="a command that tells each process its place"):
        start.run(given, lambda: pytest.fail("began"))
    begun: list[int] = []
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    start.run(given, lambda: begun.append(1))
    assert begun == [1]


def test_a_shell_in_a_slurm_step_of_its_own_starts_what_the_settings_say(
    make_config, monkeypatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    started: list[int] = []
    monkeypatch.setattr(start, "launch", lambda _, count: started.append(count))
    start.run(make_config(distributed__processes=2, train__accumulate=2), lambda: None)
    assert started == [2]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-010,012],cpu5", "gpu003"),
        ("rack[2-3]gpu[07,09]", "rack2gpu07"),
        ("gpu[1-2].site", "gpu1.site"),
    ],
)
def test_tasks_of_slurm_meet_at_the_first_of_their_machines(nodes: str, first: str) -> None:
    step = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "71234", "SLURM_STEP_ID": "3"}
    found = start.meeting_point(step)
    assert found["MASTER_ADDR"] == first and 20000 <= int(found["MASTER_PORT"]) < 32000
    other = start.meeting_point(step | {"SLURM_STEP_ID": "4"})
    assert other["MASTER_PORT"] != found["MASTER_PORT"]
    assert start.meeting_point(step | {"MASTER_ADDR": "host"}) == start.meeting_point({}) == {}
