"""Stop and look: the interpreter in the step, and the step on disk, seen from outside."""

from __future__ import annotations

import code
import contextlib
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline import paths
from pipeline.compute.precision import choose_precision
from pipeline.data import token_files, token_writer
from pipeline.data.documents import Document
from pipeline.diagnostics import debugger, nonfinite, token_spans
from pipeline.errors import NumericsError, StorageError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model
from pipeline.resume import snapshot
from pipeline.resume.interruption import Interruption
from pipeline.training import loop, training_step, validation
from pipeline.training.inputs import Inputs
from stages import import_hf_weights
from tests.conftest import Checkout, tiny_pipeline

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128)


@pytest.fixture
def config(make_config):
    return make_config(train__steps=3, train__warmup_steps=1, precision="bf16")


def made(config, shape: GPTConfig = SHAPE) -> training_step.TrainState:
    model = GPT(shape)
    initialize(model, config.init, torch.Generator().manual_seed(0))
    precision = choose_precision(config.precision, CPU)
    return training_step.start(model, config.train, precision, config.init.narrowing(shape.n_embd))


@pytest.fixture
def state(config) -> training_step.TrainState:
    return made(config)


def batches(step: int) -> list[training_step.Batch]:
    ids = torch.randint(97, (2, 2, 17), generator=torch.Generator().manual_seed(step))
    return [(part[:, :-1], part[:, 1:]) for part in ids]


def test_the_scope_holds_the_steps_values_before_the_update(state, config) -> None:
    seen = {}

    def look(at: training_step.TrainState) -> None:
        seen.update(debugger.scope(at))
        seen["weights"] = [p.detach().clone() for p in at.model.parameters()]
        seen["norm"] = torch.stack([g.norm() for g in seen["gradients"].values()]).norm().item()
        seen["training"] = at.model.training

    reports = list(loop.fit(state, config.train, batches, look=look, look_at=1))
    assert seen["step"] == 1 and seen["loss"] == reports[1].loss
    assert torch.equal(seen["x"], batches(1)[0][0]) and torch.equal(seen["y"], batches(1)[0][1])
    assert seen["logits"].shape == (2, 16, 97)
    assert seen["norm"] == pytest.approx(reports[1].grad_norm, rel=1e-5)
    assert seen["gradients"].keys() == dict(state.model.named_parameters()).keys()
    assert seen["training"], "making the logits leaves the model in training mode"
    assert set(debugger.SCOPE.split(", ")) <= seen.keys()
    now = list(state.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(seen["weights"], now, strict=True))


@pytest.mark.alone
def test_the_time_of_a_look_is_not_the_steps(state, config) -> None:
    reports = list(loop.fit(state, config.train, batches, look=lambda _: time.sleep(2), look_at=2))
    assert reports[2].seconds < 1.5


