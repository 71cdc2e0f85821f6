"""A training that is stopped at any moment goes on to the bit, in the same record."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline import paths
from pipeline.compute import machine
from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import Ranks
from pipeline.compute.runtime import generator
from pipeline.data import token_writer
from pipeline.data.documents import Document
from pipeline.diagnostics import doctor, forecast
from pipeline.errors import InputError, NumericsError, ResumeError, StorageError, exit_code
from pipeline.model import model_dir
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model
from pipeline.records import provenance, record_file, stage_graph
from pipeline.resume import checkpoints, interruption, run_folder, snapshot
from pipeline.storage import digests, folders
from pipeline.tracking import recording
from pipeline.training import history, loop, training_step, validation
from pipeline.training.history import History
from stages import common, train
from tests.conftest import NoCourier, params
from tests.helpers.steps import one_step

CPU = torch.device("cpu")
# Five windows of 16 tokens an epoch, four a step: epochs end inside steps and between them.
SMALL: dict[str, Any] = {
    "model__n_layer": 1,
    "model__n_head": 1,
    "model__n_embd": 8,
    "model__block_size": 16,
    "model__dropout": 0.3,
    "train__steps": 12,
    "train__batch_size": 2,
    "train__sequence_length": 16,
    "train__accumulate": 2,
    "train__warmup_steps": 2,
    "train__val_every": 4,
    "train__val_tokens": 40,
    "checkpoint__every_steps": 3,
}
OUTPUTS = [Path(out) for out in stage_graph.stages()["train"].outs]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed child needs fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("prepared")
    words = np.random.default_rng(0).choice(["on", "in", "up", "off", "to"], 80)
    texts = {"train": " ".join(words), "val": " ".join(words[:50])}
    documents = [Document(split, split, text, True) for split, text in texts.items()]
    token_writer.write_tokens(iter(documents), made / paths.TOKENS, workers=1)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    initialize(model, configuration.from_dict(params()).init, generator(0, "init"))
    save_model(model, made / paths.INIT)
    return made


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch) -> Path:
    """A workspace with tokens and initial weights, and a stage without what resume is not about."""
    for folder in (paths.TOKENS, paths.INIT):
        folders.copy(prepared / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(recording, "Courier", NoCourier)
    monkeypatch.setattr(forecast, "before_training", lambda *_: [])
    monkeypatch.setattr(forecast, "after_first_steps", lambda *_: "")
    monkeypatch.setattr(doctor, "judge", lambda *_: ({}, []))
    monkeypatch.setattr(doctor.Rounds, "look", lambda *_: [])
    monkeypatch.setattr(machine, "matrix_rate", lambda *_: 1e9)
    monkeypatch.setattr(record_file.git, "said", lambda *_: "")
    return tmp_path


@pytest.fixture
def settings(make_config) -> Callable[..., configuration.Config]:
    return lambda **changes: make_config(**SMALL | changes)


def the_run() -> Path:
    (found,) = run_folder._folders()
    return found


def saved_steps() -> list[str]:
    return sorted(path.name for path in (the_run() / "checkpoints").iterdir())


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, act: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """`act` in the middle of a step; a kill after the gradients of its first micro-batch."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        original = training_step.gradients

        def gradients(
            state: training_step.TrainState, batches: list[training_step.Batch], *each: Any
        ) -> torch.Tensor:
            if state.step == step:
                if act is kill:
                    original(state, batches[:1])
                act()
            return original(state, batches, *each)

        training_step.gradients = gradients
        try:
            yield
        finally:
            training_step.gradients = original

    return patched()


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os._exit(exit_code(error))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Seen:
    """Exact losses by step over all processes, and the state in the end."""

    def __init__(self, folder: Path, monkeypatch):
        self.losses, self.end = folder / "losses.txt", folder / "end"
        add, through = History.add, train.loop

        def note(self_: History, report: loop.StepReport, *rest: Any) -> None:
            with open(self.losses, "a") as file:
                file.write(f"{report.step} {report.loss.hex()}\n")
            add(self_, report, *rest)

        def to_the_end(job: train.Job, state: training_step.TrainState, *rest: Any) -> None:
            through(job, state, *rest)
            snapshot.save_snapshot(self.end, state, {})

        monkeypatch.setattr(History, "add", note)
        monkeypatch.setattr(train, "loop", to_the_end)

    def take(self) -> tuple[dict[int, str], dict[str, str], bytes]:
        """Losses by step, the sums of the state's files, the best model; then begin anew."""
        losses: dict[int, str] = {}
        for line in self.losses.read_text().splitlines():
            step, loss = line.split()
            assert losses.setdefault(int(step), loss) == loss, f"step {step} came out in two ways"
        sums = {
            n: s["sha256"] for n, s in json.loads((self.end / "sha256.json").read_text()).items()
        }
        self.losses.unlink()
        folders.remove(self.end)
        return (
            losses,
            sums,
            hashlib.sha256((paths.MODEL / "model.safetensors").read_bytes()).digest(),
        )


