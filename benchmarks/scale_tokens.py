"""The tokenize stage on gigabytes: speed, memory, disk, and what a kill -9 in the middle costs.

    python benchmarks/scale_tokens.py [--gigabytes 5] [--folder FOLDER]

Text is written as uncompressed Parquet files, see `write_corpus`. The stage runs in two workspaces
of its own: once unbroken, once killed when half of the text's tokens are kept and then given
again. Both must write the same bytes. Then a training of two steps starts over them, twice. What
10 and 100 billion tokens take is arithmetic from these rates, but for the shuffled order, which is
drawn. Writes benchmarks/results/scale_tokens.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks import outcomes
from pipeline import paths
from pipeline.data import batches, corpus, token_files, token_writer
from pipeline.data.sources import python_docs, shakespeare
from pipeline.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
FILE = 250e6  # bytes of text in a file ...
POOL = 25e6  # ... drawn from so many bytes of sentences, which are the file's own
GROUP = 1000  # documents written at a time
PLAYS = 0.25  # share of the sentences that are Shakespeare's
OTHER, MADE = 0.1, 0.02  # shares of words replaced by another running word, by one made of two
LENGTH = 8.0, 0.9  # of a document's bytes, log-normal: 3 kB in the middle, 4.5 in the mean
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# As `python -m stages.NAME`, but for MLflow's client, and files of any size are kept.
STAGE = """
import sys
from pipeline.tracking import recording

class Silent:
    def __init__(self, *_): pass
    def close(self, hurried=False): pass

recording.Courier = Silent
import importlib
from stages import common, tokenize_corpus
tokenize_corpus.KEPT_FROM, name = 0, sys.argv.pop()
common.run(importlib.import_module(f"stages.{name}").main)
"""


@dataclass
class Ran:
    """A process of the stage: wall and processor seconds, its highest memory, what it said."""

    seconds: float
    processor: float
    mib: float
    disk: int  # most bytes in the workspace
    said: str
    grew: float = 0.0  # seconds until the files grew beyond what an earlier process had kept


def write_corpus(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Parquet files of text as a web page's in bytes a token; returns their bytes and the text's.

    A document is made of sentences drawn at random, of Python's documentation and Shakespeare's
    plays, prose alone, in which words have been replaced: no document comes twice, and a sentence
    some ten times in a file and never in another.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    total, wanted, written = 1e9 * gigabytes, 0.0, 0
    for number in range(1000):
        if wanted >= total:
            break
        wanted += min(FILE, total - wanted)
        schema = pa.schema([("text", pa.string())])
        path = folder / f"{number:04}.parquet"
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as file:
            every = documents(random.Random(number))
            while written < wanted:
                some = [next(every) for _ in range(GROUP)]
                file.write_table(pa.table({"text": some}, schema))
                written += sum(len(text.encode()) for text in some)
    return sum(path.stat().st_size for path in folder.iterdir()), written


def documents(draws: random.Random) -> Iterator[str]:
    docs, plays = (
        [s for text in texts.values() for s in sentences(text)]
        for texts in (python_docs.texts(), shakespeare.scenes())
    )
    words = [word for sentence in (*docs, *draws.sample(plays, len(docs))) for word in sentence]
    pool, size = [], 0
    while size < POOL:
        sentence = draws.choice(plays if draws.random() < PLAYS else docs)
        pool.append(" ".join([varied(word, words, draws) for word in sentence]))
        size += len(pool[-1])
    mean = size / len(pool)
    while True:
        yield " ".join(draws.choices(pool, k=1 + int(draws.lognormvariate(*LENGTH) / mean)))


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence that is prose: no code, no list, no heading."""
    every = [s for part in text.split("\n\n") for s in SENTENCE.split(part)]
    return [s.split() for s in every if 40 < len(s) < 1000 and s[0].isupper() and _prose(s)]


def _prose(sentence: str) -> bool:
    plain = sum(char.isalpha() or char in " \n,.;'" for char in sentence)
    return sentence.rstrip()[-1] in ".!?" and plain > 0.93 * len(sentence)


