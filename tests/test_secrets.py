"""No secret of the environment reaches a file, a row or a log; servers stay on this machine."""

from __future__ import annotations

import base64
import importlib
import json
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline import paths, records, rows, store, tracking
from tests.conftest import NANO, tiny_pipeline

pytestmark = [
    pytest.mark.usefixtures("own_store"),
    pytest.mark.filterwarnings("ignore"),  # whole stages run here: theirs is tested elsewhere
]

PASSWORD = uuid.uuid4().hex
NAMES = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "WANDB_API_KEY")
NAMES += ("AWS_SECRET_ACCESS_KEY", "DB_PASSWORD")
CANARIES = {name: uuid.uuid4().hex for name in NAMES}
STAGES = ("tokenize_corpus", "import_hf_weights", "train", "evaluate", "numerics", "sample")


@pytest.fixture(autouse=True)
def _canaries(monkeypatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


def secrets() -> list[bytes]:
    """Every canary as it is, and as an Authorization header would carry it."""
    values = [*CANARIES.values(), PASSWORD]
    encoded = [base64.b64encode(f"user:{value}".encode()) for value in values]
    return [*(value.encode() for value in values), *encoded]


def leaks(folder: Path) -> dict[str, bytes]:
    """The files in which a canary stands."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and ".git" not in path.relative_to(folder).parts:
            content = path.read_bytes()
            found |= {path.relative_to(folder).as_posix(): s for s in secrets() if s in content}
    return found


def test_no_canary_is_in_a_file_a_row_or_a_log_after_all_stages(
    own_store: Path, monkeypatch, rest_server, capfd, caplog
) -> None:
    folder = own_store.parent
    tiny_pipeline(folder)
    raw = OmegaConf.load(paths.PARAMS)
    raw.debug.interact_at_step = 2  # nobody sits here: the moment goes into the scratch folder
    OmegaConf.save(raw, paths.PARAMS)
    port, stop = rest_server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{PASSWORD}@127.0.0.1:{port}")
    for stage in STAGES:
        importlib.import_module(f"stages.{stage}").main(configuration.load())
    stop()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    client = store.connect()
    (row,) = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    assert row.info.status == "FINISHED" and row.data.metrics["val/loss"] > 0
    searched = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert {".runs", "mlflow.db", "mlartifacts", "records", "metrics", "artifacts"} <= searched
    assert leaks(folder) == {}
    said = caplog.text + "".join(capfd.readouterr())
    assert "train: loss" in said
    assert not [secret for secret in secrets() if secret.decode() in said]


def test_a_naive_tag_with_the_uri_is_found_by_the_search(own_store: Path) -> None:
    client = store.connect()
    run = client.create_run("0")
    assert leaks(own_store.parent) == {}
    client.set_tag(run.info.run_id, "tracking", f"http://user:{PASSWORD}@127.0.0.1")
    assert leaks(own_store.parent) == {"mlflow.db": PASSWORD.encode()}


class _Echo(BaseHTTPRequestHandler):
    """Refuses, and repeats in its answer what it was sent, as a careless proxy does."""

    def do_GET(self) -> None:
        secrets = ", ".join([*CANARIES.values(), self.headers.get("Authorization", "")])
        address = f"http://user:{PASSWORD}@host/?password={PASSWORD}"
        message = f"{address} may not come in with {secrets}"
        body = json.dumps({"error_code": "PERMISSION_DENIED", "message": message}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def echo(monkeypatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        port = server.server_address[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{PASSWORD}@127.0.0.1:{port}")
        yield
        server.shutdown()


def test_what_a_refusing_server_repeats_is_not_in_the_warning(
    make_config, echo, own_store: Path, caplog
) -> None:
    with tracking.record("tokenize", make_config()):
        pass
    rows.attach(["some record"], own_store.parent, "comparison")
    with pytest.raises(SystemExit):
        tracking.main(["sync"])
    assert len([r for r in caplog.records if "may not come in" in r.getMessage()]) == 3
    assert not [secret for secret in secrets() if secret.decode() in caplog.text]
    assert leaks(own_store.parent) == {}


def test_the_servers_own_words_do_hold_the_canaries(echo) -> None:
    from mlflow import MlflowClient

    with pytest.raises(store.store_errors()) as refused:
        MlflowClient(store.store_uri()).get_experiment_by_name("gpt2")
    said = str(refused.value).encode()
    assert [secret in said for secret in secrets()].count(True) >= len(CANARIES) + 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pass/w@rd@host:1/x is down", "http://host:1/x is down"),
        ("postgresql://me:pw@host/db?sslpassword=pw", "postgresql://host/db?sslpassword=***"),
        ("api_key=abc&user=me", "api_key=***&user=me"),
        ("Authorization: Basic bWU6cHc=, denied", "Authorization: Basic ***, denied"),
        ("sqlite:////home/me/mlflow.db: locked", "sqlite:////home/me/mlflow.db: locked"),
        ("sqlite:////home/a@b/c.db", "sqlite:////home/a@b/c.db"),
        ("http://host:1/a@b and file:///a@b", "http://host:1/a@b and file:///a@b"),
        ("mysql+pymysql://me:1/2@host/a", "mysql+pymysql://host/a"),
        ("http://token@host/", "http://host/"),
    ],
)
def test_uris_are_shown_without_a_user_and_named_secrets_without_their_value(
    text: str, shown: str
) -> None:
    assert store.without_secrets(text) == shown


def test_the_path_of_a_file_of_secrets_is_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY_FILE", str(tmp_path))
    assert store.without_secrets(f"{tmp_path}/mlflow.db") == f"{tmp_path}/mlflow.db"


def test_short_values_stay_readable(monkeypatch) -> None:
    monkeypatch.setenv("SORT_KEY", "name")
    assert store.without_secrets("a name, " + CANARIES["HF_TOKEN"]) == "a name, ***"


def test_the_facts_of_the_machine_take_no_environment_value(make_config, monkeypatch) -> None:
    records.environment.cache_clear()
    head = records.start_event("tokenize", make_config())
    assert not [canary for canary in CANARIES.values() if canary in json.dumps(head)]


def test_the_page_is_served_on_loopback_and_its_password_is_on_no_command_line(
    monkeypatch,
) -> None:
    called = {}

    def call(command: list[str], **options: object) -> int:
        called.update(options, command=command)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    shutil.copyfile(NANO, paths.PARAMS)
    uri = f"sqlite:///{Path('mlflow.db').absolute().as_posix()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking.show(5000) == 0
    command = called["command"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "mlflow.db" not in " ".join(command)
    assert called["env"]["MLFLOW_BACKEND_STORE_URI"] == uri
