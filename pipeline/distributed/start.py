"""A training in one process or in several: these are started here, or by somebody else."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.compute.ranks import Ranks, join
from pipeline.compute.runtime import choose_device
from pipeline.config import Config
from pipeline.distributed import team
from pipeline.errors import ConfigError, PeerError
from pipeline.resume.interruption import SIGNALS

# Who starts processes says so in these: torchrun and all that do as it does, or Slurm's srun. A
# Slurm job that starts no step has some of its names, too, but not the middle one.
STARTERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
LAUNCHED = "PIPELINE_LAUNCHED"  # set for the processes that distributed.launcher starts


class Place(NamedTuple):
    """Where a process stands among all, and its number on its machine, which is its GPU's."""

    ranks: Ranks
    local: int


def run(
    config: Config, work: Callable[[], None], others: Callable[[Config], None] | None = None
) -> None:
    """Do a stage's `work` in as many processes as there are to be; for `others` see `team.run`.

    Started with others, by torchrun or srun, this process joins them. Else it has them started,
    by distributed.launcher, waits, and ends as they do.
    """
    given, launched = place(os.environ), LAUNCHED in os.environ
    if given and given.ranks.world > 1:
        check(config, given.ranks.world, trains=not others)
        os.environ.update(meeting_point(os.environ))
        if hasattr(signal, "SIGUSR1"):  # see `by_command`; an Interruption listens to SIGTERM
            signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
        given.ranks.sharded = config.distributed.strategy == "fsdp"
        given.ranks.ordered = config.distributed.ordered
        team.run(config, given.ranks, given.local, work, others)
    elif launched and not given:
        raise ConfigError(
            f"distributed.launcher={config.distributed.launcher}: expected a command that tells "
            "each process its place, in RANK and WORLD_SIZE or as srun does"
        )
    elif not launched and config.distributed.launcher != "local":
        by_command(config)
    elif not launched and (count := processes(config)) > 1:
        check(config, count, trains=not others)
        launch(config, count)
    else:
        join(Ranks(ordered=config.distributed.ordered))
        work()


def place(environment: Mapping[str, str]) -> Place | None:
    """This process's place among those that somebody has started; None where nobody has."""
    for rank, world, local in STARTERS:
        if rank in environment and world in environment:
            found = Ranks(int(environment[rank]), int(environment[world]))
            return Place(found, int(environment.get(local, found.rank)))
    return None


def meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Where a Slurm step's tasks meet: at its first task's machine, by a port of the step's own.

    Nothing where somebody has said it, or where Slurm has not started them.
    """
    if "MASTER_ADDR" in environment or "SLURM_STEP_NODELIST" not in environment:
        return {}
    nodes = environment["SLURM_STEP_NODELIST"]  # such as gpu[003-010,012],cpu5
    first = re.sub(r"\[(\d+)[^]]*]", r"\1", nodes).partition(",")[0]
    step = 100 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    # Below the ports that systems hand out by themselves.
    return {"MASTER_ADDR": first, "MASTER_PORT": str(20000 + step % 12000)}


def processes(config: Config) -> int:
    """How many processes distributed.processes comes to: `auto` is one a GPU."""
    asked = config.distributed.processes
    if isinstance(asked, int):
        return asked
    return max(1, torch.cuda.device_count()) if config.device in ("auto", "cuda") else 1


def check(config: Config, world: int, trains: bool = True) -> None:
    """Raise ConfigError for what so many processes cannot do, or cannot train."""
    train, problems = config.train, []
    sequences = train.batch_size * train.accumulate
    if sequences % world:
        fitting = [str(n) for n in range(1, sequences + 1) if sequences % n == 0]
        problems.append(
            f"train.batch_size={train.batch_size} times train.accumulate={train.accumulate}: "
            f"{sequences} sequences a step cannot be dealt out to {world} processes evenly; "
            f"accepted are {', '.join(fitting)} processes"
        )
    if config.debug.interact_at_step >= 0:
        problems.append(
            f"debug.interact_at_step={config.debug.interact_at_step}: expected -1 with {world} "
            "processes, since the others would wait; try the step with distributed.processes=1"
        )
    if config.distributed.strategy == "fsdp" and train.optimizer == "muon":
        problems.append(
            "train.optimizer=muon distributed.strategy=fsdp: Muon needs whole matrices, of which a "
            "process has some rows; expected train.optimizer=adamw, or distributed.strategy=ddp"
        )
    if config.distributed.strategy == "fsdp" and config.distributed.ordered:
        problems.append(
            "distributed.ordered=true distributed.strategy=fsdp: FSDP adds up gradients in an "
            "order of its own; expected distributed.strategy=ddp, or distributed.ordered=false"
        )
    problems = problems if trains else []
    if not torch.distributed.is_available():
        problems.append(f"{world} processes: this build of torch has no torch.distributed")
    elif choose_device(config.device).type == "mps":
        problems.append(f"device={config.device}: MPS is one device, for one process, not {world}")
    if problems:
        raise ConfigError("\n".join(problems))


def launch(config: Config, count: int) -> None:
    """Start `count` processes of this command by torchrun's launcher, and end as they do."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it says of its own is told better below, and by the processes themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    os.environ.setdefault(*patience(config))
    if sys.platform == "win32":  # torch is built without it there
        os.environ.setdefault("USE_LIBUV", "0")
    with tempfile.TemporaryDirectory() as logs:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            local_addr="localhost",  # a machine's own name may lead nowhere
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(settings, sys.executable)(*sys.orig_argv[1:])
        except ChildFailedError as error:
            code, said = verdict(error.failures, count)
        except SignalException as error:
            code, said = 128 + error.sigval, ""
        else:
            return
    if said:
        raise PeerError(said, code)
    sys.exit(code)


