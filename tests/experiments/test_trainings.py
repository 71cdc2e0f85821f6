"""`ls`, `watch` and the line of a sweep: what a training's record and folder say of it."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.errors import NumericsError
from pipeline.experiments import screen, trainings
from pipeline.records import record_file, record_reader
from pipeline.records.run_data import Experiment
from pipeline.resume import run_folder


class Clock:
    """The time of records and of the page; it goes only where a test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def stand_in(self) -> SimpleNamespace:
        tell = lambda: self.now  # noqa: E731
        return SimpleNamespace(time=tell, monotonic=tell, sleep=self.sleep)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    made = Clock()
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(record_file, "_now", lambda: int(made.now * 1000))
    monkeypatch.setattr(trainings, "time", made.stand_in())
    return made


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(
        train__steps=1000, train__batch_size=2, train__sequence_length=16, train__accumulate=2
    )


@contextlib.contextmanager
def training(config: Config) -> Iterator[record_file.Record]:
    """The record of one at work, whose folder is held."""
    settings = configuration.flatten(config)
    identity = {"stage": "train", "params": settings, "inputs": {}, "code": {}}
    with run_folder.claim(identity) as run:
        record = record_file.Record("train", config, run.journal)
        try:
            yield record
        finally:
            record.close("KILLED")


def steps(record: record_file.Record, clock: Clock, first: int, last: int, seconds: float) -> None:
    for step in range(first, last):
        clock.sleep(seconds)
        record.metrics({"train/loss": 9.0 - step / 500}, step)


def test_one_at_work_says_how_far_it_is_how_fast_and_how_long_the_rest_takes(
    clock: Clock, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "hot")
    with training(config) as record:
        (one,) = trainings.kept()
        assert one.line() == "hot: at work, step 0/1,000, loss -, - tokens/s, - left"
        steps(record, clock, 0, 100, 2.0)
        record.metrics({"train/val_loss": 8.5}, 99)
        (one,) = trainings.kept()
        # 2 x 16 x 2 tokens in 2 s; the mean of the last 20 losses; 900 steps of 2 s.
        assert one.line() == "hot: at work, step 100/1,000, loss 8.821, 32 tokens/s, 30:00 left"
        assert one.row()[4] == "8.500" and one.at_work


def test_a_pause_between_two_processes_is_no_part_of_a_trainings_pace(
    clock: Clock, config: Config
) -> None:
    with contextlib.suppress(KeyboardInterrupt), training(config) as record:
        steps(record, clock, 0, 100, 2.0)
        raise KeyboardInterrupt
    (one,) = trainings.kept()
    assert (one.state, one.left, one.at_work) == ("interrupted", None, False)
    clock.sleep(3600.0)
    with training(config) as record:
        steps(record, clock, 100, 110, 1.0)
        (one,) = trainings.kept()
        assert (one.done, one.left) == (110, pytest.approx(890.0))


def test_one_that_failed_says_why_in_a_line(clock: Clock, config: Config) -> None:
    with pytest.raises(NumericsError), training(config) as record:
        steps(record, clock, 0, 10, 2.0)
        raise NumericsError("step 10: the loss is nan\x1b[2J\nand more of it")
    said = trainings.page(trainings.kept())
    assert "workspace failed: step 10: the loss is nan\\x1b[2J\n" in said
    assert "and more of it" not in said


def test_a_time_budget_bounds_what_is_left(clock: Clock, make_config) -> None:
    with training(make_config(train__steps=1000, train__time_budget=5.0)) as record:
        steps(record, clock, 0, 100, 2.0)
        (one,) = trainings.kept()
        assert one.left == pytest.approx(100.0)  # of the five minutes, not of the 900 steps