def recorded() -> list[int]:
    events = record_file.read(paths.record("train"))
    return [e["step"] for e in events if "train/loss" in e.get("values", {})]


@needs_fork
@pytest.mark.fault(38)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("kills", [(7, 11), (5, 6)])
def test_killed_twice_and_resumed_equals_unbroken_to_the_bit(
    workspace: Path, settings, monkeypatch, precision: str, kills: tuple[int, int]
) -> None:
    seen = Seen(workspace, monkeypatch)
    config = settings(precision=precision)
    train.main(config)
    unbroken = seen.take()
    folders.discard(the_run())
    for step in kills:
        with at_step(step, kill):
            assert in_a_child(lambda: train.main(config)) == -signal.SIGKILL
    assert saved_steps()
    train.main(config)
    assert seen.take() == unbroken
    assert recorded() == list(range(12))


def _without_chance(monkeypatch) -> None:
    monkeypatch.setattr(checkpoints.runtime, "set_rng_state", lambda *_: None)


def _without_position(monkeypatch) -> None:
    original = loop.micro_batches
    monkeypatch.setattr(train, "micro_batches", lambda t, c, step, **_: original(t, c, step - 6))


@needs_fork
@pytest.mark.fault(38, control=True)
@pytest.mark.parametrize("drop", [_without_chance, _without_position])
def test_without_the_random_state_or_the_data_position_it_would_differ(
    workspace: Path, settings, monkeypatch, drop: Callable
) -> None:
    seen = Seen(workspace, monkeypatch)
    train.main(settings())
    unbroken = seen.take()
    folders.discard(the_run())
    with at_step(6, kill):
        assert in_a_child(lambda: train.main(settings())) == -signal.SIGKILL
    seen.losses.unlink()
    drop(monkeypatch)
    train.main(settings())
    losses, sums, _ = seen.take()
    assert sums != unbroken[1]
    assert {step: unbroken[0][step] for step in losses} != losses


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_finishes_the_step_saves_and_leaves(
    workspace: Path, settings, number: int, code: int
) -> None:
    handler = signal.getsignal(number)
    ended = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    with at_step(7, lambda: os.kill(os.getpid(), number)), pytest.raises(ended):
        train.main(settings())
    assert signal.getsignal(number) == handler
    assert saved_steps()[-1] == "step-00000008"
    said = json.loads((the_run() / "run_status.json").read_text())
    assert (said["state"], said["step"], said["exit_code"]) == ("preempted", 8, code)
    assert (
        record_file.read(paths.record("train").with_suffix(".jsonl.part"))[-1]["status"] == "KILLED"
    )
    train.main(settings())
    assert recorded() == list(range(12))


@pytest.mark.fault(36, control=True)
def test_without_the_handler_the_step_is_lost(workspace: Path, settings, monkeypatch) -> None:
    monkeypatch.setattr(interruption.Interruption, "_listen", lambda self: None)
    number = signal.SIGINT
    with at_step(7, lambda: os.kill(os.getpid(), number)), pytest.raises(KeyboardInterrupt):
        train.main(settings())
    assert saved_steps()[-1] == "step-00000006"


def stopped_in_validation(config: configuration.Config, monkeypatch) -> None:
    windows = validation.windows

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from windows(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "windows", interrupted)
        with pytest.raises(SystemExit):
            train.main(config)


def test_a_signal_in_the_last_validation_leaves_it_for_later_twice(
    workspace: Path, settings, monkeypatch
) -> None:
    config = settings(train__val_every=50)
    for _ in range(2):  # the second time no step is left
        stopped_in_validation(config, monkeypatch)
        assert saved_steps()[-1] == "step-00000012"
    train.main(config)
    events = record_file.read(paths.record("train"))
    assert [e["step"] for e in events if "train/val_loss" in e.get("values", {})] == [11]
    assert model_dir.load_model(paths.MODEL)


