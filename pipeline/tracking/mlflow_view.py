"""What MLflow's page opens with: the columns of its table, and its charts."""

from __future__ import annotations

import json
from typing import Any

# A shared view is an experiment tag whose format MLflow does not document; a test holds it.
_KEY = "comparison"
TAG = f"mlflow.sharedViewState.{_KEY}"
# Colours that differ on white, also for readers who do not see all of them.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#882255", "#999933", "#332288", "#44aa99", "#661100", "#888888"),
)
# In this order, each as wide as its values need, in pixels: what runs are compared by comes first,
# and all of it fits beside the page's menu on a screen of 1600.
COLUMNS = {
    "tags.`changed`": 190,
    "metrics.`val/loss`": 82,
    "metrics.`val/bits_per_byte`": 86,
    "tags.`health.verdict`": 150,
    "params.`corpus.source`": 96,
    "params.`precision`": 72,
    "tags.`model`": 98,
    "metrics.`train/tokens`": 84,
    "metrics.`perf/tokens_per_second`": 86,
    "metrics.`perf/mfu`": 70,
    "metrics.`perf/peak_memory_mib`": 84,
    "attributes.`Duration`": 68,
}
# The page's own columns, and what it calls the duration inside.
FIRST = {"attributes.`Run Name`": 134, "runDateAndNestInfo": 104}
INSIDE = {"attributes.`Duration`": "duration"}
# The charts that the view opens with, in two sections: metric, whether its axis is logarithmic,
# how much MLflow smooths the line (0 to 100).
CURVES = (
    ("train/loss", False, 20),
    ("train/val_loss", False, 0),
    ("train/grad_norm", True, 0),
    ("train/learning_rate", False, 0),
    ("train/update_ratio", True, 20),
    ("perf/step_tokens_per_second", False, 30),
)
PARALLEL = {
    "selectedParams": ["precision", "train.lr", "model.n_layer", "init.std"],
    "selectedMetrics": ["val/loss", "perf/tokens_per_second"],
    "showAllRuns": False,
}


def state() -> str:
    """The tag's value: columns and charts for training, best validation loss first."""
    widths = FIRST | {INSIDE.get(name, name): width for name, width in COLUMNS.items()}
    shown = {
        "searchFilter": "",
        "orderByKey": "metrics.`val/loss`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(widths),
        "columnWidths": widths,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "FIRST_10_RUNS",
        "viewMaximized": True,
        "runListHidden": False,
        "isAccordionReordered": True,  # else sections are sorted by name
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {},
        "compareRunCharts": [*(_curve(*asked) for asked in CURVES), _chart("PARALLEL", PARALLEL)],
        "compareRunSections": [_section("training"), _section("comparison")],
    }
    return json.dumps(shown)


_OURS: dict[str, Any] = {"deleted": False, "isGenerated": False}


def _section(name: str) -> dict[str, Any]:
    return {"name": name, "uuid": name, "display": True, "isReordered": True, **_OURS}


def _curve(metric: str, logarithmic: bool, smoothness: int) -> dict[str, Any]:
    words = {"metricKey": metric, "selectedMetricKeys": [metric], "lineSmoothness": smoothness}
    words |= {"scaleType": "log" if logarithmic else "linear", "yAxisKey": "metric"}
    words |= {"xAxisKey": "step", "xAxisScaleType": "linear"}
    words |= {"selectedXAxisMetricKey": "", "selectedYAxisMetricKey": ""}
    return _chart("LINE", words)


def _chart(kind: str, words: dict[str, Any]) -> dict[str, Any]:
    section = "training" if kind == "LINE" else "comparison"
    uuid = words.get("metricKey", kind)  # any text that no other chart has
    place = {"uuid": uuid, "type": kind, "metricSectionId": section, "runsCountToCompare": 10}
    return place | _OURS | words


def link(server: str, experiment_id: str) -> str:
    """The page of an MLflow server that shows the view."""
    return (
        f"{server}/#/experiments/{experiment_id}/runs"
        f"?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={_KEY}"
    )
