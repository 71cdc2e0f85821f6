"""Messages to a person who is elsewhere: a run has ended, failed, or shows an urgent problem."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import threading
import urllib.request
from collections.abc import Callable

from pipeline.config import TrackingConfig
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

ADDRESS = "PIPELINE_NOTIFY"  # of the environment: an address is often a secret
SECONDS = 10.0  # the longest wait; a process that ends waits for its last message


def check(config: TrackingConfig) -> None:
    """Raise ConfigError where tracking.notify has no address to go to."""
    given, expected = os.environ.get(ADDRESS, "").strip(), ""
    if config.notify == "command" and not given:
        expected = "a program and its arguments"
    if config.notify == "webhook" and not given.startswith(("http://", "https://")):
        expected = "an address that begins with https://"
    if expected:
        raise ConfigError(
            f"tracking.notify={config.notify}: expected {expected} in the environment variable "
            f"{ADDRESS}, which is {'something else' if given else 'not set'}"
        )


def tell(config: TrackingConfig, text: str) -> None:
    """Send one message, beside whatever goes on; one that cannot be sent is a warning.

    A command finds it on its standard input and as MESSAGE in its environment. A webhook gets
    JSON with the text as `text` (Slack, Mattermost, Teams) and as `content` (Discord).
    """
    send = {"command": _to_command, "webhook": _to_webhook}.get(config.notify)
    if send:
        name = os.environ.get("DVC_EXP_NAME", "")
        words = f"{name}: {text}" if name else text
        # No daemon: the interpreter waits for it before it ends.
        threading.Thread(target=_sent, args=(send, words), name="notify").start()


def _sent(send: Callable[[str], None], words: str) -> None:
    try:
        send(words)
    except Exception as error:  # whatever the network, a shell or a server does: the run goes on
        log.warning("tracking.notify: the message was not taken: %s", _said(error))


def _said(error: Exception) -> str:
    """An error without the address, which its own text may repeat."""
    match error:
        case subprocess.CalledProcessError():
            return f"the command ended with exit code {error.returncode}"
        case subprocess.TimeoutExpired():
            return f"the command did not end within {SECONDS:.0f} s"
        case OSError():  # of the network, too
            return str(error.strerror or error.__dict__.get("reason") or error)
    return type(error).__name__


def _to_command(words: str) -> None:
    line = os.environ[ADDRESS]
    subprocess.run(
        line if os.name == "nt" else shlex.split(line),  # Windows splits it itself
        input=words.encode(),
        env=os.environ | {"MESSAGE": words},
        stdout=subprocess.DEVNULL,
        timeout=SECONDS,
        check=True,
    )


def _to_webhook(words: str) -> None:
    body = json.dumps({"text": words, "content": words}).encode()
    request = urllib.request.Request(
        os.environ[ADDRESS],
        body,
        {"Content-Type": "application/json", "User-Agent": "gpt2-pipeline"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS):
        pass
