"""MLflow: one flat row an experiment, filled from records, off the training thread."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipeline import paths, records, view
from pipeline.config import load
from pipeline.records import Event, Record
from pipeline.runs import is_alive, this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.config import Config

log = logging.getLogger(__name__)

BATCH = 1000  # MLflow's limit of metrics a request
SHIP_EVERY_SECONDS = 2.0
LOCK_SECONDS = 30.0
END_SECONDS = 60.0  # how long a finished stage waits for its last points and artifacts

Fetch = Callable[[str, str], Path | None]  # (path, sha256) -> where those very bytes lie, or None


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else one sqlite file at the main repository root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.root().as_posix()}/mlflow.db"


def connect() -> MlflowClient:
    """A client for the store, which is created under a lock if it does not exist.

    Import and limits come first: MLflow reads its environment when it is imported, and its
    defaults wait minutes for a server that is gone.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = store_uri()
    if uri.startswith("sqlite:///"):
        with _lock():
            _create_sqlite(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri)


def _create_sqlite(path: Path) -> None:
    """Build the schema in a temporary file and rename it: a reader never meets half a database."""
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    store = SqlAlchemyStore(f"sqlite:///{temporary.as_posix()}", _artifact_root())
    store.engine.dispose()
    os.replace(temporary, path)


def _artifact_root() -> str:
    return (paths.root() / "mlartifacts").as_uri()


def _lock() -> FileLock:
    paths.runs().mkdir(parents=True, exist_ok=True)
    return FileLock(paths.runs() / "tracking.lock", timeout=LOCK_SECONDS)


class Row:
    """One MLflow run: what an experiment's records look like there."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str):
        self.client, self.id, self.experiment_id = client, run_id, experiment_id

    def write(self, events: Iterable[Event], checkpoints: str, fetch: Fetch) -> None:
        """Ship events; writing the same events again changes nothing."""
        from mlflow.entities import Metric

        points = []
        for event in events:
            if event["kind"] == "metrics":
                points += [
                    Metric(key, value, event["time"], event["step"])
                    for key, value in event["values"].items()
                ]
            elif event["kind"] in _SHIP:
                _SHIP[event["kind"]](self, event, checkpoints, fetch)
        for start in range(0, len(points), BATCH):
            self.client.log_batch(self.id, metrics=points[start : start + BATCH])

    def replay(self, record: list[Event], checkpoints: str, fetch: Fetch) -> None:
        """Write a stage's whole record, unless all of it has arrived before."""
        if self.client.get_run(self.id).data.tags.get(_shipped(record[0])) != record[0]["id"]:
            self.write(record, checkpoints, fetch)
            self.tag({_shipped(record[0]): record[0]["id"]})

    def tag(self, values: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, str(value)[:5000]) for key, value in values.items() if value != ""]
        self.client.log_batch(self.id, tags=tags)

    def _start(self, event: Event, *_: Any) -> None:
        tags = {f"record.{event['stage']}": event["id"], "code": event["code"][:12]}
        tags |= {f"env.{key}": value for key, value in event["environment"].items()}
        self.tag(tags)

    def _tagged(self, event: Event, *_: Any) -> None:
        self.tag(event["values"])

    def _dataset(self, event: Event, *_: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": event["source"]})
        dataset = Dataset(event["name"], event["digest"][:36], "local", source)
        context = InputTag("mlflow.data.context", event["context"])
        self.client.log_inputs(self.id, [DatasetInput(dataset, [context])])
        self.tag({f"digest.{event['name']}.{event['context']}": event["digest"]})

    def _artifact(self, event: Event, _: str, fetch: Fetch) -> None:
        if path := fetch(event["path"], event["sha256"]):
            self._copy(path, event["folder"])

    def _checkpoint(self, event: Event, checkpoints: str, fetch: Fetch) -> None:
        name = event["name"]
        place = {key: str(event[key]) for key in ("path", "sha256", "step")}
        self.tag({f"checkpoint.{name}.{key}": value for key, value in place.items()})
        if checkpoints == "reference":
            self._refer(name, place)
        elif checkpoints in ("all", name) and (path := fetch(event["path"], event["sha256"])):
            self._copy(path, f"checkpoints/{name}")

    def _copy(self, path: Path, folder: str) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.id, str(path), folder)
        else:
            self.client.log_artifact(self.id, str(path), folder or None)

    def _refer(self, name: str, place: dict[str, str]) -> None:
        """A model on the Models tab that points at DVC's files instead of copying them."""
        import mlflow
        from mlflow.entities import LoggedModelOutput

        known = self.client.get_run(self.id).outputs
        if known and any(
            self.client.get_logged_model(m.model_id).tags.get("sha256") == place["sha256"]
            for m in known.model_outputs
        ):
            return
        mlflow.set_tracking_uri(store_uri())
        model = mlflow.create_external_model(
            name=f"{name}-{place['sha256'][:8]}",
            source_run_id=self.id,
            tags=place,
            experiment_id=self.experiment_id,
        )
        output = LoggedModelOutput(model.model_id, int(place["step"]))
        self.client.log_outputs(self.id, [output])


