"""Stop and look: an interpreter inside a training step, or the same moment on disk for later."""

from __future__ import annotations

import code
import contextlib
import importlib.util
import logging
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import config as configuration
from pipeline import paths, terminal
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.config import Config
from pipeline.errors import StorageError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.loss import evaluating
from pipeline.resume.snapshot import Tensors, read_facts, restore, save_snapshot, understood
from pipeline.training import training_step
from pipeline.training.training_step import TrainState

log = logging.getLogger(__name__)

MAX_LOGIT_BYTES = 1 << 30  # of logits made for a look; more sequences than fit are left out

SCOPE = "model, x, y, logits, loss, gradients, state, batches, step, torch"


def look(state: TrainState) -> None:
    """An interpreter with the step's values in scope; what is changed there stays changed."""
    _interact(
        scope(state),
        f"\nstep {state.step}, loss {state.loss:.4f}, between the gradients and the update.\n"
        f"In scope: {SCOPE}.\n"
        "gradients are unscaled and not clipped; what you change here, the run goes on with.\n"
        "Leave with exit() or Ctrl-D and training goes on.",
    )


def has_terminal() -> bool:
    """Whether somebody can type into this process."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def write_bundle(state: TrainState, config: Config, why: str) -> Path | None:
    """Keep this moment under `.runs/debug`, say where, and how to open it.

    None, and a warning, where the disk does not take it: the run has its own way to end.
    """
    moment = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-step-{state.step}"
    folder = paths.runs() / "debug" / moment
    facts = {
        "why": why,
        "params": _nested(config),
        "gpt": asdict(state.model.config),
        "device": state.precision.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    try:
        save_snapshot(folder, state, facts)
    except StorageError as error:
        log.warning("the step could not be kept for a look: %s", error)
        return None
    log.warning(
        "%s: weights, batch, random state and optimizer are in %s; look at the step with "
        "`python -m pipeline debug %s`",
        *(why.partition("\n")[0], folder, folder),
    )
    return folder


def scope(state: TrainState) -> dict[str, Any]:
    """What an interpreter finds: the first micro-batch as x and y, its logits without dropout."""
    x, y = (part.to(state.precision.device) for part in state.batches[0])
    return {
        "model": state.model,
        "x": x,
        "y": y,
        "logits": _logits(state, x),
        "loss": state.loss,
        "gradients": {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None},
        "state": state,
        "batches": state.batches,
        "step": state.step,
        "torch": torch,
    }


def open_bundle(folder: Path, device: str = "") -> tuple[dict[str, Any], str]:
    """The scope of a written moment, its gradients made again, and a line on how that went."""
    facts = read_facts(folder)
    with understood(folder):
        config = configuration.from_dict(facts["params"], f"{folder}: params")
        where = runtime.choose_device(device or facts["device"])
        precision = choose_precision(config.precision, where)
        model = GPT(GPTConfig(**facts["gpt"])).to(where)
        state = training_step.start(model, replace(config.train, compile=False), precision)
        restore(state, Tensors(folder), facts)
    runtime.set_rng_state(state.rng, where)
    then, state.loss = state.loss, training_step.gradients(state, state.batches).item()
    same = state.loss == then or (math.isnan(state.loss) and math.isnan(then))
    line = f"step {state.step}: {facts['why']}\nloss {state.loss!r}, "
    line += "the same as then" if same else f"{then!r} then (torch {facts['torch']}, "
    line += "" if same else f"{facts['device']}, {facts['threads']} threads)"
    return scope(state), line


def odd_gradients(gradients: dict[str, torch.Tensor]) -> list[str]:
    """Names of parameters whose gradient is not finite, in the model's order."""
    return [name for name, grad in gradients.items() if not grad.isfinite().all()]


def _logits(state: TrainState, x: torch.Tensor) -> torch.Tensor:
    row_bytes = 4 * x.size(1) * state.model.config.vocab_rows
    with evaluating(state.model), state.precision.products(), state.precision.autocast():
        return state.model(x[: max(1, MAX_LOGIT_BYTES // row_bytes)])


def _nested(config: Config) -> dict[str, Any]:
    values = asdict(config)
    values["sample"]["prompts"] = list(values["sample"]["prompts"])
    return values


def interact(names: dict[str, Any], said: str) -> None:
    """An interpreter with these names, which begins with what is `said`."""
    _interact(names, f"{said}\nIn scope: {SCOPE}. Leave with exit() or Ctrl-D.")


def _interact(names: dict[str, Any], banner: str) -> None:
    if importlib.util.find_spec("IPython"):
        import IPython

        with terminal.unguarded():
            IPython.embed(user_ns=names, banner1=f"{banner}\n", colors="neutral")
        return
    with contextlib.suppress(SystemExit):  # exit() leaves the interpreter, not the training
        code.interact(banner=banner, local=names, exitmsg="")