def by_command(config: Config) -> None:
    """Run distributed.launcher with this process's command behind it, and end as it does.

    A signal is handed on to it, and it is waited for. Raises ConfigError where it is no command.
    """
    said = f"distributed.launcher={config.distributed.launcher}"
    try:
        words = shlex.split(config.distributed.launcher, posix=sys.platform != "win32")
    except ValueError as error:
        raise ConfigError(f"{said}: expected local or a command: {error}") from None
    if not words or not shutil.which(words[0]):
        raise ConfigError(f"{said}: expected local or a command; there is none of this name")
    if config.distributed.processes not in (1, "auto"):
        raise ConfigError(
            f"distributed.processes={config.distributed.processes}: expected 1 or auto, since "
            f"{said} says how many"
        )
    # Of SIGTERM srun kills its tasks at once; this one it hands on to them.
    number = signal.SIGUSR1 if Path(words[0]).name == "srun" else signal.SIGTERM
    process: subprocess.Popen[bytes] | None = None
    early = False

    def hand_on(*_: object) -> None:
        nonlocal early
        early = not process
        if process:
            process.send_signal(number)

    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, hand_on)
    process = subprocess.Popen(
        [*words, sys.executable, *sys.orig_argv[1:]],
        # Once one task has ended, srun gives the others so many seconds.
        env={"SLURM_WAIT": "30", **dict([patience(config)]), **os.environ, LAUNCHED: "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C comes to it from here alone
    )
    if early:
        process.send_signal(number)
    if (code := process.wait()) < 0:
        raise PeerError(f"{said} was ended by {signal.Signals(-code).name}", 128 - code)
    if code:
        sys.exit(code)


def patience(config: Config) -> tuple[str, str]:
    """torchrun's variable for how long it waits for processes that it has handed a signal on to.

    They need time for a step and a checkpoint.
    """
    return "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(60 * config.distributed.timeout))


def verdict(failures: Mapping[int, Any], world: int) -> tuple[int, str]:
    """The exit code of the first process that failed; what to say, where a signal ended it.

    Those that ended otherwise have said why. Times are whole seconds: of the same one, a process
    that a signal has ended is the cause, but for SIGTERM, by which the launcher ends the others.
    """

    def order(item: tuple[int, Any]) -> tuple[bool, float, int]:
        _, failure = item
        return failure.exitcode == -signal.SIGTERM, failure.timestamp, failure.exitcode

    rank, first = min(failures.items(), key=order)
    if first.exitcode >= 0:
        return first.exitcode, ""
    return 128 - first.exitcode, (
        f"rank {rank} of {world} (process {first.pid}) was ended by {first.signal_name()}"
    )
