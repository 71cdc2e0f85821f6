"""A page in headless Chromium: how long it takes until it shows what it is to show."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync")
# Begun with the page: how long its one thread has been busy without a break, at most.
OBSERVE = """
window.longest = 0;
new PerformanceObserver(list => list.getEntries().forEach(
    task => { window.longest = Math.max(window.longest, task.duration); }
)).observe({type: "longtask"});
"""
RESOURCES = """performance.getEntriesByType("resource")
    .filter(one => one.name.includes("ajax-api")).map(one => one.encodedBodySize)"""


@dataclass(frozen=True)
class Visit:
    """What a page took until `shown` was true, by the clock."""

    seconds: float
    blocked: float  # seconds of the longest time in which the page could not answer
    requests: int  # for data
    mib: float  # of these answers
    heap: float  # MiB of the page's objects


def browser() -> str:
    """The command of a Chromium; raises SystemExit where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or exit(f"no browser here: none of {', '.join(NAMES)}")


def visit(address: str, shown: str, limit: float = 300, picture: Path | None = None) -> Visit:
    """Open the page in a browser of its own until the expression `shown` is true in it.

    Raises TimeoutError after `limit` seconds.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [browser(), *SWITCHES, "--window-size=1920,2400", "--remote-debugging-port=0"]
        process = subprocess.Popen(
            [*words, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return asyncio.run(_visit(Path(profile), address, shown, limit, picture))
        finally:
            process.terminate()
            process.wait(30)


async def _visit(
    profile: Path, address: str, shown: str, limit: float, picture: Path | None
) -> Visit:
    port = await _port(profile / "DevToolsActivePort")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            found = [one for one in await answer.json() if one["type"] == "page"]
        async with session.ws_connect(found[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = _Page(socket)
            await page.ask("Page.enable")
            await page.ask("Page.addScriptToEvaluateOnNewDocument", source=OBSERVE)
            began = time.perf_counter()
            await page.ask("Page.navigate", url=address)
            while not await page.value(shown):
                if time.perf_counter() - began > limit:
                    raise TimeoutError(f"{address} did not show it within {limit:g} s")
                await asyncio.sleep(0.05)
            took = time.perf_counter() - began
            sizes = await page.value(RESOURCES)
            heap = await page.value("performance.memory.usedJSHeapSize")
            blocked = await page.value("window.longest")
            if picture:
                await page.picture(picture)
    return Visit(took, blocked / 1000, len(sizes), sum(sizes) / 2**20, heap / 2**20)


async def _port(path: Path) -> int:
    for _ in range(600):
        if path.exists() and (text := path.read_text()):
            return int(text.split("\n")[0])
        await asyncio.sleep(0.1)
    raise TimeoutError("the browser did not start")


class _Page:
    """One page, by the protocol of the browser's developer tools."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0

    async def ask(self, method: str, **words: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": words})
        while (answer := await self._socket.receive_json()).get("id") != self._number:
            pass  # an event
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]  # type: ignore[no-any-return]

    async def value(self, expression: str) -> Any:
        found = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    async def picture(self, path: Path) -> None:
        shot = await self.ask("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))
