"""MLflow's own page, for this machine alone."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings

from pipeline.config import load
from pipeline.errors import InputError
from pipeline.tracking import mlflow_view
from pipeline.tracking.mlflow_store import artifact_root, connect, store_uri, without_secrets

log = logging.getLogger(__name__)


def show(port: int) -> int:
    """Print the link to the prepared table; serve the store unless it is a server's already."""
    experiment = connect().get_experiment_by_name(load().tracking.experiment)
    remote = store_uri().startswith("http")
    with socket.socket() as knock:
        if not remote and not knock.connect_ex(("127.0.0.1", port)):
            raise InputError(f"port {port}: another server has it: `make ui PORT={port + 1}`")
    server = without_secrets(store_uri()) if remote else f"http://127.0.0.1:{port}"
    link = mlflow_view.link(server.rstrip("/"), experiment.experiment_id if experiment else "0")
    log.info("The prepared comparison:\n  %s", link)
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
