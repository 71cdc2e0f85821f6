"""Shared pieces of the tests: settings to vary, and a tiny pipeline in a checkout of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline import records, runs, shipping, tracking
from pipeline.config import Config

ROOT = Path(__file__).resolve().parent.parent

NANO = ROOT / "recipes" / "nano.yaml"

pytest_plugins = ["tests.faults", "pytester"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it puts aside
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


def params(**changes: Any) -> dict[str, Any]:
    """The default recipe as nested values, with dotted settings changed (a__b=1 for a.b)."""
    raw = OmegaConf.load(NANO)  # params.yaml is the user's to change
    for name, value in changes.items():
        OmegaConf.update(raw, name.replace("__", "."), value, force_add=True)
    return OmegaConf.to_container(raw)  # type: ignore[return-value]


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """make_config(train__lr=1e-3) -> a checked Config."""
    return lambda **changes: configuration.from_dict(params(**changes))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, made once as `connect` makes it: the schema takes seconds."""
    from pipeline.store import _create_sqlite

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    _create_sqlite(path)
    return path


@pytest.fixture
def own_store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory is a workspace of its own with an empty store, which is returned.

    What ships does so in this process, where it can be watched and patched.
    """
    (tmp_path / ".dvc").mkdir()
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(records, "_invocation", lambda: "one")
    monkeypatch.setattr(tracking, "Courier", InThisProcess)
    return tmp_path / "mlflow.db"


@pytest.fixture
def rest_server(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], tuple[int, Callable[[], None]]]]:
    """start(port) -> (port, stop): MLflow's own REST handlers over the test's store."""
    from mlflow.server import app, handlers
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from werkzeug.serving import make_server

    from pipeline import store

    running = []

    def start(port: int = 0) -> tuple[int, Callable[[], None]]:
        server = make_server("127.0.0.1", port, app)  # one request at a time
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append(server)

        def stop() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        return server.server_port, stop

    behind = SqlAlchemyStore(store.store_uri(), store.artifact_root())
    monkeypatch.setattr(handlers, "_tracking_store", behind)
    yield start
    for server in running:
        server.shutdown()


class NoCourier:
    """Stands in for tracking.Courier: the record is written and no store is asked."""

    def __init__(self, *_: object) -> None: ...

    def __call__(self, event: object) -> None: ...

    def close(self, hurried: bool = False) -> None: ...


class InThisProcess:
    """Stands in for tracking.Courier: ships from a thread of the test's own process."""

    def __init__(self, checkpoints: str):
        self._shipper = shipping.Shipper(runs.this_process(), checkpoints)

    def __call__(self, event: records.Event) -> None:
        self._shipper(event)

    def close(self, hurried: bool = False) -> None:
        self._shipper.close(3.0 if hurried else 20.0)


HANGS_SECONDS = 600.0  # far more than any command of a tiny pipeline takes


def abort(process: subprocess.Popen) -> str:
    """End a command and all that it started: what ran, and from stages, where each thread was."""
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    ran = "\n".join(f"{member.pid} {' '.join(member.cmdline())}" for member in tree)
    for name in ("SIGABRT", "SIGKILL"):
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(getattr(signal, name, signal.SIGTERM))
        psutil.wait_procs(tree, timeout=10)
    out, err = process.communicate()
    return f"{ran}\n{out}\n{err}"


class Checkout:
    """A copy of this repository's files as a git and DVC repository of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
        self.env |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",  # two experiments at a time on two cores
            **{
                f"GIT_{who}_{what}": f"test{'@example.org' if what == 'EMAIL' else ''}"
                for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")
            },
        }

    def run(self, *words: str, expect: int | None = 0, **env: str) -> subprocess.CompletedProcess:
        process = subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        try:
            out, err = process.communicate(timeout=HANGS_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{words} hung\n{abort(process)}")
        done = subprocess.CompletedProcess(words, process.returncode, out, err)
        if expect is not None:
            assert done.returncode == expect, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def dvc(self, *words: str, expect: int | None = 0) -> str:
        done = self.run(sys.executable, "-m", "dvc", *words, expect=expect)
        return done.stdout + done.stderr


def checkout(folder: Path) -> Checkout:
    """Tracked and new files, so that a test sees the working tree as it is."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    made = Checkout(folder)
    made.run("git", "init", "--quiet", "--initial-branch=main")
    return made


TINY = {
    "corpus.source": "text",
    "corpus.path": "data/text",
    "corpus.val_fraction": 0.3,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.block_size": 32,
    "train.steps": 6,
    "train.batch_size": 2,
    "train.sequence_length": 32,
    "train.warmup_steps": 2,
    "train.val_every": 3,
    "train.val_tokens": 200,
    "evaluate.choice_items": 4,
    "sample.samples": 1,
    "sample.max_new_tokens": 8,
}


def tiny_pipeline(folder: Path) -> Checkout:
    """A checkout whose recipe takes seconds: a few small documents and a model of 16 channels."""
    made = checkout(folder)
    text = folder / "data" / "text"
    text.mkdir(parents=True)
    text_words = "the model reads a window of tokens and learns what comes next in the text"
    words = text_words.split()
    for number in range(12):
        lines = [
            " ".join(words[(number * 5 + i * j) % len(words)] for j in range(1, 40)) + "."
            for i in range(1, 9)
        ]
        (text / f"{number:02}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    raw = OmegaConf.load(NANO)
    for name, value in TINY.items():
        OmegaConf.update(raw, name, value)
    OmegaConf.save(raw, folder / "params.yaml")
    made.run("git", "add", "--all")
    made.run("git", "commit", "--quiet", "--message", "tiny recipe")
    return made
