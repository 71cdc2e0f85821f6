"""Claims about token files: how they are written and read."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.data import batches, corpus, token_files, token_writer, tokenizer
from pipeline.data.documents import Document
from pipeline.errors import ConfigError, InputError, together
from pipeline.storage import verified as verified_files

ROOT = Path(__file__).parents[2]
SMALL = [
    Document("a", "train", "The first document."),
    Document("b", "val", "naïve 中文 🦜"),
    Document("c", "train", "A part", True),
    Document("c", "train", " and another of <|endoftext|> it.", False),
]


def some_documents(count, characters=20_000):
    words = ["the", "quick", "brown", "fox", "naïve", "中文", "jumps", "over", "it\n"]
    draw = np.random.default_rng(0)
    for i in range(count):
        text = " ".join(draw.choice(words, characters // 5))
        yield Document(f"d{i}", "val" if i % 5 == 0 else "train", text)


@pytest.fixture
def written(tmp_path):
    token_writer.write_tokens(SMALL, tmp_path)
    return tmp_path


def rewrite(folder, split, content, **record):
    """Replace a token file, and what meta.json says of it."""
    (folder / f"{split}.bin").write_bytes(content)
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"][split] |= {"tokens": len(content) // 2} | record
    (folder / "meta.json").write_text(json.dumps(meta))


# --- writing


def test_one_end_of_text_token_stands_before_each_document(written):
    encode, eot = tokenizer.gpt2().encode_ordinary, [tokenizer.EOT]
    train = eot + encode("The first document.") + eot + encode("A part")
    train += encode(" and another of <|endoftext|> it.")
    assert token_files.open_tokens(written, "train").ids.tolist() == train
    assert token_files.open_tokens(written, "val").ids.tolist() == eot + encode("naïve 中文 🦜")


def test_a_literal_end_of_text_makes_no_end_of_text_token(written):
    train = token_files.open_tokens(written, "train")
    assert (train.ids == tokenizer.EOT).sum() == train.documents == 2
    assert "<|endoftext|> it." in tokenizer.gpt2().decode(train.ids.tolist())


def test_meta_says_what_the_files_hold(tmp_path):
    meta = token_writer.write_tokens(SMALL, tmp_path, source={"source": "test"})
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    assert meta["source"] == {"source": "test"}
    assert (meta["tokenizer"], meta["dtype"], meta["vocab_size"]) == ("gpt2", "uint16", 50257)
    for split in token_files.SPLITS:
        content = (tmp_path / f"{split}.bin").read_bytes()
        text = "".join(d.text for d in SMALL if d.split == split)
        assert meta["splits"][split] == {
            "tokens": len(content) // 2,
            "documents": sum(d.starts for d in SMALL if d.split == split),
            "bytes": len(text.encode()),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def test_bytes_of_the_text_are_the_bytes_of_its_tokens(written):
    tokens = token_files.open_tokens(written, "val")
    assert tokenizer.token_byte_lengths()[tokens.ids].sum() == tokens.bytes


def test_tokens_are_little_endian_uint16(written):
    raw = (written / "val.bin").read_bytes()
    assert raw[:2] == (50256).to_bytes(2, "little")


def test_files_do_not_depend_on_the_number_of_workers_or_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 50_000)
    documents = list(some_documents(12))
    alone = token_writer.write_tokens(documents, tmp_path / "1", workers=1)
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 30_000)
    together = token_writer.write_tokens(documents, tmp_path / "2", workers=2)
    assert alone == together
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_workers_encode_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 10_000)
    both, encode = threading.Barrier(2, timeout=20), token_writer._encode

    def meeting(batch):
        both.wait()  # passes when another is in here as well
        return encode(batch)

    monkeypatch.setattr(token_writer, "_encode", meeting)
    token_writer.write_tokens(some_documents(6), tmp_path, workers=2)


def test_progress_adds_up_to_the_bytes_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 30_000)
    done = []
    meta = token_writer.write_tokens(some_documents(6), tmp_path, done.append, workers=1)
    assert len(done) > 2
    assert sum(done) == sum(meta["splits"][split]["bytes"] for split in token_files.SPLITS)


def test_reading_is_never_more_than_a_few_batches_ahead_of_writing(tmp_path, monkeypatch):
    """What bounds the memory, whatever the size of the corpus."""
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 10_000)
    taken, done, ahead = [0], [0], []

    def documents():
        for document in some_documents(40, 5_000):
            taken[0] += len(document.text.encode())
            ahead.append(taken[0] - done[0])
            yield document

    def progress(text_bytes):
        done[0] += text_bytes

    token_writer.write_tokens(documents(), tmp_path, progress, workers=2)
    assert done[0] == taken[0] > 200_000
    assert max(ahead) < 100_000


@pytest.mark.fault(18)
@pytest.mark.parametrize("left", ["train", "val"])
def test_an_empty_split_is_an_input_error_and_leaves_nothing(tmp_path, left):
    with pytest.raises(InputError, match="split is empty.*corpus.val_fraction"):
        token_writer.write_tokens([d for d in SMALL if d.split == left], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_at_all_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="train split is empty"):
        token_writer.write_tokens([], tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_on_the_way_leaves_the_old_files_and_nothing_partial(
    written, monkeypatch, workers
):
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 10_000)
    before = {path.name: path.read_bytes() for path in written.iterdir()}

    def documents():
        yield from some_documents(4)
        raise InputError("broken source")

    with pytest.raises(InputError, match="broken source"):
        token_writer.write_tokens(documents(), written, workers=workers)
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before


def test_a_crash_between_renames_leaves_no_record_that_looks_whole(written, monkeypatch):
    def crash(source, target):
        raise OSError("crash")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="crash"):
        token_writer.write_tokens(list(some_documents(6)), written)
    with pytest.raises(InputError, match="meta.json.*tokenize first"):
        token_files.open_tokens(written, "train")


@pytest.mark.fault(13)
def test_a_vocabulary_over_uint16_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "VOCAB_SIZE", 70_000)
    with pytest.raises(ConfigError, match="70000 does not fit into uint16"):
        token_writer.write_tokens(SMALL, tmp_path)


@pytest.mark.fault(13, control=True)
def test_numpy_wraps_a_token_over_uint16_silently():
    assert np.array([69_999]).astype(np.uint16).tolist() == [4463]


# --- going on after a kill


@pytest.fixture
def journals(monkeypatch):
    """Small batches, kept after each."""
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(token_writer, "KEPT_EVERY", 1)


STOPPED = """
import os, sys
from pathlib import Path
from pipeline.data import token_writer
from tests.data.test_token_files import some_documents

