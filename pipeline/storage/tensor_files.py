"""Folders of weights as JSON and safetensors: nothing in them can run code."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline import regular
from pipeline.errors import InputError, cut, quoted, some

HEADER_BYTES = 1 << 24  # parsed whole: GPT-2 XL's has 50,000
MOST_PROBLEMS = 8  # named at once
LONGEST = 600  # characters of one


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: `model.safetensors`, or the shards its index names.

    Raises InputError for a missing, damaged or ambiguous file, and for a folder of pickles,
    which are never opened.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_file(single)
    if not index.exists():
        raise InputError(
            f"{folder}: expected model.safetensors or model.safetensors.index.json "
            "(safetensors only: .bin, .pt and .ckpt files can run code and are never opened)"
        )
    return _read_shards(folder, index)


def write_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """A safetensors file, written from the tensors' own memory; raises OSError as files do.

    They have to be contiguous; those that are not on the CPU are copied there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata=metadata or None)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)  # safetensors makes its file readable by the owner only


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places = regular.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: expected a weight_map from tensor to file")
    tensors: dict[str, Tensor] = {}
    problems = []
    for name in sorted({str(place) for place in places.values()}):
        try:
            tensors |= _read_shard(folder, index, name, places)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(shortened(problems))
    return tensors


def shortened(problems: list[str]) -> str:
    """A line for each problem, up to MOST_PROBLEMS."""
    problems = [cut(problem, LONGEST) for problem in problems]
    more = len(problems) - MOST_PROBLEMS
    rest = [f"and {more} more"] if more > 0 else []
    return "\n  ".join(problems[:MOST_PROBLEMS] + rest)


def _read_shard(folder: Path, index: Path, name: str, places: dict[str, Any]) -> dict[str, Tensor]:
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", name)
    if not plain or not os.path.isfile(folder / name):  # False for a name that is too long
        raise InputError(f"{index}: expected a file of this folder, got {quoted(name)}")
    shard = read_file(folder / name)
    listed = {tensor for tensor, place in places.items() if place == name}
    if shard.keys() != listed:
        odd = some(sorted(shard.keys() ^ listed))
        raise InputError(f"{folder / name}: differs from {index.name} in {odd}")
    return shard


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory; raises InputError for one that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        _refuse_duplicates(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {cut(str(error))}") from None


def _refuse_duplicates(path: Path) -> None:
    """safetensors keeps the last of two entries of the same name; which one was meant?"""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held: dict[str, Any] = {}
        for name, content in pairs:
            if name in held:
                raise InputError(f"{path}: {cut(name)}: twice in the header")
            held[name] = content
        return held

    with regular.opened(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > HEADER_BYTES:
            raise InputError(f"{path}: header of {size:,} bytes; expected at most {HEADER_BYTES:,}")
        if size <= path.stat().st_size - 8:  # else safetensors itself says what is wrong
            json.loads(file.read(size), object_pairs_hook=unique)
