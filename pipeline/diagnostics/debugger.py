"""A look inside a training step: an interpreter there, or the same moment on disk for later."""

from __future__ import annotations

import code
import contextlib
import importlib.util
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import config as configuration
from pipeline import paths, terminal
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import Ranks
from pipeline.config import Config
from pipeline.diagnostics import nonfinite, token_spans
from pipeline.errors import InputError, NumericsError, StorageError, UserError, cut, out_of_memory
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.loss import evaluating
from pipeline.records.record_file import Record
from pipeline.resume.interruption import Interruption
from pipeline.resume.snapshot import read_facts, read_tensors, restore, save_snapshot
from pipeline.training import training_step
from pipeline.training.inputs import Inputs
from pipeline.training.loop import micro_batches
from pipeline.training.training_step import Look, TrainState
from pipeline.training.validation import ValidationError

log = logging.getLogger(__name__)

MAX_LOGIT_BYTES = 1 << 30  # of logits in the scope; sequences that do not fit are left out

SCOPE = "model, x, y, logits, loss, gradients, state, batches, step, torch"


@contextlib.contextmanager
def attached(
    state: TrainState,
    config: Config,
    record: Record,
    inputs: Inputs,
    stop: Interruption,
) -> Iterator[Look]:
    """Around a training loop: yields what `loop.fit` is to call in debug.interact_at_step.

    Where somebody sits at a terminal that is an interpreter, while its signals are suspended; else
    the step is kept on disk. A NumericsError leaves with its explanation, after the step that it
    is about was kept.
    """

    def keep(why: str) -> None:
        folder = write_bundle(state, config, why)
        record.tags({"debug.why": why, "debug.bundle": folder or "not written"})

    def stop_and_look(state: TrainState) -> None:
        if not has_terminal():
            keep(f"debug.interact_at_step={state.step}: no terminal here, so no interpreter")
            return
        record.tags({"debug.interacted_at_step": state.step})
        with stop.suspended():
            look(state)

    try:
        yield stop_and_look
    except NumericsError as error:
        if state.ranks.world > 1:  # it may be in another process's share: all of it is done again
            alone = state.ranks.alone()
            state.batches = micro_batches(inputs.train, config.train, state.step, alone)
            if not state.ranks.sharded:
                state.ranks = alone
        if isinstance(error, ValidationError):
            explained = nonfinite.explain_validation(error, state, inputs.val, config.train)
        else:
            mine = partial(token_spans.of_step, ranks=state.ranks.alone())
            text = partial(mine, inputs.train, config.train)
            explained = nonfinite.explain(error, state, text)
        keep(str(explained))
        raise explained from None


def look(state: TrainState) -> None:
    """An interpreter with the step's values in scope; what is changed there stays changed."""
    interact(
        scope(state),
        f"\nstep {state.step}, loss {state.loss:.4f}, between the gradients and the update.\n"
        f"In scope: {SCOPE}.\n"
        "gradients are unscaled and not clipped; what you change here stays changed.\n"
        "Leave with exit() or Ctrl-D to continue training.",
    )


def has_terminal() -> bool:
    """Whether somebody can type into this process."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def write_bundle(state: TrainState, config: Config, why: str) -> Path | None:
    """Keep this moment under `.runs/debug`; a warning says where, and how to open it.

    None, with another warning, where the disk does not take it: that must not hide why it is kept.
    """
    moment = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-step-{state.step}"
    folder = paths.runs() / "debug" / moment
    facts = {
        "why": why,
        "params": asdict(config),
        "gpt": asdict(state.model.config),
        "device": state.precision.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    try:
        save_snapshot(folder, state, facts)
    except StorageError as error:
        log.warning("the step could not be kept for the debugger: %s", error)
        return None
    log.warning(
        "%s: weights, batch, random state and optimizer are in %s; look at the step with "
        "`python -m pipeline debug %s`",
        *(why.partition("\n")[0], folder, folder),
    )
    return folder


def scope(state: TrainState) -> dict[str, Any]:
    """Names for an interpreter: x and y are the first micro-batch, logits are without dropout."""
    x, y = (part.to(state.precision.device) for part in state.batches[0])
    sequences = MAX_LOGIT_BYTES // (4 * x.size(1) * state.model.config.vocab_rows)
    with evaluating(state.model), state.precision.products(), state.precision.autocast():
        logits = state.model(x[: max(1, sequences)])
    return {
        "model": state.model,
        "x": x,
        "y": y,
        "logits": logits,
        "loss": state.loss,
        "gradients": {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None},
        "state": state,
        "batches": state.batches,
        "step": state.step,
        "torch": torch,
    }


def open_bundle(folder: Path, device: str = "") -> tuple[dict[str, Any], str]:
    """The scope of a moment on disk, its gradients computed again, and lines on how that went."""
    facts = read_facts(folder)
    try:
        config = configuration.from_dict(facts["params"], f"{folder}: params")
        where = runtime.choose_device(device or facts["device"])
        precision = choose_precision(config.precision, where)
        model = GPT(GPTConfig(**facts["gpt"])).to(where)
        narrowing = config.init.narrowing(model.config.n_embd)
        plain = replace(config.train, compile=False)
        state = training_step.start(model, plain, precision, narrowing)
        state.ranks = Ranks(ordered=config.distributed.ordered)
        restore(state, read_tensors(folder), facts)
        state.ranks.seed(config.train.seed, state.step)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        said = cut(f"{type(error).__name__}: {error}")
        raise InputError(f"{folder}: not a snapshot that can be put back: {said}") from error
    runtime.set_rng_state(state.rng, where)
    then, state.loss = state.loss, training_step.gradients(state, state.batches).item()
    same = state.loss == then or (math.isnan(state.loss) and math.isnan(then))
    machine = f"torch {facts['torch']}, {facts['device']}, {facts['threads']} threads"
    beside = "the same as then" if same else f"{then!r} then ({machine})"
    return scope(state), f"step {state.step}: {facts['why']}\nloss {state.loss!r}, {beside}"


def odd_gradients(gradients: dict[str, torch.Tensor]) -> list[str]:
    """The parameters whose gradient is not finite, in the model's order."""
    return [name for name, grad in gradients.items() if not grad.isfinite().all()]


def interact(names: dict[str, Any], banner: str) -> None:
    """An interpreter with these names, which begins by printing the banner: IPython if there."""
    if importlib.util.find_spec("IPython"):
        import IPython

        with terminal.unguarded():
            IPython.embed(user_ns=names, banner1=f"{banner}\n", colors="neutral")
        return
    with contextlib.suppress(SystemExit):  # exit() leaves the interpreter, not the training
        code.interact(banner=banner, local=names, exitmsg="")