def test_a_signal_during_validation_leaves_it_for_later(
    workspace: Path, settings, monkeypatch
) -> None:
    stopped_in_validation(settings(), monkeypatch)
    assert saved_steps() == ["step-00000003", "step-00000004"]
    train.main(settings())
    events = record_file.read(paths.record("train"))
    assert [e["step"] for e in events if "train/val_loss" in e.get("values", {})] == [3, 7, 11]


@needs_fork
def test_a_validation_after_the_newest_checkpoint_keeps_its_best_model(
    workspace: Path, settings, monkeypatch
) -> None:
    with monkeypatch.context() as patch:  # saved after step 4, before its validation
        patch.setattr(History, "validation_due", lambda self: False)
        stopped_at(3, settings())
    with at_step(5, kill):  # validated, and killed before the next checkpoint
        assert in_a_child(lambda: train.main(settings())) == -signal.SIGKILL
    stopped_at(6, settings())
    facts = snapshot.read_facts(the_run() / "checkpoints" / saved_steps()[-1])
    assert facts["best_step"] == 4
    assert (the_run() / "best" / "step-00000004" / "model.safetensors").exists()


@pytest.mark.alone
@needs_fork
@pytest.mark.fault(37)
def test_a_second_signal_during_the_save_ends_at_once_and_harms_nothing(
    workspace: Path, settings, monkeypatch
) -> None:
    def slow(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    def work() -> None:
        monkeypatch.setattr(folders, "_sync", slow)
        train.main(settings())

    with at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        began = time.monotonic()
        monkeypatch.setattr(checkpoints.Checkpoints, "due", lambda *_: False)
        assert in_a_child(lambda: train.main(settings())) == 143  # the first alone
    assert saved_steps() == ["step-00000006"]
    with at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        monkeypatch.setattr(History, "validation_due", lambda self: False)
        assert in_a_child(work) == -signal.SIGTERM
        assert time.monotonic() - began < 25
    assert "step-00000009" not in saved_steps()
    monkeypatch.undo()


@pytest.fixture
def small_state(make_config) -> training_step.TrainState:
    config = make_config(**SMALL)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    return training_step.start(model, config.train, choose_precision("fp32", CPU), narrowing=1.0)


def kept(folder: Path, make_config, **changes: Any) -> checkpoints.Checkpoints:
    return checkpoints.Checkpoints(folder, make_config(**changes).checkpoint)


FACTS = {"best_step": 0}


@pytest.mark.alone
@needs_fork
@pytest.mark.fault(38)
def test_forty_kills_in_the_middle_of_saves_lose_no_checkpoint(
    tmp_path: Path, make_config, small_state
) -> None:
    chance, first = random.Random(5), 0
    torn = 0
    for _ in range(40):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            saved = kept(tmp_path, make_config)
            for step in range(first + 1, 10**6):
                small_state.step = step
                saved.save(small_state, FACTS)
                os.write(tell, step.to_bytes(4, "little"))  # acknowledged
        os.close(tell)
        os.read(told, 4)  # it is at work
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += bool(list((tmp_path / "checkpoints").glob(".*.partial")))
        last = first + 1
        while acknowledged := os.read(told, 4):
            last = int.from_bytes(acknowledged, "little")
        os.close(told)
        found = kept(tmp_path, make_config).newest()
        facts = found.facts
        assert facts["step"] >= last
        assert not list((tmp_path / "checkpoints").glob(".*"))
        first = facts["step"]
    assert torn > 5  # the kills did hit saves


@pytest.mark.alone
@needs_fork
@pytest.mark.fault(37, control=True)
@pytest.mark.fault(38, control=True)
@pytest.mark.fault(41, control=True)
def test_a_save_in_place_is_torn_by_a_kill(tmp_path: Path, small_state) -> None:
    tensors = {n: p.detach() for n, p in small_state.model.named_parameters()}
    tensors["more"] = torch.zeros(4_000_000)
    torn = 0
    for attempt in range(10):
        child = os.fork()
        if child == 0:
            while True:
                torch.save(tensors, tmp_path / "naive.pt")
        time.sleep(0.05 + 0.004 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            torch.load(tmp_path / "naive.pt", weights_only=True)
        except Exception:  # of every kind
            torn += 1
    assert torn > 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def stopped_at(step: int, config: configuration.Config) -> None:
    with (
        at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        train.main(config)


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    "harm", ["flip", "truncate", "facts", "key", "missing", "sums", "best", "no best"]
)
def test_a_damaged_checkpoint_is_passed_over_aloud(
    workspace: Path, settings, caplog, capsys, harm: str
) -> None:
    stopped_at(8 if "best" in harm else 7, settings())
    newest = the_run() / "checkpoints" / saved_steps()[-1]
    tensors = newest / "exp_avg.safetensors"
    if harm == "flip":
        flip(tensors)
    elif harm == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif harm == "facts":
        (newest / "snapshot.json").write_text("{")
    elif harm == "key":
        text = (newest / "snapshot.json").read_text()
        (newest / "snapshot.json").write_text(text.replace("best_step", "bess_step"))
    elif harm == "sums":
        (newest / "sha256.json").unlink()
    elif harm == "no best":
        folders.remove(the_run() / "best" / "step-00000008")
    elif harm == "missing":
        tensors.unlink()
    else:
        flip(the_run() / "best" / "step-00000008" / "model.safetensors")
    train.main(settings())
    assert "a damaged checkpoint is passed over" in caplog.text
    assert "resuming from step 6/12" in capsys.readouterr().out
    assert recorded() == list(range(12))


def test_a_person_is_told_that_checkpoints_are_whole(workspace: Path, settings) -> None:
    stopped_at(7, settings())
    lines = model_dir.verify(the_run())
    assert [line.partition(": ")[2] for line in lines][1:] == [
        f"training state after step {step}: whole, SHA-256 as written" for step in (6, 8)
    ]
    assert "best" in lines[0]
    flip(the_run() / "checkpoints" / "step-00000006" / "exp_avg.safetensors")
    with pytest.raises(InputError, match="step-00000006.exp_avg.safetensors: damaged"):
        model_dir.verify(the_run())


@pytest.mark.fault(43, control=True)
def test_safetensors_itself_takes_the_flipped_bit(workspace: Path, settings) -> None:
    from safetensors.torch import load_file

    stopped_at(7, settings())
    tensors = the_run() / "checkpoints" / saved_steps()[-1] / "exp_avg.safetensors"
    flip(tensors)
    assert load_file(tensors)


@pytest.mark.fault(43)
def test_with_no_whole_checkpoint_nothing_starts_in_silence(
    workspace: Path, settings, capsys
) -> None:
    stopped_at(7, settings())
    for name in saved_steps():
        flip(the_run() / "checkpoints" / name / "model.safetensors")
    with pytest.raises(InputError, match=r"none of 2 checkpoints is whole.*resume=never"):
        train.main(settings())
    first = json.loads((the_run() / run_folder.JOURNAL).read_text().splitlines()[0])["id"]
    train.main(settings(checkpoint__resume="never"))
    assert record_file.read(paths.record("train"))[0]["id"] != first
    assert "resuming" not in capsys.readouterr().out


@pytest.mark.fault(44)
def test_changed_settings_start_afresh_and_say_so(workspace: Path, settings, capsys) -> None:
    stopped_at(7, settings())
    train.main(settings(train__lr=0.004))
    said = capsys.readouterr().out
    assert "starting from step 0" in said and "here train.lr=0.004 instead of 0.002" in said
    assert recorded() == list(range(12))
    train.main(settings())  # the first one is still there
    assert "resuming from step 8/12" in capsys.readouterr().out


@pytest.mark.fault(44)
@pytest.mark.parametrize("change", ["settings", "data", "code"])
def test_going_on_that_is_forced_names_every_difference(
    workspace: Path, settings, monkeypatch, change: str
) -> None:
    stopped_at(7, settings())
    words = {
        "settings": "train.lr=0.004 instead of 0.002",
        "code": "other code in pipeline/model/gpt.py",
    }
    changes = {"train__lr": 0.004} if change == "settings" else {}
    if change == "code":
        other = provenance.code_of("train") | {"pipeline/model/gpt.py": "other"}
        monkeypatch.setattr(run_folder, "code_of", lambda _: other)
    if change == "data":
        documents = [Document(s, s, f"{s} off up in to on " * 20, True) for s in ("train", "val")]
        token_writer.write_tokens(iter(documents), paths.TOKENS, workers=1)
    with pytest.raises(
        ResumeError, match=words.get(change, "other bytes in train; other")
    ) as error:
        train.main(settings(checkpoint__resume="require", **changes))
    assert error.value.exit_code == 7
    assert not paths.record("train").with_suffix(".jsonl.part").read_text().count('"resume"')


@pytest.mark.fault(44, control=True)
def test_a_state_would_load_under_other_settings(workspace: Path, settings, make_config) -> None:
    stopped_at(7, settings())
    path = the_run() / "checkpoints" / saved_steps()[-1]
    other = make_config(**SMALL, train__lr=0.5)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    state = training_step.start(model, other.train, choose_precision("fp32", CPU), narrowing=1.0)
    checkpoints.Checkpoint(path, snapshot.read_facts(path)).restore(state)
    assert state.step == 8


@pytest.mark.fault(41)
def test_a_full_disk_while_saving_is_storage_and_the_last_checkpoint_stays(
    workspace: Path, settings
) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # noqa: E731
    try:
        with (
            at_step(5, fill),
            pytest.raises(StorageError, match=r"needs [\d,]+ bytes, [\d,]+ are free") as error,
        ):
            train.main(settings(train__val_every=12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.exit_code == 5
    assert saved_steps() == ["step-00000003"]
    assert folders.problems(the_run() / "checkpoints" / "step-00000003") == []
    train.main(settings(train__val_every=12))
    assert recorded() == list(range(12))


def as_a_stage(limit: int | None) -> int:
    """The exit code of the stage as `params.yaml` says, with so many bytes of memory more."""
    resource = pytest.importorskip("resource")

    def work() -> None:
        if limit:
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + limit, resource.RLIM_INFINITY))
        common.run(train.main)

    return in_a_child(work)


LARGE = {"train__batch_size": 1024, "train__steps": 1, "train__warmup_steps": 0}


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux limits memory so")
@pytest.mark.parametrize(
    ("limit", "code"),
    [
        pytest.param(100 << 20, 5, marks=pytest.mark.fault(39)),
        pytest.param(None, 0, marks=pytest.mark.fault(39, control=True)),
    ],
)
def test_memory_that_does_not_suffice_names_the_micro_batch(
    workspace: Path, limit: int | None, code: int, capfd, monkeypatch
) -> None:
    OmegaConf.save(OmegaConf.create(params(**SMALL | LARGE)), "params.yaml")
    monkeypatch.setattr(common.dvc_plots, "keep_script", lambda: None)
    assert as_a_stage(limit) == code
    told = "error: out of memory" in (said := capfd.readouterr().err)
    assert told == (code == 5)
    assert ("train.batch_size=512 train.accumulate=" in said) == told
    if told:
        state = json.loads((the_run() / "run_status.json").read_text())
        assert (state["state"], state["exit_code"]) == ("failed", 5)


@needs_fork
@pytest.mark.fault(42)
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_a_folder_that_cannot_be_written_ends_before_training(
    workspace: Path, settings, monkeypatch
) -> None:
    told = workspace / "told"
    told.touch()
    told.chmod(0o666)
    for folder in [workspace, *workspace.parents][:4]:
        folder.chmod(folder.stat().st_mode | 0o055)

    config = settings()  # read before the child gives its rights up, as are the sources
    provenance.find_code()

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        monkeypatch.setattr(train, "train", lambda *_: told.write_text("it trained"))
        try:
            train.main(config)
        except StorageError as error:
            told.write_text(str(error))

    mode = workspace.stat().st_mode
    workspace.chmod(0o555)
    try:
        assert in_a_child(work) == 0
    finally:
        workspace.chmod(mode)
    assert ".runs" in told.read_text() and "cannot be written" in told.read_text()


@needs_fork
@pytest.mark.fault(42, control=True)
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_a_naive_training_learns_of_a_folder_like_that_when_it_saves(
    tmp_path: Path, small_state
) -> None:
    ids = torch.zeros(1, 8, dtype=torch.int64)
    ended_steps, tell = os.pipe()
    tmp_path.chmod(0o555)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        for _ in range(3):
            one_step(small_state, [(ids, ids)], 1e-3, 1.0)
        os.write(tell, b"trained")
        torch.save({}, tmp_path / "naive.pt")

    try:
        assert in_a_child(work) == 1
    finally:
        tmp_path.chmod(0o755)
        os.close(tell)
    assert os.read(ended_steps, 16) == b"trained"
    os.close(ended_steps)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(41)
def test_a_disk_too_small_for_the_checkpoints_ends_before_training(
    workspace: Path, settings, monkeypatch
) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"more bytes, 1,000 are free.*checkpoint\.keep=2"):
        train.main(settings())
    assert not (the_run() / "checkpoints").exists()


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_saving_takes_less_memory_than_the_model(tmp_path: Path, make_config) -> None:
    config = make_config()
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=64))
    state = training_step.start(model, config.train, choose_precision("fp32", CPU), narrowing=1.0)
    x = torch.zeros(1, 8, dtype=torch.int64)
    one_step(state, [(x, x)], 1e-3, 1.0)

    def resident(line: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.partition(f"{line}:")[2].split()[0]) * 1024

    def work() -> None:
        save = kept(tmp_path, make_config).save
        state.step = 1
        save(state, FACTS)  # what the first one imports is not its memory
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        state.step = 2
        save(state, FACTS)
        save_model(model, tmp_path / "model")
        (tmp_path / "peak").write_text(str(resident("VmHWM") - before))

    assert in_a_child(work) == 0
    assert int((tmp_path / "peak").read_text()) < 4 * model.parameter_count()


