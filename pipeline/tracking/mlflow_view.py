"""The comparison table that MLflow's page opens with: its columns and its order."""

from __future__ import annotations

import json

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
    "metrics.`val/loss`": 82,
    "metrics.`val/bits_per_byte`": 86,
    "metrics.`val/choice_acc_norm`": 80,
    "params.`precision`": 72,
    "tags.`init`": 112,
    "tags.`model`": 98,
    "tags.`health.grad_norm`": 100,
    "metrics.`perf/tokens_per_second`": 86,
    "metrics.`perf/mfu`": 70,
    "metrics.`perf/of_matrix_rate`": 84,
    "metrics.`perf/peak_memory_mib`": 84,
    "attributes.`Duration`": 68,
}
# The page's own columns, and what it calls the duration inside.
FIRST = {"attributes.`Run Name`": 134, "runDateAndNestInfo": 104}
INSIDE = {"attributes.`Duration`": "duration"}


def state() -> str:
    """The tag's value: machine-learning columns, best validation loss first."""
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
        "isAccordionReordered": False,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {},
    }
    return json.dumps(shown)


def link(server: str, experiment_id: str) -> str:
    """The page of an MLflow server that shows the view."""
    return (
        f"{server}/#/experiments/{experiment_id}/runs"
        f"?workflowType=machine_learning&viewStateShareKey={_KEY}"
    )
