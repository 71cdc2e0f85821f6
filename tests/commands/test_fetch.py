"""`python -m pipeline fetch`: all of it or nothing, whatever the line, the hub and the disk do."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commands import fetch as verb
from pipeline.errors import BusyError, InputError, StorageError
from pipeline.inference.multiple_choice import hellaswag_items
from pipeline.storage import folders, hub
from tests.helpers import hub as stand_in
from tests.helpers.imports import ROOT

GPT2 = "openai-community/gpt2"
FINEWEB = "datasets/HuggingFaceFW/fineweb-edu"
WEIGHTS = bytes(range(256)) * 20_000  # 5 MB: several of what the client reads at once


def table(**columns: list) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Hub]:
    """A hub with GPT-2, in a folder of its own; nobody waits, and `waits` says for how long."""
    monkeypatch.chdir(tmp_path)
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "vocab.json": b'{"a": 0}'}
    other = {"pytorch_model.bin": b"pickle", "onnx/config.json": b"[]", "README.md": b"#"}
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with stand_in.serving({GPT2: files | other}) as site:
        stand_in.point_at(site.address, monkeypatch)
        site.waits = []
        monkeypatch.setattr("time.sleep", site.waits.append)
        yield site


def ranges(site: stand_in.Hub, file: str) -> list[str]:
    return [asked for path, asked in site.asked if path.startswith("/cdn/") and file in path]


def test_what_comes_is_safetensors_and_text_and_every_byte_is_checked(site, caplog) -> None:
    caplog.set_level("INFO")
    verb.fetch("gpt2")
    folder = Path("data/hf/gpt2")
    names = ["config.json", "model.safetensors", "sha256.json", "vocab.json"]
    assert sorted(os.listdir(folder)) == names and os.listdir(folder.parent) == ["gpt2"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folders.problems(folder) == []
    noted = json.loads((folder / folders.SUMS).read_text())["config.json"]
    assert noted["repository"] == GPT2 and noted["commit"] == site.commits[GPT2]
    assert "-S init.hf_model=data/hf/gpt2 -S init.hf_watch=data/hf/gpt2" in caplog.text


def test_a_line_that_breaks_goes_on_from_the_byte_it_reached(site) -> None:
    drops = [("drop", 3_000_000), ("reset", 10), ("short", 1_500_000)]
    site.faults["model.safetensors"] = [*drops, *[("drop", 0)] * 3]
    verb.fetch("gpt2")
    assert Path("data/hf/gpt2/model.safetensors").read_bytes() == WEIGHTS
    begun = [int(asked[6:-1]) for asked in ranges(site, "model.safetensors")[1:]]
    assert begun == sorted(begun) and begun[0] >= 2 << 20 and begun[-1] >= 3 << 20


def test_a_line_that_is_dead_is_given_up_and_what_came_is_kept(site) -> None:
    site.faults["model.safetensors"] = [("drop", 3_000_000), *[("drop", 0)] * 99]
    with pytest.raises(hub.HubError, match="(?s)by hand: put config.json and model.safetensors"):
        verb.fetch("gpt2")
    assert not Path("data/hf/gpt2").exists()
    site.faults.clear()
    site.asked.clear()
    verb.fetch("gpt2")
    [asked] = ranges(site, "model.safetensors")
    assert int(asked[6:-1]) >= 2 << 20
    assert not ranges(site, "config.json")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_download_is_no_folder_and_goes_on_at_its_commit(site) -> None:
    site.faults["model.safetensors"] = [("stall", 3 << 20)]
    code = "from pipeline.commands.fetch import fetch; fetch('gpt2')"
    told = {"HF_ENDPOINT": site.address, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | told)
    part = Path("data/hf/.gpt2.partial/model.safetensors.part")
    while not part.exists() or part.stat().st_size < 2 << 20:
        assert process.poll() is None
    with pytest.raises(BusyError, match="another process"):
        verb.fetch("gpt2")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("data/hf/gpt2").exists()

    first = site.commits[GPT2]
    site.going_on.set()
    site.asked.clear()
    verb.fetch("gpt2")
    assert site.asked[0][0].endswith(f"/revision/{first}")
    [asked] = ranges(site, "model.safetensors")
    assert int(asked[6:-1]) >= 2 << 20
    assert Path("data/hf/gpt2/model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_file_is_fetched_again_and_a_mirror_that_lies_is_refused(site) -> None:
    site.faults["model.safetensors"] = [("wrong", 4_000_000)]
    verb.fetch("gpt2")
    path = Path("data/hf/gpt2/model.safetensors")
    assert path.read_bytes() == WEIGHTS
    path.write_bytes(WEIGHTS[:-1] + b"!")  # on the disk, later: the same command finds it
    site.faults["model.safetensors"] = [("wrong", 0)] * 2
    with pytest.raises(hub.HubError, match=r"model.safetensors came damaged 2 times"):
        verb.fetch("gpt2")
    assert not Path("data/hf/gpt2").exists()
    verb.fetch("gpt2")
    assert path.read_bytes() == WEIGHTS


def test_weights_that_somebody_put_there_are_not_replaced(site) -> None:
    folder = Path("data/hf/gpt2")
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")  # as on the hub
    (folder / "model.safetensors").write_bytes(b"my own")
    with pytest.raises(InputError, match=r"model.safetensors: another file, not of the hub"):
        verb.fetch("gpt2")
    assert (folder / "model.safetensors").read_bytes() == b"my own"
    (folder / "model.safetensors").unlink()
    verb.fetch("gpt2")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_hub_that_wants_to_be_left_alone_is(site) -> None:
    site.faults["model.safetensors"] = [(429, 88), (503, 0)]
    verb.fetch("gpt2")
    assert site.waits == [89, 2]
    site.faults["api"] = [(503, 0)] * 9
    with pytest.raises(hub.HubError, match="503"):
        verb.fetch("gpt2-medium")


@pytest.mark.parametrize("case", ["missing", "gated", "token", "offline", "away", "no hub"])
def test_what_a_hub_refuses_is_said_as_what_it_is(site, case: str, monkeypatch) -> None:
    said = {
        "missing": "gpt2-xl: RepositoryNotFoundError: 401 .*make sure you are authenticated",
        "gated": "gpt2: GatedRepoError: 401 .*Cannot access gated repo",
        "token": "401 Unauthorized.*Invalid credentials",
        "offline": "unset the `HF_HUB_OFFLINE`",
        "away": "http://127.0.0.1:1: .*ConnectError.*HF_ENDPOINT",
        "no hub": "mirror.example: .*UnsupportedProtocol.*HF_ENDPOINT",
    }[case]
    if case == "gated":
        site.gated.add(GPT2)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "zZ9" * 11) if case == "token" else None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", case == "offline")
    if case == "away":
        stand_in.point_at("http://me:s3cret@127.0.0.1:1", monkeypatch)
    if case == "no hub":
        stand_in.point_at("mirror.example", monkeypatch)
    with pytest.raises(hub.HubError, match=f"(?s){said}.*\n  by hand: ") as caught:
        verb.fetch("gpt2-xl" if case == "missing" else "gpt2")
    assert "zZ9" not in str(caught.value) and "s3cret" not in str(caught.value)
    assert not Path("data").exists()


def test_a_token_goes_to_the_hub_and_into_no_file(site, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    site.gated.add(GPT2)
    site.faults["model.safetensors"] = [("drop", 1)] * 3
    verb.fetch("gpt2")  # the stand-in refuses a token at the storage it redirects to
    assert stand_in.TOKEN not in caplog.text and "s3cret" not in caplog.text
    for path in Path("data").rglob("*.json"):
        assert stand_in.TOKEN not in path.read_text()


def test_a_disk_too_small_is_refused_before_and_a_dry_run_writes_nothing(
    site, monkeypatch, caplog
) -> None:
    caplog.set_level("INFO")
    verb.fetch("gpt2", dry_run=True)
    assert "3 of its files, 5.1 MB" in caplog.text and not Path("data").exists()
    usage = shutil.disk_usage(".")._replace(free=10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"5.1 MB are to come and 1.00 GB .* 1.00 GB are free"):
        verb.fetch("gpt2")
    assert all(path.startswith("/api/") for path, _ in site.asked)


def test_a_disk_that_fills_on_the_way_is_said_with_both_numbers(site, monkeypatch) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 1000:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*; [\d,]+ bytes are free"):
        verb.fetch("gpt2")
    assert not Path("data/hf/gpt2").exists()


def test_tokens_choose_whole_files_in_order_and_more_can_come_later(site, caplog) -> None:
    caplog.set_level("INFO")
    part = table(text=["word " * 50] * 40, token_count=[50_000_000] * 40)
    files = {f"sample/10BT/{n:03}_00000.parquet": part for n in (2, 0, 4, 1, 3)}
    site.repositories[FINEWEB] = files | {"sample/100BT/000_00000.parquet": part, "a.parquet": b"x"}
    site.commits[FINEWEB] = "c" * 40
    folder = Path("data/corpus/fineweb-edu-10BT")
    verb.fetch("fineweb-edu", tokens="2.5B")
    assert [p.name for p in sorted(folder.glob("*.parquet"))] == [
        "000_00000.parquet",
        "001_00000.parquet",
    ]
    assert "2 files, 4,000,000,000 GPT-2 tokens" in caplog.text
    site.asked.clear()
    verb.fetch("fineweb-edu")
    assert len(list(folder.glob("*.parquet"))) == 5
    assert not [path for path, _ in site.asked if "/000_" in path or "/001_" in path]
    verb.fetch("fineweb-edu", tokens="11B")
    assert "-S corpus.path=data/corpus/fineweb-edu-100BT" in caplog.text
    with pytest.raises(InputError, match="has files of HuggingFaceFW/fineweb-edu; expected"):
        verb.fetch("gpt2", to=folder)


def test_hellaswag_is_what_was_published_and_evaluate_reads_it(site, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    published = [
        {"ind": 24, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "label": 3}
        | {"ctx": "A man sits. he", "split": "val", "split_type": "indomain", "source_id": "v_1"}
        | {"endings": ["is “wrapping”.", "rips.", "holds.", "starts."]},
        {"ind": 92, "activity_label": "Ice", "ctx_a": "A lady.", "ctx_b": "the", "label": 0}
        | {"ctx": "A lady. the", "split": "val", "split_type": "zeroshot", "source_id": "v_2"}
        | {"endings": ["dog.", "cat.", "cow.", "hen."]},
    ]
    rows = [row | {"label": str(row["label"])} for row in published]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    name = "data/validation-00000-of-00001.parquet"
    site.repositories["datasets/Rowan/hellaswag"] = {name: table(**columns)}
    site.commits["datasets/Rowan/hellaswag"] = "d" * 40
    with pytest.raises(InputError, match=r"2 items; expected 10,042"):
        verb.fetch("hellaswag")
    monkeypatch.setattr(verb, "ITEMS", 2)
    verb.fetch("hellaswag")
    path = Path("data/hellaswag/hellaswag_val.jsonl")
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == published
    assert [item.label for item in hellaswag_items(path)] == [3, 0]
    assert f"-S evaluate.hellaswag={path.as_posix()}" in caplog.text


def test_progress_is_whole_lines_that_grow_rarer(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = verb.Progress(3_600_000_000)
    for now[0] in range(1, 3601):
        progress.update(1_000_000)
    assert caplog.messages[0] == "  10.0 MB of 3.60 GB, 1.0 MB/s, 59.8 min left"
    assert 60 < len(caplog.messages) < 180
