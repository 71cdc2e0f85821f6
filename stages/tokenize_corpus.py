"""tokenize: a corpus in, token files of its two splits out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pipeline import paths
from pipeline.config import Config, CorpusConfig
from pipeline.data import contamination, corpus, token_writer
from pipeline.data.token_files import SPLITS, open_tokens
from pipeline.records import git, provenance
from pipeline.resume import run_folder
from pipeline.tracking import recording
from stages.common import run

KEPT_FROM = 1 << 28  # bytes of the corpus's files


def names(config: CorpusConfig, path: str) -> list[str]:
    """The files that the corpus would read at a path, relative to it."""
    found = corpus.files(replace(config, path=path)).values()
    return [f.name if f == Path(path) else f.relative_to(path).as_posix() for f in found]


def main(config: Config) -> None:
    with recording.record("tokenize", config) as record:
        if corpus.reads_files(config.corpus):
            git.check_whole("corpus.path", config.corpus.path, partial(names, config.corpus))
        with kept(config) as folder:
            before = check(config, folder)
            started = time.perf_counter()
            with tqdm(unit="B", unit_scale=True, desc="tokenize", mininterval=0.5) as bar:
                documents, about = corpus.documents(config.corpus), corpus.describe(config.corpus)
                meta = token_writer.write_tokens(
                    documents, paths.TOKENS, progress=bar.update, source=about, kept=folder
                )
        seconds = time.perf_counter() - started
        for split in SPLITS:
            facts = meta["splits"][split]
            of, rest = token_writer.TOKENS_OF, {n: c for n, c in facts.items() if n != "sha256"}
            shares = {n.removeprefix(of): rest.pop(n) / facts["tokens"] for n in facts if of in n}
            record.metrics({f"data/{split}_{name}": count for name, count in rest.items()})
            for name, share in shares.items():  # MLflow's names take no colon everywhere
                record.metrics({f"data/{split}_share_{name.replace(':', '_')}": share})
            record.dataset("tokens", facts["sha256"], config.corpus.source, split)
            print(
                f"tokenize: {split} {facts['documents']:,} documents, {facts['bytes']:,} bytes, "
                f"{facts['tokens']:,} tokens"
                + (f", {facts['answers']:,} of answers" if "answers" in facts else "")
                + "".join(f", {share:.1%} {name}" for name, share in shares.items())
            )
        text_bytes = sum(meta["splits"][split]["bytes"] for split in SPLITS) - before
        record.metrics({"perf/tokenize_mb_per_second": text_bytes / 1e6 / seconds})
        splits = [open_tokens(paths.TOKENS, split, verify=False) for split in SPLITS]
        shared = contamination.overlap(*splits)
        record.metrics({"data/val_overlap": shared})
        passages = f"{contamination.LENGTH}-token validation passages"
        print(f"tokenize: {shared:.1%} of {passages} also occur in the training text")


@contextlib.contextmanager
def kept(config: Config) -> Iterator[Path | None]:
    """The folder for unfinished tokens of a large corpus; a small one takes half a minute."""
    stamps = provenance.input_stamps("tokenize", config)
    if sum(size for size, _ in stamps.values()) < KEPT_FROM:
        yield None
        return
    identity = run_folder.identity("tokenize", config, stamps)
    with run_folder.scratch(identity, token_writer.JOURNAL) as folder:
        yield folder


def check(config: Config, folder: Path | None) -> int:
    """All of the text is checked before any work, unless an earlier process did and was stopped.

    Returns the bytes of text whose tokens that one has left.
    """
    if folder and (begun := token_writer.begun(folder)):
        done = sum(facts.get("bytes", 0) for facts in begun["splits"].values())
        print(f"tokenize: goes on after {done:,} bytes of text, once it has read past them")
        return done
    with tqdm(unit="B", unit_scale=True, desc="check", mininterval=0.5) as bar:
        counts = corpus.check(config.corpus, bar.update)
    show_left_out(corpus.left_out(config.corpus), counts["empty"])
    token_writer.refuse_empty(counts)
    if config.corpus.source == "mix":
        for name, times in corpus.times_read(config.corpus, counts).items():
            print(f"tokenize: {name} is read {times:.2f} times")
    return 0


def show_left_out(files: str, documents: int) -> None:
    """What the corpus passes over: a line for files and one for documents, if there are any."""
    if files:
        print(f"tokenize: {files}")
    if documents:
        plural = "s" * (documents > 1)
        print(f"tokenize: left out {documents:,} document{plural} without any text")


if __name__ == "__main__":
    run(main, "tokenize")
