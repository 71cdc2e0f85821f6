"""The ways a run ends that are not bugs, each with the exit code of the stage that meets it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MESSAGE = 8000  # characters of an error: all settings of a params file may be missing
VALUE = 200  # of a value in it
NAMES = 5  # of a list in it
PROBLEMS = 8  # of an input, named at once


class UserError(ValueError):
    """Something the user can mend; shown as one message of bounded length, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return cut(super().__str__(), MESSAGE)


class ConfigError(UserError):
    """A setting is unknown, missing, of the wrong type or out of range."""

    exit_code = 2


class InputError(UserError):
    """A corpus, token file or model directory cannot be used as it is."""

    exit_code = 3


class NumericsError(UserError):
    """The computation left the finite numbers."""

    exit_code = 4


class StorageError(UserError):
    """The disk or the memory does not suffice, or MLflow's store cannot be used as it is."""

    exit_code = 5


class BusyError(UserError):
    """Another process trains this very configuration, and this one was asked not to wait."""

    exit_code = 6


class ResumeError(UserError):
    """A checkpoint to go on from was asked for, and none fits these settings, data and code."""

    exit_code = 7


class ChangedError(UserError):
    """A setting or a file that decides the result was edited while the stage was at work."""

    exit_code = 8


class PeerError(UserError):
    """Another process of this training has failed; `code` is its exit code, where it had one."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.exit_code = code


def cut(text: str, most: int = VALUE) -> str:
    """The beginning of a text that may be of any length."""
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]}... and {more:,} more characters"


def quoted(found: object) -> str:
    """A value in an error, as Python writes it."""
    try:
        return cut(repr(found))
    except (ValueError, RecursionError):  # a number of too many digits, lists too deep
        return f"a value of type {type(found).__name__}, too large to show"


def some(names: Iterable[str]) -> str:
    """The first few names of a list that may be of any length."""
    names = list(names)
    more = [f"and {len(names) - NAMES:,} more"] if len(names) > NAMES else []
    return ", ".join([*map(cut, names[:NAMES]), *more])


def exit_code(error: BaseException) -> int:
    """What a stage that ends with this error says to the shell; 1 is a bug."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if undetermined(error):
        return ConfigError.exit_code
    return StorageError.exit_code if out_of_memory(error) or disk_full(error) else 1


def to_user(error: BaseException) -> str:
    """The message of an error that is no bug; "" for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, UserError):
        return f"error: {error}"
    if disk_full(error):
        return f"error: {error}; make room, and say the same again"
    if out_of_memory(error):
        return (
            f"error: out of memory ({str(error).partition('. ')[0]}); halve train.batch_size and "
            "double train.accumulate, set train.checkpoint_activations=true, or lower "
            "evaluate.batch_size"
        )
    if undetermined(error):
        return (
            f"error: train.deterministic=true: {str(error).partition('. ')[0]}; "
            "train.deterministic=false does without"
        )
    return ""


def reason(error: BaseException) -> str:
    """Why work ended: what the user is told, or the last line of a bug's traceback."""
    return to_user(error) or f"{type(error).__name__}: {error}"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a GPU (told without importing torch)."""
    words = str(error).lower()
    known = ("out of memory", "can't allocate memory", "not enough memory")
    told = isinstance(error, RuntimeError) and any(part in words for part in known)
    return isinstance(error, MemoryError) or told


def undetermined(error: BaseException) -> bool:
    """Whether torch refused an operation for want of a deterministic form."""
    known = ("does not have a deterministic implementation", "Deterministic behavior was enabled")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in known)


def together(*inputs: Callable[[], Any]) -> list[Any]:
    """What each call gives, all of them called before any work; the same message counts once.

    Where some raise UserErrors, one of the first one's kind is raised with what all of them say.
    """
    given, refused = [], []
    for call in inputs:
        try:
            given.append(call())
        except UserError as error:
            refused.append(error)
    if refused:
        raise type(refused[0])("\n  ".join(dict.fromkeys(map(str, refused))))
    return given


Refuse = Callable[[InputError], None]  # takes what is wrong with a file, line or row


class _Enough(Exception):
    """As many problems as a person reads."""


@contextmanager
def collecting() -> Iterator[Refuse]:
    """Yields a function that takes errors; raises one InputError for all of them in the end.

    After PROBLEMS of them what happens inside is cut short.
    """
    problems: list[str] = []

    def refuse(error: InputError) -> None:
        problems.append(str(error))
        if len(problems) == PROBLEMS:
            raise _Enough

    try:
        yield refuse
    except _Enough:
        problems.append("and perhaps more: the rest has not been read")
    if problems:
        raise InputError("\n  ".join(problems))


@contextmanager
def refusing(refuse: Refuse, path: Path) -> Iterator[None]:
    """What is wrong with a file, or a part of it, goes to `refuse`."""
    try:
        yield
    except InputError as error:
        refuse(error)
    except OSError as error:
        refuse(InputError(f"{path}: cannot be read: {error.strerror or error}"))


def disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of space, or of the right to take more."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full
