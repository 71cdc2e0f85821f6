"""What a training left behind, and whether it is what an undisturbed one left."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.records.record_file import read
from pipeline.storage.digests import tree_digest
from pipeline.storage.folders import SUMS, problems
from pipeline.tracking.row_facts import shown

Point = tuple[str, int, float]  # key, step, value

MODELS = ("last", "model")
ASIDE = re.compile(r".*\.part|\..*\.(partial|replaced)")  # what is on its way to a final name
SHOWN = 5  # steps named in one message


@dataclass(frozen=True)
class Outcome:
    """A finished training: its models, its record, its rows in MLflow, and what should not be."""

    models: dict[str, str]  # SHA-256 of each folder
    points: list[Point]  # of the record, in its order
    rows: list[tuple[str, list[Point]]]  # status and points of the record's keys
    unfit: list[str]


def outcome(workspace: Path) -> Outcome:
    """Read it from a workspace with a store of its own."""
    events = read(workspace / "records" / "train.jsonl")
    points = [
        (key, event["step"], value)
        for event in events
        if event["kind"] == "metrics"
        for key, value in event["values"].items()
    ]
    return Outcome(
        models={name: tree_digest(workspace / "artifacts" / name) for name in MODELS},
        points=points,
        rows=rows(workspace / "mlflow.db", {key for key, *_ in points}),
        unfit=unfit(workspace),
    )


def rows(store: Path, keys: set[str]) -> list[tuple[str, list[Point]]]:
    """Every row of a store: its status, and its points of these keys."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store.as_posix()}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = []
    for run in client.search_runs(experiments):
        known = sorted(keys & set(run.data.metrics))
        history = [p for key in known for p in client.get_metric_history(run.info.run_id, key)]
        found.append((run.info.status, [(p.key, p.step, p.value) for p in history]))
    return found


def unfit(workspace: Path) -> list[str]:
    """What a save left aside, and checkpoints that are not whole."""
    files = [p for p in workspace.rglob("*") if p.relative_to(workspace).parts[0] != ".git"]
    left = [p for p in files if ASIDE.fullmatch(p.name)]
    damaged = [p for p in checkpoints(workspace) if damage(p)]
    return sorted(p.relative_to(workspace).as_posix() for p in left + damaged)


def checkpoints(workspace: Path) -> list[Path]:
    """Those that carry a final name, the newest last."""
    return sorted(workspace.glob(".runs/*/checkpoints/step-*"))


def damage(checkpoint: Path) -> list[str]:
    """Why it is not whole: a checkpoint without sums is none."""
    return problems(checkpoint) if (checkpoint / SUMS).is_file() else [f"{checkpoint}: no {SUMS}"]


def differences(found: Outcome, reference: Outcome) -> list[str]:
    """What was lost, doubled or changed; nothing where all is as if nothing had happened."""
    lost = [
        f"artifacts/{name}: other weights"
        for name in reference.models
        if found.models.get(name) != reference.models[name]
    ]
    lost += compared("the record", computed(found.points), computed(reference.points))
    if [status for status, _ in found.rows] != ["FINISHED"]:
        statuses = ", ".join(status for status, _ in found.rows) or "none"
        lost.append(f"MLflow: one row that is FINISHED expected, got {statuses}")
    in_rows = [point for point in found.points if shown({point[0]: point[2]})]
    for _, points in found.rows:
        lost += compared("MLflow's row", points, in_rows)
    return lost + [f"{name}: is still there, or not whole" for name in found.unfit]


def computed(points: Iterable[Point]) -> list[Point]:
    """The points that are no timings, so that two trainings have the same."""
    return [point for point in points if point[0].startswith("train/")]


def compared(where: str, found: list[Point], expected: list[Point]) -> list[str]:
    """By key: steps that are missing, there too often, or of another value."""
    have, want = Counter(p[:2] for p in found), Counter(p[:2] for p in expected)
    values = dict((p[:2], p[2]) for p in expected)
    kinds = {
        "missing": (want - have).keys(),
        "too often": (have - want).keys(),
        "of another value": {p[:2] for p in found if p[2] != values.get(p[:2], p[2])},
    }
    lost = []
    for kind, places in kinds.items():
        for key in sorted({key for key, _ in places}):
            steps = sorted(step for other, step in places if other == key)
            more = f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
            lost.append(f"{where}: {key} {kind} at {', '.join(map(str, steps[:SHOWN]))}{more}")
    return lost
