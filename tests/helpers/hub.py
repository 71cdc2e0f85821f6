"""A Hugging Face hub on loopback: what its client asks of the real one, and what that one refuses.

    with hub.serving({"a/b": {"config.json": b"{}"}}) as stand_in: ...

Written after the client's source, `huggingface_hub` 2.4; the real hub was never asked.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS = (".safetensors", ".parquet", ".bin")
TOKEN = "hf_" + "aB3" * 11


class Hub:
    """`repositories` are {id: {path: content}}; a data set's id begins with `datasets/`.

    `faults` are {path or "api": [(what, number), ...]}, of which each request takes the next:
    "drop" or "reset" the connection after so many bytes, end a "short" answer of no stated length,
    "wrong" byte there, "stall" until `going_on` is set, or a status, with Retry-After.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.gated: set[str] = set()
        self.commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in repositories}
        self.faults: defaultdict[str, list[tuple[Any, int]]] = defaultdict(list)
        self.asked: list[tuple[str, str]] = []  # path, Range
        self.going_on = threading.Event()
        self.address = ""


def _lfs(path: str) -> bool:
    return path.endswith(LFS)


def sibling(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob}
    if _lfs(path):  # its blob is a pointer of some 130 bytes
        found["blobId"] = hashlib.sha1(path.encode()).hexdigest()
        sha256 = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.asked.append((path, self.headers.get("Range", "")))
        if path.startswith("/api/"):
            self._api(path.removeprefix("/api/").removeprefix("models/"), parse_qs(address.query))
        elif path.startswith("/cdn/"):
            self._cdn(path.removeprefix("/cdn/"), address.query)
        elif "/resolve/" in path:
            self._resolve(path.removeprefix("/"))
        else:
            self._answer(404, b"<html>no such page</html>")

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str = "no") -> None:
        self._answer(status, X_Error_Code=code, X_Error_Message=message)

    def _may(self, name: str) -> bool:
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            said = "Invalid credentials in Authorization header"
            self._answer(401, said.encode(), X_Error_Message=said)
        elif name not in self.hub.repositories:
            self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        elif name in self.hub.gated and token is None:
            self._refuse(401, "GatedRepo", "Access to this repository is restricted")
        else:
            return True
        return False

    def _failed(self, name: str) -> bool:
        """Whether the next fault is a status, which then is the answer."""
        faults = self.hub.faults[name]
        if faults and isinstance(faults[0][0], int):
            status, seconds = faults.pop(0)
            self._answer(status, Retry_After=str(seconds))
            return True
        return False

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        name, _, commit = path.partition("/revision/")
        if self._failed("api") or not self._may(name):
            return
        if commit not in ("", "main", self.hub.commits[name]):
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        listed = [sibling(*item) for item in self.hub.repositories[name].items()]
        if "blobs" not in query:
            listed = [{"rfilename": found["rfilename"]} for found in listed]
        info = {"id": name.removeprefix("datasets/"), "sha": self.hub.commits[name]}
        self._answer(200, json.dumps(info | {"siblings": listed}).encode())

    def _resolve(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        commit, _, file = rest.partition("/")
        if self._failed(file) or not self._may(name):
            return
        content = self.hub.repositories[name].get(file)
        if content is None or commit != self.hub.commits[name]:
            code = "EntryNotFound" if content is None else "RevisionNotFound"
            self._refuse(404, code)
            return
        found = sibling(file, content)
        if _lfs(file):  # another origin, to which no token may go
            place = f"{self.hub.address.replace('127.0.0.1', 'localhost')}/cdn/{name}/{file}"
            etag = f'"{found["lfs"]["sha256"]}"'
            self._answer(302, Location=f"{place}?Signature=s3cret", X_Linked_Etag=etag)
        else:
            self._send(file, content, ETag=f'"{found["blobId"]}"', X_Repo_Commit=commit)

    def _cdn(self, path: str, query: str) -> None:
        if self.headers.get("Authorization") or query != "Signature=s3cret":
            self._answer(400 if query else 403, b"<Error>one way of authentication</Error>")
            return
        name = next(n for n in self.hub.repositories if path.startswith(f"{n}/"))
        file = path.removeprefix(f"{name}/")
        self._send(file, self.hub.repositories[name][file])

    def _send(self, file: str, content: bytes, **headers: str) -> None:
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if first >= len(content) > 0:
            self._answer(416, Content_Range=f"bytes */{len(content)}")
            return
        rest = content[first:]
        faults = self.hub.faults[file]
        what, at = faults.pop(0) if faults else ("", 0)
        if what == "wrong":
            rest = rest[:at] + bytes([rest[at] ^ 1]) + rest[at + 1 :]
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if what != "short":
            self.send_header("Content-Length", str(len(rest)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if what in ("drop", "reset", "short", "stall"):
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(rest[:at])
            self.wfile.flush()
            if what == "reset":  # the end is RST, not FIN
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.shutdown(socket.SHUT_RD)
                self.connection.close()
            if what == "stall":
                self.hub.going_on.wait()
            self.close_connection = True
            return
        self.end_headers()
        self.wfile.write(rest)


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.going_on.set()
        server.shutdown()
        server.server_close()


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does to a process that begins."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
