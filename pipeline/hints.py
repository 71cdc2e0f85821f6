"""What a person may have meant: settings under other programs' names, misread values, paths."""

from __future__ import annotations

import contextlib
import difflib
import glob
import math
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from pipeline.published import differing, sizes_of

if TYPE_CHECKING:
    from pipeline.config import Config

# Setting: what nanoGPT, build-nanogpt, transformers and others call it, where people change it.
OTHERS_CALL_IT = {
    "precision": "dtype amp mixed_precision bf16 fp16",
    "device": "accelerator",
    "corpus.path": "data data_dir data_path dataset dataset_name input_file train_file",
    "model.n_layer": "layers n_layers num_layers num_hidden_layers depth",
    "model.n_head": "heads n_heads num_heads num_attention_heads",
    "model.n_embd": "n_embed d_model dim embed_dim embedding_size hidden_size width",
    "model.block_size": "context context_length n_ctx n_positions max_position_embeddings",
    "model.vocab_rows": "vocab_size n_vocab",
    "model.dropout": "resid_pdrop embd_pdrop attn_pdrop",
    "init.source": "init_from",
    "train.steps": "max_iters max_steps num_iterations iterations iters epochs num_train_epochs",
    "train.batch_size": "batch micro_batch_size device_batch_size per_device_train_batch_size",
    "train.sequence_length": "seq_len seq_length sequence_len max_seq_len max_seq_length",
    "train.accumulate": "gradient_accumulation_steps grad_accum accumulate_grad_batches",
    "train.lr": "learning_rate max_lr peak_lr",
    "train.min_lr": "min_learning_rate lr_min final_lr",
    "train.warmup_steps": "warmup warmup_iters warmup_ratio num_warmup_steps",
    "train.weight_decay": "wd decay",
    "train.grad_clip": "clip clip_grad clip_grad_norm max_grad_norm gradient_clip_val",
    "train.val_every": "eval_every eval_interval eval_steps val_interval val_check_interval",
    "train.val_tokens": "eval_iters eval_tokens val_steps",
    "checkpoint.every_steps": "save_every save_interval save_steps checkpoint_interval",
}
_MEANT = {other: name for name, others in OTHERS_CALL_IT.items() for other in others.split()}


def meant(key: str, prefix: str, here: Sequence[str], everywhere: Sequence[str]) -> str:
    """What to say of an unknown setting `prefix + key`.

    `here` are the names known at its place, `everywhere` all settings by their dotted names. A
    known name at the wrong place and other programs' names come before names spelt alike:
    learning_rate is train.lr, though min_lr has more of its letters.
    """
    plain = key.lower().replace("-", "_")
    names_meant = [name for name in everywhere if name.rpartition(".")[2] == plain]
    names_meant = names_meant or ([_MEANT[plain]] if plain in _MEANT else [])
    near_here = {name: prefix + name for name in here}
    near_elsewhere = {name.rpartition(".")[2]: name for name in everywhere}
    for names, cutoff in ((near_here, 0.8), (near_elsewhere, 0.8), (near_here, 0.6)):
        near = difflib.get_close_matches(plain, names, n=1, cutoff=cutoff)
        names_meant = names_meant or [names[name] for name in near]
    if not names_meant:
        return f"known: {', '.join(here)}"
    return f"did you mean {' or '.join(names_meant)}?"


def misread(value: Any, hint: Any, accepted: Mapping[str, Any]) -> str:
    """Why a value of another type than `hint` stands there, to follow "expected ..."; or ""."""
    if hint is str and not accepted["choices"]:
        if isinstance(value, int | float):
            read_as = "true or false" if isinstance(value, bool) else "a number"
            return f"; it is read as {read_as}, so put it in quotes"
        return "; it is read as null" if value is None else ""
    if hint == tuple[str, ...]:
        if isinstance(value, str):
            return ", in square brackets or a line with a dash for each"
        texts = value if isinstance(value, list) else []
        if "" in texts:
            return ", none of them empty"
        unquoted = any(isinstance(text, int | float) for text in texts)
        return "; numbers, true and false among them need quotes" if unquoted else ""
    if hint in (bool, int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError, OverflowError):
            logical = value.lower() in ("true", "false")
            if logical if hint is bool else math.isfinite(hint(value)):
                return ", without quotes"
    return ""


# --- settings that name files


def of_files(config: Config) -> list[str]:
    """One line for each setting that names what DVC cannot find or would not watch.

    And one for sizes that differ from those of the weights to import, where they are known offline.
    """
    init = config.init
    names = {
        "corpus.path": config.corpus.path,
        "init.hf_model": init.hf_model,
        "init.hf_watch": init.hf_watch,
        "train.fork": config.train.fork,
        "evaluate.hellaswag": config.evaluate.hellaswag,
    }
    lines = [said for name, value in names.items() if (said := _unfindable(name, value))]
    pattern = PureWindowsPath(config.corpus.pattern)  # it knows both separators, and drives
    if pattern.anchor or ".." in pattern.parts:
        lines.append(f"corpus.pattern={config.corpus.pattern}: expected a glob inside corpus.path")
    if any("**" in part and part != "**" for part in pattern.parts):
        lines.append(
            f"corpus.pattern={config.corpus.pattern}: expected ** alone between slashes, "
            "as in **/*.txt"
        )
    if init.source != "hf":
        return lines
    if os.path.isdir(init.hf_model) and init.hf_watch != init.hf_model:
        lines.append(
            f"init.hf_watch={init.hf_watch}: expected {init.hf_model}, as in init.hf_model, "
            "so that DVC notices an edit in that folder"
        )
    said = differing(config.model, init.hf_model, sizes_of(init.hf_model))
    return [*lines, said] if said else lines


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
