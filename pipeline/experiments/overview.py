"""A table of the experiments: what each changed and what came of it, the best first."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipeline import screen
from pipeline.errors import InputError
from pipeline.records.run_data import Experiment
from pipeline.tables import cell, markdown
from pipeline.tracking.run_note import changes

COLUMNS = (
    *("name", "changed", "verdict", "val loss", "bits/byte", "tokens", "tokens/s", "MiB"),
    *("time", "ended"),
)
NONE = "no experiment yet: `make repro` makes the first one"


def page(found: Iterable[Experiment], as_markdown: bool = False) -> str:
    """A table for each corpus, the newest corpus last. Raises InputError where none was trained.

    A training that several names share is in it once, and so is the workspace's run.
    """
    corpora: dict[str, dict[str, Experiment]] = {}
    for one in found:
        if "train" in one.records and one.last("train/tokens") is not None:
            runs = corpora.setdefault(one.tags.get("digest.train", ""), {})
            runs.setdefault(one.head["id"], one)
    if not corpora:
        raise InputError(NONE)
    tables = []
    for runs in corpora.values():
        best = sorted(runs.values(), key=_loss)
        rows = [row(one) for one in best]
        params = best[0].params
        count = f"{len(rows)} experiment{'s' if rows[1:] else ''}"
        head = f"{count} on {params['corpus.source']}, {params['corpus.path']}"
        made = markdown(COLUMNS, rows) if as_markdown else screen.table(COLUMNS, rows, left=3)
        tables.append(f"{head}, the best first:\n\n{made}")
    return "\n\n".join(tables)


def row(one: Experiment) -> tuple[str, ...]:
    """One tuple of COLUMNS."""
    train = one.records["train"]
    numbers = (one.last(f"val/{name}") for name in ("loss", "bits_per_byte"))
    return (
        one.name,
        changes(train[0]) or "nothing",
        one.tags.get("health.verdict", "-"),
        *(cell(number) for number in numbers),
        screen.count(one.last("train/tokens")),
        screen.count(one.last("perf/tokens_per_second")),
        screen.count(one.last("perf/peak_memory_mib")),
        screen.duration(one.last("time/train_seconds")),
        screen.moment(train[-1].get("time", train[0]["time"]) / 1000),
    )


def _loss(one: Experiment) -> float:
    loss = one.last("val/loss")
    return math.inf if loss is None or math.isnan(loss) else loss
