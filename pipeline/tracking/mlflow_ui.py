"""MLflow's page for this machine alone: the table that it opens with, and the server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import urllib.request
import warnings
import webbrowser
from typing import Any

from pipeline.config import load
from pipeline.errors import InputError
from pipeline.tracking.mlflow_store import artifact_root, connect, store_uri, without_secrets

log = logging.getLogger(__name__)

PORTS = 20  # that are tried

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


def show(port: int) -> int:
    """Serve the store and open the prepared view; of a server's own store only print the link.

    The port is the first free one from `port` on.
    """
    experiment = connect().get_experiment_by_name(load().tracking.experiment)
    id_ = experiment.experiment_id if experiment else "0"
    if store_uri().startswith("http"):
        log.info("%s", link(without_secrets(store_uri()).rstrip("/"), id_))
        return 0
    port = _free_port(port)
    over = threading.Event()
    opening = threading.Thread(target=_open, args=(port, id_, over), daemon=True)
    opening.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _serve(port)
    finally:
        over.set()
        opening.join()
    return 0


def _free_port(first: int) -> int:
    """A port that no server of this machine has: macOS itself keeps 5000 for AirPlay."""
    ports = range(max(first, 1), min(first + PORTS, 1 << 16))
    if first not in ports:
        raise InputError(f"port {first}: expected a number from 1 to 65535")
    for port in ports:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)):
                return port
    raise InputError(f"ports {first} to {ports[-1]}: other servers have them all: name a free one")


def _open(port: int, experiment_id: str, over: threading.Event) -> None:
    """Wait until the page answers; print its address, and open it where there is a screen."""
    server = f"http://127.0.0.1:{port}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY is set?
    while not over.wait(0.2):
        with contextlib.suppress(OSError), direct.open(f"{server}/health", timeout=5):
            break
    if over.is_set():
        return
    address = link(server, experiment_id)
    log.info("MLflow is at %s (Ctrl-C ends it)", address)
    screens = {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if sys.stdout.isatty() and (screens or sys.platform in ("win32", "darwin")):
        webbrowser.open(address)


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
