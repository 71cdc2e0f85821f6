"""A training in one process or in several: these are started here, or by somebody else."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from pipeline.compute.ranks import Ranks
from pipeline.compute.runtime import choose_device
from pipeline.config import Config
from pipeline.distributed import team
from pipeline.errors import ConfigError, PeerError

# Who starts processes says so in these: torchrun and all that do as it does, or Slurm's srun. A
# Slurm job that starts no step has some of its names, too, but not the middle one.
STARTERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


class Place(NamedTuple):
    """Where a process stands among all, and its number on its machine, which is its GPU's."""

    ranks: Ranks
    local: int


def run(
    config: Config, work: Callable[[], None], others: Callable[[Config], None] | None = None
) -> None:
    """Do a stage's `work` in as many processes as there are to be; for `others` see `team.run`.

    Started by torchrun or srun, this process joins the others. Else it starts
    distributed.processes of them, which run its own command, waits, and ends as they do.
    """
    given = place(os.environ)
    if given and given.ranks.world > 1:
        check(config, given.ranks.world)
        team.run(config, given.ranks, given.local, work, others)
    elif not given and (count := processes(config)) > 1:
        check(config, count)
        launch(config, count)
    else:
        work()


def place(environment: Mapping[str, str]) -> Place | None:
    """This process's place among those that somebody has started; None where nobody has."""
    for rank, world, local in STARTERS:
        if rank in environment and world in environment:
            found = Ranks(int(environment[rank]), int(environment[world]))
            return Place(found, int(environment.get(local, found.rank)))
    return None


def processes(config: Config) -> int:
    """How many processes distributed.processes comes to: `auto` is one a GPU."""
    asked = config.distributed.processes
    if isinstance(asked, int):
        return asked
    return max(1, torch.cuda.device_count()) if config.device in ("auto", "cuda") else 1


def check(config: Config, world: int) -> None:
    """Raise ConfigError for what so many processes cannot do."""
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
    # A signal is handed on to the processes, which need time for a step and a checkpoint.
    seconds = math.ceil(60 * config.distributed.timeout)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(seconds))
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
