"""Settings that name files: what DVC can watch, and whether published weights have these sizes."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from pipeline import regular
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.config import Config

# n_layer, n_head, n_embd, block_size by hub id, which the hub takes without its owner, too.
PUBLISHED = {
    "distilbert/distilgpt2": (6, 12, 768, 1024),
    "openai-community/gpt2": (12, 12, 768, 1024),
    "openai-community/gpt2-medium": (24, 16, 1024, 1024),
    "openai-community/gpt2-large": (36, 20, 1280, 1024),
    "openai-community/gpt2-xl": (48, 25, 1600, 1024),
}
SIZES = ("n_layer", "n_head", "n_embd", "block_size")


def problems(config: Config) -> list[str]:
    """One line for each setting that names what DVC cannot find or would not watch.

    And one for each size that differs from the weights to import, where it is known offline.
    """
    names = {
        "corpus.path": config.corpus.path,
        "init.hf_model": config.init.hf_model,
        "init.hf_watch": config.init.hf_watch,
        "evaluate.hellaswag": config.evaluate.hellaswag,
    }
    found = [said for name, value in names.items() if (said := _unfindable(name, value))]
    pattern = PureWindowsPath(config.corpus.pattern)  # it knows both separators, and drives
    if pattern.anchor or ".." in pattern.parts:
        found.append(f"corpus.pattern={config.corpus.pattern}: expected a glob inside corpus.path")
    if any("**" in part and part != "**" for part in pattern.parts):
        found.append(
            f"corpus.pattern={config.corpus.pattern}: expected ** alone between slashes, "
            "as in **/*.txt"
        )
    init = config.init
    if init.source == "hf":
        if os.path.isdir(init.hf_model) and init.hf_watch != init.hf_model:
            found.append(
                f"init.hf_watch={init.hf_watch}: expected {init.hf_model}, as in init.hf_model, "
                "so that DVC notices an edit in that folder"
            )
        found += _sizes(config)
    return found


def _unfindable(name: str, value: str) -> str:
    """DVC takes a path by the letter: `~`, `*`, `?` and `[` too, which a name may really have."""
    if os.path.lexists(value):
        return ""
    whole = os.path.expanduser(value)
    if glob.has_magic(value):
        plain = Path(*takewhile(lambda part: not glob.has_magic(part), Path(whole).parts))
        there = f"{name}={value}: no such file or folder, and DVC takes no glob here"
        if name != "corpus.path":
            return f"{there}; name the one that is meant"
        pattern = Path(whole).relative_to(plain).as_posix()
        return f"{there}; say corpus.path={plain} and corpus.pattern={pattern}"
    if value.startswith("~"):
        way = f"say {whole}" if whole != value else "say the whole path"
        return f"{name}={value}: DVC does not know what ~ stands for; {way}"
    return ""


def _sizes(config: Config) -> Iterator[str]:
    model, name = config.model, config.init.hf_model
    for key, size in published_sizes(name).items():
        if getattr(model, key) != size:
            yield f"model.{key}={getattr(model, key)}: expected {size}, as {name} has"


def published_sizes(name: str) -> dict[str, int]:
    """Sizes of the weights that init.hf_model names, by the names of `model`.

    Out of a local folder's config.json, or known by the hub id; {} where neither tells. What is
    wrong with a config.json is said where the weights are imported.
    """
    if not os.path.isdir(name):
        known = [PUBLISHED[key] for key in PUBLISHED if name in (key, key.rpartition("/")[2])]
        return dict(zip(SIZES, known[0], strict=True)) if known else {}
    try:
        content: Any = regular.read_json(Path(name, "config.json"))
        found = {key: content["n_positions" if key == "block_size" else key] for key in SIZES}
    except (InputError, OSError, LookupError, TypeError):
        return {}
    return found if all(type(size) is int for size in found.values()) else {}
