"""A run's model as a folder for others: found, converted, read back, described."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline import paths
from pipeline.errors import InputError, some
from pipeline.export.card import CARD, card
from pipeline.model.gpt import GPT
from pipeline.model.hf_import import PARITY_BOUND, parity
from pipeline.model.model_dir import load_model, write_files, write_json
from pipeline.published import EOT, VOCAB_SIZE
from pipeline.records.dvc_history import copy_of
from pipeline.records.run_data import Experiment
from pipeline.regular import read_json
from pipeline.storage.digests import tree_digest
from pipeline.storage.folders import SUMS, problems, writing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(run: Experiment, folder: Path, dtype: str, title: str) -> str:
    """Write the best model of a run; what reading it back has shown, in words.

    The folder is whole or not there. Raises InputError where the model is not there or not the
    one that the run recorded, or where transformers computes something else from what was
    written; and as `refuse_others` and `writing` do.
    """
    refuse_others(folder)
    model, step = model_of(run)
    size = model.parameter_count() * DTYPES[dtype].itemsize + (4 << 20)  # and the tokenizer
    with writing(folder, size) as partial:
        write_files(model, partial, DTYPES[dtype])
        settings = generation(run.params, model.config.block_size)
        write_json(partial / "generation_config.json", settings)
        told = _read_back(model, partial, dtype)
        text = card(run, title, model, step, f"{dtype}; {told}")
        (partial / CARD).write_text(text, "utf-8", newline="\n")
    return told


def refuse_others(folder: Path) -> None:
    """Raise InputError unless a folder is new, empty, or an export that nobody has changed."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    listed = {SUMS, *read_json(folder / SUMS)} if SUMS in there else set()
    if (there and CARD not in listed) or folder.is_file():
        raise InputError(f"--to {folder}: expected a new folder, an empty one or an earlier export")
    if changed := sorted(there - listed) or problems(folder):
        raise InputError(
            f"--to {folder}: an earlier export, but changed since, so that something would be "
            f"lost: {some(changed)}; name another folder"
        )


def model_of(run: Experiment) -> tuple[GPT, int]:
    """The best model of a run, without padded rows, and the steps it was trained for."""
    place = paths.MODEL.as_posix()
    best = next((event for event in run.events("checkpoint") if event["path"] == place), None)
    if best is None:
        raise InputError(f"{run.name}: its training has not come to its end; there is no model yet")
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy_of(run.rev, place, scratch) if run.rev else paths.root() / paths.MODEL
        if folder is None or not folder.is_dir():
            raise InputError(f"{run.name}: {place} is neither in DVC's cache nor in a remote")
        if tree_digest(folder) != best["sha256"]:
            raise InputError(
                f"{folder}: not the model that {paths.record('train').as_posix()} tells of; "
                "`dvc checkout` brings back what belongs together"
            )
        return load_model(folder, vocab_rows=VOCAB_SIZE), best["step"]


def generation(params: dict[str, Any], longest: int) -> dict[str, Any]:
    """generation_config.json: the settings of `sample` as transformers has them.

    A text that outgrows the model is an error there, so that a prompt's token is left room for.
    """
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOT)
    most = {"max_new_tokens": min(params["sample.max_new_tokens"], longest - 1)}
    drawn = bool(params["sample.temperature"])  # 0 is greedy
    names = ("temperature", "top_k", "top_p") if drawn else ()
    return ends | most | {"do_sample": drawn} | {name: params[f"sample.{name}"] for name in names}


def _read_back(model: GPT, folder: Path, dtype: str) -> str:
    """Compare what was written, as transformers loads it, with the model itself."""
    shape = 2, min(32, model.config.block_size)
    probe = torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0))
    found = parity(model, folder, probe)
    difference, equal = found["relative_logit_difference"], found["greedy_equal"]
    said = (
        f"transformers computes logits off by at most {difference:.1e} of the largest from them, "
        f"and {'the same' if equal else 'other'} greedy tokens"
    )
    good = math.isfinite(difference)  # a weight may be too large for fp16
    if not good or (dtype == "fp32" and not (difference <= PARITY_BOUND and equal)):
        raise InputError(f"--dtype {dtype}: what was written is another model: {said}")
    return said
