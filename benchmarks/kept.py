"""Results that are kept as soon as they are measured, so that the next call goes on with the rest.

One JSON file has them by what was measured: card, versions, a digest of the code, settings. Where
any of these differs nothing of it counts, and the results of before stay under their own key.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.compute.runtime import device_name
from pipeline.records.provenance import code_of
from pipeline.storage.digests import digest_of

ROOT = Path(__file__).resolve().parent.parent


class Kept:
    """Results by name. `path` None keeps them in memory; `minutes` 0 has no limit."""

    def __init__(self, path: Path | None, facts: Mapping[str, Any], minutes: float = 0.0) -> None:
        self.missing: list[str] = []  # what there was no time for
        self._path = path
        self._all = json.loads(path.read_text("utf-8")) if path and path.is_file() else {}
        self._results = self._all.setdefault(digest_of(facts)[:12], {**facts, "results": {}})[
            "results"
        ]
        self._end = time.monotonic() + 60 * minutes if minutes else math.inf

    def get(self, name: str, seconds: float, measure: Callable[[], Any]) -> Any | None:
        """What is kept under `name`, else what `measure` gives: plain values, kept at once.

        None, and one more in `missing`, if it would not end in time: it takes some `seconds`.
        """
        if name not in self._results:
            if time.monotonic() + seconds > self._end:
                self.missing.append(name)
                return None
            self._results[name] = measure()
            self._write()
        return self._results[name]

    def _write(self) -> None:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_name(f"{self._path.name}.part")
            part.write_text(json.dumps(self._all, indent=1) + "\n", "utf-8", newline="\n")
            os.replace(part, self._path)


def facts_of(device: torch.device, stage: str = "train", **settings: Any) -> dict[str, Any]:
    """Card, torch, settings, and a digest of the files that decide what `stage` computes."""
    with contextlib.chdir(ROOT):  # where dvc.yaml is
        code = digest_of(code_of(stage))[:12]
    return {"card": device_name(device), "torch": torch.__version__, "code": code, **settings}
