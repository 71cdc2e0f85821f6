"""What the training of a rung leaves, made up."""

from __future__ import annotations

import json

from pipeline import config as configuration
from pipeline.ladders import ladder
from pipeline.ladders.ladder import Trained
from pipeline.ladders.plan import Rung
from pipeline.records.run_data import Experiment


def id_of(name: str) -> str:
    """Of the record of an experiment."""
    return name.encode().hex()[:32].ljust(32, "0")


def trained(rung: Rung, name: str, loss: float = 6.0, code: str = "", begins: int = 0) -> Trained:
    """The experiment that a rung's run leaves."""
    start = {
        **{"kind": "start", "stage": "train", "id": id_of(name)},
        **{"time": 1, "name": name},
        **{"params": configuration.flatten(rung.config)},
    }
    tags = {"digest.train": "tokens"}
    if rung.parent:
        parent = {"name": "p", "step": begins or rung.begins, "record": id_of(rung.parent.name)}
        tags["fork.lineage"] = json.dumps([parent])
    values = {"train/val_loss": loss, "perf/tokens_per_second": 1000.0}
    events = [
        {"kind": "tags", "values": tags},
        {"kind": "metrics", "step": rung.steps, "time": 2, "values": values},
        {"kind": "end", "status": "FINISHED", "time": 3},
    ]
    run = Experiment(name, "rev", {"train": [start, *events]})
    return Trained(run, code or ladder.code_here(rung.config))