def test_the_newest_are_kept_and_the_best_models_that_they_name(
    tmp_path: Path, make_config, small_state
) -> None:
    saved = kept(tmp_path, make_config, checkpoint__keep=2)
    for step, best in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5)]:
        small_state.step = step
        if step == best:
            saved.keep_best(small_state)
        saved.save(small_state, {"best_step": best})
    names = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000004", "step-00000005"]
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == [
        "step-00000003",
        "step-00000005",
    ]


def test_best_models_do_not_pile_up_between_checkpoints(
    tmp_path: Path, make_config, small_state
) -> None:
    saved = kept(tmp_path, make_config)
    small_state.step = 1
    saved.keep_best(small_state)
    saved.save(small_state, {"best_step": 1})
    for step in (2, 3, 4):
        small_state.step = step
        saved.keep_best(small_state)
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == [
        "step-00000001",
        "step-00000004",
    ]


def test_a_disk_that_is_full_for_the_record_is_storage_and_costs_nothing(
    workspace: Path, settings, monkeypatch, capsys
) -> None:
    write = record_file.Record._write

    def full(self: record_file.Record, event: record_file.Event) -> None:
        if event.get("step") == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, event)

    OmegaConf.save(OmegaConf.create(params(**SMALL)), "params.yaml")
    monkeypatch.setattr(common.dvc_plots, "keep_script", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(record_file.Record, "_write", full)
        with pytest.raises(SystemExit) as ended:
            common.run(train.main)
    assert ended.value.code == 5 and "No space left on device" in capsys.readouterr().err
    assert json.loads((the_run() / "run_status.json").read_text())["exit_code"] == 5
    train.main(settings())
    assert recorded() == list(range(12))


def test_checkpoints_come_by_steps_and_by_minutes(tmp_path: Path, make_config, monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    changes = {"checkpoint__every_steps": 10, "checkpoint__every_minutes": 2.0}
    saved = checkpoints.Checkpoints(tmp_path, make_config(**changes).checkpoint)
    assert [saved.due(done) for done in (1, 9, 10, 20)] == [False, False, True, True]
    now = 119.0
    assert not saved.due(3)
    now = 120.0
    assert saved.due(3)
    never = {"checkpoint__every_steps": 0, "checkpoint__every_minutes": 0.0}
    none = checkpoints.Checkpoints(tmp_path, make_config(**never).checkpoint)
    now = 1e9
    assert not any(none.due(done) for done in range(1, 100))


def test_another_machine_is_warned_of_by_name(
    workspace: Path, settings, monkeypatch, caplog
) -> None:
    stopped_at(7, settings())
    here = SimpleNamespace(precision=choose_precision("fp32", CPU), ranks=Ranks())
    now = checkpoints.machine(here) | {"torch": "9.9"}
    monkeypatch.setattr(checkpoints, "machine", lambda _: now)
    with caplog.at_level(logging.WARNING):
        train.main(settings())
    (line,) = [m for m in caplog.messages if "not bit-equal" in m]
    assert line.endswith(f": torch: {torch.__version__} then, 9.9 now")


@needs_fork
def test_a_step_that_comes_out_otherwise_the_second_time_is_told(
    workspace: Path, settings, monkeypatch, caplog
) -> None:
    with at_step(5, kill):
        assert in_a_child(lambda: train.main(settings())) == -signal.SIGKILL
    _without_chance(monkeypatch)
    train.main(settings())
    assert "step 3 is done again and its loss is" in caplog.text
    assert recorded() == list(range(12))


def test_a_run_that_left_the_numbers_keeps_its_checkpoints_and_says_why(
    workspace: Path, settings, monkeypatch
) -> None:
    original = training_step.gradients

    def nan(
        state: training_step.TrainState, batches: list[training_step.Batch], *each: Any
    ) -> torch.Tensor:
        return torch.tensor(torch.nan) if state.step == 7 else original(state, batches, *each)

    monkeypatch.setattr(training_step, "gradients", nan)
    with pytest.raises(NumericsError):
        train.main(settings())
    said = json.loads((the_run() / "run_status.json").read_text())
    assert (said["state"], said["exit_code"], said["step"]) == ("failed", 4, 6)
    assert "step 7" in said["message"]
    assert saved_steps()[-1] == "step-00000006"


def test_a_finished_training_is_kept_until_dvc_has_it(workspace: Path, settings, capsys) -> None:
    """DVC killed between the end of the stage and its commit costs no training."""
    train.main(settings())
    before = {path: digests.tree_digest(path) for path in OUTPUTS}
    for path in OUTPUTS:
        folders.remove(path)  # as DVC does before it starts a stage
    train.main(settings())
    assert "reusing its verified result" in capsys.readouterr().out
    assert {path: digests.tree_digest(path) for path in OUTPUTS} == before
    run_folder.forget_result()  # as the next stage does
    assert run_folder._folders() == []


@pytest.mark.parametrize("how", ["forced", "by hand"])
def test_a_training_that_is_asked_for_again_is_done_again(
    workspace: Path, settings, monkeypatch, capsys, how: str
) -> None:
    train.main(settings())
    if how == "forced":
        md5 = digests.dvc_md5(paths.MODEL)
        Path("dvc.lock").write_text(f"outs:\n- path: artifacts/model\n  md5: {md5}\n")
    else:
        (workspace / ".dvc").mkdir()
        monkeypatch.delenv("DVC_ROOT")
    first = record_file.read(paths.record("train"))[0]["id"]
    train.main(settings())
    assert record_file.read(paths.record("train"))[0]["id"] != first


def test_a_time_budget_counts_what_was_spent_before(workspace: Path, settings, monkeypatch) -> None:
    config = settings(train__time_budget=5.0)
    stopped_at(5, config)
    facts = snapshot.read_facts(the_run() / "checkpoints" / saved_steps()[-1])
    assert 0 < facts["budget"]["spent"] < 60 and facts["budget"]["planned"] == 12
    path = the_run() / "checkpoints" / saved_steps()[-1] / "snapshot.json"
    seen: list[float] = []
    original = history.Budget

    def budget(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("spent", 0.0))
        return original(*args, **kwargs)

    monkeypatch.setattr(history, "Budget", budget)
    train.main(config)
    assert facts["budget"]["spent"] in seen
    assert not path.exists()


def test_a_journal_cut_by_a_kill_is_gone_on_with(tmp_path: Path, monkeypatch, make_config) -> None:
    monkeypatch.chdir(tmp_path)
    journal = tmp_path / "record.jsonl"
    first = record_file.Record("train", make_config(), journal=journal)
    first.metrics({"train/loss": 3.0}, 0)
    first.metrics({"train/loss": 2.0}, 1)
    with open(journal, "a", encoding="utf-8") as file:
        file.write('{"kind": "metrics", "step": 2, "val')
    for file in first._files:  # as a kill does
        file.close()
    again = record_file.Record("train", make_config(), journal=journal)
    again.metrics({"train/loss": 2.5, "train/other": 1.0}, 1)
    again.metrics({"train/loss": 1.0}, 2)
    again.close("FINISHED")
    events = record_file.read(paths.record("train"))
    assert events == [json.loads(line) for line in journal.read_text().splitlines()]
    points = [(e["step"], e["values"]) for e in events if e["kind"] == "metrics"]
    assert points[:4] == [
        (0, {"train/loss": 3.0}),
        (1, {"train/loss": 2.0}),
        (1, {"train/other": 1.0}),
        (2, {"train/loss": 1.0}),
    ]
    assert events[0]["id"] == first.head["id"] == again.head["id"]
    assert [e["kind"] for e in events if e["kind"] != "metrics"] == ["start", "resume", "end"]


def test_a_damaged_line_in_a_journal_is_named_and_nothing_is_thrown_away(
    workspace: Path, settings
) -> None:
    stopped_at(7, settings())
    journal = the_run() / run_folder.JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b":", b"?", 1)
    journal.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"record\.jsonl: line 6 is damaged.*resume=never"):
        train.main(settings())
    assert journal.read_bytes() == b"".join(lines)


