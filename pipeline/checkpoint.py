"""Model directories on disk: written atomically, read strictly.

A model directory is a Hugging Face GPT-2 directory, so transformers opens it as it is.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any

import torch

from pipeline import hf_weights, tokenizer
from pipeline.errors import StorageError
from pipeline.model import GPT, GPTConfig
from pipeline.weight_files import read_json, read_tensors

WEIGHTS = "model.safetensors"


def save_model(model: GPT, folder: Path) -> None:
    """Write a HF GPT-2 directory, replacing one of that name; the model is left as it is.

    Everything goes to a sibling folder first, reaches the disk, and gets the final name last, so
    a folder of that name is always whole. The same weights give the same bytes. Raises
    StorageError with the bytes needed and free where the disk does not take it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial = folder.with_name(f".{folder.name}.{token}.partial")
    try:
        partial.mkdir()
        _write(model, partial)
        _sync(partial)
        _replace(partial, folder, folder.with_name(f".{folder.name}.{token}.replaced"))
    except OSError as error:
        needed, free = 4 * model.parameter_count(), shutil.disk_usage(folder.parent).free
        raise StorageError(
            f"{folder}: could not be written: {error}; it needs {needed:,} bytes, {free:,} are free"
        ) from error
    finally:
        _remove(partial)


def load_model(
    folder: Path,
    *,
    vocab_rows: int = 50304,
    dropout: float = 0.0,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> GPT:
    """Read a HF GPT-2 directory into a model in fp32, drawing no random number.

    Raises InputError where a file is missing or damaged, or a name, shape, dtype or value is not
    what its config.json promises.
    """
    folder = Path(folder)
    where = folder / "config.json"
    config = hf_weights.gpt_config(
        read_json(where),
        vocab_rows=vocab_rows,
        dropout=dropout,
        attention=attention,
        where=where,
    )
    state = hf_weights.from_hf(read_tensors(folder), config, folder)
    return build_model(config, state, device)


def build_model(
    config: GPTConfig,
    state: dict[str, torch.Tensor],
    device: torch.device | str = "cpu",
) -> GPT:
    """A model whose parameters are the tensors of `state`: no second copy, no random numbers."""
    model = hf_weights.outline(config)
    model.load_state_dict(state, assign=True)
    return model.to(device)


def recover(folder: Path) -> None:
    """Tidy up after a save that was killed; call it only while nobody else writes `folder`.

    A folder moved aside for a successor that never came gets its name back; the rest goes.
    """
    folder = Path(folder)
    for replaced in sorted(folder.parent.glob(f".{folder.name}.*.replaced")):
        if not os.path.lexists(folder):
            os.replace(replaced, folder)
        _remove(replaced)
    for partial in folder.parent.glob(f".{folder.name}.*.partial"):
        _remove(partial)


def _write(model: GPT, folder: Path) -> None:
    config = model.config
    _write_json(folder / "config.json", hf_weights.hf_config(config))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": hf_weights.EOT, "eos_token_id": hf_weights.EOT},
    )
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size},
    )
    tokenizer.write_files(folder)
    _write_weights(hf_weights.to_hf(model.state_dict(), config), folder / WEIGHTS)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors makes its file readable by the owner only; the others follow the umask.
    path.chmod(stat.S_IMODE((path.parent / "config.json").stat().st_mode))


def _sync(folder: Path) -> None:
    """Have a folder's files, and their names, on the disk and not only in memory."""
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and keeps names by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, target: Path, aside: Path) -> None:
    """Give `new` the name `target`; what had it moves aside first (see `recover`), then goes."""
    if os.path.lexists(target):
        os.replace(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        if os.path.lexists(aside):
            os.replace(aside, target)
        raise
    _sync_names(target.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    """Delete a folder, link or file, if it is there; DVC's links may be read-only."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        if os.name == "nt":  # there a read-only file cannot be deleted
            for file in path.rglob("*"):
                file.chmod(stat.S_IWRITE)
        shutil.rmtree(path)
