"""The processes of a training from their start to their end, and who tells of a failure."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from pipeline.compute import ranks as places
from pipeline.compute.determinism import deterministic
from pipeline.compute.ranks import LEAVE, START, Ranks
from pipeline.compute.runtime import choose_device
from pipeline.distributed.follow import follow
from pipeline.errors import ConfigError, PeerError, UserError, exit_code, reason
from pipeline.process import is_alive, this_process
from pipeline.resume import run_folder
from pipeline.resume.checkpoints import Checkpoint, machine

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.records.record_file import Record
    from pipeline.training.training_step import TrainState

GRACE_SECONDS = 5.0  # for the process that failed to say so, before the others say it is silent

log = logging.getLogger(__name__)

_board: Board | None = None  # of a process that is one of several


def run(
    config: Config,
    ranks: Ranks,
    local: int,
    work: Callable[[], None],
    others: Callable[[Config], None] | None = None,
) -> None:
    """The part of one of several processes: the first does `work`, the others what it tells them.

    That is a training's, if not `others`, who listen to the first one until it has them leave.
    `local` is this process's number on its machine, and that of its GPU there. One that fails says
    so to all, and the first one says it to the user. Raises PeerError in the others, or leaves
    with the exit code of the one that failed.
    """
    backend = prepare(config, local)
    board = Board(ranks, config.distributed.timeout)
    signal.signal(signal.SIGTERM, board.on_signal)
    try:
        board.open(backend)
        places.join(ranks)
        if ranks.rank:
            logging.getLogger().setLevel(logging.ERROR)  # the first one warns
            if others:
                others(config)
            else:
                with deterministic(config.train.deterministic, choose_device(config.device)):
                    follow(config, board.tell_facts)
        else:
            work()
            leave(ranks)
    except (SystemExit, KeyboardInterrupt) as error:
        if ranks.asked:  # all have agreed on it, and the others wait for an order
            leave(ranks, max(0, exit_code(error) - 128))
        else:  # they may wait in a sum, where no order is heard: the end of this one ends them
            board.end(exit_code(error))
        raise
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in `telling`
        found = board.settle(error)
        if found is error:
            get_error_handler().record_exception(error)  # in the file where torchrun looks for it
        if ranks.rank and isinstance(found, UserError):
            if not board.first:
                sys.exit(exit_code(found))
            found = PeerError(f"{board.name(ranks.rank)}: {found}", exit_code(found))
        if found is error:
            raise
        raise found from None
    dist.destroy_process_group()


def leave(ranks: Ranks, number: int = 0) -> None:
    """The first process tells the others that it ends, by a signal of that number if any."""
    with contextlib.suppress(PeerError):  # they may have ended already
        ranks.lead(LEAVE, number)


def prepare(config: Config, local: int) -> str:
    """Take this process's GPU, and name what tensors travel by; raises ConfigError without one."""
    if choose_device(config.device).type != "cuda":
        return "gloo"
    if local >= (count := torch.cuda.device_count()):
        raise ConfigError(f"process {local} of this machine: it has {count} GPUs, one a process")
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"


def begin(
    state: TrainState, identity: dict[str, Any], newest: Checkpoint | None, record: Record
) -> list[str]:
    """The first process begins a training with the others; lines to print, none if it is alone.

    Raises ConfigError where one of them has other settings, inputs or code.
    """
    if not _board:
        return []
    everyone = _board.facts(state, identity)
    for rank, facts in enumerate(everyone):
        if changed := run_folder.differences(facts["identity"], everyone[0]["identity"]):
            raise ConfigError(f"{_board.name(rank)} would train another model: {changed[0]}")
        how, first = (found["machine"]["processes"] for found in (facts, everyone[0]))
        if how != first:
            raise ConfigError(f"{_board.name(rank)} would train as {how}, the first as {first}")
        if facts["machine"] != everyone[0]["machine"]:
            log.warning("%s computes otherwise: %s", _board.name(rank), facts["machine"])
    counted = Counter(f"{facts['machine']['device']} on {facts['host']}" for facts in everyone)
    devices = ", ".join(f"{count} x {device}" for device, count in counted.items())
    world, params = state.ranks.world, identity["params"]
    sizes = params["train.batch_size"], params["train.accumulate"]
    each, count = state.ranks.share(*sizes)
    strategy = "fsdp" if state.ranks.sharded else "ddp"
    tags = {"processes": world, "devices": devices, "strategy": strategy}
    record.tags({f"distributed.{name}": value for name, value in tags.items()})
    state.ranks.lead(START, newest.step if newest else -1)
    return [
        f"{world} processes ({devices}); a step has train.batch_size={sizes[0]} times "
        f"train.accumulate={sizes[1]} sequences, of which each makes {count} times {each}"
    ]


@contextlib.contextmanager
def telling(where: Callable[[], str]) -> Iterator[None]:
    """Inside, an error that another process caused becomes what that one failed of, and `where`."""
    try:
        yield
    except Exception as error:
        if not _board:
            raise
        # The launcher ends all where one has failed; this one is at it, and says why first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        found = _board.settle(error, where())
        if found is error:
            raise
        raise found from None


