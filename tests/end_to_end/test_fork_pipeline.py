"""A fork as DVC, MLflow and the report see it."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest

from pipeline.records import stage_graph
from tests.conftest import Checkout, tiny_pipeline


def locked(made: Checkout, name: str) -> dict[str, str]:
    """DVC's MD5 by path of an experiment's outputs."""
    refs = made.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    (ref,) = (ref for ref in refs if ref.endswith(f"/{name}"))
    return stage_graph.locked(made.run("git", "show", f"{ref}:dvc.lock").stdout.encode())


def check(made: Checkout, state: str) -> None:
    """`same` is a fork of `base` with unchanged settings, and `state` is not kept."""
    base, same = (locked(made, name) for name in ("base", "same"))
    for out in ("artifacts/model", "artifacts/last"):
        assert base[out] == same[out]
    assert base["records/train.jsonl"] != same["records/train.jsonl"]

    def pipeline(*words: str, expect: int = 0) -> str:
        done = made.run(sys.executable, "-m", "pipeline", *words, expect=expect)
        return done.stdout + done.stderr

    pipeline("sync")
    with sqlite3.connect(made.folder / "mlflow.db") as store:
        of_run = "join runs r on r.run_uuid = t.run_uuid where r.name = 'same'"
        rows = store.execute(f"select t.key, t.value from tags t {of_run}").fetchall()
    tags = dict(rows)
    assert len(rows) == len(tags) and tags["fork"].startswith("base@")
    assert tags["fork.parent"].startswith("#/experiments/")
    assert "no checkpoint of that step; kept are those after" in pipeline("fork", state, expect=3)
    pipeline("report", "base", "same")
    page = (made.folder / "report.html").read_text("utf-8")
    assert f"    @{tags['fork'].partition('@')[2]} same: " in page


@pytest.mark.slow
def test_a_fork_of_unchanged_settings_is_its_parents_continuation_for_dvc(tmp_path: Path) -> None:
    made = tiny_pipeline(tmp_path, **{"train.steps": 12, "checkpoint.keep_every": 4})
    made.dvc("exp", "run", "--temp", "-n", "base")
    made.run(sys.executable, "-m", "pipeline", "fork", "base@8", "-n", "same")
    check(made, "base@5")
