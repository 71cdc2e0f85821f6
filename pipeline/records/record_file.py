"""Records: what a stage did, a JSON line an event. They are the truth, MLflow a view of them."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import platform
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline import paths
from pipeline.config import Config, flatten, settings_of
from pipeline.errors import ChangedError, ConfigError, InputError
from pipeline.process import is_alive
from pipeline.records import git, stage_graph
from pipeline.records.provenance import code_digest, differing, listed
from pipeline.records.record_reader import SCHEMA, read
from pipeline.records.run_data import Event, Log
from pipeline.storage.digests import digest_of, dvc_md5, tree_digest

log = logging.getLogger(__name__)

# Significant digits of a value: the page shows what it is given. No timing repeats to five, and a
# fingerprint is a whole number below 2^53.
DIGITS = 6
DIGITS_OF = {"perf": 4, "time": 4, "system": 4, "fingerprint": 17}
EDITED = (
    f"{paths.PARAMS} was edited after this run's {{stage}} stage had begun:{{changed}}\n"
    "The stages that are finished are kept. The same command again goes on with what stands there "
    "now, as a run of its own; to finish this one, put the old back first. `dvc exp run --temp` "
    "works on a copy, whose settings no edit reaches"
)


class Record:
    """One stage's events, written line by line.

    The file carries its final name only after `close("FINISHED")`: what a failed stage leaves
    behind ends in `.part`. A `journal` outlives the workspace: a second copy of every line, which
    a later record of the same stage continues. It keeps the events that are there, the first
    one's id included, and the points: one that the journal has is not written again.
    """

    def __init__(self, stage: str, config: Config, journal: Path | None = None):
        self.stage = stage
        self.path = paths.record(stage)
        self.bytes = 0  # of the artifacts and checkpoints that it names
        self._writing = threading.Lock()
        self._part = part(self.path)
        earlier = reopen(journal) if journal else Log()
        # A clock may be set back meanwhile, also between the sessions of a journal.
        self._spent = sum(max(0.0, end - began) for began, end in _sessions(earlier))
        self._started = time.monotonic()
        self.head = earlier[0] if earlier else start_event(stage, config)
        self._held = {key: e["step"] for e in earlier.of_kind("metrics") for key in e["values"]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own: a process may still ship what a killed stage wrote into the old one.
        self._part.unlink(missing_ok=True)
        self._files = [open(self._part, "w", encoding="utf-8", newline="\n")]  # noqa: SIM115
        for event in earlier:
            self._write(event)
        if journal:
            self._files.append(open(journal, "a", encoding="utf-8", newline="\n"))  # noqa: SIM115
        again = {"kind": "resume", "time": _now(), "name": os.environ.get("DVC_EXP_NAME", "")}
        again["invocation"] = _invocation()
        self._write(again if earlier else self.head)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """One point for each key, rounded: six digits, four of rates and times."""
        new = {key: value for key, value in values.items() if step > self._held.get(key, -1)}
        if new:
            rounded = {key: _round(key, value) for key, value in new.items()}
            self._write({"kind": "metrics", "time": _now(), "step": step, "values": rounded})

    def next_step(self, key: str) -> int:
        """The step after the last one that the journal has of a metric."""
        return self._held.get(key, -1) + 1

    def tags(self, values: dict[str, Any]) -> None:
        self._write({"kind": "tags", "values": {k: str(v) for k, v in values.items()}})

    def text(self, step: int, text: str) -> None:
        """What the model says after so many steps."""
        self._write({"kind": "text", "time": _now(), "step": step, "text": text})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A small file or folder that the row keeps a copy of, under `folder`."""
        self._write({"kind": "artifact", "folder": folder, **_place(path)})

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        event = {"kind": "dataset", "name": name, "digest": digest}
        self._write(event | {"source": source, "context": context})

    def checkpoint(self, name: str, path: Path, step: int) -> None:
        """A model directory; tracking.checkpoints decides what the row makes of it."""
        event = {"kind": "checkpoint", "name": name, "step": step, "md5": dvc_md5(path)}
        self._write(event | _place(path))

    def so_far(self) -> Log:
        """Every event written up to now."""
        return read(self._part, self.stage, whole=False)

    def persist(self) -> None:
        """Have every line on the disk, so that no later checkpoint knows more than they."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self, status: str, why: str = "") -> None:
        if status == "FINISHED":  # an interrupted stage may go on, and has one time in the end
            seconds = self._spent + time.monotonic() - self._started
            self.metrics({f"time/{self.stage}_seconds": seconds})
        self._write({"kind": "end", "status": status, "time": _now(), "why": why})
        for file in self._files:
            file.close()
        if status == "FINISHED":
            os.replace(self._part, self.path)

    def _write(self, event: Event) -> None:
        self.bytes += event.get("bytes", 0)
        with self._writing:  # the machine's load comes from another thread
            for file in self._files:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")
                file.flush()


def part(path: Path) -> Path:
    """The name of a record that is being written, or that a failed stage left behind."""
    return path.with_suffix(".jsonl.part")


def reopen(journal: Path) -> Log:
    """The events of a journal to go on with; a line that a kill cut off, and the end, go.

    Empty where there is no journal yet. Raises InputError for a line that is damaged otherwise.
    """
    events, size = Log(), 0
    if not journal.exists():
        return events
    lines = journal.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        event: Any = None
        with contextlib.suppress(ValueError):
            event = json.loads(line) if line.endswith(b"\n") else None
        kind = event.get("kind") if isinstance(event, dict) else None
        if kind is None and number < len(lines):
            raise InputError(
                f"{journal}: line {number} is damaged, so that this training cannot go on: put it "
                f"right (where it was stopped there is a copy, {paths.RECORDS}/*.part), or begin "
                "anew with checkpoint.resume=never"
            )
        if kind in (None, "end"):
            break
        events.append(event)
        size += len(line)
    os.truncate(journal, size)
    return events


def _sessions(events: Log) -> Iterator[tuple[float, float]]:
    """When each process that wrote these began and was last heard of, in seconds."""
    times: list[list[float]] = []
    for event in events:
        if event["kind"] in ("start", "resume"):
            times.append([])
        if times and "time" in event:
            times[-1].append(event["time"] / 1000)
    return ((session[0], session[-1]) for session in times)


def here(stages: Iterable[str]) -> Iterator[Log]:
    """Finished records of the workspace, without those that are missing or not to be read."""
    for path, stage in ((paths.record(stage), stage) for stage in stages):
        try:
            if path.exists():
                yield read(path, stage)
        except (InputError, OSError) as error:
            log.warning("%s: %s; left out", path, error)


def upstream(stage: str) -> Iterator[Log]:
    """The records that `stage` builds on, as far as the workspace has them."""
    return here(stage_graph.upstream(stage))


def beside(head: Event) -> Iterator[Log]:
    """The other records of this workspace that the same command has made so far."""
    others = here(stage for stage in stage_graph.stages() if stage != head["stage"])
    return (record for record in others if record[0]["invocation"] == head["invocation"])


def start_event(stage: str, config: Config) -> Event:
    """Who, where, when, with which settings and code. `key` names the experiment's row.

    Raises ChangedError where the same command began its chain with other settings: they would
    split its row in two.
    """
    params = stage_graph.decisive(flatten(config))
    invocation = _invocation()
    chain = [
        record
        for record in upstream(stage)  # a training that was resumed had several commands
        if any(e["invocation"] == invocation for e in record.of_kind("start", "resume"))
    ]
    for record in chain:
        if changed := differing(record[0]["params"], params):
            raise ChangedError(EDITED.format(stage=record[0]["stage"], changed=listed(changed)))
    # Taken once: an edit of another stage's code while a chain runs must not split its row either.
    code = next((record[0]["code"] for record in chain), None) or code_digest()
    return {
        "kind": "start",
        "schema": SCHEMA,
        "id": uuid.uuid4().hex,
        "stage": stage,
        "time": _now(),
        "key": digest_of({"params": params, "code": code}),
        "code": code,
        "invocation": invocation,
        "name": os.environ.get("DVC_EXP_NAME", ""),
        "experiment": config.tracking.experiment,
        "checkpoints": config.tracking.checkpoints,
        "params": params,
        "settings": digest_of(params),
        "git": git.state(),
        "parent": _parent(params),
        "environment": environment(),
    }


@functools.cache
def environment() -> dict[str, str]:
    """The facts that explain a difference between two machines; no environment variables."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "host": socket.gethostname(),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "user": git.said("config", "user.name") or psutil.Process().username(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that a stage has really imported."""
    names = ("torch", "numpy", "tiktoken", "transformers", "safetensors")
    return {n: str(sys.modules[n].__version__) for n in names if n in sys.modules}


