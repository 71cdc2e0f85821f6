"""The comparison table that MLflow's page opens with: its columns and its order."""

from __future__ import annotations

import json

# A shared view is an experiment tag whose format MLflow does not document; a test holds it.
_KEY = "comparison"
TAG = f"mlflow.sharedViewState.{_KEY}"
COLUMNS = (
    "attributes.`Duration`",
    "params.`precision`",
    "params.`model.n_layer`",
    "params.`model.n_embd`",
    "params.`train.lr`",
    "metrics.`val/loss`",
    "metrics.`val/perplexity`",
    "metrics.`val/bits_per_byte`",
    "metrics.`val/choice_acc_norm`",
    "metrics.`perf/tokens_per_second`",
    "metrics.`perf/peak_memory_mib`",
    "tags.`dvc.exp_name`",
)


def state() -> str:
    """The tag's value: machine-learning columns, best validation loss first."""
    shown = {
        "searchFilter": "",
        "orderByKey": "metrics.`val/loss`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
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
