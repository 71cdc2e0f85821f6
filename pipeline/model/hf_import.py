"""Import of published GPT-2 weights, and proof that a model computes what transformers computes."""

from __future__ import annotations

import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.errors import InputError
from pipeline.model.gpt import GPT, GPTConfig, KVCache
from pipeline.model.hf_layout import CONV1D, to_hf
from pipeline.model.model_dir import read_config, read_state
from pipeline.published import MODELS
from pipeline.storage import hub

# Heads leave no trace in any shape, so for the published sizes (n_layer, n_embd) they are known.
HEADS = {(layers, width): heads for layers, heads, width, _ in MODELS.values()}
# Of relative_logit_difference. Measured: 1e-15 at init.std 0.02, 4e-13 at 2 in 4 layers, and 2e-9
# at 3 in 24 layers, which amplify rounding so much that fp32 has no digit right.
PARITY_BOUND = 1e-7
GREEDY_STEPS = 64
# Two orders of the same additions in fp32 may part by so many times what one of them is off.
ROUNDING = 8


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
    wanted = ["config.json", "model.safetensors", "model-*.safetensors", "*.safetensors.index.json"]
    try:
        return hub.cached(name, wanted)
    except hub.HubError as error:
        raise InputError(
            f"init.hf_model={name}: no such folder, and {error}. `python -m pipeline fetch gpt2` "
            "brings weights over a bad line; without any copy config.json and model.safetensors "
            "here and name their folder"
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


class _InFloat64(TorchFunctionMode):
    """Inside, every operation widens its fp32 operands: exact weights, arithmetic in fp64.

    The models stay in fp32, and one weight at a time is held twice, so that XL needs no 25 GB.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # of .shape, .device and the like
            return func(*args, **kwargs)
        wide = {key: _widened(value) for key, value in kwargs.items()}
        return func(*map(_widened, args), **wide)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype is torch.float32:
        return value.double()
    if isinstance(value, (tuple, list)):  # of torch.cat, say
        return type(value)([_widened(part) for part in value])
    return value


@torch.no_grad()
def parity(model: GPT, folder: Path, probe: Tensor) -> dict[str, Any]:
    """Compare `model`, on the CPU, with transformers.GPT2LMHeadModel loaded from `folder`.

    probe: token ids (B, T). relative_logit_difference is max |a - b| / max(1, max |b|) over it,
    both in fp64: at most PARITY_BOUND where the two agree, whereas in fp32 large weights part by
    more than some mistakes do. greedy_equal says whether the tokens that `model` takes in fp32,
    behind its cache, are the likeliest ones of the reference in fp64 as well: GREEDY_STEPS of them
    behind each row's first tokens, fewer where block_size ends. Of B times greedy_steps,
    greedy_decided count: those where the two likeliest are further apart than ROUNDING times what
    fp32 makes of the reference itself.
    """
    reference = _reference(folder)
    training = model.training
    model.eval()
    with _InFloat64():
        ours, theirs = model(probe), reference(probe, use_cache=False).logits
    assert ours.dtype is theirs.dtype is torch.float64
    largest = theirs.abs().max().item()
    difference = (ours - theirs).abs().max().item() / max(1.0, largest)
    tokens, steps = _greedy(model, probe)
    model.train(training)
    behind = partial(reference, tokens[:, :-1], use_cache=False, logits_to_keep=steps)
    rounded = behind().logits  # (B, steps, V)
    with _InFloat64():
        exact = behind().logits
    best = exact.topk(2, dim=-1)
    noise = (rounded - exact).abs().max()
    decided = best.values[..., 0] - best.values[..., 1] > ROUNDING * noise  # (B, steps)
    chosen = tokens[:, -steps:]
    return {
        "relative_logit_difference": difference,
        "largest_logit": largest,
        "greedy_equal": torch.equal(best.indices[..., 0][decided], chosen[decided]),
        "greedy_steps": steps,
        "greedy_decided": int(decided.sum()),
    }


def _greedy(model: GPT, probe: Tensor) -> tuple[Tensor, int]:
    """(B, T + steps) tokens and steps: the first of each row and the likeliest behind a cache."""
    block_size = model.config.block_size
    tokens = probe[:, : max(1, min(8, block_size + 1 - GREEDY_STEPS))]
    steps = min(GREEDY_STEPS, block_size + 1 - tokens.size(1))
    cache = KVCache(model.config, len(tokens))
    new = tokens
    for _ in range(steps):
        new = model.logits(model.hidden(new, cache)[:, -1]).argmax(-1, keepdim=True)  # (B, 1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens, steps


def _reference(folder: Path) -> Any:
    """transformers' own model of a local folder, complete and in fp32; errors alone are logged."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # By one thread: several gain little here, and are not waited for.
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    reference, loading = GPT2LMHeadModel.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    unused = {kind: names for kind, names in loading.items() if names}
    if unused:
        raise InputError(f"{folder}: transformers does not take all of it: {unused}")
    return reference.eval()
