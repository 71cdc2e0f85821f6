"""What the commands that read many experiments cost: a hundred of them, and one of 200,000 steps.

    python benchmarks/hundred.py [--experiments 100] [--steps 19073] [--long 200000] [--keep FOLDER]

A tiny pipeline runs once in a repository of its own. Its records are then written as those of so
many experiments, as DVC keeps them: a commit under refs/exps, files in the cache. Every command
is a process of its own; seconds of the processor stand beside seconds of the clock, since other
work on the machine slows only the latter. MLflow's page is opened in headless Chromium: its memory
is that of the page's objects, its processor time the server's, and it is blocked while a click has
no answer. 19,073 steps are those of GPT-2 124M on 10 billion tokens. Writes
benchmarks/results/hundred-STEPS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import chromium, outcomes
from pipeline.tables import markdown
from pipeline.tracking import mlflow_view
from tests.conftest import Checkout, tiny_pipeline

OWN = ("train", "evaluate", "sample")  # the stages that another learning rate runs anew
STEPS = 5  # of the run that the others are made from
RESULTS = Path(__file__).parent / "results"
PORT = 5917
# Every chart of curves has as many lines.
DRAWN = """(charts => charts.length >= 6 && charts.slice(0, 6).every(
    chart => chart.querySelectorAll(".scatterlayer .trace").length >= %d
))([...document.querySelectorAll(".js-plotly-plot")])"""
Events = list[dict[str, Any]]


def build(folder: Path) -> Checkout:
    made = tiny_pipeline(folder, **{"train.steps": STEPS})
    made.dvc("repro")
    made.run("git", "add", "--all")
    made.run("git", "commit", "--quiet", "--message", "a run")
    return made


# --- experiments, as DVC would have kept them


def multiply(repo: Checkout, number: int, steps: int) -> None:
    """So many experiments, each with another learning rate and a training of so many steps."""
    events = {stage: read(repo, stage) for stage in OWN}
    lock = (repo.folder / "dvc.lock").read_text("utf-8")
    settings = (repo.folder / "params.yaml").read_text("utf-8")
    head = repo.run("git", "rev-parse", "HEAD").stdout.strip()
    for n in range(number):
        name, lr = f"lr-{n:04}", round(0.0005 + n * 1e-5, 7)
        changed = lock.replace("train.lr: 0.002", f"train.lr: {lr}")
        for stage, made in records_of(events, name, n, {"train.lr": lr}, steps).items():
            md5, size = keep(repo, made)
            pattern = rf"(path: records/{stage}\.jsonl\n\s+hash: md5\n\s+md5: )\w+(\n\s+size: )\d+"
            changed = re.sub(pattern, rf"\g<1>{md5}\g<2>{size}", changed)
        params = settings.replace("lr: 0.002", f"lr: {lr}")
        commit(repo, head, name, {"dvc.lock": changed, "params.yaml": params})


def read(repo: Checkout, stage: str) -> Events:
    lines = (repo.folder / "records" / f"{stage}.jsonl").read_text("utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def records_of(
    events: dict[str, Events], name: str, n: int, settings: dict[str, Any], steps: int
) -> dict[str, Events]:
    """The records of one more experiment, begun ten minutes after the one before."""
    chance, params = random.Random(n), events["train"][0]["params"] | settings
    head = {
        "name": name,
        "params": params,
        "invocation": f"{1000 + n}-1.00",
        "key": hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest(),
    }
    made = {}
    for stage, found in copy.deepcopy(events).items():
        found[0] |= head | {"id": uuid.UUID(int=chance.getrandbits(128)).hex}
        found = [event for event in found if event["kind"] != "artifact"]
        if stage == "train":
            found = trained(found, steps, chance)
        for event in found:
            if "time" in event:
                event["time"] += (n + 1) * 600_000
        made[stage] = found
    return made


def trained(events: Events, steps: int, chance: random.Random) -> Events:
    """A training's record with so many steps in the place of its own."""
    at = [n for n, e in enumerate(events) if "train/loss" in e.get("values", {})]
    one, made = events[at[0]], []
    for step in range(steps):
        loss = 4 + 6 * 0.99 ** min(step, 500) + chance.gauss(0, 0.05)
        norm = 1 + chance.random() / 5
        values = one["values"] | {"train/loss": round(loss, 5), "train/grad_norm": round(norm, 5)}
        made.append(one | {"step": step, "values": values})
        if step % 50 == 49:
            made.append(one | {"step": step, "values": {"train/val_loss": round(loss, 5)}})
    for event in events:
        if event["kind"] == "checkpoint":
            event["step"] = steps
    rest = [event for event in events[at[0] :] if not is_of_a_step(event)]
    return [*events[: at[0]], *made, *rest]


