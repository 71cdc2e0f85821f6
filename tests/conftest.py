"""Shared pieces of the tests: settings to vary, and a tiny pipeline in a checkout of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline import paths
from pipeline.config import Config
from pipeline.process import this_process
from pipeline.records import record_file
from pipeline.tracking import recording

ROOT = Path(__file__).resolve().parent.parent

NANO = ROOT / "recipes" / "nano.yaml"

pytest_plugins = ["tests.helpers.faults", "pytester"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it puts aside
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
# A fork of a test has none of its threads, and would wait for the compiler's for ever.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def params(**changes: Any) -> dict[str, Any]:
    """The default recipe as nested values, with dotted settings changed (a__b=1 for a.b).

    On the CPU, also where a GPU is seen, if `device` does not say otherwise.
    """
    raw = OmegaConf.load(NANO)  # params.yaml is the user's to change
    for name, value in ({"device": "cpu"} | changes).items():
        OmegaConf.update(raw, name.replace("__", "."), value, force_add=True)
    return OmegaConf.to_container(raw)  # type: ignore[return-value]


def recipe() -> str:
    """The default recipe's text with the settings that `params` has."""
    text = NANO.read_text("utf-8")
    assert "device: auto" in text
    return text.replace("device: auto", "device: cpu ")


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """make_config(train__lr=1e-3) -> a checked Config."""
    return lambda **changes: configuration.from_dict(params(**changes))


@pytest.fixture(scope="session", autouse=True)
def _compiler_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two processes that compile the same code into one cache may load a file half written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _unbounded() -> Iterator[None]:
    """A limit of memory would stay for every test after the one that asked a server."""
    from pipeline.tracking import mlflow_store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_store, "_bound_memory", lambda: None)
        yield


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, made once as `connect` makes it: the schema takes seconds."""
    from pipeline.tracking.mlflow_store import _create_sqlite

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
    monkeypatch.setattr(record_file, "_invocation", lambda: "one")
    monkeypatch.setattr(recording, "Courier", InThisProcess)
    return tmp_path / "mlflow.db"


@pytest.fixture
def rest_server(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], tuple[int, Callable[[], None]]]]:
    """start(port) -> (port, stop): MLflow's own REST handlers over the test's store."""
    from mlflow.server import app, handlers
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from werkzeug.serving import make_server

    from pipeline.tracking import mlflow_store

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

    # As `mlflow server` does by default: it takes the artifacts itself.
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", mlflow_store.artifact_root())
    monkeypatch.setattr(handlers, "_artifact_repo", None)
    behind = SqlAlchemyStore(mlflow_store.store_uri(), "mlflow-artifacts:/")
    monkeypatch.setattr(handlers, "_tracking_store", behind)
    yield start
    for server in running:
        server.shutdown()


class NoCourier:
    """Stands in for recording.Courier: the record is written and no store is asked."""

    def __init__(self, *_: object) -> None: ...

    def close(self, hurried: bool = False) -> None: ...


class InThisProcess:
    """Stands in for recording.Courier: ships from a thread of the test's own process."""

    def __init__(self, record: record_file.Record, checkpoints: str):
        self._shipper = recording.Shipper(record.path, this_process(), checkpoints)

    def close(self, hurried: bool = False) -> None:
        self._shipper.close(3.0 if hurried else 20.0)


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    """Until it is so; a failure after so many seconds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def record_is_complete(steps: int) -> bool:
    """Whether this workspace's record of `train` has ended with each point of train/value once."""
    events = record_file.read(paths.record("train"))
    points = [e["step"] for e in events if "train/value" in e.get("values", {})]
    return points == list(range(steps)) and events[-1]["status"] == "FINISHED"


HANGS_SECONDS = 600.0  # far more than any command of a tiny pipeline takes


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
            "PYTHONFAULTHANDLER": "1",  # whatever crashes or is aborted says where it was
            **{
                f"GIT_{who}_{what}": f"test{'@example.org' if what == 'EMAIL' else ''}"
                for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")
            },
        }

    def run(self, *words: str, expect: int | None = 0, **env: str) -> subprocess.CompletedProcess:
        """What a command says, through files: DVC's workers would keep a pipe open for ever."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                words,
                cwd=self.folder,
                env=self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            hung = []
            try:
                process.wait(HANGS_SECONDS)
            except subprocess.TimeoutExpired:
                hung = self.abort()
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode("utf-8").replace("\r\n", "\n"))
        done = subprocess.CompletedProcess(words, process.returncode, *said)
        everything = f"{words}\n{done.stdout}\n{done.stderr}"
        if hung:
            pytest.fail(f"hung, with these at work: {hung}\n{everything}\n{self.logs()}")
        if expect is not None:
            assert done.returncode == expect, everything
        return done

    def abort(self) -> list[str]:
        """End every process at work in this checkout; what they were. Each says where it was."""
        ran = {}
        for name in ("SIGABRT", "SIGKILL"):
            for member in (members := self.at_work()):
                with contextlib.suppress(psutil.Error, ValueError):  # Windows knows few signals
                    ran.setdefault(member.pid, " ".join(member.cmdline()))
                    member.send_signal(getattr(signal, name, signal.SIGTERM))
            psutil.wait_procs(members, timeout=10)
        return list(ran.values())

    def at_work(self) -> list[psutil.Process]:
        """Every process with its working directory in this checkout, but this one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if Path(process.cwd()).is_relative_to(self.folder.resolve()):
                    found.append(process)
        return [process for process in found if process.pid != os.getpid()]

    def logs(self) -> str:
        """What the queue's tasks and workers have said."""
        found = sorted((self.folder / ".dvc" / "tmp" / "exps").rglob("*.out"))
        return "\n".join(f"{path}\n{path.read_text('utf-8', 'replace')}" for path in found)

    def wait_for_queue(self, tasks: int) -> None:
        """Until so many tasks have ended; one on its way to a worker is in no list for a moment."""
        deadline = time.monotonic() + HANGS_SECONDS
        ended = 0
        while ended < tasks:
            said = self.dvc("queue", "status", expect=None)
            ended = said.count("Success") + said.count("Failed")
            if time.monotonic() > deadline:
                pytest.fail(f"at work: {self.abort()}\n{said}\n{self.logs()}")
            time.sleep(1)
        leaving = time.monotonic() + 20
        while self.at_work() and time.monotonic() < leaving:
            time.sleep(0.5)
        self.abort()  # DVC's worker stays for ever if the word to leave was lost on its way

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
    "device": "cpu",  # also where a GPU is seen: tests/test_gpu.py is about those
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


def write_tiny_text(text: Path) -> None:
    """A few small documents into the new folder `text`."""
    text.mkdir(parents=True)
    text_words = "the model reads a window of tokens and learns what comes next in the text"
    words = text_words.split()
    for number in range(12):
        lines = [
            " ".join(words[(number * 5 + i * j) % len(words)] for j in range(1, 40)) + "."
            for i in range(1, 9)
        ]
        (text / f"{number:02}.txt").write_text("\n".join(lines) + "\n", "utf-8")


def tiny_pipeline(folder: Path, **changes: Any) -> Checkout:
    """A checkout whose recipe takes seconds: a few small documents and a model of 16 channels."""
    made = checkout(folder)
    write_tiny_text(folder / "data" / "text")
    raw = OmegaConf.load(NANO)
    for name, value in (TINY | changes).items():
        OmegaConf.update(raw, name, value)
    OmegaConf.save(raw, folder / "params.yaml")
    made.run("git", "add", "--all")
    made.run("git", "commit", "--quiet", "--message", "tiny recipe")
    return made