class Board:
    """Where the processes leave word for one another, though their connections may be gone."""

    def __init__(self, ranks: Ranks, minutes: float):
        self.ranks, self.minutes = ranks, minutes
        self.first = False  # whether this process was the first to tell of a failure
        self._store: Any = None

    def open(self, backend: str) -> None:
        """Meet the others. Raises PeerError where they do not come."""
        global _board
        rank, world = self.ranks.rank, self.ranks.world
        within = datetime.timedelta(minutes=self.minutes)
        try:
            store, *_ = next(rendezvous("env://", rank, world, timeout=within))
            self._store, _board = dist.PrefixStore("pipeline", store), self
            self._put(f"here/{rank}", {"host": socket.gethostname(), "process": this_process()})
            everyone = [f"here/{other}" for other in range(world)]
            self._wait(everyone)
            hosts = [self._get(key)["host"] for key in everyone]
            self.ranks.beside = hosts.count(socket.gethostname())
            group = dist.PrefixStore("group", store)
            dist.init_process_group(
                backend, store=group, rank=rank, world_size=world, timeout=within
            )
        except (RuntimeError, ValueError) as error:
            raise PeerError(f"rank {rank} of {world} does not meet the others: {error}") from error

    def tell_facts(self, state: TrainState, identity: dict[str, Any]) -> None:
        facts = {"identity": identity, "machine": machine(state), "host": socket.gethostname()}
        self._put(f"facts/{self.ranks.rank}", facts)

    def facts(self, state: TrainState, identity: dict[str, Any]) -> list[Any]:
        """What each process is about to train, and on what."""
        self.tell_facts(state, identity)
        keys = [f"facts/{rank}" for rank in range(self.ranks.world)]
        self._wait(keys)
        return [self._get(key) for key in keys]

    def name(self, rank: int) -> str:
        known = self._store and self._has(f"here/{rank}")
        here = self._get(f"here/{rank}") if known else None
        where = f" ({here['host']}, process {here['process'].partition('-')[0]})" if here else ""
        return f"rank {rank} of {self.ranks.world}{where}"

    def settle(self, error: Exception, where: str = "") -> Exception:
        """What `_settle` finds; a machine that is cut off waits for no answer that cannot come."""
        found: list[Exception] = []
        asking = threading.Thread(
            target=lambda: found.append(self._settle(error, where)), daemon=True
        )
        asking.start()
        asking.join(2 * GRACE_SECONDS)
        if found:
            return found[0]
        self._store, self.first = None, True
        cut_off = f"{where}rank 0 of {self.ranks.world} is out of reach"
        return PeerError(cut_off) if isinstance(error, PeerError) else error

    def _settle(self, error: Exception, where: str) -> Exception:
        """Of an error in this process, the one to end with: its own, or what caused it elsewhere.

        The first to come here with an error of its own tells the others.
        """
        if not self._store:
            return error
        try:
            if not places.lost(error):
                why = reason(error).removeprefix("error: ")
                self._blame(f"{self.name(self.ranks.rank)}: {why}", exit_code(error))
                return error
            self._put(f"lost/{self.ranks.rank}", True)
            until = time.monotonic() + GRACE_SECONDS
            while not self._has("failed") and time.monotonic() < until:
                time.sleep(0.05)
            if not self._has("failed"):
                self._blame_the_silent(error, where)
            failed = self._get("failed")
            return PeerError(failed["words"], failed["code"])
        except RuntimeError:  # it lay with the first process, where no launcher holds it
            self._store, self.first = None, True
            return PeerError(f"{where}rank 0 of {self.ranks.world} is gone")

    def on_signal(self, number: int, _: object) -> None:
        """The launcher ends all processes where one has failed: that is no wish of the user's."""
        if self._store and self._has("failed"):
            raise PeerError("another process has failed")
        sys.exit(128 + number)

    def end(self, code: int) -> None:
        """A signal ends this process: the others end with its exit code."""
        with contextlib.suppress(RuntimeError):
            if self._store:
                self._blame(f"{self.name(self.ranks.rank)} was ended by a signal", code)

    def _blame_the_silent(self, error: Exception, where: str) -> None:
        others = [r for r in range(self.ranks.world) if not self._has(f"lost/{r}")]
        if not others:
            return self._blame(f"{where}the processes lost one another: {error}")
        here = self._get(f"here/{others[0]}")
        gone = here["host"] == socket.gethostname() and not is_alive(here["process"])
        said = "ended without a word" if gone else f"gave no answer (within {self.minutes:g} min)"
        return self._blame(f"{where}{self.name(others[0])} {said}")

    def _blame(self, words: str, code: int = 1) -> None:
        told = json.dumps({"words": words, "code": code})
        kept = self._store.compare_set("failed", "", told).decode()
        self.first = self.first or kept == told

    def _wait(self, keys: Sequence[str]) -> None:
        until = time.monotonic() + 60 * self.minutes
        while not all(map(self._has, keys)):
            if self._has("failed") or time.monotonic() > until:
                raise PeerError("another process does not come")
            time.sleep(0.05)

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key))
