"""GPT-2 as published: its vocabulary and targets, and the sizes of its models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import regular
from pipeline.errors import InputError

VOCAB_SIZE = 50257  # byte-pair tokens and end-of-text
EOT = VOCAB_SIZE - 1
IGNORE = -100  # a target that counts for nothing, as in torch.nn.functional.cross_entropy

# n_layer, n_head, n_embd, block_size by hub id, which the hub takes without its owner, too.
MODELS = {
    "distilbert/distilgpt2": (6, 12, 768, 1024),
    "openai-community/gpt2": (12, 12, 768, 1024),
    "openai-community/gpt2-medium": (24, 16, 1024, 1024),
    "openai-community/gpt2-large": (36, 20, 1280, 1024),
    "openai-community/gpt2-xl": (48, 25, 1600, 1024),
}
SIZES = ("n_layer", "n_head", "n_embd", "block_size")


def sizes_of(name: str) -> dict[str, int]:
    """Sizes of the weights that init.hf_model names, by the names of `model`'s settings.

    They come from a local folder's config.json, or are known by the hub id; {} where neither tells.
    The import says what is wrong with a config.json.
    """
    if not os.path.isdir(name):
        known = [MODELS[key] for key in MODELS if name in (key, key.rpartition("/")[2])]
        return dict(zip(SIZES, known[0], strict=True)) if known else {}
    try:
        content: Any = regular.read_json(Path(name, "config.json"))
        sizes = {key: content["n_positions" if key == "block_size" else key] for key in SIZES}
    except (InputError, OSError, LookupError, TypeError):
        return {}
    return sizes if all(type(size) is int for size in sizes.values()) else {}


def differing(given: object, name: str, sizes: Mapping[str, int]) -> str:
    """What to say where `model`'s settings are not the sizes of the weights `name`, or nothing."""
    wrong = [
        f"model.{key}={getattr(given, key)}" for key in sizes if getattr(given, key) != sizes[key]
    ]
    if not wrong:
        return ""
    ways = " ".join(f"-S model.{key}={size}" for key, size in sizes.items())
    return f"init.hf_model={name} has other sizes than {', '.join(wrong)}; say {ways}"
