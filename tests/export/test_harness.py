"""An exported model in lm-evaluation-harness: the accuracies and likelihoods of `evaluate`."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline.compute.precision import choose_precision
from pipeline.export import folder
from pipeline.inference.evaluation import TASKS, Context
from pipeline.inference.multiple_choice import ending_nats, hellaswag_items
from pipeline.model.model_dir import load_model
from tests.export.test_export import run  # noqa: F401

LENGTH = 32  # of that model: contexts of most items have to be cropped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-evaluation-harness is not there: pip install 'lm_eval[hf]'",
    ),
]


def items(path: Path, count: int) -> None:
    """A file as published: marks of WikiHow, double blanks, capitals, empty second parts."""
    draw = random.Random(3)
    words = [
        "the",
        "man",
        "walks",
        "Up",
        "and",
        "Sees",
        "[step]",
        "his",
        ".",
        "(dog)",
        "2",
        "naïve",
    ]

    def text(low: int, high: int, *marks: str) -> str:
        said = draw.choices([*words, *marks], k=draw.randint(low, high))
        return "".join(word + draw.choice([" ", " ", "  "]) for word in said).strip() or "he"

    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            a, b = text(3, 40, "[header]", "[title]"), draw.choice(["", "he", "The Dog", "[x]"])
            row = {"ind": number, "activity_label": "Walking the dog", "ctx_a": a, "ctx_b": b}
            row |= {"ctx": f"{a} {b}".strip(), "label": draw.randrange(4), "split": "val"}
            row["endings"] = [f"goes {text(1, 9, '[substeps]')}" for _ in range(4)]
            file.write(json.dumps(row) + "\n")


def harness(task: dict[str, Any], model: Path, work: Path) -> tuple[dict[str, float], np.ndarray]:
    """Metrics, and the nats of every ending, of the command line with `task` in a file."""
    (work / "tasks").mkdir()
    (work / "tasks/local.yaml").write_text(yaml.safe_dump({"task": "local"} | task), "utf-8")
    given = {"model": "hf", "model_args": f"pretrained={model},dtype=float32", "device": "cpu"}
    given |= {
        "tasks": "local",
        "include_path": str(work / "tasks"),
        "output_path": str(work / "out"),
    }
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--log_samples"],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    [results] = work.glob("out/**/results_*.json")
    [said] = work.glob("out/**/samples_*.jsonl")
    samples = sorted(map(json.loads, said.read_text().splitlines()), key=lambda s: s["doc_id"])
    nats = -np.array([[float(reply[0]) for reply in s["filtered_resps"]] for s in samples])
    return json.loads(results.read_text())["results"]["local"], nats


@pytest.mark.parametrize("method", ["hellaswag_harness", "choice"])
def test_its_accuracies_and_likelihoods_are_those_of_evaluate(
    method: str,
    run,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Its own task `hellaswag` with a local file; and that of docs/export.md."""
    path, out, work = tmp_path / "items.jsonl", tmp_path / "exported", tmp_path / "work"
    work.mkdir()
    items(path, 60)
    folder.export(run, out, "fp32", "exported")
    task: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "validation_split": "validation",
        "training_split": None,
    }
    if method == "choice":
        task |= {"output_type": "multiple_choice", "doc_to_text": "{{ctx}}"}
        task |= {"doc_to_choice": "{{endings}}", "doc_to_target": "label"}
        task["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    else:
        [spec] = importlib.util.find_spec("lm_eval").submodule_search_locations
        task["include"] = str(Path(spec, "tasks/hellaswag/hellaswag.yaml"))
    model, cpu = load_model(out), torch.device("cpu")
    ours = hellaswag_items(path, edited=method == "hellaswag_harness")
    at = Context(choose_precision("fp32", cpu), 4, LENGTH)
    expected = dict(TASKS[method](model, ours, at))
    found, nats = harness(task, out, work)
    assert nats == pytest.approx(ending_nats(model, ours, at), abs=2e-4)
    for name in ("acc", "acc_norm"):
        assert found[f"{name},none"] == expected[name]
