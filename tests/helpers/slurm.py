"""A Slurm cluster of this machine alone, for tests: its daemons run as long as they are needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import wait_for

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
AccountingStorageType=accounting_storage/none
# However many cores this machine has, two tasks at a time find room.
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES
"""


def lacking() -> str:
    """Why no cluster can be started here; nothing if one can."""
    if sys.platform != "linux" or os.geteuid():
        return "Slurm's daemons need root"
    found = [daemon for daemon in DAEMONS if not shutil.which(daemon)]
    return f"Slurm is not installed: no {', '.join(found)}" if found else ""


def said(*words: str, **how: Any) -> str:
    return subprocess.run(words, capture_output=True, text=True, **how).stdout


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Inside, srun and sbatch find a cluster of one node, on loopback."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)  # munged wants its socket to be within everybody's reach
        with socket.socket() as one, socket.socket() as other:
            for each in (one, other):
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in (one, other)]
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=ports))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        stack.callback(os.environ.pop, "SLURM_CONF")
        munge = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid"}
        munge |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        daemons = (
            ["munged", "--foreground", *(f"--{n}={folder / v}" for n, v in munge.items())],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "localhost"],
        )
        for words in daemons:
            with open(folder / f"{words[0]}.out", "w") as out:
                process = subprocess.Popen(words, stdout=out, stderr=out)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            if words[0] == "munged":
                wait_for((folder / "munge.socket").exists)
        wait_for(lambda: said("sinfo", "--noheader", "--format=%t").strip() == "idle")
        stack.callback(said, "scancel", "--user=root")
        yield
