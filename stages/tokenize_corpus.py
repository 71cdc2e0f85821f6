"""tokenize: a corpus in, token files of its two splits out."""

from __future__ import annotations

import time
from dataclasses import replace

from tqdm import tqdm

from pipeline import paths
from pipeline.config import Config
from pipeline.data import contamination, corpus, token_writer
from pipeline.data.token_files import SPLITS, open_tokens
from pipeline.records import git
from pipeline.tracking import recording
from stages.common import run


def main(config: Config) -> None:
    with recording.record("tokenize", config) as record:
        if corpus.SOURCES[config.corpus.source].suffixes:
            git.check_whole(
                "corpus.path",
                config.corpus.path,
                lambda path: corpus.files(replace(config.corpus, path=path)),
            )
        with tqdm(unit="B", unit_scale=True, desc="check", mininterval=0.5) as bar:
            counts = corpus.check(config.corpus, bar.update)
        show_left_out(corpus.left_out(config.corpus), counts["empty"])
        token_writer.refuse_empty(counts)
        started = time.perf_counter()
        with tqdm(unit="B", unit_scale=True, desc="tokenize", mininterval=0.5) as bar:
            documents = corpus.documents(config.corpus)
            meta = token_writer.write_tokens(
                documents, paths.TOKENS, progress=bar.update, source=corpus.describe(config.corpus)
            )
        seconds = time.perf_counter() - started
        for split in SPLITS:
            facts = meta["splits"][split]
            counts = {name: facts[name] for name in facts if name != "sha256"}
            record.metrics({f"data/{split}_{name}": count for name, count in counts.items()})
            record.dataset("tokens", facts["sha256"], config.corpus.source, split)
            print(
                f"tokenize: {split} {facts['documents']:,} documents, {facts['bytes']:,} bytes, "
                f"{facts['tokens']:,} tokens"
                + (f", {facts['answers']:,} of answers" if "answers" in facts else "")
            )
        text_bytes = sum(meta["splits"][split]["bytes"] for split in SPLITS)
        record.metrics({"perf/tokenize_mb_per_second": text_bytes / 1e6 / seconds})
        splits = [open_tokens(paths.TOKENS, split, verify=False) for split in SPLITS]
        shared = contamination.overlap(*splits)
        record.metrics({"data/val_overlap": shared})
        passages = f"{contamination.LENGTH}-token validation passages"
        print(f"tokenize: {shared:.1%} of {passages} also occur in the training text")


def show_left_out(files: str, documents: int) -> None:
    """What the corpus passes over: a line for files and one for documents, if there are any."""
    if files:
        print(f"tokenize: {files}")
    if documents:
        plural = "s" * (documents > 1)
        print(f"tokenize: left out {documents:,} document{plural} without any text")


if __name__ == "__main__":
    run(main, "tokenize")
