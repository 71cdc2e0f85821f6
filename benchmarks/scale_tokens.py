"""The tokenize stage on gigabytes: speed, memory, disk, and what a kill -9 in the middle costs.

    python benchmarks/scale_tokens.py [--gigabytes 5] [--folder FOLDER]

Text is written as uncompressed Parquet files, all of one piece of varied text under different
names. The stage runs in two workspaces of its own: once unbroken, once killed when half of the
tokens are kept and then given again. Both must write the same bytes. What 10 and 100 billion
tokens take is arithmetic from these rates. Writes benchmarks/results/scale_tokens.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks import outcomes, tokenizing
from pipeline import paths
from pipeline.data import batches, corpus, token_files, token_writer
from pipeline.storage import verified
from pipeline.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE = 4000  # characters of a document: a web page's
PIECE = 50.0  # MB of text in a file
# As `python -m stages.tokenize_corpus`, but for MLflow's client, and files of any size are kept.
STAGE = """
import sys
from pipeline.tracking import recording

class Silent:
    def __init__(self, *_): pass
    def close(self, hurried=False): pass

recording.Courier = Silent
from stages import common, tokenize_corpus
tokenize_corpus.KEPT_FROM, sys.argv = 0, [""]
common.run(tokenize_corpus.main)
"""


@dataclass
class Ran:
    """A process of the stage: wall and processor seconds, its highest memory, what it said."""

    seconds: float
    processor: float
    mib: float
    disk: int  # most bytes in the workspace
    said: str


def write_corpus(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Parquet files of varied text, hard links to one; returns their bytes and those of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    text = folder / tokenizing.TEXT
    megabytes = min(PIECE, 1000 * gigabytes)
    tokenizing.write_text(text, megabytes)
    pages = [t[at : at + PAGE] for t in tokenizing.texts(text) for at in range(0, len(t), PAGE)]
    text.unlink()
    first = folder / "0000.parquet"
    pq.write_table(pa.table({"text": pages}), first, compression="none", use_dictionary=False)
    count = max(1, round(1000 * gigabytes / megabytes))
    for number in range(1, count):
        os.link(first, folder / f"{number:04}.parquet")
    return count * first.stat().st_size, count * sum(len(page.encode()) for page in pages)


def workspace(place: Path, source: Path) -> Path:
    """A folder with settings; `.dvc` makes it a root of its own."""
    (place / ".dvc").mkdir(parents=True)
    text = (ROOT / "recipes" / "nano.yaml").read_text("utf-8")
    for old, new in [
        ("source: shakespeare", "source: parquet"),
        ("path: data/unset", f"path: {source}"),
    ]:
        assert old in text
        text = text.replace(old, new, 1)
    (place / "params.yaml").write_text(text, "utf-8")
    return place


def run(place: Path, kill_at: int | None = None) -> Ran:
    """The stage in a process of its own, killed when so many bytes of text are kept."""
    with (place / "said.txt").open("w") as said:
        began, disk, mib, processor = time.perf_counter(), 0, 0.0, 0.0
        process = psutil.Popen(
            [sys.executable, "-c", STAGE],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            try:
                times, memory = process.cpu_times(), process.memory_info().rss / 2**20
            except psutil.Error:
                break
            processor, mib = times.user + times.system, max(mib, memory)
            disk = max(disk, sum(p.stat().st_size for p in _files(place)))
            if kill_at and _kept(place) >= kill_at:
                process.kill()
            time.sleep(0.2)
    assert (process.wait() == 0) == (kill_at is None), (place / "said.txt").read_text()
    seconds = time.perf_counter() - began
    return Ran(seconds, processor, mib, disk, (place / "said.txt").read_text())


def _files(place: Path) -> list[Path]:
    return [p for part in ("data", ".runs") for p in (place / part).rglob("*") if p.is_file()]


def _kept(place: Path) -> int:
    """Bytes of text whose tokens are kept, as the next process would find them."""
    for journal in place.glob(f".runs/*/{token_writer.JOURNAL}"):
        splits = json.loads(journal.read_text())["splits"]
        return sum(split.get("bytes", 0) for split in splits.values())
    return 0


def timed_opening(tokens: Path) -> tuple[float, float]:
    """Processor seconds of opening the training tokens: never read before, and once more."""
    path = tokens / "train.bin"
    os.utime(path, (time.time() - 60,) * 2)  # settled
    verified.LARGE = 0  # whatever was asked for counts as large
    seconds = []
    for _ in range(2):
        began = time.process_time()
        token_files.open_tokens(tokens, "train")
        seconds.append(time.process_time() - began)
    return seconds[0], seconds[1]


def checking(source: Path) -> float:
    """Processor seconds of reading all of the text."""
    from types import SimpleNamespace

    place = {"source": "parquet", "path": str(source), "pattern": "**/*", "field": "text"}
    began = time.process_time()
    corpus.check(SimpleNamespace(**place, val_fraction=0.05))  # type: ignore[arg-type]
    return time.process_time() - began


def order(tokens: float, length: int = 1024) -> tuple[float, float]:
    """MB and processor seconds of one epoch's shuffled order."""
    began = time.process_time()
    _, found = batches._epoch.__wrapped__(int(tokens), length, 0, 0)
    return found.nbytes / 1e6, time.process_time() - began


