"""Model directories on disk: written atomically, read strictly.

A model directory is a Hugging Face GPT-2 directory, so transformers opens it as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline import paths
from pipeline.data import tokenizer
from pipeline.errors import InputError, quoted
from pipeline.model import hf_layout
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.published import EOT
from pipeline.regular import SNAPSHOT_BYTES, read_json
from pipeline.storage.digests import tree_digest
from pipeline.storage.folders import SUMS, check, writing
from pipeline.storage.tensor_files import read_tensors, write_tensors


def save_model(model: GPT, folder: Path) -> None:
    """Write a HF GPT-2 directory, replacing one of that name; the model is left as it is.

    A folder of that name is always whole (see `folders.writing`, also for what is raised). The
    same weights give the same bytes.
    """
    with writing(folder, 4 * model.parameter_count()) as partial:
        write_files(model, partial)


def write_files(model: GPT, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the files of a HF GPT-2 directory into a folder that is there; see `save_model`."""
    config = model.config
    ends = {"bos_token_id": EOT, "eos_token_id": EOT}
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.EOT_TEXT)
    encoding = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size}
    write_json(folder / "config.json", hf_layout.hf_config(config, dtype))
    write_json(folder / "generation_config.json", ends)
    write_json(folder / "tokenizer_config.json", encoding | names | {"add_prefix_space": False})
    tokenizer.write_files(folder)
    weights = hf_layout.to_hf(model.state_dict(), config, dtype)
    write_tensors(weights, folder / "model.safetensors", format="pt")


def load_model(folder: Path, *, device: torch.device | str = "cpu", **settings: Any) -> GPT:
    """Read a HF GPT-2 directory into a model in fp32, drawing no random number.

    `settings` are those of `hf_layout.gpt_config`. Raises InputError where a file is missing or
    damaged, or a name, shape, dtype or value is not what its config.json promises.
    """
    if not folder.is_dir():
        said = paths.MISSING.get(folder, "no such folder; expected a model directory")
        raise InputError(f"{folder}: {said}")
    check(folder)
    config = read_config(folder, **settings)
    return build_model(config, read_state(folder, config)).to(device)


def read_config(folder: Path, **settings: Any) -> GPTConfig:
    """The shape that config.json gives: `settings` and errors are those of `gpt_config`."""
    where = folder / "config.json"
    return hf_layout.gpt_config(read_json(where), where, **settings)


def read_state(folder: Path, config: GPTConfig) -> dict[str, torch.Tensor]:
    """Our state dict in fp32; raises InputError as `from_hf` does."""
    return hf_layout.from_hf(read_tensors(folder), config, folder)


def check_model(folder: Path) -> str:
    """SHA-256 of a model directory; raises InputError unless it is whole.

    The model is dropped again: of several, one at a time fits into memory.
    """
    load_model(folder)
    return tree_digest(folder)


def build_model(config: GPTConfig, state: dict[str, torch.Tensor]) -> GPT:
    """A model whose parameters are the tensors of `state`: no second copy, no random numbers."""
    model = hf_layout.outline(config)
    model.load_state_dict(state, assign=True)
    return model


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Sorted keys and the same bytes on every system."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def verify(folder: Path) -> list[str]:
    """A line for each folder with weights in or below `folder`: what it is, and that it is whole.

    Raises InputError naming everything that is not as it was written, or where there is nothing
    to verify.
    """
    places = sorted({path.parent for path in folder.rglob("*.safetensors")})
    if not places:
        raise InputError(f"{folder}: no model directory and no training checkpoint is there")
    lines, damage = [], []
    for place in places:
        try:
            lines.append(_verified(place))
        except InputError as error:
            damage.append(str(error))
    if damage:
        raise InputError("\n".join(damage))
    return lines


def _verified(folder: Path) -> str:
    check(folder)
    sums = folder / SUMS
    how = "SHA-256 as written" if sums.exists() else f"no {SUMS}: its bytes cannot be checked"
    if (folder / "snapshot.json").exists():
        facts = read_json(folder / "snapshot.json", SNAPSHOT_BYTES)
        if not sums.exists():
            raise InputError(f"{folder}: a training checkpoint without {SUMS}")
        return f"{folder}: training state after step {quoted(facts.get('step'))}: whole, {how}"
    model = load_model(folder)
    return f"{folder}: model of {model.parameter_count():,} parameters: whole, {how}"
