"""`show`: every experiment in a table that fits."""

from __future__ import annotations

import pytest

from pipeline.errors import InputError
from pipeline.experiments import overview, screen
from pipeline.records.run_data import Experiment

LR = {"settings": "s", "changed": {"train.lr": [0.002, 0.006], "train.steps": [400, 100]}}


def trained(name: str, loss: float | None, corpus: str = "plays", **more: object) -> Experiment:
    params = {"corpus.source": corpus, "corpus.path": "data/corpus"}
    head = {"kind": "start", "id": name, "name": name, "time": 0, "params": params, "parent": LR}
    values = {"train/tokens": 51_200.0, "perf/tokens_per_second": 1660.0}
    values |= {"perf/peak_memory_mib": 627.8, "time/train_seconds": 61.0}
    values |= {"val/loss": loss, "val/bits_per_byte": 2.4} if loss is not None else {}
    events = [
        head | more,
        {"kind": "tags", "values": {"digest.train": corpus, "health.verdict": "gradient spike"}},
        {"kind": "metrics", "time": 1, "step": 8, "values": values},
        {"kind": "end", "status": "FINISHED", "time": 1000},
    ]
    return Experiment(name, name, {"train": events})


def test_each_corpus_has_a_table_of_its_own_with_the_best_first(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(screen.WIDTH))
    found = [
        trained("worse", 6.5),
        trained("elsewhere", 9.0, "text"),
        trained("best", 5.25),
        trained("unjudged", None),
        trained("workspace", 5.25, id="best"),
    ]
    page = overview.page([*found, Experiment("untrained", "x", {})])
    heads = [line for line in page.splitlines() if "the best first" in line]
    assert heads == [
        "on plays, data/corpus, the best first:",
        "on text, data/corpus, the best first:",
    ]
    names = [line.split()[0] for line in page.splitlines() if "gradient" in line]
    assert names == ["best", "worse", "unjudged", "elsewhere"]
    for part in ("lr 0.002 ->", "gradient", "5.25", "2.400", "51.2k", "1,660", "01:01"):
        assert part in page
    assert max(map(len, page.splitlines())) <= screen.WIDTH


@pytest.mark.parametrize("columns", [80, 100])
def test_long_names_and_changes_leave_every_number_whole(columns: int, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    long = {"settings": "s", "changed": {f"model.setting_{n}": [n, n + 1] for n in range(9)}}
    names = ["a-name-of-some-length-" * 3, "transfer-2x128-0.0005-seed-1"]
    page = overview.page([trained(name, 5.2512, parent=long) for name in names])
    assert max(map(len, page.splitlines())) <= columns
    assert set(names) <= {line.split()[0] for line in page.splitlines() if line}
    for number in ("5.251", "51.2k", "1,660", "628", "01:01"):
        assert number in page.split()


def test_where_nothing_is_trained_it_says_so() -> None:
    with pytest.raises(InputError, match="no experiment yet: `make repro`"):
        overview.page([Experiment("untrained", "x", {})])
