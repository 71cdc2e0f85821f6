"""MLflow's store brought up to date with every record that there is."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import paths
from pipeline.errors import InputError, StorageError
from pipeline.records import dvc_history
from pipeline.records.record_file import Event
from pipeline.records.run_data import Experiment
from pipeline.records.stage_graph import upstream
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
    experiments = list(dvc_history.experiments(brief=True))
    everything = [*experiments, *dvc_history.commits(brief=True)]
    stages = stages_that_ran(everything)
    problems += [f"{one.name}: {why}" for one in everything for why in one.unreadable]
    known = {stage.head["id"] for stage in stages}
    client = connect()
    arrived = shipped(client)
    sweep(client)
    missing = [stage for stage in stages if not any(stage.parts <= row for row in arrived)]
    touched: dict[str, tuple[Row, Ran]] = {}
    with tempfile.TemporaryDirectory() as folder:
        copies = Copies(missing, everything, problems) if missing else None
        for stage in missing:
            if not copies or any(stage.parts <= row for row in arrived):  # beside another meanwhile
                continue
            with _left_out_if_refused(client, stage, problems):
                if row := _replay(client, stage, copies, Path(folder)):
                    arrived.append(stage.parts)
                    touched[row.id] = row, stage
    problems[:] = dict.fromkeys(problems)
    names = {}
    for row, stage in touched.values():
        with _left_out_if_refused(client, stage, problems):
            row.settle(stage.record, known)
            names[row.id] = client.get_run(row.id).info.run_name
    return list((names | _renamed(client, experiments)).values())


@dataclass(frozen=True)
class Ran:
    """One stage that ran: its record, and those that were there when it started, by their ends."""

    record: Sequence[Event]
    others: list[Sequence[Event]]
    where: Experiment  # whose files these records speak of

    @property
    def head(self) -> Event:
        return self.record[0]

    @property
    def parts(self) -> set[str]:
        """The ids of all these records."""
        return {record[0]["id"] for record in [self.record, *self.others]}


def stages_that_ran(experiments: Iterable[Experiment]) -> list[Ran]:
    """Each record once, however many experiments share it, in the order in which they started.

    Its neighbours are taken from the experiment that holds most of them: a stage that DVC took
    from its cache stands in other experiments, too, beside records that were made later. The
    record of a stage that is at work or has failed is left to its own process.
    """
    best: dict[str, Ran] = {}
    for experiment in experiments:
        for record in experiment.records.values():
            if record[-1].get("status") != "FINISHED":
                continue
            ran = Ran(record, _before(record[0], experiment), experiment)
            known = best.get(ran.head["id"])
            if known is None or len(ran.others) > len(known.others):
                best[ran.head["id"]] = ran
    return sorted(best.values(), key=lambda ran: ran.head["time"])


class Copies:
    """Records with every point, read one at a time from an experiment that has them undamaged."""

    def __init__(
        self, stages: Iterable[Ran], everything: Iterable[Experiment], problems: list[str]
    ):
        self._problems = problems
        self._places: dict[str, list[Experiment]] = {}  # by a record's id, the stage's own first
        for stage in stages:
            for id_ in stage.parts:
                self._places.setdefault(id_, [stage.where])
        for one in everything:
            for record in one.records.values():
                places = self._places.get(record[0]["id"])
                if places and (one.name, one.rev) not in {(p.name, p.rev) for p in places}:
                    places.append(one)
        every = (one for places in self._places.values() for one in places)
        self._read = dvc_history.reader({(one.name, one.rev): one for one in every}.values())

    def whole(self, head: Event) -> tuple[Sequence[Event], Experiment] | None:
        """A record and where it was found; None where no copy is whole, as a warning says."""
        places = self._places[head["id"]]
        while places:
            try:
                record = self._read(places[0], head["stage"])
                if record[0]["id"] == head["id"] and record[-1].get("status") == "FINISHED":
                    return record, places[0]
            except InputError as error:
                self._problems.append(f"{places[0].name}: {error}")
                log.warning("%s; left out", self._problems[-1])
            places.pop(0)  # another stage need not try again
        return None


def _before(head: Event, experiment: Experiment) -> list[Sequence[Event]]:
    """The records upstream and those of the same command, as the stage itself met them."""
    return [
        record
        for stage, record in experiment.records.items()
        if record[0]["time"] < head["time"]
        and (stage in upstream(head["stage"]) or record[0]["invocation"] == head["invocation"])
    ]


def _replay(client: MlflowClient, ran: Ran, copies: Copies, folder: Path) -> Row | None:
    """Write the records into their row, one at a time; None where the stage's own is damaged."""

    def fetch(path: str, sha256: str) -> Path | None:
        copy = from_workspace(path, sha256) or dvc_history.copy_of(where.rev, path, folder)
        return copy if copy and digests.tree_digest(copy) == sha256 else None

    if not (found := copies.whole(ran.head)):
        return None
    row = open_row(client, ran.head, ran.others, tidy=False)
    for other in ran.others:
        if row.lacks(other[0]) and (beside := copies.whole(other[0])):
            record, where = beside
            row.replay(record, ran.head["checkpoints"], fetch)
    record, where = found
    row.replay(record, ran.head["checkpoints"], fetch)
    return row


@contextlib.contextmanager
def _left_out_if_refused(client: MlflowClient, ran: Ran, problems: list[str]) -> Iterator[None]:
    """A record that the store refuses is one warning, unless the store does not answer at all."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # of whatever kind: who wrote the record, or the store, decides
        client.search_experiments(max_results=1)
        path = paths.record(ran.head["stage"]).as_posix()
        problems.append(f"{ran.where.name}: {path}: {said(error)}")
        log.warning("%s; left out", problems[-1])


def _renamed(client: MlflowClient, experiments: list[Experiment]) -> dict[str, str]:
    """Rows by id with their new names, where `dvc exp rename` has given one.

    Where DVC took all of an experiment from its cache, two share every record: a row whose name
    one of them still has keeps it.
    """
    sharing: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        if experiment.rev and experiment.records:
            sharing.setdefault(experiment.head["id"], []).append(experiment)
    renamed = {}
    for first, *others in sharing.values():
        if not others and first.head["name"] != first.name:
            known = {record[0]["id"] for record in first.records.values()}
            renamed |= rename(client, first.head, known, first.name)
    return renamed
