"""A server that names a folder of its client's own machine as the place of artifacts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.errors import StorageError
from pipeline.records import record_file
from pipeline.tracking import mlflow_run, mlflow_store, recording
from tests.conftest import ROOT, record_is_complete

pytestmark = [
    pytest.mark.usefixtures("own_store"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi"),  # of MLflow's server
]

HARMLESS = "mlflow-artifacts:/1/r1/artifacts"


class _Hostile(BaseHTTPRequestHandler):
    """Answers as MLflow's server does, with one experiment, one run and one model."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        places, times = self.server.places, {"creation_timestamp_ms": 1}  # type: ignore[attr-defined]
        experiment = {"experiment_id": "1", "name": "gpt2", "lifecycle_stage": "active"}
        experiment |= {"artifact_location": places["experiment"], "tags": []}
        info = {"run_id": "r1", "run_name": "r", "experiment_id": "1", "status": "RUNNING"}
        info |= {"start_time": 1, "lifecycle_stage": "active", "artifact_uri": places["run"]}
        held = {"key": "pipeline.records", "value": json.dumps({"train": places["known"]})}
        run = {"info": info, "data": {"tags": [held]}, "inputs": {}, "outputs": {}}
        model = {"model_id": "m1", "experiment_id": "1", "name": "x", "status": 2} | times
        model = {"info": model | {"artifact_uri": places["model"]}, "data": {}}
        answers = {
            "get-by-name": {"experiment": experiment},
            "experiments/get": {"experiment": experiment},
            "experiments/search": {"experiments": [experiment]},
            "runs/search": {"runs": [run] if places["known"] else []},
            "runs/create": {"run": run},
            "runs/get": {"run": run},
            "logged-models/search": {"models": []},
            "logged-models": {"model": model},
            "logged-models/m1": {"model": model},
        }
        found = [answer for end, answer in answers.items() if path.endswith(end)]
        if path.endswith("runs/get") and places["later"]:  # another one to whoever asks again
            places["run"] = places["later"]
        body = json.dumps(found[0] if found else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_PUT = answer

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def places(monkeypatch) -> Iterator[dict[str, str]]:
    """What the server says; it is the store."""
    said = dict.fromkeys(("experiment", "run", "model"), HARMLESS) | {"known": "", "later": ""}
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hostile) as server:
        server.places = said  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield said
        server.shutdown()


