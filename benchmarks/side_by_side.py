"""Contestants side by side: turns in alternation, answers compared before a time counts.

Each contestant lives in a process of its own, so that none changes another's allocator, threads
or memory, and only the one whose turn it is does anything. The benchmark can lose: whatever it
finds is what the tables show.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

LOOK_EVERY = 0.01  # seconds between looks at the memory, in turns that are not timed
ANSWERED, BROKEN = "answered", "broken"

Turn = Callable[[], Any]  # does the work once; what it returns is the answer


class Verdict(NamedTuple):
    """Why no time of a contestant counts, or "" where it does; and what else to say of it."""

    refused: str = ""
    remark: str = ""


Agree = Callable[[list[Any], list[Any]], Verdict]  # (own answers, those of the reference)


@dataclass(frozen=True)
class Contestant:
    """A name and a callable: `start` prepares, in the contestant's process, and gives a turn."""

    name: str
    start: Callable[[], Turn]  # sent to another process: a function of a module, or a partial
    version: str = ""
    missing: str = ""  # why it cannot take part here


@dataclass
class Result:
    """What came of a contestant: seconds of every timed turn, or why there are none."""

    name: str
    version: str
    seconds: list[float] = field(default_factory=list)
    memory_mib: float | None = None  # the most that it and its processes held, shared pages once
    refused: str = ""
    remark: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def speed(self, base: Result) -> tuple[float, float, float] | None:
        """(median, least, most) of `base`'s seconds by ours, the extremes round by round."""
        if not self.seconds or not base.seconds:
            return None
        ratios = [theirs / own for own, theirs in zip(self.seconds, base.seconds, strict=True)]
        return base.median / self.median, min(ratios), max(ratios)


def measure(
    contestants: Sequence[Contestant],
    agree: Agree,
    reference: str,
    rounds: int,
    warm_up: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Results in the contestants' order.

    After `warm_up` turns, which are not timed, the answers are compared with those of the
    contestant named `reference`; who disagrees is refused. Then `rounds` times one turn each, in
    an order that turns around from round to round. Memory is that of a contestant's processes as
    looked at during the turns that are not timed, or the most that its own process ever held, as
    far as the system notes that: a step's peak lasts for milliseconds, and not every step has it.
    Raises ValueError where the reference itself gives no answer.
    """
    results = {c.name: Result(c.name, c.version, refused=c.missing) for c in contestants}
    with ExitStack() as stack:
        running, answers = {}, {}
        for contestant in (c for c in contestants if not c.missing):
            tell(f"{contestant.name}: first turns")
            result = results[contestant.name]
            with _refusing(result):
                process = stack.enter_context(_Process(contestant))
                answers[contestant.name] = _warm_up(process, result, warm_up)
                running[contestant.name] = process
        if reference not in running:
            raise ValueError(f"{reference} gives the answers: {results[reference].refused}")
        for name in list(running):
            result = results[name]
            result.refused, result.remark = agree(answers[name], answers[reference])
            if result.refused:
                running.pop(name).end()
        _take_turns(running, results, rounds, tell)
        # Of all while all are there: what they share counts for each of them alike.
        for name, process in running.items():
            results[name].memory_mib = max(results[name].memory_mib or 0, process.peak_mib())
    return list(results.values())


def in_a_fresh_process(work: Callable[..., Any], *given: Any) -> Any:
    """What `work(*given)` returns, with imports and memory of its own, which end with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def _warm_up(process: _Process, result: Result, turns: int) -> list[Any]:
    answers = []
    for _ in range(turns):
        _, answer, mib = process.turn(watch=True)
        result.memory_mib = max(mib, result.memory_mib or 0)
        answers.append(answer)
    return answers


def _take_turns(
    running: dict[str, _Process],
    results: dict[str, Result],
    rounds: int,
    tell: Callable[[str], None],
) -> None:
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for name in list(running)[:: 1 - 2 * (number % 2)]:
            with _refusing(results[name]):
                results[name].seconds.append(running[name].turn()[0])
            if results[name].refused:  # it broke: half a measurement counts for nothing
                results[name].seconds.clear()
                del running[name]


class _Broken(Exception):
    """A contestant's own failure, in words."""


@contextmanager
def _refusing(result: Result) -> Iterator[None]:
    try:
        yield
    except _Broken as error:
        result.refused = str(error)


class _Process:
    """A contestant at the other end of a pipe, asleep but for its turns."""

    def __init__(self, contestant: Contestant) -> None:
        # Spawned on every platform: a fork would share what the parent has set and loaded.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, contestant.start))
        self.process.start()
        other.close()

    def __enter__(self) -> _Process:
        try:
            self._reply()  # it is ready
            with suppress(OSError):  # Linux: its peak counts from now on
                Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", "ascii")
        except _Broken:
            self.end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        self.connection.close()  # which is the other end's word to leave
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def turn(self, watch: bool = False) -> tuple[float, Any, float]:
        """(seconds, answer, the most memory in MiB that a watched turn was seen to hold)."""
        mib = 0.0
        try:
            self.connection.send("turn")
        except OSError:
            raise _Broken(self._death()) from None
        while watch and not self.connection.poll(LOOK_EVERY):
            mib = max(mib, _held_mib(self.process.pid))
        seconds, answer = self._reply()
        return seconds, answer, mib

    def peak_mib(self) -> float:
        """The most that the process itself has held in its turns; 0 where no system notes it."""
        with suppress(OSError, psutil.Error):
            lines = Path(f"/proc/{self.process.pid}/status").read_text("ascii").splitlines()
            (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
            facts = psutil.Process(self.process.pid).memory_full_info()
            return peak / 2**10 - (facts.rss - facts.pss) / 2**20  # shared pages once
        return 0.0

    def _reply(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise _Broken(self._death()) from None
        if kind == BROKEN:
            raise _Broken(value)
        return value

    def _death(self) -> str:
        self.process.join()
        return f"its process ended with exit code {self.process.exitcode}"


def _serve(connection: Connection, start: Callable[[], Turn]) -> None:
    """The contestant's side: one turn for each word, until the pipe closes."""
    try:
        turn, reply = start(), None
        gc.collect()
        while True:
            connection.send((ANSWERED, reply))
            connection.recv()
            began = time.perf_counter()
            answer = turn()
            reply = (time.perf_counter() - began, answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:  # a peer may raise anything: it is told in the table
        connection.send((BROKEN, f"{type(error).__name__}: {error}".splitlines()[0]))


def _held_mib(pid: int | None) -> float:
    """Memory of a process and all below it; a page that several hold counts once, where known."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            facts = process.memory_full_info()
            total += getattr(facts, "pss", facts.uss)
    except psutil.Error:  # one ended meanwhile; the next look finds the others
        return 0.0
    return total / 2**20
