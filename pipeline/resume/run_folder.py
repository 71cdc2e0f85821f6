"""Trainings in progress: a folder each under the main root, with one process at work on it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline import paths, regular
from pipeline.config import Config, flatten
from pipeline.errors import BusyError, InputError, ResumeError, StorageError, UserError, exit_code
from pipeline.process import is_alive, this_process
from pipeline.records import stage_graph
from pipeline.records.provenance import code_of
from pipeline.storage.digests import digest_of, dvc_md5, tree_digest
from pipeline.storage.folders import copy, discard, recover

log = logging.getLogger(__name__)

IDENTITY, STATUS, RESULT, JOURNAL = "run.json", "run_status.json", "result.json", "record.jsonl"


def identity(stage: str, config: Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides a stage's result: settings by name, inputs, and SHA-256 of its code by file.

    dvc.yaml says which settings and files these are; `inputs` tell the stage's data from other.
    """
    settings = stage_graph.settings_of(stage, flatten(config))
    return {"stage": stage, "params": settings, "inputs": inputs, "code": code_of(stage)}


class Run:
    """A training's folder, held under its lock: checkpoints, journal, status, and its result.

    Its `identity` is what the function of that name gives.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, identity
        self.outputs = [Path(out) for out in stage_graph.stages()[identity["stage"]].outs]
        self.journal = folder / JOURNAL

    def say(self, state: str, **facts: Any) -> None:
        """Write run_status.json: `dvc repro` turns every exit code into one."""
        known = _json(self.folder / STATUS)
        kept = {"step": known["step"]} if "step" in known else {}
        me = {"pid": os.getpid(), "process": this_process(), "time": int(time.time())}
        facts["name"] = os.environ.get("DVC_EXP_NAME", "")
        with contextlib.suppress(OSError):  # a full disk, or a reader on Windows: no reason to end
            _write(self.folder / STATUS, kept | {"state": state} | me | facts)

    def start_over(self) -> None:
        """Forget what earlier processes left here."""
        discard(self.folder)
        self.folder.mkdir()
        _write(self.folder / IDENTITY, self.identity)
        self.say("running")

    def adopt(self) -> bool:
        """Reuse a result of this very identity that DVC was stopped before it could keep.

        Every output is checked against its SHA-256 before it replaces anything here; a result that
        is not whole is forgotten. A stage that is started by hand, or forced to run again with
        `dvc repro -f`, is to train.
        """
        for output in self.outputs:
            recover(output)  # what a killed copy left
        if not (made := _json(self.folder / RESULT)):
            return False
        shared = {name: self.folder / name for name in made["digests"]}
        lock = Path("dvc.lock")
        kept = lock.exists() and made["md5"] in lock.read_text("utf-8")
        if not (made["by_dvc"] and _under_dvc() and not kept) or any(
            not p.exists() or tree_digest(p) != made["digests"][n] for n, p in shared.items()
        ):
            self.start_over()
            return False
        for name, path in shared.items():
            copy(path, Path(name))
        return True

    def share(self) -> None:
        """Leave the result for DVC's next try, if this one is stopped before DVC has kept it."""
        for output in self.outputs:
            recover(self.folder / output)
            copy(output, self.folder / output, link=output == paths.CHECKPOINTS)
        digests = {output.as_posix(): tree_digest(output) for output in self.outputs}
        made = {"digests": digests, "md5": dvc_md5(self.outputs[0]), "by_dvc": _under_dvc()}
        _write(self.folder / RESULT, made)
        for name in ("checkpoints", "best", JOURNAL):
            discard(self.folder / name)


@contextlib.contextmanager
def claim(identity: dict[str, Any]) -> Iterator[Run]:
    """Hold a training.

    Raises BusyError where a living process has it, StorageError where the folder cannot be written.
    """
    folder = folder_of(identity)
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{folder}.lock", timeout=0))
            recover(folder)
            folder.mkdir(exist_ok=True)
            run = Run(folder, identity)
            _write(folder / IDENTITY, identity)
            run.say("running")
        except Timeout:
            pid = _json(folder / STATUS).get("pid")
            who, stage = f"process {pid}" if pid else "another process", identity["stage"]
            doing = "trains" if stage == "train" else f"runs {stage} with"
            raise BusyError(
                f"{who} {doing} this very configuration; "
                "give the same command again once it has ended, and its result is reused"
            ) from None
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be written: {error}; what is not finished goes there"
            ) from error
        try:
            yield run
        except BaseException as error:
            code = exit_code(error)
            state = "preempted" if code >= 128 else "failed"
            run.say(state, exit_code=code, message=str(error))
            raise
        run.say("finished", exit_code=0)


@contextlib.contextmanager
def scratch(identity: dict[str, Any], worth: str) -> Iterator[Path]:
    """A folder for work that the next process of the same identity goes on with; see `claim`.

    It goes when the work is done, and after a failure that leaves no file of the name `worth`.
    """
    folder, done = folder_of(identity), False
    try:
        with claim(identity):
            yield folder
        done = True
    finally:
        if done or not (folder / worth).exists():
            _drop(folder)


def forget_result() -> None:
    """Drop the result that this workspace's training left: DVC holds the outputs by now.

    For the stage after it to call, which DVC starts when it has.
    """
    for folder in _left_by("train"):
        _drop(folder)


