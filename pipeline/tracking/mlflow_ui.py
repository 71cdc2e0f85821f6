"""MLflow's page, served for this machine alone."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import urllib.request
import warnings
import webbrowser

from pipeline.config import load
from pipeline.errors import InputError
from pipeline.tracking.mlflow_store import artifact_root, connect, store_uri, without_secrets
from pipeline.tracking.mlflow_view import link

log = logging.getLogger(__name__)

PORTS = 20  # that are tried


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
