"""What DVC's cache hands out after its bytes have changed, and how a person gets rid of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.__main__ import main as command
from pipeline.data import token_files
from pipeline.errors import InputError
from pipeline.storage import digests
from tests.conftest import Checkout

WRITE = """
from pathlib import Path
from pipeline.data import token_writer as tokenizing
from pipeline.data.documents import Document

tokenizing.write_tokens([Document(s, s, "text " * 99) for s in ("train", "val")], Path("tokens"))
"""


def rot(path: Path) -> None:
    """Flip a bit and keep the times and the permissions, as a failing disk does."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:  # in place: links to it see the change
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(before.st_mode)


def cached(folder: Path, size: int) -> Path:
    return next(p for p in folder.glob(".dvc/cache/files/md5/??/*") if p.stat().st_size == size)


@pytest.fixture
def rotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A stage of DVC's that tokenizes, checked out from a cache with a flipped bit."""
    made = Checkout(tmp_path)
    made.env["PYTHONPATH"] = str(Path(token_files.__file__).parents[2])
    (tmp_path / "write.py").write_text(WRITE, "utf-8")
    made.dvc("init", "--no-scm")
    made.dvc("config", "cache.type", "hardlink,copy")
    made.dvc("stage", "add", "--name", "tokenize", "--outs", "tokens", "python write.py")
    made.dvc("repro")
    tokens = token_files.open_tokens(tmp_path / "tokens", "train")
    rot(cached(tmp_path, tokens.path.stat().st_size))
    made.dvc("checkout", "--force", "--relink")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return made


@pytest.mark.slow
@pytest.mark.fault(54)
def test_bit_rot_in_the_cache_is_refused_and_deleting_it_heals(rotten: Checkout) -> None:
    tokens = rotten.folder / "tokens"
    with pytest.raises(InputError, match="SHA-256 is .*pipeline verify cache --delete"):
        token_files.open_tokens(tokens, "train")
    with pytest.raises(SystemExit) as ended:
        command(["verify", "cache"])
    assert ended.value.code == 3
    command(["verify", "cache", "--delete"])
    rotten.dvc("repro", "-f", "-s", "tokenize")
    assert len(token_files.open_tokens(tokens, "train")) > 99
    assert list(digests.damaged(rotten.folder / ".dvc/cache/files/md5")) == []


@pytest.mark.slow
@pytest.mark.fault(54, control=True)
def test_dvc_calls_the_rotten_file_up_to_date_and_keeps_it_when_it_is_made_again(
    rotten: Checkout,
) -> None:
    assert "up to date" in rotten.dvc("status")
    rotten.dvc("repro", "-f", "-s", "tokenize")
    assert list(digests.damaged(rotten.folder / ".dvc/cache/files/md5"))


def test_a_whole_cache_is_called_whole_and_a_changed_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    caplog.set_level("INFO")
    folder = tmp_path / ".dvc/cache/files/md5"
    with pytest.raises(SystemExit):
        command(["verify", "cache"])
    assert caplog.messages == [f"{folder}: nothing is cached yet"]
    caplog.clear()
    for name in ("76/5e5c3b4a4e3a6d1d0c2b8a4c4f4b7d", "d4/1d8cd98f00b204e9800998ecf8427e.dir"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"")
    with pytest.raises(SystemExit):
        command(["verify", "cache"])
    assert caplog.messages[0].endswith("4f4b7d: its content has changed")
    command(["verify", "cache", "--delete"])
    caplog.clear()
    command(["verify", "cache"])
    assert [m.split(": ")[1] for m in caplog.messages] == ["every file is whole"]
    assert (folder / "d4/1d8cd98f00b204e9800998ecf8427e.dir").exists()