def is_of_a_step(event: dict[str, Any]) -> bool:
    return bool({"train/loss", "train/val_loss"} & event.get("values", {}).keys())


def keep(repo: Checkout, events: Events) -> tuple[str, int]:
    """A file of DVC's cache: its MD5 and its size."""
    data = "".join(json.dumps(event) + "\n" for event in events).encode()
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    path = repo.folder / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return md5, len(data)


def commit(repo: Checkout, head: str, name: str, files: dict[str, str]) -> None:
    """An experiment of DVC: a commit on `head` with these files, which no branch knows."""
    index = {"GIT_INDEX_FILE": str(repo.folder / ".git" / "index-of-one")}
    repo.run("git", "read-tree", head, **index)
    for path, text in files.items():
        blob = subprocess.run(
            ["git", "hash-object", "-w", "--stdin"],
            cwd=repo.folder,
            input=text.encode(),
            capture_output=True,
            check=True,
        ).stdout.decode()
        entry = f"100644,{blob.strip()},{path}"
        repo.run("git", "update-index", "--add", "--cacheinfo", entry, **index)
    tree = repo.run("git", "write-tree", **index).stdout.strip()
    made = repo.run("git", "commit-tree", tree, "-p", head, "-m", name).stdout.strip()
    repo.run("git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", made)


def lengthen(repo: Checkout, steps: int) -> None:
    """Give the workspace's own training so many steps."""
    path = repo.folder / "records" / "train.jsonl"
    events = trained(read(repo, "train"), steps, random.Random(0))
    path.unlink()  # DVC may have linked it to its cache
    path.write_text("".join(json.dumps(event) + "\n" for event in events), "utf-8")


# --- commands


Row = tuple[str, float, float, float, str]


