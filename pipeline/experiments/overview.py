"""A table of the experiments: what each changed and what came of it, the best first."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipeline.errors import InputError
from pipeline.experiments import screen
from pipeline.records.run_data import Experiment
from pipeline.tracking.run_note import changes

COLUMNS = (
    *("name", "changed", "verdict", "val loss", "bits/byte", "tokens", "tokens/s", "MiB"),
    *("time", "ended"),
)


def page(found: Iterable[Experiment]) -> str:
    """A table for each corpus. Raises InputError where none was trained.

    A run that several names share, as an experiment and the workspace, is in it once.
    """
    corpora: dict[str, dict[str, Experiment]] = {}
    for one in found:
        train = one.records.get("train")
        if train and train[-1].get("status") == "FINISHED":
            corpora.setdefault(one.tags.get("digest.train", ""), {}).setdefault(one.head["id"], one)
    if not corpora:
        raise InputError("no experiment yet: `make repro` makes the first one")
    tables = []
    for runs in corpora.values():
        best = sorted(runs.values(), key=_loss)
        params, made = best[0].params, screen.table(COLUMNS, map(row, best), left=3)
        source = params["corpus.source"]
        source = params["corpus.mix"] if source == "mix" else source
        corpus = f"{source}, {params['corpus.path']}"
        tables.append(f"on {corpus}, the best first:\n\n{made}")
    return "\n\n".join(tables)


def row(one: Experiment) -> tuple[str, ...]:
    """One tuple of COLUMNS."""
    train = one.records["train"]
    return (
        *(one.name, changes(train[0]) or "nothing", one.tags.get("health.verdict", "-")),
        *(screen.number(one.last(f"val/{name}"), ".3f") for name in ("loss", "bits_per_byte")),
        screen.count(one.last("train/tokens")),
        screen.number(one.last("perf/tokens_per_second")),
        screen.number(one.last("perf/peak_memory_mib")),
        screen.duration(one.last("time/train_seconds")),
        screen.moment(train[-1]["time"] / 1000)[5:],
    )


def _loss(one: Experiment) -> float:
    loss = one.last("val/loss")
    return math.inf if loss is None or math.isnan(loss) else loss
