"""MLflow's Models tab: a row's checkpoints with step, losses and the place of their files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.records.run_data import Event
from pipeline.tracking import row_facts
from pipeline.tracking.mlflow_store import hold_elsewhere

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

LOSSES = {"train/loss": "train", "train/val_loss": "val"}  # {metric: split}
EVALUATED = "val/"  # begins the metrics that `evaluate` measures of the best checkpoint
REFUSED = re.compile("[/:.%\"']")  # what MLflow takes in no model's name
EXTERNAL = "mlflow.model.isExternal"  # MLflow's tag of a model whose files it does not hold


class LoggedModels:
    """The checkpoints of one row. Nothing is copied: a model only says where its files are."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str):
        self._client, self._run_id, self._experiment_id = client, run_id, experiment_id
        self._latest: dict[str, Metric] = {}
        self._validated: dict[int, list[Metric]] = {}  # step -> the two losses there
        self._datasets: dict[str, dict[str, str]] = {}  # by split: its data, as a point names it
        self._known: dict[str, str] | None = None  # checkpoint name -> model id

    def points(self, event: Event) -> list[Metric]:
        """MLflow's points for what the row shows; those of the best checkpoint carry its id."""
        from mlflow.entities import Metric

        step, time = event["step"], event["time"]
        shown = row_facts.shown(event["values"]).items()
        points = [Metric(key, value, time, step) for key, value in shown]
        self._latest |= {point.key: point for point in points if point.key in LOSSES}
        if "train/val_loss" in event["values"]:
            self._validated[step] = list(self._latest.values())
        best = self._ids().get("best") if any(p.key.startswith(EVALUATED) for p in points) else None
        if best is None:
            return points
        return [self._of(best, p, "val") if p.key.startswith(EVALUATED) else p for p in points]

    def put(self, name: str, place: dict[str, str]) -> None:
        """Show a checkpoint; showing it again changes nothing.

        `place` holds DVC's `path` and `md5`, the `sha256`, the number of `step`s that were done
        and, where the row has one, the `copy`.
        """
        from mlflow.entities import LoggedModelOutput

        id_ = self._ids().get(name)
        if id_ is None:
            id_ = self._ids()[name] = self._create(name, place)
        outputs = self._client.get_run(self._run_id).outputs
        if id_ not in {m.model_id for m in (outputs.model_outputs if outputs else [])}:
            output = LoggedModelOutput(id_, int(place["step"]))
            self._client.log_outputs(self._run_id, [output])
        losses = self._validated.get(int(place["step"]) - 1, [])  # steps are counted from 0
        if losses:
            linked = [self._of(id_, point, LOSSES[point.key]) for point in losses]
            self._client.log_batch(self._run_id, metrics=linked)

    def _create(self, name: str, place: dict[str, str]) -> str:
        run = self._client.get_run(self._run_id).info.run_name
        model = self._client.create_logged_model(
            self._experiment_id,
            name=f"{REFUSED.sub('-', run)} {name}, step {place['step']}",
            source_run_id=self._run_id,
            params={key: place[key] for key in ("step", "path", "md5") if key in place},
            tags={EXTERNAL: "true", "checkpoint": name} | place,
            model_type="gpt2",
        )
        hold_elsewhere(self._client.tracking_uri, model.artifact_location)
        self._client.finalize_logged_model(model.model_id, "READY")
        return model.model_id

    def _ids(self) -> dict[str, str]:
        """Model ids by checkpoint name, also of models made before this process."""
        if self._known is None:
            models = self._client.search_logged_models(
                [self._experiment_id], f"source_run_id = '{self._run_id}'"
            )
            ours = [model for model in models if "checkpoint" in model.tags]
            self._known = {model.tags["checkpoint"]: model.model_id for model in ours}
        return self._known

    def _of(self, model_id: str, point: Metric, split: str) -> Metric:
        """A point linked to a model and to the tokens that it was measured on."""
        from mlflow.entities import Metric

        if split not in self._datasets:
            inputs = self._client.get_run(self._run_id).inputs.dataset_inputs
            self._datasets |= {
                tag.value: {"dataset_name": d.dataset.name, "dataset_digest": d.dataset.digest}
                for d in inputs
                for tag in d.tags
            }
        place = (point.key, point.value, point.timestamp, point.step)
        return Metric(*place, model_id=model_id, **self._datasets.get(split, {}))
