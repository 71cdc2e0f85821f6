"""What a row shows of a record, and what lies beside it as `facts/STAGE.json` and a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import terminal
from pipeline.records.run_data import Curve, Log, RunData, samples

# A run's page lists every metric and tag by name alone. These nobody compares runs by: they are
# the same for all of them, follow from others, or are the noise of a step's parts.
METRICS_ASIDE = re.compile(
    r"(data|fingerprint|health|init|init_val|model|numerics|sample|time)/.*"
    r"|train/(steps|skipped_steps|found_inf"
    r"|final_loss|best_val_loss)|val/(unigram_loss|perplexity|.*(_count|_acc|_per_token|_stderr))"
    r"|perf/(data_seconds|step_seconds|warm_up_seconds|matrix_gflops|of_matrix_rate|tokenize_.*"
    r"|forecast_.*)"
)
TAGS_ASIDE = re.compile(
    r"(env|digest|numerics|evaluate|sample|init|fork)\..*|precision\.(asked|emulated)|torch"
    r"|parameters|health\.grad_norm"
)
# Curves that say something only where they leave this value.
AT_REST = {"train/loss_scale": 1.0, "train/skipped": 0.0}


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The values of a point that the row shows: curves, and results that runs are compared by."""
    return {
        name: value
        for name, value in metrics.items()
        if not METRICS_ASIDE.fullmatch(name) and AT_REST.get(name) != value
    }


def shown_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if not TAGS_ASIDE.fullmatch(name)}


def facts(record: Log) -> dict[str, Any]:
    """All that a record says but for its settings and the single points of its curves."""
    head, kept = record[0], ("id", "stage", "code", "git", "environment")
    return {
        **{key: head[key] for key in kept},
        "files": list(record.of_kind("dataset", "checkpoint", "artifact")),
        "tags": {k: v for event in record.of_kind("tags") for k, v in event["values"].items()},
        "metrics": {name: _summary(curve) for name, curve in sorted(record.curves.items())},
    }


def _summary(curve: Curve) -> Any:
    """The value of a single point, or what the points of a curve come to; JSON knows no NaN."""
    last = curve.values[-1]
    if not (values := list(filter(math.isfinite, curve.values))) or len(curve) == 1:
        return last if values else str(last)
    ends = {"last": last if math.isfinite(last) else str(last), "finite": len(values)}
    return {"points": len(curve), **ends, "least": min(values), "most": max(values)}


def texts_table(record: Log) -> dict[str, list[Any]]:
    """What the model said while it was trained, by the steps done."""
    texts = RunData({"train": record}).texts
    rows = [[f"step {step:>7,}", terminal.shown(text)] for step, text in texts.items()]
    return {"columns": ["done", "text"], "data": rows}


def samples_table(path: Path) -> dict[str, list[Any]]:
    """samples.jsonl as MLflow's page lays it out beside other runs', a line a draw."""
    rows = [
        [f"{terminal.shown(prompt)} [{number}]", terminal.shown(after), terminal.shown(before)]
        for prompt, pairs in samples(path.read_bytes()).items()
        for number, (before, after) in enumerate(pairs, 1)
    ]
    return {"columns": ["prompt", "after", "before"], "data": rows}
