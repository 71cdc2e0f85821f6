"""The Hugging Face layout of GPT-2: names, shapes and config.json, both ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.errors import InputError, cut, quoted
from pipeline.model.gpt import GPT, LAYER_NORM_EPS, GPTConfig
from pipeline.published import EOT, VOCAB_SIZE
from pipeline.storage.tensor_files import shortened

# OpenAI wrote these four as Conv1D, whose weight is (in, out); nn.Linear holds (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # not c_attn.bias, a parameter
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # fp32 holds each of them exactly
PREFIX = "transformer."

# What the core computes. Any other value means another function, so it is refused by name.
FIXED = {
    "model_type": "gpt2",
    "vocab_size": VOCAB_SIZE,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
REQUIRED = ("model_type", "vocab_size")  # of FIXED; the others default to the value above
# Upper bounds before anything is built: XL has 48, 25, 1600 and 1024.
SIZES = {"n_layer": 512, "n_head": 512, "n_embd": 65536, "n_positions": 1 << 20}
FOREIGN = (
    "auto_map",  # custom code
    "quantization_config",
    "hidden_size",  # HF reads these four as other names of the sizes above
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


class _NoInitialisation(TorchFunctionMode):
    """torch.nn.init does nothing inside: on the meta device it would import a compiler first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def outline(config: GPTConfig) -> GPT:
    """A model on the meta device: names and shapes, no values, no random number drawn."""
    with torch.device("meta"), _NoInitialisation():
        return GPT(config)


# Names and shapes


def hf_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF model by its name without `transformer.`, with its HF shape."""
    state = outline(config).state_dict()
    shapes = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in state.items()}
    for name, shape in shapes.items():
        if name.endswith(CONV1D):
            shapes[name] = shape[::-1]
    shapes["wte.weight"] = (config.vocab_size, config.n_embd)
    return shapes


def to_hf(
    state: dict[str, Tensor], config: GPTConfig, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Our state dict -> HF's: `transformer.` names, Conv1D weights (in, out), no padded rows.

    On the CPU and contiguous; tensors that need no change share memory with `state`.
    """
    names = [PREFIX + name for name in hf_shapes(config)]
    assert sorted(state) == sorted(names), "not a GPT's state dict (compiled or wrapped?)"
    out = {}
    for name in names:
        tensor = state[name].detach().to("cpu", dtype)
        if name.endswith(CONV1D):
            tensor = tensor.T
        elif name.endswith("wte.weight"):
            tensor = tensor[: config.vocab_size]
        out[name] = tensor.contiguous()
    return out


def from_hf(
    state: dict[str, Tensor], config: GPTConfig, where: str | Path = "weights"
) -> dict[str, Tensor]:
    """HF's state dict -> ours, in fresh fp32 memory with zeros in the padded rows.

    Takes names with or without `transformer.`, drops mask buffers and a head equal to `wte`.
    Raises InputError naming every tensor that is missing, unknown or unusable.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = name.removeprefix(PREFIX)
        if short in tensors:
            raise InputError(f"{where}: {cut(short)}: given both with and without `{PREFIX}`")
        if not MASK_BUFFER.fullmatch(short):
            tensors[short] = tensor
    head = tensors.pop("lm_head.weight", None)
    problems = _problems(tensors, hf_shapes(config))
    if head is not None and not problems:
        wte = tensors["wte.weight"]
        if head.shape != wte.shape or not torch.equal(head.float(), wte.float()):
            problems.append("lm_head.weight: expected wte.weight's own values, got others")
    if problems:
        raise InputError(f"{where}: {shortened(problems)}")
    ours = {}
    for name, tensor in tensors.items():
        tensor = tensor.T if name.endswith(CONV1D) else tensor
        rows = config.vocab_rows if name == "wte.weight" else len(tensor)
        # Copied: the file behind `tensor` may change later.
        ours[PREFIX + name] = torch.zeros(rows, *tensor.shape[1:])
        ours[PREFIX + name][: len(tensor)] = tensor
    return ours


def _problems(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [f"{name}: missing, expected {shapes[name]}" for name in shapes.keys() - tensors]
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in shapes:
            problems.append(f"{cut(name)}: not a tensor of this GPT-2, got {quoted(shape)}")
        elif shape != shapes[name]:
            problems.append(f"{name}: expected shape {shapes[name]}, got {quoted(shape)}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name}: expected fp32, fp16 or bf16, got {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            problems.append(f"{name}: expected finite values, got {bad} NaN or infinite ones")
    return sorted(problems)


# config.json


def hf_config(config: GPTConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The contents of config.json for a model of this shape with weights of this type.

    n_ctx is n_positions once more: transformers reads it no longer, but llama.cpp's converter and
    others that go by the published file do.
    """
    return FIXED | {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_inner": None,
        "vocab_size": config.vocab_size,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        "bos_token_id": EOT,
        "eos_token_id": EOT,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def gpt_config(hf: dict[str, Any], where: str | Path = "config.json", **settings: Any) -> GPTConfig:
    """config.json -> GPTConfig. Raises InputError naming every field that asks for another model.

    Only the fields that shape the network are read, within bounds, before anything is built.
    `settings` are GPTConfig's others: vocab_rows, dropout and attention.
    """
    problems = [f"{key}: not supported, got {quoted(hf[key])}" for key in FOREIGN if key in hf]
    for key, accepted in FIXED.items():
        got = hf.get(key, None if key in REQUIRED else accepted)
        if type(got) is not type(accepted) or got != accepted:
            problems.append(f"{key}: expected {accepted!r}, got {quoted(got)}")
    for key, most in SIZES.items():
        got = hf.get(key)
        if type(got) is not int or not 1 <= got <= most:
            problems.append(f"{key}: expected a whole number from 1 to {most}, got {quoted(got)}")
    if not problems and hf["n_embd"] % hf["n_head"]:
        problems.append(f"n_head: expected a divisor of n_embd={hf['n_embd']}, got {hf['n_head']}")
    if not problems and hf.get("n_inner") not in (None, 4 * hf["n_embd"]):
        problems.append(
            f"n_inner: expected null or {4 * hf['n_embd']}, got {quoted(hf['n_inner'])}"
        )
    if problems:
        raise InputError(f"{where}: {shortened(problems)}")
    return GPTConfig(hf["n_layer"], hf["n_head"], hf["n_embd"], hf["n_positions"], **settings)
