"""Several processes of one test, as forks of it that meet by gloo: cheaper than new ones."""

from __future__ import annotations

import datetime
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.compute import ranks as places
from pipeline.compute.ranks import Ranks

GRACE = 60  # seconds beyond the time that a sum may take
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks of a test need fork")


def together(
    world: int, work: Callable[[Ranks], Any], minutes: float = 1.0, **how: bool
) -> list[Any]:
    """What `work` returns in each rank, as JSON has it, and tensors. Fails where one raises."""
    with tempfile.TemporaryDirectory() as folder:
        each = [Ranks(rank, world, **how) for rank in range(world)]
        children = [_fork(Path(folder), ranks, work, minutes) for ranks in each]
        deadline = time.monotonic() + 60 * minutes + GRACE
        codes = [_ended(child, deadline) for child in children]
        said = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        assert codes == [0] * world, "\n".join([str(codes), *said])
        texts = [(Path(folder) / f"{rank}.json").read_text() for rank in range(world)]
        return [json.loads(text, object_hook=_tensor) for text in texts]


def _ended(child: int, deadline: float) -> int:
    """Its exit code; that of SIGKILL where it had not ended by then."""
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def _plain(x: torch.Tensor) -> dict[str, Any]:
    return {"numbers": x.tolist(), "dtype": str(x.dtype).removeprefix("torch.")}


def _tensor(found: dict[str, Any]) -> Any:
    if found.keys() != {"numbers", "dtype"}:
        return found
    return torch.tensor(found["numbers"], dtype=getattr(torch, found["dtype"]))


def _fork(folder: Path, ranks: Ranks, work: Callable[[Ranks], Any], minutes: float) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        store = dist.FileStore(str(folder / "store"), ranks.world)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=datetime.timedelta(minutes=minutes),
        )
        places.join(ranks)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(work(ranks), default=_plain))
        dist.barrier()  # so that nobody's end breaks another's last sum
        code = 0
    except BaseException:
        (folder / f"{ranks.rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)
