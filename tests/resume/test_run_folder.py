"""One process a training: a second one is refused; a result that was left behind is reused."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from pipeline.errors import BusyError, InputError, NumericsError
from pipeline.resume import run_folder
from pipeline.storage.folders import copy

OUTPUT = Path("artifacts/model")


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)


def produce(text: str) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "weights").write_text(text)


IDENTITY = {
    "stage": "train",
    "params": {"train.lr": 0.1, "train.steps": 9},
    "inputs": {"init": "a"},
    "code": "c",
}


@pytest.fixture
def finished(monkeypatch) -> run_folder.Run:
    """A training that came to its end under a dvc that was stopped before it kept the result."""
    monkeypatch.setenv("DVC_ROOT", str(Path.cwd()))
    with run_folder.claim(IDENTITY) as held:
        held.outputs = [OUTPUT]
        produce("trained once")
        held.share()
        (OUTPUT / "weights").write_text("changed since")
    return held


def adopted() -> bool:
    with run_folder.claim(IDENTITY) as held:
        held.outputs = [OUTPUT]
        return held.adopt()


@pytest.mark.fault(57)
def test_a_result_that_dvc_did_not_come_to_keep_is_reused(finished) -> None:
    assert adopted() and (OUTPUT / "weights").read_text() == "trained once"


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_result_that_dvc_holds_or_that_is_asked_for_by_hand_is_made_again(
    finished, monkeypatch, by_hand: bool
) -> None:
    made = json.loads((finished.folder / run_folder.RESULT).read_text())
    if by_hand:
        monkeypatch.delenv("DVC_ROOT")
    else:
        Path("dvc.lock").write_text(f"md5: {made['md5']}")
    assert not adopted()


def test_a_damaged_result_is_not_reused(finished) -> None:
    (finished.folder / OUTPUT / "weights").write_text("trained 0nce")
    assert not adopted()


def test_a_failed_training_lets_the_next_one_train() -> None:
    with pytest.raises(RuntimeError), run_folder.claim(IDENTITY):
        raise RuntimeError
    with run_folder.claim(IDENTITY) as held:
        assert not held.adopt()


def test_a_copy_never_writes_into_a_linked_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_text("kept")
    target = tmp_path / "out"
    os.link(cache, target)
    source = tmp_path / "new"
    source.write_text("new")
    copy(source, target)
    assert (cache.read_text(), target.read_text()) == ("kept", "new")


@pytest.mark.fault(40)
def test_a_second_trainer_of_the_same_is_told_who_trains_and_writes_nothing() -> None:
    with run_folder.claim(IDENTITY) as held:
        before = sorted((p, p.stat().st_mtime_ns) for p in held.folder.rglob("*"))
        with (
            pytest.raises(
                BusyError, match=rf"process {os.getpid()} trains this very configuration"
            ) as error,
            run_folder.claim(IDENTITY),
        ):
            raise AssertionError("two processes hold the same training")
        assert error.value.exit_code == 6
        assert before == sorted((p, p.stat().st_mtime_ns) for p in held.folder.rglob("*"))


@pytest.mark.fault(40, control=True)
def test_two_without_a_lock_would_hold_the_same_training(monkeypatch) -> None:
    monkeypatch.setattr(run_folder.FileLock, "acquire", lambda self, timeout=None: None)
    with run_folder.claim(IDENTITY) as first, run_folder.claim(IDENTITY) as second_:
        assert first.folder == second_.folder


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (NumericsError("the loss is nan"), "failed", 4),
        (KeyboardInterrupt(), "preempted", 130),
        (SystemExit(143), "preempted", 143),
        (MemoryError(), "failed", 5),
        (ZeroDivisionError("a bug"), "failed", 1),
    ],
)
def test_the_status_says_how_a_training_ended(error: BaseException, state: str, code: int) -> None:
    with pytest.raises(type(error)), run_folder.claim(IDENTITY) as held:
        held.say("running", step=7)
        raise error
    said = json.loads((held.folder / "run_status.json").read_text())
    assert (said["state"], said["exit_code"], said["step"]) == (state, code, 7)
    assert said["pid"] == os.getpid() and said["message"] == str(error)


def test_trainings_that_were_stopped_are_listed_and_removed_by_name(caplog) -> None:
    with pytest.raises(KeyboardInterrupt), run_folder.claim(IDENTITY) as held:
        held.say("running", step=7)
        raise KeyboardInterrupt
    (left,) = run_folder.every()
    assert (left.folder, left.state, left.status["step"]) == (held.folder, "preempted", 7)
    with run_folder.claim(IDENTITY), pytest.raises(BusyError, match="a process is at work on it"):
        run_folder.remove(held.folder.name)
    with pytest.raises(
        InputError, match=f"no training of that name; there are: {held.folder.name}"
    ):
        run_folder.remove("../artifacts")
    run_folder.remove(held.folder.name[:4])
    assert not held.folder.exists() and run_folder.every() == []


def test_a_training_whose_process_is_gone_is_called_killed() -> None:
    with contextlib.suppress(RuntimeError), run_folder.claim(IDENTITY) as held:
        status = (held.folder / "run_status.json").read_text()
        raise RuntimeError
    (held.folder / "run_status.json").write_text(status.replace(str(os.getpid()), "999999"))
    assert run_folder.every()[0].state == "killed"
    assert run_folder.unfinished(but=Path("another")) is None  # it has nothing to go on from
    (held.folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert run_folder.unfinished(but=Path("another")) == held.folder


def test_a_training_at_work_is_not_called_interrupted() -> None:
    with run_folder.claim(IDENTITY):
        assert run_folder.unfinished(but=Path("another")) is None
