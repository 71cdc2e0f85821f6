"""One trainer a fingerprint: the second waits, then takes over the checked result."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from pipeline import runs

OUTPUT = Path("artifacts/model")


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)


def produce(text: str) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "weights").write_text(text)


def second(done: dict[str, object]) -> threading.Thread:
    def work() -> None:
        with runs.claim("f" * 64) as held:
            done["adopted"] = held.adopt()
            done["content"] = (OUTPUT / "weights").read_text() if OUTPUT.exists() else None

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wait_until_awaited(held: runs.Claim) -> None:
    for _ in range(200):
        if held.awaited():
            return
        time.sleep(0.02)
    raise AssertionError("the second process never said that it waits")


def test_the_second_waits_and_adopts_what_the_first_made(caplog) -> None:
    done: dict[str, object] = {}
    with runs.claim("f" * 64) as held:
        thread = second(done)
        wait_until_awaited(held)
        assert not done
        produce("trained once")
        held.share([OUTPUT])
        (OUTPUT / "weights").write_text("changed since")
    thread.join(20)
    assert done == {"adopted": True, "content": "trained once"}
    assert f"process {os.getpid()} trains this very configuration" in caplog.text
    assert [p.name for p in runs.paths.runs().iterdir()] == ["f" * 16 + ".lock"]


def test_a_damaged_result_is_not_adopted() -> None:
    done: dict[str, object] = {}
    with runs.claim("f" * 64) as held:
        thread = second(done)
        wait_until_awaited(held)
        produce("trained once")
        held.share([OUTPUT])
        (held.folder / OUTPUT / "weights").write_text("trained 0nce")
    thread.join(20)
    assert done["adopted"] is False


def test_nothing_is_kept_where_nobody_waits() -> None:
    with runs.claim("f" * 64) as held:
        produce("trained once")
        held.share([OUTPUT])
        assert not held.folder.exists()
    with runs.claim("f" * 64) as held:
        assert not held.adopt()


def test_a_dead_waiter_does_not_count() -> None:
    with runs.claim("f" * 64) as held:
        held.folder.with_name(held.folder.name + ".waiting-999999-1.00").touch()
        assert not held.awaited()


def test_a_result_that_nobody_came_for_is_not_adopted_later(monkeypatch) -> None:
    with runs.claim("f" * 64) as held:
        monkeypatch.setattr(held, "awaited", lambda: True)  # it dies before its turn comes
        produce("trained long ago")
        held.share([OUTPUT])
    assert (held.folder / "result.json").exists()
    with runs.claim("f" * 64) as held:
        assert not held.adopt()
        assert not held.folder.exists()


def test_a_failed_training_lets_the_next_one_train() -> None:
    with pytest.raises(RuntimeError), runs.claim("f" * 64):
        raise RuntimeError
    with runs.claim("f" * 64) as held:
        assert not held.adopt()


def test_a_copy_never_writes_into_a_linked_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_text("kept")
    target = tmp_path / "out"
    os.link(cache, target)
    source = tmp_path / "new"
    source.write_text("new")
    runs.copy(source, target)
    assert (cache.read_text(), target.read_text()) == ("kept", "new")
