"""Text into token files, by this pipeline and by the ways of its peers, side by side.

    python benchmarks/tokenizing.py [--megabytes 12 96] [--rounds N]
                                    [--nanogpt CHECKOUT] [--build-nanogpt CHECKOUT]

Everyone reads the same JSON lines and writes token ids as uint16 to a file. nanoGPT's way needs
`datasets`, an extra that nothing else here uses (pip install datasets); its text is loaded before
the clock starts, as after its download. Ours does what the tokenize stage does: check the text,
split it, encode, hash. A time counts only for who wrote the ids that tiktoken gives.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import checkouts, outcomes, side_by_side
from benchmarks.checkouts import BUILD_NANOGPT, NANOGPT
from benchmarks.outcomes import OURS
from benchmarks.side_by_side import Contestant, Turn, Verdict
from pipeline import config as configuration
from pipeline.data import corpus, token_writer, tokenizer
from pipeline.data.documents import name_hash
from pipeline.data.sources import python_docs
from pipeline.data.token_writer import usable_cores

ROOT = Path(__file__).resolve().parent.parent
TEXT = "text.jsonl"
VAL_FRACTION = 0.1
REFERENCE = "tiktoken, one process"
SHARD = 100_000_000  # tokens of build-nanogpt's buffer
PIECES = 1024  # in which nanoGPT writes
SLOW_MEGABYTES = 24  # above, the slowest ways are left out

Answer = tuple[str, list[str]]  # where end-of-text stands, and the files


# --- the text


def write_text(path: Path, megabytes: float) -> int:
    """JSON lines of some `megabytes` of Python's documentation; returns the bytes of text.

    It is read again and again, each time with other words in place of a quarter of its words, a
    tenth of them new ones made of two halves: no line stands there often, nor any cache helps.
    """
    documents = [text for text in python_docs.texts().values() if text]
    words = sorted({word for text in documents for word in text.split(" ")})
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for turn in itertools.count():
            other = _other_words(words, turn)
            for text in documents:
                text = " ".join([other.get(word, word) for word in text.split(" ")])
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                if written >= megabytes * 1e6:
                    return written


def _other_words(words: list[str], turn: int) -> dict[str, str]:
    draws = random.Random(turn)
    other = {}
    for word in draws.sample(words, len(words) // 4) if turn else ():
        a, b = draws.choice(words), draws.choice(words)
        other[word] = a[: len(a) // 2] + b[len(b) // 2 :] if draws.random() < 0.1 else a
    return other


def texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


# --- the contestants: each turn writes its files and says where end-of-text stands in them


def ours(path: Path, folder: Path, workers: int | None = None) -> Turn:
    """The tokenize stage without its record."""
    changes = {"source": "jsonl", "path": str(path), "field": "text", "val_fraction": VAL_FRACTION}
    settings = [f"corpus.{name}={json.dumps(value)}" for name, value in changes.items()]
    config = configuration.load(ROOT / "recipes" / "nano.yaml", settings).corpus

    def turn() -> Answer:
        token_writer.refuse_empty(corpus.check(config))
        documents, about = corpus.documents(config), corpus.describe(config)
        token_writer.write_tokens(documents, folder, workers=workers, source=about)
        return "by split", [str(folder / "train.bin"), str(folder / "val.bin")]

    return turn


def one_process(path: Path, folder: Path) -> Turn:
    encode = tokenizer.gpt2().encode_ordinary
    return partial(_write, folder, lambda: map(encode, texts(path)))


def threads(path: Path, folder: Path) -> Turn:
    encode = tokenizer.gpt2().encode_ordinary_batch
    return partial(_write, folder, lambda: encode(list(texts(path)), num_threads=usable_cores()))


def hf_tokenizers(path: Path, folder: Path) -> Turn:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer.write_files(folder)
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    encode = ByteLevelBPETokenizer(*files).encode_batch
    return partial(_write, folder, lambda: (e.ids for e in encode(list(texts(path)))))


def _write(folder: Path, encoded: Callable[[], Iterable[list[int]]]) -> Answer:
    """Ids of each document behind its end-of-text, in order, into one file."""
    with (folder / "tokens.bin").open("wb") as file:
        for ids in encoded():
            np.array([tokenizer.EOT, *ids], dtype=np.uint16).tofile(file)
    return "first", [str(folder / "tokens.bin")]


def pool(path: Path, folder: Path, checkout: Path) -> Turn:
    """build-nanogpt: its `tokenize` by a pool of all cores (its script takes half of them)."""
    script, file = checkout / "fineweb.py", folder / "tokens.npy"
    _fineweb(script)

    def turn() -> Answer:
        buffer, filled = np.empty(SHARD, dtype=np.uint16), 0
        documents = ({"text": text} for text in texts(path))
        with multiprocessing.Pool(usable_cores()) as workers:
            for ids in workers.imap(partial(_fineweb_tokens, script), documents, chunksize=16):
                buffer[filled : filled + len(ids)] = ids
                filled += len(ids)
        np.save(file, buffer[:filled])
        return "first", [str(file)]

    return turn


@cache
def _fineweb(script: Path) -> Any:
    theirs = checkouts.definitions(script, ("enc", "eot"))
    theirs.enc, theirs.eot = tokenizer.gpt2(), tokenizer.EOT
    return theirs


def _fineweb_tokens(script: Path, document: dict[str, str]) -> np.ndarray:
    return _fineweb(script).tokenize(document)


def mapped(path: Path, folder: Path, checkout: Path) -> Turn:
    """nanoGPT: its `process` by `datasets.map` with all cores, then piece by piece to the file."""
    import datasets

    datasets.disable_progress_bars()
    theirs = checkouts.definitions(checkout / "data" / "openwebtext" / "prepare.py", ("enc",))
    theirs.enc = tokenizer.gpt2()
    data = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(folder / "cache")
    )
    file = folder / "tokens.bin"

    def turn() -> Answer:
        found = data.map(
            theirs.process,
            remove_columns=["text"],
            num_proc=usable_cores(),
            load_from_cache_file=False,
        )
        total, done = int(np.sum(found["len"])), 0
        written = np.memmap(file, dtype=np.uint16, mode="w+", shape=(total,))
        pieces = min(PIECES, len(found))
        for index in range(pieces):
            piece = found.shard(num_shards=pieces, index=index, contiguous=True)
            ids = np.concatenate(piece.with_format("numpy")["ids"])
            written[done : done + len(ids)] = ids
            done += len(ids)
        written.flush()
        return "last", [str(file)]

    return turn


# --- the same ids?


def agree(answers: list[Answer], others: list[Answer]) -> Verdict:
    """Refuses ids other than the reference's, wherever a way puts its end-of-text."""
    ids, theirs = _in_order(*answers[-1]), _in_order(*others[-1])
    if np.array_equal(ids, theirs):
        return Verdict()
    if len(ids) != len(theirs):
        return Verdict(f"{len(ids):,} ids instead of {len(theirs):,}")
    return Verdict(f"other ids from place {int(np.argmax(ids != theirs)):,} on")