token_writer.BATCH_BYTES, token_writer.KEPT_EVERY = 3_000, 3_000
kept, left = Path(sys.argv[1]), [int(sys.argv[2])]

def stop(text_bytes):
    left[0] -= 1
    if not left[0]:
        os._exit(9)  # nothing is flushed or tidied up, as by kill -9

token_writer.write_tokens(some_documents(120, 1000), kept / "x", stop, workers=2, kept=kept)
"""


@pytest.mark.parametrize("stops", [[6], [30], [16, 9, 5]])
def test_after_a_kill_tokenizing_goes_on_to_the_same_bytes(tmp_path, monkeypatch, stops):
    """Each process is killed after so many batches of a few documents."""
    documents = list(some_documents(120, 1000))
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    token_writer.write_tokens(documents, whole)
    kept.mkdir()
    for number in stops:
        words = [sys.executable, "-c", STOPPED, str(kept), str(number)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 9, done.stderr
    begun = token_writer.begun(kept)["parts"]
    assert begun > 2 * sum(stops)
    with (kept / "val.bin.partial").open("ab") as file:  # what came to the disk later
        file.write(bytes(1 << 20))
    encoded, encode = [], token_writer._encode
    monkeypatch.setattr(token_writer, "_encode", lambda b: encoded.append(len(b)) or encode(b))
    token_writer.write_tokens(documents, tmp_path / "tokens", kept=kept)
    assert sum(encoded) == len(documents) - begun
    for path in whole.iterdir():
        assert (tmp_path / "tokens" / path.name).read_bytes() == path.read_bytes()
    assert token_writer.begun(kept) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-3],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_kept_tokens_that_are_damaged_are_not_used(tmp_path, journals, caplog, damage):
    class Stop(Exception):
        pass

    def stop(text_bytes):
        raise Stop

    whole, kept = tmp_path / "whole", tmp_path / "kept"
    token_writer.write_tokens(some_documents(6), whole)
    kept.mkdir()
    with pytest.raises(Stop):
        token_writer.write_tokens(some_documents(6), tmp_path / "tokens", stop, kept=kept)
    path = kept / "val.bin.partial"
    path.write_bytes(damage(path.read_bytes()))
    token_writer.write_tokens(some_documents(6), tmp_path / "tokens", kept=kept)
    assert "what was kept is damaged; tokenizing starts anew" in caplog.text
    for path in whole.iterdir():
        assert (tmp_path / "tokens" / path.name).read_bytes() == path.read_bytes()


def test_tokenizing_conversations_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(text_bytes):
        done.append(text_bytes)
        if len(done) == 5:
            raise Stop

    monkeypatch.setattr(token_writer, "BATCH_BYTES", 100)
    monkeypatch.setattr(token_writer, "KEPT_EVERY", 1)
    whole, kept, done = tmp_path / "whole", tmp_path / "kept", []
    documents = [
        Document(f"d{i}", "val" if i % 3 else "train", f"{answer} words " * 20, not answer, answer)
        for i in range(9)
        for answer in (False, True)
    ]
    token_writer.write_tokens(documents, whole)
    kept.mkdir()
    with pytest.raises(Stop):
        token_writer.write_tokens(documents, tmp_path / "tokens", stop, kept=kept)
    assert token_writer.begun(kept)["parts"] == 5
    token_writer.write_tokens(documents, tmp_path / "tokens", kept=kept)
    assert (whole / "val.answers").stat().st_size > 99
    for path in whole.iterdir():
        assert (tmp_path / "tokens" / path.name).read_bytes() == path.read_bytes()


def test_kept_tokens_may_lie_on_another_disk_than_the_finished_ones(tmp_path, monkeypatch):
    replace, kept = os.replace, tmp_path / "kept"
    kept.mkdir()

    def refusing(source, target):
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    token_writer.write_tokens(SMALL, tmp_path / "tokens", kept=kept)
    assert len(token_files.open_tokens(tmp_path / "tokens", "train")) > 9


def test_tokenizing_does_without_torch():
    code = (
        "import sys; from pipeline.data import corpus, token_files, token_writer; "
        "print(*sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "pyarrow", "transformers", "mlflow"} & set(ran.stdout.split())


# --- reading


def test_tokens_are_read_only(written):
    tokens = token_files.open_tokens(written, "train")
    assert len(tokens) == len(tokens.ids) and tokens.path == written / "train.bin"
    with pytest.raises(ValueError, match="read-only"):
        tokens.ids[0] = 0


def test_a_missing_folder_or_split_is_an_input_error(tmp_path, written):
    with pytest.raises(InputError, match="meta.json"):
        token_files.open_tokens(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="test: incomplete"):
        token_files.open_tokens(written, "test")
    (written / "val.bin").unlink()
    with pytest.raises(InputError, match="val.bin: no such file"):
        token_files.open_tokens(written, "val")


SIZES = [
    pytest.param(lambda content: content[:-1], marks=pytest.mark.fault(9)),
    pytest.param(lambda content: content[:-2], marks=pytest.mark.fault(10)),
    pytest.param(lambda content: b"", marks=pytest.mark.fault(10)),
    pytest.param(lambda content: content + b"\0\0", marks=pytest.mark.fault(10)),
    pytest.param(
        lambda content: np.frombuffer(content, "<u2").astype("<u4").tobytes(),
        marks=pytest.mark.fault(11),
    ),
]


@pytest.mark.parametrize("change", SIZES)
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_of_another_size_is_refused(written, change, verify):
    path = written / "train.bin"
    path.write_bytes(change(path.read_bytes()))
    size = path.stat().st_size
    with pytest.raises(InputError, match=f"train.bin: {size} bytes, meta.json says .* bytes; tok"):
        token_files.open_tokens(written, "train", verify=verify)


DAMAGES = {
    9: lambda content: content[:-1],
    10: lambda content: content[:-2],
    11: lambda content: np.frombuffer(content, "<u2").astype("<u4").tobytes(),
    12: lambda content: content[:-2] + b"\xff\xff",
    14: lambda content: bytes([content[0] ^ 1]) + content[1:],
    18: lambda content: b"",
}


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.fault(row, control=True)) for row in DAMAGES]
)
def test_numpy_reads_the_damaged_file_without_a_word(written, row):
    path = written / "train.bin"
    before = np.fromfile(path, np.uint16)
    path.write_bytes(DAMAGES[row](path.read_bytes()))
    after = np.fromfile(path, np.uint16)
    assert after.tolist() != before.tolist()


@pytest.mark.fault(14)
@pytest.mark.fault(54)
def test_one_flipped_bit_is_refused(written):
    content = bytearray((written / "train.bin").read_bytes())
    content[5] ^= 1
    (written / "train.bin").write_bytes(content)
    with pytest.raises(InputError, match="train.bin: SHA-256 is"):
        token_files.open_tokens(written, "train")


@pytest.mark.fault(12)
def test_a_token_over_the_vocabulary_is_refused_at_the_start(written):
    content = np.array([50256, 5, 50257], dtype="<u2").tobytes()
    rewrite(written, "train", content, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(InputError, match="train.bin: token 50257: expected less than .* 50257"):
        token_files.open_tokens(written, "train")


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "uint32"), ("tokenizer", "r50k"), ("byte_order", "big"), ("vocab_size", 70_000)],
)
def test_tokens_of_another_kind_are_refused(written, key, value):
    meta = json.loads((written / "meta.json").read_text())
    (written / "meta.json").write_text(json.dumps(meta | {key: value}))
    with pytest.raises(InputError, match=f"meta.json: {key}={value}: expected"):
        token_files.open_tokens(written, "train")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"splits": []}', '{"splits": {"train": 3}}'),
        *("[" * 100_000, " " * (1 << 20) + "{}"),
    ],
)
def test_a_damaged_record_is_refused(written, text):
    (written / "meta.json").write_text(text)
    with pytest.raises(InputError, match="meta.json: .*tokenize again"):
        token_files.open_tokens(written, "train")


@pytest.mark.parametrize("key", ["documents", "bytes"])
def test_a_count_that_the_tokens_do_not_bear_out_is_refused(written, key):
    meta = json.loads((written / "meta.json").read_text())
    meta["splits"]["train"][key] += 1
    (written / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        InputError, match="train.bin: the tokens hold .*'documents': 2.* meta.json says"
    ):
        token_files.open_tokens(written, "train")


def test_all_that_is_wrong_with_both_splits_is_one_error(written):
    for split in token_files.SPLITS:
        content = (written / f"{split}.bin").read_bytes()
        (written / f"{split}.bin").write_bytes(content[:-2] + b"\xff\xff")
    with pytest.raises(InputError) as caught:
        together(
            *(partial(token_files.open_tokens, written, split) for split in token_files.SPLITS)
        )
    found = [line.split(": ")[1][:8] for line in str(caught.value).split("\n  ")]
    assert found == ["SHA-256 ", "token 65", "SHA-256 ", "token 65"]


def test_counts_that_are_none_are_refused(written):
    rewrite(written, "train", b"", tokens="many")
    with pytest.raises(InputError, match="counts and a hash are expected"):
        token_files.open_tokens(written, "train")


def test_fewer_than_two_tokens_are_refused(written):
    content = b"\x50\xc4"
    rewrite(written, "val", content, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(InputError, match="val.bin: 1 tokens; at least 2"):
        token_files.open_tokens(written, "val")


@pytest.mark.fault(15)
def test_tokenizing_again_leaves_an_open_split_as_it_was(written):
    tokens = token_files.open_tokens(written, "train")
    before = tokens.ids.tolist()
    token_writer.write_tokens([*SMALL[:2], SMALL[0]], written)
    assert tokens.ids.tolist() == before
    assert token_files.open_tokens(written, "train").ids.tolist() != before


@pytest.mark.fault(15, control=True)
@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a mapped file from being truncated")
def test_a_mapped_file_truncated_in_place_kills_its_reader(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "np.zeros(1 << 20, 'u1').tofile(sys.argv[1])\n"
        "ids = np.memmap(sys.argv[1], mode='r')\n"
        "open(sys.argv[1], 'wb').close()\n"
        "print(ids.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], capture_output=True)
    assert done.returncode == -signal.SIGBUS


@pytest.fixture
def large(written, monkeypatch):
    """Token files written an hour ago, taken for large ones; and how often each was read."""
    reads, verify = Counter(), token_files._verify

    def counting(path, record):
        reads[path.name] += 1
        verify(path, record)

    monkeypatch.setattr(token_files, "_verify", counting)
    monkeypatch.setattr(verified_files, "LARGE", 1)
    monkeypatch.setattr(paths, "runs", lambda: written / ".runs")
    for split in token_files.SPLITS:
        age(written / f"{split}.bin")
    return written, reads


def age(path, seconds=3600):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_large_file_is_read_once_and_so_is_a_link_to_it(large):
    folder, reads = large
    first = token_files.open_tokens(folder, "train")
    linked = folder / "workspace"
    linked.mkdir()
    shutil.copy(folder / "meta.json", linked)
    os.link(folder / "train.bin", linked / "train.bin")
    for place in (folder, linked):
        assert token_files.open_tokens(place, "train").ids.tolist() == first.ids.tolist()
    assert reads == {"train.bin": 1}


@pytest.mark.fault(14)
def test_a_large_file_that_changed_since_it_was_read_is_read_again(large):
    folder, reads = large
    path = folder / "train.bin"
    token_files.open_tokens(folder, "train")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    age(path, 60)
    for _ in range(2):  # what failed is not remembered
        with pytest.raises(InputError, match="train.bin: SHA-256 is"):
            token_files.open_tokens(folder, "train")
    assert reads == {"train.bin": 3}


def test_a_large_file_is_read_again_for_another_record(large):
    folder, _ = large
    token_files.open_tokens(folder, "train")
    rewrite(folder, "val", b"\x50\xc4\x05\x00")  # leaves train.bin as it is
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"]["sha256"] = "0" * 64
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="train.bin: SHA-256 is"):
        token_files.open_tokens(folder, "train")


@pytest.mark.parametrize("why", ["small", "just written"])
def test_a_file_that_is_small_or_was_just_written_is_read_each_time(large, monkeypatch, why):
    """The clock of a file's time may not have moved on since: another write would not be seen."""
    folder, reads = large
    if why == "small":
        monkeypatch.setattr(verified_files, "LARGE", 1 << 28)
    else:
        (folder / "train.bin").touch()
    for _ in range(2):
        token_files.open_tokens(folder, "train")
    assert reads == {"train.bin": 2}


