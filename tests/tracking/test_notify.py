"""Messages to a person who is elsewhere."""

from __future__ import annotations

import http.server
import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import paths
from pipeline.config import Config, TrackingConfig
from pipeline.errors import ConfigError, InputError
from pipeline.tracking import notify
from stages import common

Received = list[tuple[str, dict[str, str]]]


def settings(way: str) -> TrackingConfig:
    return TrackingConfig(experiment="gpt2", checkpoints="none", notify=way)


def tell(way: str, text: str) -> None:
    """`notify.tell`, and its end."""
    notify.tell(settings(way), text)
    for thread in threading.enumerate():
        if thread.name == "notify":
            thread.join(30)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    """What a webhook on this machine receives; it takes JSON objects at one path alone."""
    received: Received = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fits = self.path == "/secret" and self.headers["Content-Type"] == "application/json"
            if fits:
                received.append((self.path, json.loads(body)))
            self.send_response(200 if fits else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/secret"
        monkeypatch.setenv(notify.ADDRESS, address)
        yield received
        server.shutdown()


def test_a_webhook_gets_the_text_and_the_experiment(hook: Received, monkeypatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "hot-lr")
    tell("webhook", "train failed: ∞")
    words = "hot-lr: train failed: ∞"
    assert hook == [("/secret", {"text": words, "content": words})]


def test_a_command_gets_the_text_on_its_input_and_in_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = tmp_path / "tell me.py", tmp_path / "out"
    script.write_text(
        "import os, sys\n"
        f"open({str(out)!r}, 'w', encoding='utf-8').write(repr("
        "(sys.argv[1:], sys.stdin.buffer.read().decode(), os.environ['MESSAGE'])))\n",
        "utf-8",
    )
    monkeypatch.setenv(notify.ADDRESS, f'"{sys.executable}" "{script}" "two words" $HOME')
    tell("command", "done; `rm -rf x`")
    words = "done; `rm -rf x`"
    assert eval(out.read_text("utf-8")) == (["two words", "$HOME"], words, words)


def test_none_tells_nobody(hook: Received) -> None:
    tell("none", "train has ended")
    assert hook == []


@pytest.mark.parametrize(
    ("way", "address", "why"),
    [
        ("webhook", "http://127.0.0.1:9/secret", "refused|denied|rejected"),
        ("command", "no-such-program --token secret", "No such file|cannot find"),
        ("command", f'"{sys.executable}" -c "exit(3)" secret', "exit code 3"),
    ],
)
def test_a_message_that_nobody_takes_is_a_warning_without_the_address(
    way: str, address: str, why: str, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(notify.ADDRESS, address)
    with caplog.at_level(logging.WARNING):
        tell(way, "train has ended")
    (said,) = caplog.messages
    assert said.startswith("tracking.notify: the message was not taken")
    assert re.search(why, said) and "secret" not in said


@pytest.mark.parametrize(
    ("way", "given", "expected"),
    [
        ("webhook", None, "https://.*PIPELINE_NOTIFY, which is not set"),
        ("webhook", "ntfy.sh/secret", "https://.*which is something else"),
        ("command", "  ", "a program"),
    ],
)
def test_a_missing_address_is_an_error_before_any_work(
    way: str, given: str | None, expected: str, monkeypatch, make_config: Callable[..., Config]
) -> None:
    monkeypatch.delenv(notify.ADDRESS, raising=False)
    if given is not None:
        monkeypatch.setenv(notify.ADDRESS, given)
    with pytest.raises(ConfigError, match=expected) as error:
        common.notified(pytest.fail, "train", make_config(tracking__notify=way))
    assert "secret" not in str(error.value)


def test_an_end_and_a_failure_of_a_stage_are_told(
    hook: Received, monkeypatch, tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    monkeypatch.chdir(tmp_path)
    common.write_metrics(paths.METRICS / "train.json", {"train/best_val_loss": 5.4381})

    def work(main, *_: object) -> None:
        main()

    monkeypatch.setattr(common, "held", work)

    def fail() -> None:
        raise InputError("no tokens")

    config = make_config(tracking__notify="webhook")
    common.notified(lambda: None, "train", config)
    common.notified(lambda: None, "evaluate", config)  # an end that nobody waits for
    common.notified(lambda: None, "sample", config)  # without an evaluation
    with pytest.raises(InputError):
        common.notified(fail, "tokenize", config)
    for thread in threading.enumerate():
        if thread.name == "notify":
            thread.join(30)
    texts = sorted(body["text"] for _, body in hook)
    assert texts == [
        "tokenize failed: error: no tokens",
        "train has ended, train/best_val_loss 5.4381",
    ]
