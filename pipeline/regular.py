"""Files from elsewhere: regular ones alone, and no more of one than its kind can need.

In the place of a model's config.json there may be a link to /dev/zero, a pipe that nobody writes
into, or a file without an end.
"""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, cut

FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # the second on Windows alone
JSON_BYTES = 1 << 20  # a config has a thousand bytes, the index of GPT-2 XL's shards 40,000
SNAPSHOT_BYTES = 1 << 26  # the facts of an optimizer's state grow with its tensors


def opened(path: Path) -> BufferedReader:
    """A regular file, opened to read; raises InputError for any other, and OSError as files do.

    Without waiting: a pipe would have it wait for somebody who writes.
    """
    descriptor = os.open(path, os.O_RDONLY | FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: cannot be read: expected a regular file")
    return open(descriptor, "rb")


def check(path: Path) -> None:
    """Raises as `opened` does: for a file that a library will open by its name."""
    opened(path).close()


def read(path: Path, limit: int = JSON_BYTES) -> bytes:
    """A file's content; raises InputError for more than `limit` bytes, and as `opened` does."""
    with opened(path) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            size = os.fstat(file.fileno()).st_size
            raise InputError(f"{path}: {size:,} bytes; expected at most {limit:,}")
    return content


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object; raises InputError with the file's name, whatever is wrong with it."""
    try:
        content = json.loads(read(path, limit).decode("utf-8"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {cut(str(error))}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