def test_never_begins_anew_even_where_a_result_was_left_behind(
    workspace: Path, settings, capsys
) -> None:
    train.main(settings())
    train.main(settings(checkpoint__resume="never"))
    assert "reusing" not in capsys.readouterr().out


def test_a_plan_that_became_shorter_ends_with_a_validation(
    workspace: Path, settings, monkeypatch
) -> None:
    config = settings(train__val_every=50, train__time_budget=5.0)
    with at_step(11, kill):
        assert in_a_child(lambda: train.main(config)) == -signal.SIGKILL
    monkeypatch.setattr(history.Budget, "steps", lambda self, step: 10)
    train.main(config)
    events = record_file.read(paths.record("train"))
    assert [e["step"] for e in events if "train/val_loss" in e.get("values", {})] == [9]


# A device that is given each step before the one before it is read


@pytest.fixture
def ahead(monkeypatch) -> list[bool]:
    """The CPU as such a device; whether each step was settled, as the stage met them."""
    met, add = [], History.add

    def note(self: History, report: loop.StepReport, *rest: Any) -> None:
        met.append(report.settled)
        add(self, report, *rest)

    monkeypatch.setattr(loop, "AHEAD", ("cpu",))
    monkeypatch.setattr(History, "add", note)
    return met


def results(monkeypatch) -> Callable[[], tuple[Any, ...]]:
    """take() -> all that this training has saved and recorded, but for times."""
    saved: list[tuple[int, dict[str, Any]]] = []
    write = checkpoints.save_snapshot

    def note(folder: Path, state: training_step.TrainState, facts: dict[str, Any]) -> None:
        write(folder, state, facts)
        saved.append((state.step, tensors(folder)))

    def tensors(folder: Path) -> dict[str, Any]:
        sums = json.loads((folder / folders.SUMS).read_text())
        facts = snapshot.read_facts(folder)
        return {n: s for n, s in sums.items() if n.endswith("safetensors")} | {
            name: facts[name] for name in ("scaler", "step", "norms", "skipped_in_a_row", "loss")
        }

    def take() -> tuple[Any, ...]:
        bundles = [tensors(path) for path in sorted((paths.runs() / "debug").glob("*"))]
        events = record_file.read(paths.record("train"))
        values = [
            (e["step"], {k: v for k, v in e["values"].items() if not k.startswith("perf/")})
            for e in events
            if "train/loss" in e.get("values", {}) or "train/val_loss" in e.get("values", {})
        ]
        kept = saved[:], bundles, values
        saved.clear()
        folders.discard(the_run())
        folders.discard(paths.runs() / "debug")
        return kept

    monkeypatch.setattr(checkpoints, "save_snapshot", note)
    return take


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_with_steps_ahead_all_that_is_saved_and_recorded_is_equal_to_the_bit(
    workspace: Path, settings, monkeypatch, ahead: list[bool], precision: str
) -> None:
    config = settings(precision=precision, debug__interact_at_step=6)
    seen, take = Seen(workspace, monkeypatch), results(monkeypatch)
    train.main(config)
    # Read first: before checkpoints (3, 6, 9), validations (4, 8, 12), and the look into step 6.
    assert [n + 1 for n, settled in enumerate(ahead) if settled] == [3, 4, 6, 8, 9, 12]
    found = [(seen.take(), *take())]
    monkeypatch.setattr(loop, "AHEAD", ())
    train.main(config)
    found.append((seen.take(), *take()))
    assert all(ahead[12:]) and found[0] == found[1]
    assert [step for step, _ in found[0][1]] == [3, 6, 9] and len(found[0][2]) == 1


@pytest.mark.parametrize("why", ["SIGTERM", "minutes"])
def test_what_comes_up_while_a_step_is_ahead_is_done_after_that_one(
    workspace: Path, settings, monkeypatch, ahead: list[bool], why: str
) -> None:
    """Step 4 has been launched and not read when it comes, and step 5 is being launched."""
    seen, late, saved = Seen(workspace, monkeypatch), [], []
    train.main(settings())
    unbroken = seen.take()
    folders.discard(the_run())
    ahead.clear()

    def save(self: checkpoints.Checkpoints, state: training_step.TrainState, facts: Any) -> None:
        late.clear()
        saved.append(state.step)
        write(self, state, facts)

    write = checkpoints.Checkpoints.save
    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    monkeypatch.setattr(checkpoints.Checkpoints, "due", lambda self, done: bool(late))
    if why == "minutes":
        with at_step(5, lambda: late.append(5)):
            train.main(settings())
    else:
        with at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(SystemExit):
            train.main(settings())
        train.main(settings())
    assert saved == [6] and ahead[3:6] == [True, False, True]
    assert seen.take() == unbroken