@pytest.mark.parametrize("scheme", ["gpt2", "mup"])
def test_an_opened_bundle_makes_the_same_loss_and_gradients(
    make_config, scheme: str, tmp_path: Path, monkeypatch, caplog
) -> None:
    config = make_config(
        train__steps=3, train__warmup_steps=1, precision="bf16", init__scheme=scheme
    )
    state = made(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    seen = {}

    def look(at: training_step.TrainState) -> None:
        seen["folder"] = debugger.write_bundle(at, config, "to be looked at")
        seen["gradients"] = {n: g.clone() for n, g in debugger.scope(at)["gradients"].items()}

    list(loop.fit(state, config.train, batches, look=look, look_at=2))
    assert seen["folder"].parent == tmp_path / ".runs" / "debug"
    assert f"python -m pipeline debug {seen['folder']}" in caplog.text
    names, line = debugger.open_bundle(seen["folder"])
    assert line.startswith("step 2: to be looked at\n") and line.endswith("the same as then")
    for name, gradient in seen["gradients"].items():
        assert torch.equal(names["gradients"][name], gradient), name


def test_a_bundle_whose_loss_cannot_be_made_again_says_so(
    state, config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    state.batches, state.loss = batches(0), 1.25
    state.rng = {"cpu": torch.get_rng_state()}
    folder = debugger.write_bundle(state, config, "why")
    assert "1.25 then (torch" in debugger.open_bundle(folder)[1]


def test_the_bundle_of_a_collapsed_loss_scale_overflows_again(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    changes = {"train__steps": 1, "train__warmup_steps": 0, "train__max_skipped": 1}
    config = make_config(precision="fp16", **changes)
    for exponent in range(10, 40):  # the first scale that is too large by itself: half of it is not
        state = made(config)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent)
        try:
            list(loop.fit(state, config.train, batches))
        except NumericsError:
            break
    folder = debugger.write_bundle(state, config, "collapsed")
    names, line = debugger.open_bundle(folder)
    assert names["state"].scaler.get_scale() == 2.0**exponent == 2 * state.scaler.get_scale()
    assert debugger.odd_gradients(names["gradients"])
    assert line.endswith("the same as then")
    assert (names["state"].skipped, names["state"].skipped_in_a_row) == (0, 0)


def test_a_bundle_of_a_step_with_dropout_does_not_depend_on_what_chance_did_since(
    config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    state = made(config, replace(SHAPE, dropout=0.2))
    kept = {}

    def look(at: training_step.TrainState) -> None:
        kept["folder"] = debugger.write_bundle(at, config, "dropout")
        kept["gradients"] = {n: p.grad.clone() for n, p in at.model.named_parameters()}

    list(loop.fit(state, config.train, batches, look=look, look_at=1))
    torch.manual_seed(4321)
    names, line = debugger.open_bundle(kept["folder"])
    assert line.endswith("the same as then")
    for name, gradient in kept["gradients"].items():
        assert torch.equal(names["gradients"][name], gradient), name


@pytest.mark.parametrize("installed", [True, False])
def test_ipython_is_taken_where_it_is_installed(monkeypatch, installed: bool) -> None:
    opened = []
    ipython = ModuleType("IPython")
    ipython.embed = lambda **words: opened.append(("IPython", words["user_ns"], words["banner1"]))
    plain = lambda banner, local, exitmsg: opened.append(("code", local, banner))  # noqa: E731
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(code, "interact", plain)
    names = {"loss": 1.5}
    debugger.interact(names, "step 3")
    ((which, scope, banner),) = opened
    assert which == ("IPython" if installed else "code")
    assert scope is names and banner.startswith("step 3")


def test_a_disk_that_is_full_is_a_warning_and_not_another_error(
    state, config, monkeypatch, caplog
) -> None:
    def full(*_: object) -> None:
        raise StorageError("kept: could not be written: no space; it needs 9 bytes, 0 are free")

    monkeypatch.setattr(debugger, "save_snapshot", full)
    assert debugger.write_bundle(state, config, "why") is None
    assert "it needs 9 bytes, 0 are free" in caplog.text


def test_gradients_that_are_not_finite_are_named_in_order() -> None:
    found = {
        "a": torch.ones(2),
        "b": torch.tensor([1.0, torch.inf]),
        "c": torch.tensor([torch.nan, 1.0]),
    }
    assert debugger.odd_gradients(found) == ["b", "c"]


# Attached to a loop


class Tagged:
    """The tags of a record, instead of one."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}

    def tags(self, values: dict[str, object]) -> None:
        self.values |= values


@pytest.fixture
def tokens() -> token_files.Tokens:
    ids = np.random.default_rng(0).integers(0, 97, 400).astype(np.uint16)
    return token_files.Tokens(ids, 400, "", 1, Path("train.bin"))


@pytest.fixture
def fitted(state, make_config, tokens, tmp_path: Path, monkeypatch) -> Callable[[], Tagged]:
    """A loop of 3 steps with the debugger attached; step 1 is to be looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    small = {"train__batch_size": 2, "train__sequence_length": 16, "precision": "bf16"}
    config = make_config(train__steps=3, train__warmup_steps=1, **small)

    def call(record: Tagged, suspended: Callable[[], Any] = contextlib.nullcontext) -> None:
        stop = SimpleNamespace(suspended=suspended)
        read = partial(loop.micro_batches, tokens, config.train)
        with debugger.attached(state, config, record, Inputs(tokens, tokens, ""), stop) as look:
            list(loop.fit(state, config.train, read, look=look, look_at=1))

    return call


def test_without_a_terminal_the_step_is_kept_and_tagged(fitted, monkeypatch) -> None:
    monkeypatch.setattr(debugger, "has_terminal", lambda: False)
    record = Tagged()
    fitted(record)
    why = "debug.interact_at_step=1: no terminal here, so no interpreter"
    folder = record.values.pop("debug.bundle")
    assert record.values == {"debug.why": why}
    assert snapshot.read_facts(folder)["why"] == why


def test_in_a_terminal_signals_are_suspended_while_somebody_looks(fitted, monkeypatch) -> None:
    order: list[str] = []

    @contextlib.contextmanager
    def suspended() -> Iterator[None]:
        order.append("suspended")
        yield
        order.append("again")

    monkeypatch.setattr(debugger, "has_terminal", lambda: True)
    monkeypatch.setattr(debugger, "look", lambda state: order.append(f"look at {state.step}"))
    record = Tagged()
    fitted(record, suspended)
    assert order == ["suspended", "look at 1", "again"]
    assert record.values == {"debug.interacted_at_step": 1}


@pytest.mark.parametrize("full", [False, True])
def test_an_error_leaves_the_loop_explained_and_its_step_kept(
    fitted, state, monkeypatch, full: bool
) -> None:
    def no_room(*_: object) -> None:
        raise StorageError("no space")

    state.model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = torch.nan
    if full:
        monkeypatch.setattr(debugger, "save_snapshot", no_room)
    record = Tagged()
    with pytest.raises(NumericsError) as stopped:
        fitted(record)
    said = str(stopped.value)
    assert said.startswith("step 0: the loss is nan; no update was made\nFirst not finite: ")
    assert "transformer.h.0.mlp.c_fc" in said and "The step's tokens in train.bin:" in said
    folder = record.values.pop("debug.bundle")
    assert record.values == {"debug.why": said}
    assert folder == "not written" if full else snapshot.read_facts(folder)["why"] == said


def test_a_validation_error_leaves_the_loop_with_its_own_explanation(
    state, make_config, tokens, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"train__batch_size": 2, "train__sequence_length": 16, "train__val_tokens": 64}
    config, record = make_config(**small), Tagged()
    state.model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = torch.nan
    with (
        pytest.raises(NumericsError) as stopped,
        debugger.attached(state, config, record, Inputs(tokens, tokens, ""), Interruption()),
    ):
        validation.validate(state, tokens, config.train)
    assert str(stopped.value).startswith("the validation loss is nan: this model is not kept\n")
    assert "in validation batch 1" in str(stopped.value)
    assert record.values["debug.why"] == str(stopped.value)


# The stage, from outside


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A tiny pipeline with tokens and initial weights, so that train can run by itself."""
    repo = tiny_pipeline(tmp_path_factory.mktemp("look"))
    repo.env["MLFLOW_TRACKING_URI"] = "sqlite:////dev/null"  # one warning, and no store to make
    made = configuration.load(repo.folder / "params.yaml")
    texts = sorted((repo.folder / "data/text").glob("*.txt"))
    documents = [
        Document(path.name, "val" if n % 3 == 0 else "train", path.read_text("utf-8"))
        for n, path in enumerate(texts)
    ]
    token_writer.write_tokens(documents, repo.folder / paths.TOKENS)
    save_model(import_hf_weights.build(made), repo.folder / paths.INIT)
    return repo


def settings(repo: Checkout, **changes: object) -> None:
    raw = OmegaConf.load(repo.folder / "params.yaml")
    for name, value in changes.items():
        OmegaConf.update(raw, name.replace("__", "."), value)
    OmegaConf.save(raw, repo.folder / "params.yaml")


def bundles(repo: Checkout) -> list[Path]:
    return sorted((repo.folder / ".runs" / "debug").glob("*-step-*"))


def tags(repo: Checkout) -> dict[str, str]:
    lines = (repo.folder / "records" / "train.jsonl.part").read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return {k: v for e in events if e["kind"] == "tags" for k, v in e["values"].items()}


@pytest.mark.fault(31)
def test_a_run_that_leaves_the_finite_numbers_keeps_the_step_and_one_command_opens_it(
    prepared: Checkout,
) -> None:
    # Decay of 10 at a rate of 10 multiplies weights by -99 a step: they overflow by themselves.
    settings(prepared, train__lr=10.0, train__weight_decay=10.0, train__steps=40)
    before = bundles(prepared)
    done = prepared.run(sys.executable, "-m", "stages.train", expect=4)
    settings(prepared, train__lr=0.001, train__weight_decay=0.1, train__steps=6)
    (kept,) = set(bundles(prepared)) - set(before)
    why = re.search(r"error: (step (\d+): .* is (?:nan|inf|-inf).*)", done.stderr)
    assert why, done.stderr
    assert f"{why[1]}\nFirst not finite: " in done.stderr
    span = re.search(r"`python -m pipeline text (\d+-\d+)`", done.stderr)
    assert "micro-batch 1: " in done.stderr and span
    tokens = token_files.open_tokens(prepared.folder / paths.TOKENS, "train")
    first, last = map(int, span[1].split("-"))
    assert f"tokens: {span[1]} (document" in token_spans.text(tokens, first, last)
    assert f"-m pipeline debug {kept}" in done.stderr
    assert tags(prepared)["debug.bundle"] == str(kept)
    facts = snapshot.read_facts(kept)
    assert facts["step"] == int(why[2]) and facts["why"].startswith(f"{why[1]}\nFirst not finite: ")
    opened = prepared.run(sys.executable, "-m", "pipeline", "debug", str(kept))
    assert f"step {why[2]}: {why[1]}" in opened.stdout
    assert "the same as then" in opened.stdout
    assert "not finite: the gradient of transformer." in opened.stdout


def test_without_a_terminal_the_asked_step_is_written_and_training_goes_on(
    prepared: Checkout,
) -> None:
    settings(prepared, debug__interact_at_step=2)
    before = bundles(prepared)
    done = prepared.run(sys.executable, "-m", "stages.train")
    settings(prepared, debug__interact_at_step=-1)
    (kept,) = set(bundles(prepared)) - set(before)
    assert "no terminal here, so no interpreter" in done.stderr
    assert "best validation loss" in done.stdout
    assert snapshot.read_facts(kept)["step"] == 2


def test_in_a_terminal_an_interpreter_opens_in_the_step(prepared: Checkout) -> None:
    pty = pytest.importorskip("pty")
    settings(prepared, debug__interact_at_step=2)
    before = bundles(prepared)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=prepared.folder,
        env=prepared.env | {"PYTHONPATH": "", "TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, b"print('SEEN', step, tuple(logits.shape), len(gradients))\nexit()\n")
    said = b""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                said += os.read(ours, 65536)
            except OSError:  # the other side has closed
                break
    process.wait(10)
    os.close(ours)
    settings(prepared, debug__interact_at_step=-1)
    text = said.decode(errors="replace")
    assert process.returncode == 0, text
    assert "between the gradients and the update" in text
    assert "SEEN 2 (2, 32, 50257) 28" in text
    assert "best validation loss" in text, "training went on afterwards"
    assert bundles(prepared) == before


def test_a_folder_that_is_no_bundle_ends_in_one_message(prepared: Checkout) -> None:
    done = prepared.run(sys.executable, "-m", "pipeline", "debug", "data", expect=3)
    assert "error: data: no snapshot of a training step is there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_look_beyond_the_last_step_is_refused(make_config) -> None:
    from pipeline.errors import ConfigError

    with pytest.raises(ConfigError, match="debug.interact_at_step=6: expected less than"):
        make_config(train__steps=6, train__warmup_steps=1, debug__interact_at_step=6)


def test_a_validation_loss_that_is_not_finite_leaves_its_own_first_window_to_look_at(
    make_config, monkeypatch
) -> None:
    config = make_config(train__batch_size=1, train__sequence_length=16)
    windows = [batches(7)[0], batches(8)[0]]
    monkeypatch.setattr(validation, "windows", lambda *_: iter(windows))
    monkeypatch.setattr(token_spans, "of_validation", lambda *_: "its text")
    model = GPT(SHAPE)
    state = training_step.start(model, config.train, choose_precision("fp32", CPU), narrowing=1.0)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    error = validation.ValidationError(torch.nan)
    told = nonfinite.explain_validation(error, state, None, config.train)
    assert str(told).startswith("the validation loss is nan: this model is not kept\nFirst not")
    assert torch.equal(state.batches[0][0], windows[0][0]) and len(state.batches) == 1
    assert state.loss != state.loss and "cpu" in state.rng