def varied(word: str, words: list[str], draws: random.Random) -> str:
    draw = draws.random()
    if draw >= OTHER + MADE:
        return word
    a, b = draws.choice(words), draws.choice(words)
    return a if draw < OTHER else a[: len(a) // 2] + b[len(b) // 2 :]


def workspace(place: Path, source: Path) -> Path:
    """A folder with settings; `.dvc` makes it a root of its own."""
    (place / ".dvc").mkdir(parents=True)
    settings = {"source: shakespeare": "source: parquet", "path: data/unset": f"path: {source}"}
    settings |= {"  steps: 500": "  steps: 2", "warmup_steps: 60": "warmup_steps: 0"}
    (place / "params.yaml").write_text((ROOT / "recipes" / "nano.yaml").read_text("utf-8"), "utf-8")
    return change(place, settings)


def change(place: Path, settings: dict[str, str]) -> Path:
    text = (place / "params.yaml").read_text("utf-8")
    for old, new in settings.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    (place / "params.yaml").write_text(text, "utf-8")
    return place


def run(place: Path, stage: str = "tokenize_corpus", kill_at: int | None = None) -> Ran:
    """A stage in a process of its own, killed when so many bytes of text are kept."""
    with (place / "said.txt").open("w") as said:
        began, disk, mib, processor, grew = time.perf_counter(), 0, 0.0, 0.0, 0.0
        kept, cut_off = _kept(place)[1], False
        process = psutil.Popen(
            [sys.executable, "-c", STAGE, stage],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            try:
                times, memory = process.cpu_times(), process.memory_info().rss / 2**20
            except psutil.Error:
                break
            processor, mib = times.user + times.system, max(mib, memory)
            disk = max(disk, sum(_size(path) for path in _files(place)))
            there = sum(_size(p) for p in place.glob(".runs/*/*.bin.partial"))
            cut_off = cut_off or there == kept  # what had not been kept is gone
            if cut_off and there > kept and not grew:
                grew = time.perf_counter() - began
            if kill_at and _kept(place)[0] >= kill_at:
                process.kill()
            time.sleep(0.2)
    told = (place / "said.txt").read_text()
    assert (process.wait() == 0) == (kill_at is None), told
    return Ran(time.perf_counter() - began, processor, mib, disk, told, grew)


def _files(place: Path) -> list[Path]:
    return [p for part in ("data", ".runs") for p in (place / part).rglob("*") if p.is_file()]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has got its name just now
        return 0


def _kept(place: Path) -> tuple[int, int]:
    """Bytes of text whose tokens are kept, as the next process would find them, and of these."""
    for journal in place.glob(f".runs/*/{token_writer.JOURNAL}"):
        splits = json.loads(journal.read_text())["splits"].values()
        tokens = sum(split.get("tokens", 0) for split in splits)
        return sum(split.get("bytes", 0) for split in splits), token_files.DTYPE.itemsize * tokens
    return 0, 0


def checking(source: Path) -> float:
    """Processor seconds of reading all of the text."""
    from types import SimpleNamespace

    place = {"source": "parquet", "path": str(source), "pattern": "**/*", "field": "text"}
    began = time.process_time()
    corpus.check(SimpleNamespace(**place, val_fraction=0.05))  # type: ignore[arg-type]
    return time.process_time() - began


def order(tokens: float, length: int = 1024) -> tuple[float, float, float]:
    """MB of one epoch's shuffled order, at the most while it is drawn, and processor seconds."""
    tracemalloc.start()
    began = time.process_time()
    _, found = batches._epoch.__wrapped__(int(tokens), length, 0, 0)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found.nbytes / 1e6, peak / 1e6, seconds


def page(size: int, text: int, source: Path, place: Path, ran: dict[str, Ran], kept: int) -> str:
    whole, killed, again = (ran[name] for name in ("whole", "killed", "again"))
    meta = json.loads((place / "whole" / paths.TOKENS / "meta.json").read_text())
    tokens = sum(split["tokens"] for split in meta["splits"].values())
    reading = checking(source)
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
        ("first new token after, s", again.grew, "share of the tokens kept", kept / tokens),
        ("both, of unbroken", both[0] / whole.seconds, "processor", both[1] / whole.processor),
        ("reading alone, processor s", reading, "MB a processor s", megabytes / reading),
    ]
    for name in ("first training", "second training"):
        rows.append((f"{name}, 2 steps, s", ran[name].seconds, "processor s", ran[name].processor))
    encode = (whole.processor - 2 * reading) / tokens  # processor seconds a token
    read = reading / tokens
    opened = (ran["first training"].processor - ran["second training"].processor) / tokens
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
        "processor s to check first",
        "MB of an epoch's order",
        "MB while it is drawn",
        "to draw, s",
    )
    facts = outcomes.circumstances()
    busy = f"load average {os.getloadavg()[2]:.0f}; " if hasattr(os, "getloadavg") else ""
    about = busy + "; ".join(facts[key] for key in ("date", "commit", "machine", "versions"))
    return (
        f"# the tokenize stage on {megabytes / 1e3:.2g} GB\n\n`{facts['command']}`: {about}\n\n"
        + markdown(("measured", "", "and", " "), rows)
        + "\nText: sentences of Python's documentation and Shakespeare's plays, drawn at random, "
        f"{OTHER:.0%} of their\nwords replaced by others and {MADE:.0%} by new ones; "
        f"{POOL / 1e6:g} MB of them for every {FILE / 1e6:g} MB.\n"
        "The unbroken run and the one that was killed and given again wrote the same bytes.\n"
        f"The second process said: `{again.said.splitlines()[0]}`\n\n"
        "By arithmetic from these rates, not measured; the last three columns are:\n\n"
        + markdown(columns, later)
        + "\nText is read twice, by one thread: first to check it, then to encode it. On 16 cores "
        "reading bounds\nthe second pass, too. A kill costs reading past what is done, and some "
        f"{token_writer.KEPT_EVERY >> 20} MiB of tokens.\n"
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
        ran = {"whole": run(workspace(place / "whole", source))}
        ran["killed"] = run(workspace(place / "killed", source), kill_at=text // 2)
        kept = _kept(place / "killed")[1] // token_files.DTYPE.itemsize
        ran["again"] = again = run(place / "killed")
        assert "goes on" in again.said, again.said
        for split in token_files.SPLITS:
            files = [place / name / paths.TOKENS / f"{split}.bin" for name in ("whole", "killed")]
            digests = {_sha256(file) for file in files}
            assert len(digests) == 1, f"{split}: other bytes after the kill"
        run(place / "whole", "import_hf_weights")
        ran["first training"] = run(place / "whole", "train")
        change(place / "whole", {"seed: 1337": "seed: 1338"})  # or its result would be taken again
        ran["second training"] = run(place / "whole", "train")
        said = page(size, text, source, place, ran, kept)
    path = outcomes.RESULTS / "scale_tokens.md"
    path.write_text(said, encoding="utf-8", newline="\n")
    print(said)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