@pytest.mark.fault(54)
def test_verify_reads_what_was_remembered_and_finds_what_kept_size_and_time(large, caplog):
    folder, reads = large
    path = folder / "train.bin"
    token_files.open_tokens(folder, "train")
    before, content = path.stat(), bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    token_files.open_tokens(folder, "train")  # the risk
    code, lines = verified(folder, caplog)
    assert code == 3 and "train.bin: SHA-256 is" in lines[0]
    with pytest.raises(InputError, match="train.bin: SHA-256 is"):
        token_files.open_tokens(folder, "train")


def verified(folder, caplog):
    """The exit code and the lines of `python -m pipeline verify tokens FOLDER`."""
    caplog.set_level("INFO")
    caplog.clear()
    try:
        command(["verify", "tokens", str(folder)])
    except SystemExit as ended:
        return ended.code, caplog.messages
    return 0, caplog.messages


def test_verify_tells_what_each_whole_split_holds(written, caplog):
    code, lines = verified(written, caplog)
    assert code == 0
    path = written / "val.bin"
    tokens = path.stat().st_size // 2
    assert lines[1] == f"{path}: whole, {tokens:,} tokens, 1 documents, 18 bytes of text"


def test_verify_says_what_is_wrong_with_one_split_and_that_the_other_is_whole(written, caplog):
    content = (written / "train.bin").read_bytes()
    (written / "train.bin").write_bytes(content[:-1])
    code, lines = verified(written, caplog)
    assert code == 3 and len(lines) == 2
    assert "train.bin: " in lines[0] and "tokenize again" in lines[0] and ": whole, " in lines[1]