def keep(found: dict[str, Any]) -> bool:
    """Keep a finished stage's outputs for `take_over`, unless its run has left them there itself.

    `found` is its identity. False where they cannot be kept: the disk is full, or the stage was
    started by hand, so that it will be done again in any case.
    """
    if not _under_dvc():
        return False
    if not _left_by(found["stage"]):
        try:
            with claim(found) as run:
                run.share()
        except (OSError, StorageError) as error:
            log.warning("%s", error)
            return False
    return True


def take_over(found: dict[str, Any]) -> bool:
    """Whether `keep` had this stage's very outputs; they are put back, checked."""
    folder = folder_of(found)
    if not (folder / RESULT).exists():
        return False
    with claim(found) as run:
        taken = run.adopt()
    _drop(folder)
    return taken


def _left_by(stage: str) -> list[Path]:
    """The folders that hold the result whose record is the workspace's."""
    record = paths.record(stage)
    mine = tree_digest(record) if record.exists() else ""
    results = paths.runs().glob(f"*/{RESULT}")
    return [r.parent for r in results if _json(r).get("digests", {}).get(record.as_posix()) == mine]


def folder_of(found: dict[str, Any]) -> Path:
    return paths.runs() / digest_of(found)[:16]


def where_to_start(run: Run, done: int | None, config: Config) -> str:
    """Where a training starts, for a person: from `done` steps, or from none, and why.

    Raises ResumeError where `checkpoint.resume` asks for a checkpoint and there is none.
    """
    if done is not None:
        return f"resuming from step {done:,}/{config.train.steps:,}"
    why = "there is no checkpoint to resume from"
    if other := unfinished(but=run.folder):
        changed = "; ".join(differences(run.identity, _json(other / IDENTITY))) or "nothing else"
        why += f"; the training interrupted last, {other}, is another one: here {changed}"
    if config.checkpoint.resume == "require":
        raise ResumeError(f"checkpoint.resume=require: {why}")
    return f"starting from step 0: {why}" if other else ""


def unfinished(but: Path) -> Path | None:
    """The folder of the training that stopped last without a result, other than `but`."""
    found = [
        folder
        for folder in _folders()
        if folder != but
        and _state(folder) in ("killed", "preempted", "failed")
        and any(folder.glob("checkpoints/step-*"))
    ]
    return max(found, key=lambda f: _json(f / STATUS).get("time", 0), default=None)


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """By what another training's identity differs, a phrase each."""
    params, before = mine["params"], theirs.get("params", {})
    inputs, inputs_before = mine["inputs"], theirs.get("inputs", {})
    code, code_before = mine["code"], theirs.get("code", {})
    changed = [
        f"{name}={params.get(name)} instead of {before.get(name)}"
        for name in {**params, **before}
        if params.get(name) != before.get(name)
    ]
    changed += [f"other bytes in {n}" for n, d in inputs.items() if inputs_before.get(n) != d]
    files = sorted(n for n in {**code, **code_before} if code.get(n) != code_before.get(n))
    return changed + ([f"other code in {', '.join(files)}"] if files else [])


def _state(folder: Path) -> str:
    said = _json(folder / STATUS)
    state = said.get("state", "unknown")
    dead = state == "running" and not is_alive(said.get("process", ""))
    return "killed" if dead else state


def _folders() -> list[Path]:
    return sorted(path.parent for path in paths.runs().glob(f"*/{IDENTITY}"))


def _drop(folder: Path) -> bool:
    """Remove a run's folder, unless a process is at work on it."""
    with contextlib.suppress(Timeout), FileLock(f"{folder}.lock", timeout=0):
        discard(folder)
        return True
    return False


def _under_dvc() -> bool:
    return "DVC_ROOT" in os.environ


def _json(path: Path) -> dict[str, Any]:
    """What the file says; nothing where it is not there, or cannot be read."""
    with contextlib.suppress(UserError):
        # A stage's identity names every file of the corpus.
        return regular.read_json(path, regular.SNAPSHOT_BYTES)
    return {}


def _write(path: Path, values: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(values, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@dataclass(frozen=True)
class Left:
    """What a training, or another stage's kept work, has on the disk, and what it says of it."""

    folder: Path
    state: str  # running, finished, preempted, failed, killed or unknown
    status: dict[str, Any]  # as `say` writes it
    identity: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())


def every() -> list[Left]:
    """All that is at work, was interrupted, or is not yet in DVC's cache."""
    return [
        Left(folder, _state(folder), _json(folder / STATUS), _json(folder / IDENTITY))
        for folder in _folders()
    ]


def remove(name: str) -> None:
    """Remove the run whose folder's name is, or begins with, `name`.

    Raises InputError where that is not one run, BusyError for one at work.
    """
    found = [folder for folder in _folders() if name and folder.name.startswith(name)]
    if len(found) != 1:
        known = ", ".join(path.name for path in _folders()) or "none"
        problem = "more than one training begins so" if found else "no training of that name"
        raise InputError(f"{name}: {problem}; there are: {known}")
    if not _drop(found[0]):
        raise BusyError(f"{name}: a process is at work on it")
