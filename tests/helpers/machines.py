"""Two machines for tests: network namespaces of this one, with a name each and a cable between."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = ("first", "second")
ADDRESSES = ("10.211.0.1", "10.211.0.2")


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


def lacking() -> str:
    """Why no such machines can be made here; nothing if they can."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need Linux and root"
    if missing := [tool for tool in ("ip", "unshare", "mount") if not shutil.which(tool)]:
        return f"network namespaces need {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True)
    return f"no network namespaces: {tried.stderr.decode().strip()}" if tried.returncode else ""


class Machines:
    """Processes are started in the one or the other; the cable is cut and mended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._spaces = [f"pipeline-{os.getpid()}-{name}" for name in NAMES]
        self._cables = [f"{name}{os.getpid()}"[-15:] for name in NAMES]  # as long as a name may be

    @contextlib.contextmanager
    def made(self) -> Iterator[Machines]:
        hosts = [f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
        with contextlib.ExitStack() as stack:
            for space in self._spaces:
                ip(f"netns add {space}")
                stack.callback(ip, f"netns del {space}")
                ip(f"-n {space} link set lo up")
            (one, two), (a, b) = self._spaces, self._cables
            ip(f"link add {a} netns {one} type veth peer name {b} netns {two}")
            for space, cable, address in zip(self._spaces, self._cables, ADDRESSES, strict=True):
                ip(f"-n {space} addr add {address}/24 dev {cable}")
                ip(f"-n {space} link set {cable} up")
            yield self

    def start(self, number: int, words: list[str], env: dict[str, str]) -> subprocess.Popen:
        """Start a command on a machine, which knows both by name."""
        inside = f"hostname {NAMES[number]}; mount --bind {self.folder}/hosts /etc/hosts"
        return subprocess.Popen(
            ["ip", "netns", "exec", self._spaces[number], "unshare", "--uts", "--mount"]
            + ["sh", "-ec", f'{inside}; exec "$@"', "sh", *words],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def cable(self, state: str) -> None:
        """Set the first machine's end of it `down` or `up`."""
        ip(f"-n {self._spaces[0]} link set {self._cables[0]} {state}")