def test_verify_says_once_that_there_is_nothing(tmp_path, caplog):
    code, lines = verified(tmp_path / "none", caplog)
    assert code == 3 and len(lines) == 1 and "meta.json" in lines[0]


# --- memory


MEASURED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pipeline.data import corpus, token_writer as tokenizing

if __name__ == "__main__":
    source, path, folder = sys.argv[1:]
    config = SimpleNamespace(
        source=source, path=path, pattern="**/*", field="text", val_fraction=0.1
    )
    tokenizing.write_tokens(corpus.documents(config), Path(folder), workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_tokenizing_300_megabytes_takes_under_500_of_memory(tmp_path, source):
    psutil = pytest.importorskip("psutil")
    script, path = tmp_path / "script.py", generated(tmp_path, source, 300_000_000)
    script.write_text(MEASURED)
    command = [sys.executable, script, source, path, tmp_path / "tokens"]
    with psutil.Popen(list(map(str, command)), env=os.environ | {"PYTHONPATH": str(ROOT)}) as ran:
        peak = 0
        while ran.poll() is None:
            peak = max(peak, resident(psutil, ran))
            time.sleep(0.1)
    assert ran.returncode == 0
    assert 50_000_000 < peak < 500_000_000


def resident(psutil, process):
    """Bytes in memory of a process and its children; shared pages count for each."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def generated(folder, source, size):
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Parquet's reader decodes a page at a time and its writers put 1024 rows into one, so rows
    # here are as long as a web page, and all stand in a single row group.
    documents = some_documents(1, 5000) if source == "parquet" else some_documents(50)
    text = "\n\n".join(d.text for d in documents)
    count = size // len(text.encode()) + 1
    path = folder / f"big.{source}"
    if source == "parquet":
        schema = pa.schema({"text": pa.string()})
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            column = pa.chunked_array([[text]] * count)
            writer.write_table(pa.table({"text": column}), row_group_size=count)
    else:
        piece = text + "\n\n" if source == "text" else json.dumps({"text": text}) + "\n"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(piece for _ in range(count))
    assert path.stat().st_size > size
    return path


def test_a_corpus_goes_from_files_to_batches(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"Document {i} says: <|endoftext|>\n" * 20)
    config = SimpleNamespace(
        source="text", path=str(tmp_path), pattern="**/*", field="", val_fraction=0.1
    )
    folder = tmp_path / "tokens"
    about = corpus.describe(config)
    first = token_writer.write_tokens(corpus.documents(config), folder, source=about)
    again = token_writer.write_tokens(corpus.documents(config), folder, source=about)
    assert first == again
    tokens = token_files.open_tokens(folder, "train")
    x, _ = batches.batch_at(tokens, 0, 0, batch_size=2, sequence_length=32, accumulate=1, seed=0)
    assert "says: <|endoftext|>" in tokenizer.gpt2().decode(x[0].tolist())