def _in_order(layout: str, files: list[str]) -> np.ndarray:
    """Ids of all documents in the text's order, end-of-text before each."""
    parts = [
        np.load(file) if file.endswith(".npy") else np.fromfile(file, dtype="<u2") for file in files
    ]
    if layout == "last":
        return np.concatenate([[tokenizer.EOT], parts[0][:-1]])
    if layout == "first":
        return parts[0]
    train, val = (_documents(part) for part in parts)
    share, merged = int(VAL_FRACTION * (1 << 64)), []
    for number in range(1, len(train) + len(val) + 1):
        split = val if name_hash(f"{TEXT}:{number}") < share else train
        merged.append(split.pop() if split else [])
    return np.concatenate(merged)


def _documents(ids: np.ndarray) -> list[np.ndarray]:
    """The documents of a stream, the first one last."""
    return np.split(ids, np.flatnonzero(ids == tokenizer.EOT)[1:])[::-1]


# --- the comparison


def contestants(
    path: Path, megabytes: float, nano: str | None, build: str | None
) -> list[Contestant]:
    def started(start: Callable[..., Turn], *more: Any) -> partial[Turn]:
        folder = path.parent / start.__name__
        folder.mkdir()
        return partial(start, path, folder, *more)

    part = checkouts.part_in(NANOGPT, nano)
    if importlib.util.find_spec("datasets") is None:
        part = {"missing": "datasets is not installed: pip install datasets"}
    found = [
        Contestant(OURS, started(ours)),
        Contestant(
            f"{BUILD_NANOGPT}, pool",
            started(pool, Path(build or "")),
            **checkouts.part_in(BUILD_NANOGPT, build),
        ),
        Contestant(f"{NANOGPT}, datasets.map", started(mapped, Path(nano or "")), **part),
        Contestant(REFERENCE, started(one_process)),
        Contestant("tiktoken, threads", started(threads)),
    ]
    if megabytes <= SLOW_MEGABYTES:
        found.append(Contestant("tokenizers, threads", started(hf_tokenizers)))
    return found


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", nargs="+", type=float, default=[12, 96])
    parser.add_argument("--rounds", type=int, default=3)
    checkouts.add_arguments(parser)
    asked = parser.parse_args(words)
    for megabytes in asked.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / TEXT
            size = write_text(path, megabytes)
            results = side_by_side.measure(
                contestants(path, megabytes, asked.nanogpt, asked.build_nanogpt),
                agree,
                reference=REFERENCE,
                rounds=asked.rounds,
                tell=lambda line: print(f"tokenizing: {line}", file=sys.stderr),
            )
        about = f"{size / 1e6:.1f} MB of Python's documentation, words varied; ids equal."
        base = f"{BUILD_NANOGPT}, pool" if asked.build_nanogpt else REFERENCE
        case = outcomes.Case(f"{megabytes:g} MB", size / 1e6, "MB", base, results, about)
        print(outcomes.publish("tokenizing", case))


if __name__ == "__main__":
    main(sys.argv[1:])
