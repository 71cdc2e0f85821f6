"""MLflow's page for this machine alone: the table that it opens with, and the server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import warnings

from pipeline.config import load
from pipeline.errors import InputError
from pipeline.tracking.mlflow_store import artifact_root, connect, store_uri, without_secrets

log = logging.getLogger(__name__)

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


def show(port: int) -> int:
    """Print the link to the prepared table; serve the store unless it is a server's already."""
    experiment = connect().get_experiment_by_name(load().tracking.experiment)
    remote = store_uri().startswith("http")
    with socket.socket() as knock:
        if not remote and not knock.connect_ex(("127.0.0.1", port)):
            raise InputError(f"port {port}: another server has it: `make ui PORT={port + 1}`")
    server = without_secrets(store_uri()) if remote else f"http://127.0.0.1:{port}"
    address = link(server.rstrip("/"), experiment.experiment_id if experiment else "0")
    log.info("The prepared comparison:\n  %s", address)
    if not remote:
        log.info("MLflow takes some seconds to start; Ctrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            _serve(port)
    return 0


def _serve(port: int) -> None:
    """Serve MLflow's page to browsers of this machine until it is stopped.

    `mlflow ui` would start fifteen processes, most of them for jobs of language models, and answer
    any host name, which lets a foreign page reach it by DNS rebinding.
    """
    places = {"_MLFLOW_SERVER_FILE_STORE": store_uri()} | {
        "_MLFLOW_SERVER_REGISTRY_STORE": os.environ.get("MLFLOW_REGISTRY_URI") or store_uri(),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifact_root(),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    os.environ.update(places, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = f"localhost:{port},127.0.0.1:{port}"
    import uvicorn

    app = "mlflow.server.fastapi_app:app"
    with warnings.catch_warnings():  # deprecations in its libraries
        warnings.simplefilter("ignore")
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