def _invocation() -> str:
    """One string for all stages of one `dvc` command: the process that started this one."""
    for parent in psutil.Process().parents()[:3]:
        with contextlib.suppress(psutil.Error):
            if _is_dvc(parent.cmdline()):
                return f"{parent.pid}-{parent.create_time():.2f}"
    return f"{os.getpid()}-{time.time():.2f}"


def _is_dvc(words: list[str]) -> bool:
    return any("dvc" in Path(word).name for word in words[:3])


def goes_on(stage: str, invocation: str) -> bool:
    """Whether the `dvc` command that ran a stage lives and has another to run that builds on it.

    A queue's process does not say which stages it was asked for: then it is taken for all.
    """
    words: list[str] = []
    if is_alive(invocation):
        with contextlib.suppress(psutil.Error):
            words = psutil.Process(int(invocation.partition("-")[0])).cmdline()
    targets = [word for word in words if word in stage_graph.stages()] or stage_graph.stages()
    return _is_dvc(words) and any(stage in stage_graph.upstream(target) for target in targets)


def _parent(params: dict[str, Any]) -> dict[str, Any]:
    """The settings of the commit that this experiment starts from, as far as they differ.

    `changed` holds [theirs, ours] by name, None for a setting that one side does not have. Empty
    where that commit has no params file, or one that nobody can read.
    """
    try:
        theirs = stage_graph.decisive(settings_of(git.said("show", "HEAD:./params.yaml")))
    except ConfigError:
        return {}
    names = dict.fromkeys([*params, *theirs])
    both = {name: [theirs.get(name), params.get(name)] for name in names}
    changed = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    return {"settings": digest_of(theirs), "changed": changed} if theirs else {}


def _place(path: Path) -> dict[str, Any]:
    """Where a file or folder lies, and how to tell that it is still the same."""
    size = sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())
    return {"path": path.as_posix(), "sha256": tree_digest(path), "bytes": size}


def _now() -> int:
    """Milliseconds since 1970; MLflow refuses times before, and takes 0 for none."""
    return max(1, int(time.time() * 1000))


def _round(key: str, value: float) -> float:
    value, digits = float(value), DIGITS_OF.get(key.partition("/")[0], DIGITS)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value