@pytest.fixture
def victim(tmp_path: Path, monkeypatch) -> Path:
    """A person's file, whose name an artifact of ours has, too."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()
    monkeypatch.setattr(recording, "RETRY_SECONDS", 0.2)
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "samples.md").write_text("a person's own")
    return folder


def ship(make_config) -> None:
    ours = paths.LAST / "samples.md"
    ours.parent.mkdir(parents=True)
    ours.write_text("ours")
    with recording.record("train", make_config()) as record:
        for step in range(3):
            record.metrics({"train/value": step / 3}, step)
        record.artifact(ours)
        record.checkpoint("best", ours, 3)


def untouched(folder: Path) -> bool:
    (file,) = folder.iterdir()
    return file.read_text() == "a person's own"


@pytest.mark.fault(70)
@pytest.mark.parametrize("liar", ["experiment", "run", "model", "later"])
def test_nothing_is_written_where_a_server_says_and_the_stage_goes_on_with_one_warning(
    make_config, places, victim: Path, caplog, liar: str
) -> None:
    places[liar] = victim.as_uri()
    ship(make_config)
    assert untouched(victim)
    assert record_is_complete(3)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname != "INFO"]
    for word in ("http://127.0.0.1:", victim.as_uri()[:80], "--serve-artifacts"):
        assert word in said


@pytest.mark.fault(70)
def test_sync_and_what_a_comparison_attaches_are_refused_likewise(
    make_config, places, victim: Path, caplog, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(recording, "Courier", lambda *_: None)
        entry = record_file.Record("train", make_config())
        entry.close("FINISHED")
    places |= {"run": victim.as_uri(), "known": entry.head["id"]}
    with pytest.raises(SystemExit) as ended:
        command(["sync"])
    assert ended.value.code == StorageError.exit_code
    Path("report").mkdir()
    Path("report/samples.md").write_text("ours")
    mlflow_run.attach([entry.head["id"]], Path("report"), "")
    assert untouched(victim)
    assert [victim.as_uri()[:80] in r.getMessage() for r in caplog.records] == [True, True]


@pytest.mark.fault(70, control=True)
def test_a_client_of_its_own_overwrites_the_file(places, victim: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.store.artifact import artifact_repository_registry as registry

    places["run"] = victim.as_uri()
    Path("samples.md").write_text("ours")
    guarded = dict(registry.get_registered_artifact_repositories())
    plain = {scheme: getattr(made, "args", [made])[0] for scheme, made in guarded.items()}
    registry.get_registered_artifact_repositories().update(plain)
    try:
        MlflowClient(mlflow_store.store_uri()).log_artifact("r1", "samples.md")
    finally:
        registry.get_registered_artifact_repositories().update(guarded)
    assert (victim / "samples.md").read_text() == "ours"


@pytest.mark.fault(70)
@pytest.mark.parametrize("place", ["file", "FILE", " file", "bare"])
def test_mlflow_s_client_itself_refuses_such_a_place(places, victim: Path, place: str) -> None:
    uri = victim.as_uri()
    places["run"] = {"bare": str(victim), " file": f" {uri}", "FILE": f"FILE{uri[4:]}"}.get(
        place, uri
    )
    Path("samples.md").write_text("ours")
    with pytest.raises(StorageError):
        mlflow_store.connect().log_artifact("r1", "samples.md")
    assert untouched(victim)


PLACES_HERE = ["file:///home/me", "FILE:/home/me", " file:///home/me", "fi\tle:///home/me", ""]
PLACES_HERE += ["/home/me", "home/me", "~", "file:relative", "file+x:///home/me", "C:\\Users\\me"]
PLACES_HERE += ["c:/Users/me", "\\\\host\\share", "//host/share", "local:/home/me", "dbfs:/x"]
PLACES_HERE += ["runs:/r1/x", "models:/m1", "file-plugin:///home/me", "unknown://x"]


@pytest.mark.fault(70)
@pytest.mark.parametrize("place", PLACES_HERE)
def test_a_place_that_is_or_may_lead_to_a_folder_here_is_refused(place: str) -> None:
    with pytest.raises(StorageError, match="--serve-artifacts"):
        mlflow_store.hold_elsewhere("https://me:secret@host", place)
    mlflow_store.hold_elsewhere("sqlite:///mlflow.db", place)  # our own store's business


@pytest.mark.parametrize("scheme", ["mlflow-artifacts", "s3", "gs", "wasbs", "https", "sftp"])
def test_a_place_on_the_network_passes(scheme: str) -> None:
    mlflow_store.hold_elsewhere("http://host", f"{scheme}://bucket/1/artifacts")


def test_the_refusal_is_one_short_line_without_secrets_or_escapes() -> None:
    with pytest.raises(StorageError) as refused:
        mlflow_store.hold_elsewhere("http://me:secret@host", "file:///\x1b]0;x\x07" + "x" * 10**6)
    said = str(refused.value)
    assert len(mlflow_store.said(refused.value)) <= mlflow_store.LONGEST and said.isprintable()
    assert "secret" not in said and "tracking.experiment" in mlflow_store.said(refused.value)


@pytest.mark.fault(70)
def test_a_real_server_gets_the_artifacts_over_the_network(
    make_config, rest_server, monkeypatch, caplog, own_store: Path
) -> None:
    port, _ = rest_server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    ship(make_config)
    assert not [r for r in caplog.records if r.levelname != "INFO"]
    found = [path.read_text() for path in Path("mlartifacts").rglob("samples.md")]
    assert set(found) == {"ours"}


class _Endless(BaseHTTPRequestHandler):
    """Answers with a body that never ends, as long as somebody reads it."""

    def answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" " * (1 << 20))

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None: ...


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limit of memory there")
def test_an_answer_without_an_end_does_not_take_the_machines_memory(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        env = os.environ | {"MLFLOW_TRACKING_URI": address, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "pipeline", "sync"]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == StorageError.exit_code
    assert "MemoryError" in done.stderr and "Traceback" not in done.stderr