def timed(repo: Checkout, label: str, *words: str, out: str = "") -> Row:
    """The command, its seconds by the clock and of the processor, its MiB, what it wrote."""
    began = time.perf_counter()
    process = psutil.Popen(
        [sys.executable, "-m", "pipeline", *words],
        cwd=repo.folder,
        env=repo.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    said: list[bytes] = []
    largest = [0]

    def watch() -> None:  # what the system counts begins with the memory of this very process
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                largest[0] = max(largest[0], process.memory_info().rss)
            time.sleep(0.02)

    threads = [threading.Thread(target=lambda: said.append(process.stderr.read()))]
    threads.append(threading.Thread(target=watch))
    for thread in threads:
        thread.start()
    before = os.times()
    for thread in threads:
        thread.join()
    took, used = time.perf_counter() - began, os.times()
    if process.returncode:
        sys.exit(f"{label}: {b''.join(said).decode()}")
    spent = used.children_user + used.children_system
    spent -= before.children_user + before.children_system
    size = (repo.folder / out).stat().st_size / 2**20 if out else 0
    return label, took, spent, largest[0] / 2**20, f"a page of {size:.1f} MiB" if out else ""


@contextlib.contextmanager
def served(repo: Checkout) -> Iterator[tuple[psutil.Popen, float]]:
    """MLflow's server, and the seconds until it answered."""
    began = time.perf_counter()
    server = psutil.Popen(
        [sys.executable, "-m", "pipeline", "ui", str(PORT)],
        cwd=repo.folder,
        env=repo.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not answers():
            if server.poll() is not None or time.perf_counter() - began > 300:
                sys.exit("the page does not answer")
            time.sleep(0.1)
        yield server, time.perf_counter() - began
    finally:
        for process in [*server.children(recursive=True), server]:
            process.terminate()
        psutil.wait_procs([server], timeout=30)


def family(server: psutil.Popen) -> list[psutil.Process]:
    return [server, *server.children(recursive=True)]


def spent(server: psutil.Popen) -> float:
    """Seconds of the processor in all of its processes."""
    return sum(sum(process.cpu_times()[:2]) for process in family(server))


def page(repo: Checkout, number: int) -> Iterator[Row]:
    """MLflow's page: until the server answers, and until the curves of ten and of all are drawn."""
    with served(repo) as (server, took):
        memory = sum(process.memory_info().rss for process in family(server)) / 2**20
        said = f"processes: {len(family(server))}"
        yield "make ui, until it answers", took, spent(server), memory, said
        address = f"http://127.0.0.1:{PORT}"
        for shown, mode in ((10, "FIRST_10_RUNS"), (number, "SHOWALL")):
            state = json.loads(mlflow_view.state()) | {"runsHiddenMode": mode}
            tag = {"key": mlflow_view.TAG, "value": json.dumps(state)}
            ask(f"{address}/api/2.0/mlflow/experiments/set-experiment-tag", tag)
            before = spent(server)
            seen = chromium.visit(mlflow_view.link(address, "1"), DRAWN % shown)
            said = f"blocked {seen.blocked:.1f} s; {seen.requests} answers, {seen.mib:.1f} MiB"
            label = f"the page, until the curves of {shown} runs are drawn"
            yield label, seen.seconds, spent(server) - before, seen.heap, said


def ask(address: str, words: dict[str, str]) -> None:
    data = json.dumps(words | {"experiment_id": "1"}).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=30).close()


def answers() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def measure(repo: Checkout, number: int, steps: int, long: int) -> Iterator[Row]:
    multiply(repo, number, steps)
    (repo.folder / "mlflow.db").unlink()
    yield timed(repo, "doctor of the workspace", "doctor")
    yield timed(repo, "doctor of one experiment", "doctor", f"lr-{number // 2:04}")
    yield timed(repo, "sync into an empty store", "sync")
    yield timed(repo, "sync with nothing to do", "sync")
    yield timed(repo, "report of one", "report", "lr-0000", out="report.html")
    yield timed(repo, "report --all", "report", "--all", out="report.html")
    yield from page(repo, number)
    lengthen(repo, long)
    yield timed(repo, f"doctor of {long:,} steps", "doctor")
    yield timed(repo, f"report of {long:,} steps", "report", out="report.html")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experiments", type=int, default=100)
    parser.add_argument("--steps", type=int, default=19_073)
    parser.add_argument("--long", type=int, default=200_000)
    parser.add_argument("--keep", type=Path, help="a new folder for the repository, kept")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (asked.keep or Path(scratch) / "repository").resolve()
        folder.mkdir(parents=True)
        rows = []
        for row in measure(build(folder), asked.experiments, asked.steps, asked.long):
            print(f"{row[0]}: {row[1]:.1f} s, {row[2]:.1f} s of the processor, {row[3]:.0f} MiB")
            rows.append(row)
    columns = ("command", "s", "s of the processor", "MiB at most", "")
    (RESULTS / f"hundred-{asked.steps}.md").write_text(
        f"# Commands that read {asked.experiments} experiments of {asked.steps} steps\n\n"
        f"{time.strftime('%d %B %Y')}, {psutil.cpu_count()} cores ({platform.machine()}), Python "
        f"{platform.python_version()}.\n\n`{outcomes.command(sys.argv)}`\n\n"
        + markdown(columns, rows),
        "utf-8",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
