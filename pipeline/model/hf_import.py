"""Import of published GPT-2 weights, from a local folder or a hub id."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import InputError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.hf_layout import CONV1D, to_hf
from pipeline.model.model_dir import read_config, read_state
from pipeline.published import MODELS

# Heads leave no trace in any shape, so for the published sizes (n_layer, n_embd) they are known.
HEADS = {(layers, width): heads for layers, heads, width, _ in MODELS.values()}


def import_pretrained(name_or_folder: str, **settings: Any) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Published weights -> (config, our state dict in fp32), from a local folder or a hub id.

    `settings` are those of `hf_layout.gpt_config`. For a size nobody published it warns that
    `n_head` is taken on trust. Raises InputError where the weights or their config cannot be used,
    or the hub cannot be reached.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = _download(name_or_folder)
    config, where = read_config(folder, **settings), folder / "config.json"
    published = HEADS.get((config.n_layer, config.n_embd))
    size = f"{config.n_layer} layers of {config.n_embd} channels"
    if published is None:
        message = f"{where}: {size}: no published size; n_head={config.n_head} cannot be checked"
        warnings.warn(message, stacklevel=2)
    elif config.n_head != published:
        raise InputError(f"{where}: n_head: expected {published} for {size}, got {config.n_head}")
    return config, read_state(folder, config)


def _download(name: str) -> Path:
    """Snapshot of a hub model: its config and safetensors, nothing else."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise InputError(f"init.hf_model={name}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "model.safetensors", "model-*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client's errors share no base, nor its HTTP library's
        reason = re.sub(r"//[^/@\s]*@", "//", str(error).strip().split("\n")[0])
        raise InputError(
            f"init.hf_model={name}: no such folder, and the hub did not give it "
            f"({type(error).__name__}: {reason}). Behind a mirror set HF_ENDPOINT; without a "
            "network copy config.json and model.safetensors here and name their folder"
        ) from None


def parameter_table(model: GPT) -> list[dict[str, Any]]:
    """One row a tensor: name, hf_name, hf_shape, our_shape, transposed, std, parameters.

    std is of the values HF sees (no padded rows), dividing by their number; parameters counts
    ours. The head has no row: it is `wte`.
    """
    ours = model.state_dict()
    return [
        {
            "name": name,
            "hf_name": name,
            "hf_shape": list(tensor.shape),
            "our_shape": list(ours[name].shape),
            "transposed": name.endswith(CONV1D),
            "std": tensor.std(correction=0).item(),
            "parameters": ours[name].numel(),
        }
        for name, tensor in to_hf(ours, model.config).items()
    ]