def test_of_a_long_record_the_ends_are_read_alone(
    clock: Clock, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(config) as record:
        record.tags({"digest.train": "d"})
        steps(record, clock, 0, 500, 2.0)
        whole = record.so_far()
        (left,) = run_folder.every()
        path = left.folder / run_folder.JOURNAL
        assert record_reader.ends(path, whole=False) == whole
        monkeypatch.setattr(record_reader, "ENDS", 4000)
        short = record_reader.ends(path, whole=False)
        assert len(short) < 100 and short[0] == whole[0] and short[1] == whole[1]
        assert list(short)[-20:] == list(whole)[-20:]
        monkeypatch.setattr(trainings, "RECENT", 20)
        (one,) = trainings.kept()
        assert (one.done, one.left) == (500, pytest.approx(1000.0))


def finished(name: str, id: str, seconds: int, steps: int = 9) -> Experiment:
    head = {"kind": "start", "id": id, "name": name, "time": 0, "params": {"train.steps": steps}}
    values = {"train/loss": 5.0, "train/steps": 9.0, "perf/tokens_per_second": 7.0}
    points = {"kind": "metrics", "time": 1, "step": 8, "values": values}
    end = {"kind": "end", "status": "FINISHED", "time": seconds * 1000}
    return Experiment(name, name, {"train": [head, points, end]})


def test_those_at_work_come_first_then_the_newest_and_a_shared_training_is_one(
    clock: Clock, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [
        finished("old", "a", 100),
        finished("new", "b", 200),
        finished("workspace", "b", 200),
        Experiment("untrained", "x", {}),
    ]
    monkeypatch.setattr(trainings.dvc_history, "experiments", lambda *_, **__: known)
    with training(config):
        found = trainings.every()
    page = trainings.page(found)
    assert max(map(len, page.splitlines())) <= 80
    first, *rest = [line.split() for line in page.splitlines()[1:]]
    assert first[:4] == ["workspace", "at", "work", "0/1,000"]
    assert [line[0] for line in rest] == ["new", "old"]
    assert rest[0][:6] == ["new", "finished", "9/9", "5.000", "-", "7"]
    assert "rm ID" not in page


def test_watching_ends_when_nothing_has_been_at_work_for_a_while(
    clock: Clock, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trainings.watch()
    assert caplog.messages == ["no training is at work"]
    caplog.clear()
    began = clock.now
    with training(config) as record:
        own = record
        held = contextlib.ExitStack()
        sleep = clock.sleep

        def end_it(seconds: float) -> None:
            sleep(seconds)
            assert clock.now - began < 1000, "it watches for ever"
            if clock.now - began > 90:
                held.close()

        trainings.time.sleep = end_it  # type: ignore[assignment]
        held.callback(lambda: _forget(own))
        trainings.watch()
    assert "at work" in caplog.messages[0] and "finished" in caplog.messages[-1]
    assert clock.now - began <= 90 + trainings.IDLE + 2 * screen.REPEATED


def _forget(record: record_file.Record) -> None:
    """As the stage after it does: the folder goes."""
    for left in run_folder.every():
        for path in left.folder.iterdir():
            path.unlink()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_lines_beside_it_stay_and_what_is_drawn_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = Terminal()
    monkeypatch.setattr(sys, "stdout", said)
    texts = iter(["step 1", "step 2", "step 3"])
    waits = iter([True, True, False])
    screen.show(lambda: next(texts), lambda _: next(waits), io.StringIO("one\ntwo \x1b]0;X\n"))
    assert "one\n" in said.getvalue() and "two \\x1b]0;X\n" in said.getvalue()
    for text in ("step 1", "step 2", "step 3"):
        assert f"{text}\r\x1b[2K" in said.getvalue() or text == "step 3"
    assert said.getvalue().endswith("\x1b[1A\x1b[2K"), "the last text is cleared"


def test_a_table_fits_and_shows_what_a_terminal_would_obey(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = screen.table(("name", "what", "n"), [("a" * 90, "b \x1b[1m c " * 9, "1,234")], left=2)
    lines = text.splitlines()
    assert lines[0] == "name" and "a" * 90 in lines, "a name is copied from its line"
    assert max(len(line) for line in lines if line != "a" * 90) <= 60 and "\x1b" not in text
    assert "1,234" in text


def test_no_word_is_broken_where_the_table_fits_without(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "22")
    rows = [("workspace: train", "at work", "1,234")]
    assert screen.table(("name", "state", "n"), rows, left=2).splitlines() == [
        "name       state     n",
        "workspace: at    1,234",
        "train      work",
    ]


def test_a_training_whose_later_stages_are_at_work_aside_is_listed_by_its_name(
    clock: Clock, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no folder any more, and is no experiment of DVC's yet."""
    monkeypatch.setattr(trainings.dvc_history, "experiments", lambda *_, **__: [])
    aside = Path(".dvc/tmp/exps/standalone/tmpx")
    aside.mkdir(parents=True)
    monkeypatch.setenv("DVC_EXP_NAME", "hot")
    with contextlib.chdir(aside):
        record = record_file.Record("train", config)
        steps(record, clock, 0, 3, 2.0)
        record.close("FINISHED")
    (one,) = trainings.every()
    assert one.row()[:3] == ("hot", "finished", "3/1,000")
