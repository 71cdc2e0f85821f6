"""No secret of the environment reaches a file, a row or a log; servers stay on this machine."""

from __future__ import annotations

import base64
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.records import record_file
from pipeline.tracking import mlflow_run, mlflow_store, mlflow_ui, recording
from tests.conftest import NANO, ROOT, tiny_pipeline, wait_for

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
    client = mlflow_store.connect()
    (row,) = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    assert row.info.status == "FINISHED" and row.data.metrics["val/loss"] > 0
    searched = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert {".runs", "mlflow.db", "mlartifacts", "records", "metrics", "artifacts"} <= searched
    assert leaks(folder) == {}
    said = caplog.text + "".join(capfd.readouterr())
    assert "train: loss" in said
    assert not [secret for secret in secrets() if secret.decode() in said]


def test_a_naive_tag_with_the_uri_is_found_by_the_search(own_store: Path) -> None:
    client = mlflow_store.connect()
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
    with recording.record("tokenize", make_config()):
        pass
    mlflow_run.attach(["some record"], own_store.parent, "comparison")
    with pytest.raises(SystemExit):
        command(["sync"])
    assert len([r for r in caplog.records if "may not come in" in r.getMessage()]) == 3
    assert not [secret for secret in secrets() if secret.decode() in caplog.text]
    assert leaks(own_store.parent) == {}


def test_the_servers_own_words_do_hold_the_canaries(echo) -> None:
    from mlflow import MlflowClient

    with pytest.raises(mlflow_store.store_errors()) as refused:
        MlflowClient(mlflow_store.store_uri()).get_experiment_by_name("gpt2")
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
        ("Server=h;PWD=abc", "Server=h;PWD=***"),
        (
            "https://b/?X-Amz-Credential=a&X-Amz-Date=1",
            "https://b/?X-Amz-Credential=***&X-Amz-Date=1",
        ),
        (
            "?X-Amz-Security-Token=a%2B&X-Amz-Signature=b",
            "?X-Amz-Security-Token=***&X-Amz-Signature=***",
        ),
        ("https://blob/x?sv=2&sig=aB%3D&se=1", "https://blob/x?sv=2&sig=***&se=1"),
        ("authorization: bearer abcdefgh is wrong", "authorization: bearer *** is wrong"),
        ("BASIC bWU6cHc=", "BASIC ***"),
    ],
)
def test_uris_are_shown_without_a_user_and_named_secrets_without_their_value(
    text: str, shown: str
) -> None:
    assert mlflow_store.without_secrets(text) == shown


@pytest.mark.parametrize(
    "token",
    [
        *("hf_" + "aB3" * 11, "ghp_" + "aB3" * 12, "github_pat_" + "11AB_" * 10),
        *(
            "AKIA" + "AB12" * 4,
            "sk-" + "aB3" * 16,
            "sk-proj-" + "a-B3_" * 9,
            "glpat-" + "aB3-_" * 4,
        ),
        *("xoxb-123456789012-aBcD", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.aB-3_"),
    ],
)
def test_a_bare_token_of_a_known_kind_is_not_shown(token: str) -> None:
    assert (
        mlflow_store.without_secrets(f"not allowed: '{token}', so go")
        == "not allowed: '***', so go"
    )


@pytest.mark.parametrize(
    "text",
    [
        *("basic training of a model", "Basic realm=x", "a bearer of news", "design=a&sigma=3"),
        *("hf_checkpoints_of_a_directory", "sk-learn-based-classifiers", "ghp_short", "AKIAB"),
        *("eyJust.a.word", "artifacts/import_hf_weights.jsonl", "task-20261128-090000-abcdefgh"),
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert mlflow_store.without_secrets(text) == text


def test_the_path_of_a_file_of_secrets_is_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY_FILE", str(tmp_path))
    assert mlflow_store.without_secrets(f"{tmp_path}/mlflow.db") == f"{tmp_path}/mlflow.db"


def test_a_variable_that_another_thread_takes_away_meanwhile_stops_nothing(monkeypatch) -> None:
    class Slow:
        def search(self, name: str) -> bool:
            monkeypatch.delenv("DB_PASSWORD", raising=False)
            return name == "HF_TOKEN"

    monkeypatch.setattr(mlflow_store, "_SECRET_NAME", Slow())
    assert mlflow_store.without_secrets(f"it says {CANARIES['HF_TOKEN']}") == "it says ***"


def test_short_values_stay_readable(monkeypatch) -> None:
    monkeypatch.setenv("SORT_KEY", "name")
    assert mlflow_store.without_secrets("a name, " + CANARIES["HF_TOKEN"]) == "a name, ***"


def test_the_facts_of_the_machine_take_no_environment_value(make_config, monkeypatch) -> None:
    record_file.environment.cache_clear()
    head = record_file.start_event("tokenize", make_config())
    assert not [canary for canary in CANARIES.values() if canary in json.dumps(head)]


def test_the_page_is_served_on_loopback_and_its_password_is_on_no_command_line(
    monkeypatch,
) -> None:
    import uvicorn

    served = {}

    def run(app: object, **options: object) -> None:
        served.update(options, hosts=os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"])
        served.update(store=os.environ["_MLFLOW_SERVER_FILE_STORE"])

    monkeypatch.setattr(uvicorn, "run", run)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what it sets stays here
    shutil.copyfile(NANO, paths.PARAMS)
    uri = f"sqlite:///{Path('mlflow.db').absolute().as_posix()}"
    os.environ["MLFLOW_TRACKING_URI"] = uri
    assert mlflow_ui.show(5000) == 0
    assert (served["host"], served["port"], served["store"]) == ("127.0.0.1", 5000, uri)
    assert served["hosts"] == "localhost:5000,127.0.0.1:5000"


@pytest.mark.slow
def test_the_page_answers_this_machine_alone_and_is_one_process(own_store: Path) -> None:
    shutil.copyfile(NANO, paths.PARAMS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from pipeline.tracking import mlflow_ui; mlflow_ui.show({port})",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: said_to(port, f"127.0.0.1:{port}") == 200, 120)
        assert said_to(port, f"localhost:{port}") == 200
        foreign = ("evil.example", f"evil.example:{port}", "192.168.1.5", "10.0.0.1.nip.io")
        assert {host: said_to(port, host) for host in foreign} == dict.fromkeys(foreign, 403)
        assert psutil.Process(process.pid).children(recursive=True) == []
    finally:
        process.terminate()
        process.wait(30)


def said_to(port: int, host: str) -> int:
    """The status of an answer to who asks for experiments under that name; 0 for none."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
        data=b'{"max_results": 5}',
        headers={"Content-Type": "application/json", "Host": host},
    )
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError:
        return 0
