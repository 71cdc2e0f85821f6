"""MLflow's store brought up to date with every record that there is."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import paths
from pipeline.errors import StorageError
from pipeline.experiments import history
from pipeline.records import dvc_history
from pipeline.records.run_data import Experiment
from pipeline.storage import digests
from pipeline.tracking.mlflow_run import Row, from_workspace, open_row, rename, shipped, sweep
from pipeline.tracking.mlflow_store import connect, said

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


def sync(problems: list[str] | None = None) -> list[str]:
    """Bring the store up to date: the names of the rows that were made or completed.

    A record that is not to be read, or that the store refuses, is left out with a warning, and
    its experiment, file and reason are appended to `problems`. Raises one of `store_errors` where
    the store itself does not answer.

    Every record in DVC's experiments, in the commits of every branch and tag and in the workspace
    is given to its row in the order in which the stages ran, as they did themselves. What no
    record holds does not come back: stages that failed or whose record is gone, comparisons
    (their command attaches them again), and what a person wrote on the page. A row follows the
    name that DVC has for its experiment now.
    """
    problems = [] if problems is None else problems
    found = list(dvc_history.experiments())
    everything = [*found, *dvc_history.commits()]
    steps = history.steps(everything)
    problems += dict.fromkeys(f"{one.name}: {why}" for one in everything for why in one.unreadable)
    known = {step.head["id"] for step in steps}
    client = connect()
    arrived = shipped(client)
    sweep(client)
    touched: dict[str, tuple[Row, history.Step]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            parts = {record[0]["id"] for record in [step.record, *step.others]}
            if any(parts <= row for row in arrived):
                continue
            with _alone(client, step, problems):
                row = _replay(client, step, Path(folder))
                arrived.append(parts)
                touched[row.id] = row, step
    names = {}
    for row, step in touched.values():
        with _alone(client, step, problems):
            row.settle(step.head, step.record[-1], known)
            names[row.id] = client.get_run(row.id).info.run_name
    return list((names | _renamed(client, found)).values())


@contextlib.contextmanager
def _alone(client: MlflowClient, step: history.Step, problems: list[str]) -> Iterator[None]:
    """What a record does that the store refuses is a warning, unless the store answers no more."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # of whatever kind: who wrote the record, or the store, decides
        client.search_experiments(max_results=1)
        path = paths.record(step.head["stage"]).as_posix()
        problems.append(f"{step.where.name}: {path}: {said(error)}")
        log.warning("%s; left out", problems[-1])


def _renamed(client: MlflowClient, found: list[Experiment]) -> dict[str, str]:
    """Rows by id with their new names, where `dvc exp rename` has given one.

    Where DVC took all of an experiment from its cache, two share every record: a row whose name
    one of them still has keeps it.
    """
    named: dict[str, list[Experiment]] = {}
    for experiment in found:
        if experiment.rev and experiment.records:
            named.setdefault(experiment.head["id"], []).append(experiment)
    renamed = {}
    for sharing in named.values():
        head, name = sharing[0].head, sharing[0].name
        if len(sharing) == 1 and head["name"] != name:
            known = {record[0]["id"] for record in sharing[0].records.values()}
            renamed |= rename(client, head, known, name)
    return renamed


def _replay(client: MlflowClient, step: history.Step, folder: Path) -> Row:
    def fetch(path: str, sha256: str) -> Path | None:
        found = from_workspace(path, sha256) or dvc_history.copy_of(step.where, path, folder)
        return found if found and digests.tree_digest(found) == sha256 else None

    row = open_row(client, step.head, step.others, tidy=False)
    for record_ in [*step.others, step.record]:
        row.replay(record_, step.head["checkpoints"], fetch)
    return row