def page(size: int, text: int, source: Path, place: Path, ran: list[Ran]) -> str:
    whole, killed, again = ran
    meta = json.loads((place / "whole" / paths.TOKENS / "meta.json").read_text())
    tokens = sum(split["tokens"] for split in meta["splits"].values())
    reading = checking(source)
    first, second = timed_opening(place / "whole" / paths.TOKENS)
    megabytes = text / 1e6
    both = killed.seconds + again.seconds, killed.processor + again.processor
    rows = [
        ("text, MB", megabytes, "Parquet without compression", size / 1e6),
        ("tokens, million", tokens / 1e6, "bytes of text a token", text / tokens),
        ("unbroken, s", whole.seconds, "processor s", whole.processor),
        ("MB/s", megabytes / whole.seconds, "a processor s", megabytes / whole.processor),
        ("highest memory, MiB", whole.mib, "of the one that goes on", again.mib),
        ("most disk, MB", whole.disk / 1e6, "token files, MB", 2 * tokens / 1e6),
        ("killed after, s", killed.seconds, "processor s", killed.processor),
        ("gone on, s", again.seconds, "processor s", again.processor),
        ("both, of unbroken", both[0] / whole.seconds, "processor", both[1] / whole.processor),
        ("reading alone, processor s", reading, "MB a processor s", megabytes / reading),
        ("opening tokens first, processor s", first, "again", second),
    ]
    encode = (whole.processor - 2 * reading) / tokens  # processor seconds a token
    read, opened = reading / tokens, first / meta["splits"]["train"]["tokens"]
    later = []
    for billions in (10, 100):
        count = billions * 1e9
        hours = [(read + max(read, (encode + read) / n)) * count / 3600 for n in (2, 16)]
        size_of = text / tokens * count / 1e9, 2 * count / 1e9
        kill = read * count / 3600
        later.append((f"{billions} billion", *size_of, *hours, kill, opened * count, *order(count)))
    columns = ("tokens", "GB of text", "GB of tokens", "h on 2 cores", "h on 16, at least")
    columns += (
        "h lost by a kill, at most",
        "processor s to open first",
        "MB of an epoch's order",
        "to draw",
    )
    facts = outcomes.circumstances()
    busy = f"load average {os.getloadavg()[1]:.0f}; " if hasattr(os, "getloadavg") else ""
    about = busy + "; ".join(facts[key] for key in ("date", "commit", "machine", "versions"))
    return (
        f"# the tokenize stage on {megabytes / 1e3:.2g} GB\n\n`{facts['command']}`: {about}\n\n"
        + markdown(("measured", "", "and", " "), rows)
        + "\nThe unbroken run and the one that was killed and given again wrote the same bytes.\n"
        f"The second process said: `{again.said.splitlines()[0]}`\n\n"
        "By arithmetic from these rates, not measured; the last two columns are:\n\n"
        + markdown(columns, later)
        + "\nText is read twice, by one thread: first to check it, then to encode it. On 16 cores "
        "reading bounds\nthe second pass, too. A kill costs reading past what is done, and some "
        f"{token_writer.KEPT_EVERY >> 20} MiB of tokens.\n"
        "This text has fewer bytes a token than a web page's, of which 10 billion tokens are some "
        "47 GB:\nhours grow with the text.\n"
    )


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, help="for text and tokens; default: a temporary one")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        place = Path(folder)
        source = place / "text"
        size, text = write_corpus(source, asked.gigabytes)
        whole = run(workspace(place / "whole", source))
        killed = run(workspace(place / "killed", source), kill_at=text // 2)
        again = run(place / "killed")
        assert "goes on" in again.said, again.said
        for split in token_files.SPLITS:
            files = [place / name / paths.TOKENS / f"{split}.bin" for name in ("whole", "killed")]
            digests = {_sha256(file) for file in files}
            assert len(digests) == 1, f"{split}: other bytes after the kill"
        os.environ["DVC_ROOT"] = str(place / "whole")  # where what was read is remembered
        said = page(size, text, source, place, [whole, killed, again])
    path = outcomes.RESULTS / "scale_tokens.md"
    path.write_text(said, encoding="utf-8", newline="\n")
    print(said)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