def _shipped(head: Event) -> str:
    """The tag that says that the whole record has arrived."""
    return f"shipped.{head['stage']}"


_SHIP: dict[str, Callable[..., None]] = {
    "start": Row._start,
    "tags": Row._tagged,
    "dataset": Row._dataset,
    "artifact": Row._artifact,
    "checkpoint": Row._checkpoint,
}


def from_workspace(path: str, sha256: str) -> Path | None:
    """The file or folder in this workspace, if it still holds what the record saw."""
    here = Path(path)
    return here if here.exists() and records.tree_digest(here) == sha256 else None


def open_row(client: MlflowClient, head: Event, upstream: list[list[Event]]) -> Row:
    """The row that a stage writes into.

    The newest row of the stage's key, if it has no part of this stage yet and no other part
    than the ones at hand; else a new one, and the old one is tagged as superseded. So forcing a
    stage to run again, or an edited input under the same params, never doubles points.
    """
    parts = {f"record.{r[0]['stage']}": r[0]["id"] for r in upstream}
    with _lock():
        experiment_id = _experiment(client, head["experiment"])
        _sweep(client, experiment_id)
        newest = client.search_runs(
            [experiment_id],
            f"tags.`pipeline.key` = '{head['key']}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        tags = newest[0].data.tags if newest else {}
        same = all(tags.get(part, id_) == id_ for part, id_ in parts.items())
        if newest and same and tags.get(f"record.{head['stage']}", head["id"]) == head["id"]:
            row = Row(client, newest[0].info.run_id, experiment_id)
        else:
            row = _new_row(client, experiment_id, head)
            if newest:
                Row(client, newest[0].info.run_id, experiment_id).tag({"superseded": row.id})
        row.tag({f"record.{head['stage']}": head["id"]})
    return row


def _new_row(client: MlflowClient, experiment_id: str, head: Event) -> Row:
    from mlflow.entities import Param

    tags = {
        "pipeline.key": head["key"],
        "dvc.exp_name": head["name"],
        "mlflow.source.type": "PROJECT",
        "mlflow.source.name": "gpt2-pipeline",
        "mlflow.source.git.commit": head["git"]["commit"],
        "mlflow.source.git.branch": head["git"]["branch"],
        "git.dirty": head["git"]["dirty"],
    }
    name = head["name"] or f"repro-{head['key'][:6]}"
    tags = {key: value for key, value in tags.items() if value != ""}
    run = client.create_run(experiment_id, start_time=head["time"], run_name=name, tags=tags)
    params = [Param(key, str(value)[:6000]) for key, value in head["params"].items()]
    client.log_batch(run.info.run_id, params=params[:100])
    return Row(client, run.info.run_id, experiment_id)


def _sweep(client: MlflowClient, experiment_id: str) -> None:
    """Rows whose process died without a word would say RUNNING for ever."""
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    here = records.environment()["host"]
    for run in running:
        tags = run.data.tags
        if tags.get("pipeline.host") == here and not is_alive(tags.get("pipeline.process", "")):
            client.set_terminated(run.info.run_id, "KILLED")


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    local = store_uri().startswith("sqlite:///")
    location = f"{_artifact_root()}/{name}" if local else None
    experiment_id = client.create_experiment(name, artifact_location=location)
    client.set_experiment_tag(experiment_id, view.TAG, view.state())
    return experiment_id


class Shipper:
    """A thread that carries one stage's events to its row while the stage computes.

    It never raises into the stage: whatever fails is one warning, and the record keeps it all.
    """

    def __init__(self, stage: str, config: Config):
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._upstream = list(records.upstream(stage))
        self._checkpoints = config.tracking.checkpoints
        self.problem = ""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        self._events.put(event)

    def close(self) -> None:
        """Ship what is left; bounded, whatever the store does."""
        self._events.put(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._warn(f"the store did not answer within {END_SECONDS:.0f} s")

    def _run(self) -> None:
        try:
            self._ship(self._events.get())
        except Exception as error:  # the store's errors are of every kind, and none may stop a run
            self._warn(f"{type(error).__name__}: {error}")

    def _ship(self, head: Event | None) -> None:
        assert head and head["kind"] == "start"
        row = open_row(connect(), head, self._upstream)
        row.client.update_run(row.id, status="RUNNING")
        row.tag({"pipeline.process": this_process(), "pipeline.host": head["environment"]["host"]})
        for record in self._upstream:
            row.replay(record, self._checkpoints, from_workspace)
        row.write([head], self._checkpoints, from_workspace)
        for events in self._batches():
            row.write(events, self._checkpoints, from_workspace)
            if events[-1]["kind"] == "end":
                row.tag({_shipped(head): head["id"]})
                row.client.set_terminated(row.id, events[-1]["status"])

    def _batches(self) -> Iterator[list[Event]]:
        """What has come, every few seconds, until the stage says that it is over."""
        while True:
            events = [self._events.get()]
            deadline = time.monotonic() + SHIP_EVERY_SECONDS
            while events[-1] is not None and (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(queue.Empty):
                    events.append(self._events.get(timeout=left))
            if known := [event for event in events if event is not None]:
                yield known
            if events[-1] is None:
                return

    def _warn(self, problem: str) -> None:
        if self.problem:  # a store that did not answer in time may well fail later, too
            return
        self.problem = problem
        log.warning(
            "MLflow at %s: %s. Nothing is lost: the record keeps it all, and "
            "`python -m pipeline.tracking sync` ships it later.",
            _without_secrets(store_uri()),
            _without_secrets(problem.partition("\n")[0])[:300],
        )


def _without_secrets(text: str) -> str:
    """URIs may carry a user and a password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextlib.contextmanager
def record(stage: str, config: Config) -> Iterator[Record]:
    """A stage's record, shipped while it is written; its row ends as the stage does."""
    shipper = Shipper(stage, config)
    entry = Record(stage, config, shipper)
    status = "FAILED"
    try:
        yield entry
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        entry.tags({f"env.{name}": version for name, version in records.versions().items()})
        entry.close(status)
        shipper.close()


def sync() -> list[str]:
    """Bring the store up to date from the workspace's records; the ids of the rows they fill."""
    chains = [records.read(paths.record(s)) for s in records.UPSTREAM if paths.record(s).exists()]
    if not chains:
        return []
    head = max((r[0] for r in chains), key=lambda e: e["time"])
    chain = [
        r for r in chains if r[0]["stage"] in (*records.UPSTREAM[head["stage"]], head["stage"])
    ]
    client = connect()
    row = open_row(client, head, [r for r in chain if r[0]["id"] != head["id"]])
    for record_ in chain:
        row.replay(record_, load().tracking.checkpoints, from_workspace)
    row.client.set_terminated(row.id, "FINISHED", end_time=chain[-1][-1]["time"])
    return [row.id]


def main(words: list[str]) -> None:
    """`sync`: fill the store from the records. `ui [port]`: that, then MLflow's page."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not words or words[0] not in ("sync", "ui"):
        sys.exit("usage: python -m pipeline.tracking sync | ui [port]")
    log.info("rows brought up to date: %s", ", ".join(sync()) or "none, no records here")
    if words[0] == "ui":
        port = int(words[1]) if len(words) > 1 else 5000
        found = connect().get_experiment_by_name(load().tracking.experiment)
        link = view.link(port, found.experiment_id if found else "0")
        log.info("The prepared comparison, ready in half a minute:\n  %s", link)
        command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
        os.chdir(paths.root())
        os.execv(sys.executable, [*command, "--backend-store-uri", store_uri()])


if __name__ == "__main__":
    main(sys.argv[1:])
