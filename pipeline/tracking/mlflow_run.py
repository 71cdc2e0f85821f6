"""One flat MLflow run per experiment, here called its row, filled from the events of records."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.process import is_alive, this_process
from pipeline.records import record_file
from pipeline.records.run_data import Event, Log, RunData, row_name
from pipeline.storage import digests
from pipeline.tracking import mlflow_store, mlflow_view, row_facts, run_note
from pipeline.tracking.mlflow_models import LoggedModels
from pipeline.tracking.thinning import Thinning

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run

log = logging.getLogger(__name__)

# Ids by stage, as JSON: the records that a row holds, and those that have arrived whole.
RECORDS, SHIPPED = "pipeline.records", "pipeline.shipped"
# Who works on the row, and on which host. A third word, the time in milliseconds at which its last
# stage finished, says that the process is a `dvc` command with more of them to come.
PROCESS = "pipeline.process"
NOTE = "mlflow.note.content"
FORKED = run_note.FORKED
OWN_NOTE = "pipeline.note"  # a mark of what we wrote there last
TABLES = "mlflow.loggedArtifacts"  # which artifacts the page lays out as tables

SYSTEM = "system/"  # metrics of the machine, for as long as a training takes

MOST_POINTS, MOST_TAGS = 900, 100  # per request: MLflow takes 100 tags, and 1000 of both together

Fetch = Callable[[str, str], Path | None]  # (path, sha256) -> where exactly those bytes lie


class Row:
    """One MLflow run: what an experiment's records look like there."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str, tags: Any = None):
        self.client, self.id, self.experiment_id = client, run_id, experiment_id
        self._known: dict[str, str] = dict(tags or {})  # tags that it is known to have
        self._models = LoggedModels(client, run_id, experiment_id)
        self._log = Log()  # what has come of the record that is being written
        self._steps = self._load = Thinning()

    def write(self, events: Iterable[Event], checkpoints: str, fetch: Fetch) -> None:
        """Ship events; writing the same ones again changes nothing."""
        points: list[Metric] = []
        tags: dict[str, str] = {}
        has_text = False
        for event in events:
            has_text |= event["kind"] == "text"
            if event["kind"] == "start":
                self._log = Log()
                settings = event["params"]  # with a budget nobody knows how many steps there are
                known = not settings.get("train.time_budget")
                self._steps = Thinning(settings.get("train.steps", 0) if known else 0)
                self._load = Thinning()
            self._log.append(event)
            if event["kind"] == "metrics":
                points += self._thinned(event)
            else:
                if event["kind"] in ("resume", "end"):  # what was an end, once it has been resumed
                    points += self._steps.rest() + self._load.rest()
                if event["kind"] == "checkpoint":  # it refers to points, which come first
                    self._send(points, tags)
                    points, tags = [], {}
                tags |= self._ship(event, checkpoints, fetch)
        if has_text:  # the table holds all that have come: one upload, however many are new
            tags |= self._table("while_training.json", row_facts.texts_table(self._log))
        self._send(points, tags)

    def _thinned(self, event: Event) -> list[Metric]:
        """The points to ship now that this event has come."""
        points = self._models.points(event)
        if "train/loss" in event["values"]:
            return self._steps.of_step(points)
        if points and points[0].key.startswith(SYSTEM):
            return self._load.of_step(points)
        return points

    def _send(self, points: Sequence[Metric], tags: Mapping[str, str]) -> None:
        """Log in as few requests as MLflow allows: each costs as much as a hundred points."""
        from mlflow.entities import RunTag

        values = {key: str(value)[:5000] for key, value in tags.items() if value != ""}
        new = [RunTag(*item) for item in values.items() - self._known.items()]
        while points or new:
            metrics, points = points[:MOST_POINTS], points[MOST_POINTS:]
            with_them = [] if points else new[:MOST_TAGS]
            self.client.log_batch(self.id, metrics=metrics, tags=with_them)
            new = new[len(with_them) :]
        self._known |= values

    def replay(self, record: Sequence[Event], checkpoints: str, fetch: Fetch) -> None:
        """Write a stage's whole record, unless all of it has arrived before."""
        if self.lacks(record[0]):
            # In one request with the record's own.
            last = {"kind": "tags", "values": self.with_record(SHIPPED, record[0])}
            self.write(chain(record, [last]), checkpoints, fetch)
            self._log = Log()  # whoever keeps the row keeps no points

    def lacks(self, head: Event) -> bool:
        """Whether a record has not arrived whole."""
        return ids(self._known, SHIPPED).get(head["stage"]) != head["id"]

    def enter(self, head: Event, process: str) -> None:
        """Say that a stage's `process`, as `process.this_process` names it, works on the row."""
        self.tag({PROCESS: f"{process} {head['environment']['host']}"})
        self.client.update_run(self.id, status="RUNNING")

    def leave(self, head: Event, end: Event, run: Run | None = None) -> None:
        """End the row as its stage did; all of the stage's record has arrived.

        It stays open where the stage finished and the same `dvc` command has another for it.
        """
        if end["status"] == "FINISHED":  # an interrupted stage may resume under the same id
            self.tag(self.with_record(SHIPPED, head))
        run = run or self.client.get_run(self.id)
        self._describe(head, run, run_note.ended(self._log))
        dvc = [head, *self._log.of_kind("start", "resume")][-1]["invocation"]
        if end["status"] == "FINISHED" and record_file.goes_on(head["stage"], dvc):
            self.tag({PROCESS: f"{dvc} {head['environment']['host']} {end['time']}"})
            return
        began = run.info.start_time or 0  # by a clock that was set back since?
        self.client.set_terminated(self.id, end["status"], end_time=max(began, end["time"]))

    def with_record(self, tag: str, head: Event) -> dict[str, str]:
        """The tag with one more record in it."""
        held = ids(self._known, tag) | {head["stage"]: head["id"]}
        return {tag: json.dumps(held, sort_keys=True)}

    def settle(self, record: Sequence[Event], known: set[str]) -> None:
        """End a row that got a finished stage's record late, unless another stage is open in it.

        The ends of the record suffice. A stage whose record is not among the `known` finished ones
        failed, or is running.
        """
        run = self.client.get_run(self.id)
        if set(ids(run.data.tags).values()) <= known:
            self._log = Log.of(record)
            self.leave(record[0], record[-1], run)

    def _describe(self, head: Event, run: Run, ended: str) -> None:
        """Write the note, unless a person has edited it."""
        if (kept := run.data.tags.get(NOTE)) and _mark(kept) != run.data.tags.get(OWN_NOTE):
            return
        own, parent = _facts(run), self._parent(head, run)
        text = run_note.note(head, own, _facts(parent) if parent else None, ended)[:5000]
        self.tag({OWN_NOTE: _mark(text), NOTE: text})

    def _parent(self, head: Event, run: Run) -> Run | None:
        """The newest evaluated row before this one with the settings of this one's commit."""
        if not head["parent"].get("changed"):
            return None
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.`pipeline.settings` = '{head['parent']['settings']}' and "
            f"attributes.start_time < {run.info.start_time} and metrics.`val/loss` > 0",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        return found[0] if found else None

    def tag(self, values: Mapping[str, str]) -> None:
        self._send((), values)

    def _ship(self, event: Event, checkpoints: str, fetch: Fetch) -> dict[str, str]:
        """Ship an event that is no point; the tags that the row gets for it."""
        match event["kind"]:
            case "start":
                return self.with_record(RECORDS, event)
            case "resume" if name := event["name"]:  # the name that DVC will keep
                return {"dvc.exp_name": name, "mlflow.runName": name}
            case "tags":
                return row_facts.shown_tags(event["values"]) | self._forked_from(event)
            case "dataset":
                self._dataset(event)
            case "artifact":
                if path := fetch(event["path"], event["sha256"]):
                    self._copy(path, event["folder"])
                    if event["path"] == paths.SAMPLES_JSONL.as_posix():
                        return self._table("samples.json", row_facts.samples_table(path))
            case "checkpoint":
                self._checkpoint(event, checkpoints, fetch)
            case "end":
                facts = row_facts.facts(self._log)
                self.client.log_dict(self.id, facts, f"facts/{facts['stage']}.json")
        return {}

    def _forked_from(self, event: Event) -> dict[str, str]:
        """Where the page shows the run that this one was forked from, if it has a row yet."""
        lineage = RunData({"train": [event]}).lineage if "fork.lineage" in event["values"] else []
        parents = _holding(self.client, "train", lineage[-1]["record"]) if lineage else iter(())
        if parent := next(parents, None):
            return {FORKED: f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"}
        return {}

    def _table(self, name: str, content: dict[str, Any]) -> dict[str, str]:
        """Log a table as `mlflow.log_table` does, but that doing it again adds no line."""
        self.client.log_dict(self.id, content, name)
        held, table = json.loads(self._known.get(TABLES, "[]")), {"path": name, "type": "table"}
        return {TABLES: json.dumps(held if table in held else [*held, table])}

    def _dataset(self, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": event["source"]})
        corpus = self._log[0]["params"]["corpus.source"]
        name = f"{corpus if event['name'] == 'tokens' else event['name']} {event['context']}"
        dataset = Dataset(name, event["digest"][:36], "local", source)
        context = InputTag("mlflow.data.context", event["context"])
        self.client.log_inputs(self.id, [DatasetInput(dataset, [context])])

    def _checkpoint(self, event: Event, checkpoints: str, fetch: Fetch) -> None:
        name = event["name"]
        kept = ("path", "md5", "sha256", "step")
        place = {key: str(event[key]) for key in kept if key in event}
        if checkpoints in ("all", name) and (path := fetch(event["path"], event["sha256"])):
            self._copy(path, f"checkpoints/{name}")
            place["copy"] = f"runs:/{self.id}/checkpoints/{name}"
        if checkpoints != "none":
            self._models.put(name, place)

    def _copy(self, path: Path, folder: str) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.id, str(path), folder)
        else:
            self.client.log_artifact(self.id, str(path), folder or None)


def _mark(text: str) -> str:
    return digests.digest_of(text)[:12]


def _facts(run: Run) -> run_note.Facts:
    return run_note.Facts(run.info.run_name, run.data.metrics, run.data.tags)


def ids(tags: Mapping[str, str], tag: str = RECORDS) -> dict[str, str]:
    """Records by stage that a row holds, also one of an earlier version: a tag for each then."""
    former = {t[len("record.") :]: id_ for t, id_ in tags.items() if t.startswith("record.")}
    return (former if tag == RECORDS else {}) | json.loads(tags.get(tag, "{}"))


def from_workspace(path: str, sha256: str) -> Path | None:
    """The file or folder in this workspace, if it still holds what the record saw."""
    here = Path(path)
    return here if here.exists() and digests.tree_digest(here) == sha256 else None


def open_row(
    client: MlflowClient, head: Event, others: Sequence[Sequence[Event]], tidy: bool = True
) -> Row:
    """The row that a stage writes into.

    It is the newest row of the stage's key that holds no other record of this stage, nor of the
    stages in `others` (those upstream, those of the same command); else a new one, and the newest
    old one is tagged as superseded. So forcing a stage to run again, an edited input under the
    same params, or two equal experiments at a time never double points. If `tidy`, rows of dead
    processes are closed first.
    """
    own = {head["stage"]: head["id"]}
    parts = {r[0]["stage"]: r[0]["id"] for r in others} | own
    with mlflow_store.lock():
        if tidy:
            sweep(client)
        experiment_id = _experiment(client, head["experiment"])
        rows = client.search_runs(
            [experiment_id],
            f"tags.`pipeline.key` = '{head['key']}'",
            order_by=["attributes.start_time DESC"],
        )
        held = {run.info.run_id: ids(run.data.tags) for run in rows}
        fitting = [r for r in rows if parts.items() <= (parts | held[r.info.run_id]).items()]
        # A replayed stage mostly has its row already.
        fitting.sort(key=lambda run: not own.items() <= held[run.info.run_id].items())
        if fitting:
            mlflow_store.hold_elsewhere(client.tracking_uri, fitting[0].info.artifact_uri)
            row = Row(client, fitting[0].info.run_id, experiment_id, fitting[0].data.tags)
        else:
            row = _new_row(client, experiment_id, head)
            if rows:
                client.set_tag(rows[0].info.run_id, "superseded", row.id)
        row.tag(row.with_record(RECORDS, head))
    return row


def attach(training_records: Iterable[str], folder: Path, name: str) -> None:
    """Copy a folder under `name` into every row that holds one of these training records.

    A store that fails is one warning: the files are in `folder` all the same.
    """
    try:
        client = mlflow_store.connect()
        for record in training_records:
            for run in _holding(client, "train", record):
                mlflow_store.hold_elsewhere(client.tracking_uri, run.info.artifact_uri)
                client.log_artifacts(run.info.run_id, str(folder), name)
    except Exception as error:  # a store's errors are of every kind
        log.warning("MLflow did not take %s: %s", folder, mlflow_store.said(error))


def rename(client: MlflowClient, record: Event, known: set[str], name: str) -> dict[str, str]:
    """Give a DVC experiment's row the name that DVC has now; {row id: name} of those changed.

    `record` is the start event of its last stage, `known` holds the ids of all of its records. A
    name that a person has given to the row stays.
    """
    renamed = {}
    for run in _holding(client, record["stage"], record["id"]):
        former = run.data.tags.get("dvc.exp_name", "")
        own = set(ids(run.data.tags).values()) <= known
        if former not in ("", name) and own:
            row = Row(client, run.info.run_id, run.info.experiment_id)
            row.tag({"dvc.exp_name": name})
            if run.info.run_name == former:
                row.tag({"mlflow.runName": name})
            renamed[row.id] = name
    return renamed


def shipped(client: MlflowClient) -> list[set[str]]:
    """The ids of the records that arrived whole, for every row of every MLflow experiment.

    Rows that a stopped process has left open are left out: somebody has to close them.
    """
    runs = [run for run in _runs(client) if not _is_left(run)]
    return [set(ids(run.data.tags, SHIPPED).values()) for run in runs]


def _holding(client: MlflowClient, stage: str, id_: str) -> Iterator[Run]:
    """The rows that hold a stage's record."""
    found = _runs(client, f"tags.`{RECORDS}` LIKE '%{id_}%'")  # an underscore is any character
    return (run for run in found if ids(run.data.tags).get(stage) == id_)


def _runs(client: MlflowClient, condition: str = "") -> Iterator[Run]:
    """The runs of all experiments that meet a condition."""
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    token = None
    while True:
        page = client.search_runs(everywhere, condition, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _new_row(client: MlflowClient, experiment_id: str, head: Event) -> Row:
    from mlflow.entities import Param

    tags = {
        "pipeline.key": head["key"],
        "pipeline.settings": head["settings"],
        # Until a stage says that it works on the row.
        PROCESS: f"{this_process()} {record_file.environment()['host']}",
        "model": run_note.model_size(head["params"]),
        "init": run_note.initial_weights(head["params"]),
        "changed": run_note.changes(head),
        "dvc.exp_name": head["name"],
        "mlflow.user": head["environment"].get("user", ""),
        "mlflow.runColor": _next_color(client, experiment_id),
        "mlflow.source.type": "PROJECT",
        "mlflow.source.name": "gpt2-pipeline",
        "mlflow.source.git.commit": head["git"]["commit"],
        "mlflow.source.git.branch": head["git"]["branch"],
    }
    tags = {key: value for key, value in tags.items() if value != ""}
    run = client.create_run(
        experiment_id, start_time=head["time"], run_name=row_name(head), tags=tags
    )
    mlflow_store.hold_elsewhere(client.tracking_uri, run.info.artifact_uri)
    params = [Param(key, str(value)[:6000]) for key, value in head["params"].items()]
    client.log_batch(run.info.run_id, params=params[:100])
    return Row(client, run.info.run_id, experiment_id, tags)


def _next_color(client: MlflowClient, experiment_id: str) -> str:
    """The color that has not been used for the longest time."""
    newest = client.search_runs(
        [experiment_id],
        order_by=["attributes.start_time DESC"],
        max_results=len(mlflow_view.COLORS) - 1,
    )
    used = {run.data.tags.get("mlflow.runColor") for run in newest}
    return next(color for color in mlflow_view.COLORS if color not in used)


def sweep(client: MlflowClient) -> None:
    """Close the rows whose process is gone: they would say RUNNING for ever.

    Between two stages a `dvc` command may end as it likes; a stage has died without a word.
    """
    for run in [r for r in _runs(client, "attributes.status = 'RUNNING'") if _is_left(r)]:
        kept, words = run.data.tags.get(NOTE, ""), run.data.tags.get(PROCESS, "").split(" ")
        if len(words) == 3:
            end = max(run.info.start_time or 0, int(words[2]))
            client.set_terminated(run.info.run_id, "FINISHED", end_time=end)
            continue
        if not kept or _mark(kept) == run.data.tags.get(OWN_NOTE):
            text = run_note.died(kept, run.data.metrics)
            tags = {OWN_NOTE: _mark(text), NOTE: text}
            Row(client, run.info.run_id, run.info.experiment_id).tag(tags)
        client.set_terminated(run.info.run_id, "KILLED")


def _is_left(run: Run) -> bool:
    """Whether a row of ours says RUNNING and its process, on this machine, is gone."""
    here = record_file.environment()["host"]
    process, host = (run.data.tags.get(PROCESS, "").split(" ") + [here])[:2]
    ours = run.info.status == "RUNNING" and "pipeline.key" in run.data.tags
    return ours and host == here and not is_alive(process)


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found and found.lifecycle_stage == "deleted":
        _make_way(client, found)
        found = None
    if found:
        mlflow_store.hold_elsewhere(client.tracking_uri, found.artifact_location)
        if found.tags.get(mlflow_view.TAG) != mlflow_view.state():
            client.set_experiment_tag(found.experiment_id, mlflow_view.TAG, mlflow_view.state())
        return found.experiment_id
    location = mlflow_store.artifact_location(name)
    experiment_id = client.create_experiment(name, artifact_location=location)
    client.set_experiment_tag(experiment_id, mlflow_view.TAG, mlflow_view.state())
    return experiment_id


def _make_way(client: MlflowClient, deleted: Experiment) -> None:
    """Rename a deleted experiment, whose name a new one could not have otherwise.

    It stays deleted, and a person can restore it under the other name.
    """
    id_ = deleted.experiment_id
    client.restore_experiment(id_)  # only an active experiment can be renamed
    client.rename_experiment(id_, f"{deleted.name} (deleted, {id_})")
    client.delete_experiment(id_)
