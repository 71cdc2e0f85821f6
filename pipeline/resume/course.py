"""The course of a training: its steps and validations so far, kept so that it can go on."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.compute import runtime, throughput
from pipeline.errors import InputError
from pipeline.records import provenance
from pipeline.records.run_data import RunData
from pipeline.resume.checkpoints import Checkpoint, Checkpoints, go_on, machine, warn_of_differences
from pipeline.training.loop import StepReport, TrainState
from pipeline.training.time_budget import Budget

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.config import Config
    from pipeline.model.gpt import GPT
    from pipeline.records.record_file import Record
    from pipeline.resume.run_folder import Run

log = logging.getLogger(__name__)


class Course:
    """Steps and validations of one training: in memory, in its record and in its checkpoints.

    `curve` holds a report for every step that was done, also by processes before this one. A
    step that is done once more after the last checkpoint keeps its first report. `study` is the
    folder for what is noted of the first step alone.
    """

    def __init__(self, config: Config, record: Record, run: Run, checkpoints: Checkpoints):
        self.config, self.record, self.checkpoints = config, record, checkpoints
        self.curve: list[StepReport] = []
        self.validations: list[tuple[int, float]] = []
        self.best, self.best_step = math.inf, 0
        self.budget = Budget(config.train)
        self.study = run.folder / "study"
        self._run = run
        self._earlier: dict[int, StepReport] = {}
        self._warned = False
        self._told: list[str] = []

    def begin(self, state: TrainState, found: Checkpoint | None) -> TrainState:
        """The state to go on with: as it is, or as the checkpoint says.

        Raises InputError where the record lacks a step before it.
        """
        self.budget = Budget(self.config.train)  # its clock starts now
        if found is None:
            return state
        path, facts = found
        go_on(state, path, facts)
        warn_of_differences(facts["machine"], machine(state.precision))
        written = RunData({"train": self.record.so_far()})
        self._earlier = reports(written, self.config, facts["budget"]["planned"])
        missing = set(range(state.step)) - self._earlier.keys()
        if missing:
            raise InputError(
                f"{path}: the record of this training lacks step {min(missing)}; "
                "checkpoint.resume=never starts it anew"
            )
        self.curve = [self._earlier[step] for step in range(state.step)]
        losses = written.curves.get("train/val_loss", [])[: facts["validations"]]
        self.validations = [(step + 1, loss) for step, loss in losses]
        self.best, self.best_step = float(facts["best_loss"]), facts["best_step"]
        self.budget = Budget(self.config.train, first=state.step, **facts["budget"])
        return state

    def step(self, report: StepReport) -> None:
        """Note a step that has just been done."""
        earlier = self._earlier.get(report.step)
        if earlier and not self._warned and f"{report.loss:.6g}" != f"{earlier.loss:.6g}":
            self._warned = True
            log.warning(
                "step %d is done again and its loss is %.6g instead of %.6g: not bit-equal here",
                *(report.step, report.loss, earlier.loss),
            )
            self.record.tags({"resume.not_bit_equal_at": report.step})
        # How many steps there are to be is the plan of now, with a time budget another one.
        self.curve.append(replace(earlier, steps=report.steps) if earlier else report)

    def new_edits(self) -> list[str]:
        """What has been edited of this training's settings and code, each told once."""
        found = [e for e in provenance.edits("train", self.config) if e not in self._told]
        self._told += found
        return found

    def validation_due(self) -> bool:
        """Whether the model as it stands is to be validated and was not yet."""
        done = len(self.curve)
        if not done or (self.validations and self.validations[-1][0] == done):
            return False
        return done % self.config.train.val_every == 0 or self.curve[-1].last

    def validated(self, state: TrainState, loss: float) -> None:
        """Note a validation; the best model is kept."""
        done = len(self.curve)
        self.validations.append((done, loss))
        self.record.metrics({"train/val_loss": loss}, done - 1)
        if loss < self.best:
            self.best, self.best_step = loss, done
            self.checkpoints.keep_best(state.model, done)

    def checkpoint_due(self) -> bool:
        """Whether it is time to save; after the last step the result itself is written."""
        return not self.curve[-1].last and self.checkpoints.due(len(self.curve))

    def save(self, state: TrainState) -> None:
        """A checkpoint from which all of this can go on."""
        self.record.persist()
        facts = {
            "best_loss": repr(self.best),  # JSON knows no infinity
            "best_step": self.best_step,
            "validations": len(self.validations),  # the record may know of later ones
            "budget": self.budget.facts(),
            "machine": machine(state.precision),
        }
        self.checkpoints.save(state, facts)
        self._run.say("running", step=state.step)

    def best_model(self) -> Path:
        """Where the model of the best validation lies."""
        return self.checkpoints.best(self.best_step)

    def summary(self, model: GPT, precision: Precision, matrix_rate: float) -> dict[str, float]:
        """What the whole training came to, in numbers; `matrix_rate` is in FLOP/s."""
        curve = self.curve
        rate = throughput.tokens_per_second([r.seconds for r in curve], curve[0].tokens)
        peak = throughput.peak_flops(runtime.device_name(precision.device), precision.effective)
        flops = model.flops_per_token(self.config.train.sequence_length)
        mfu = throughput.utilisation(rate, flops, peak)
        return {
            "train/final_loss": curve[-1].loss,
            "train/best_val_loss": self.best,
            "train/steps": float(len(curve)),
            "train/tokens": float(sum(report.tokens for report in curve)),
            "train/skipped_steps": float(sum(report.skipped for report in curve)),
            "model/parameters": float(model.parameter_count()),
            "perf/tokens_per_second": rate,
            "perf/peak_memory_mib": throughput.peak_memory_mib(precision.device),
            "perf/warm_up_seconds": throughput.warm_up_seconds([r.seconds for r in curve]),
            "perf/matrix_gflops": matrix_rate / 1e9,
            **({"perf/mfu": mfu} if mfu is not None else {}),
            "perf/of_matrix_rate": rate * flops / matrix_rate,
        }

    def table(self) -> tuple[list[str], list[list[float]]]:
        """Column names and a row for each step; NaN where a step has no such value."""
        rows = [{"step": report.step} | step_metrics(report) for report in self.curve]
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = [name.rpartition("/")[2] for name in names]
        return columns, [[row.get(name, math.nan) for name in names] for row in rows]


def step_metrics(report: StepReport) -> dict[str, float]:
    """A step as its record and MLflow have it; a skipped one has no norm that is a number."""
    norm = {"train/grad_norm": report.grad_norm} if math.isfinite(report.grad_norm) else {}
    return norm | {
        "train/loss": report.loss,
        "train/learning_rate": report.learning_rate,
        "train/loss_scale": report.loss_scale,
        "train/found_inf": float(not math.isfinite(report.grad_norm)),
        "train/skipped": float(report.skipped),
        "perf/step_seconds": report.seconds,
        "perf/data_seconds": report.data_seconds,
        "perf/step_tokens_per_second": report.tokens / report.seconds,
    }


def reports(written: RunData, config: Config, planned: int) -> dict[int, StepReport]:
    """`step_metrics` read back, by step, to the digits that a record keeps."""
    train = config.train
    by_step: dict[int, dict[str, float]] = {}
    for event in written.events("metrics"):
        if "train/loss" in event["values"]:
            by_step[event["step"]] = event["values"]
    return {
        step: StepReport(
            step=step,
            loss=values["train/loss"],
            grad_norm=values.get("train/grad_norm", math.inf),
            learning_rate=values["train/learning_rate"],
            loss_scale=values["train/loss_scale"],
            skipped=bool(values["train/skipped"]),
            seconds=values["perf/step_seconds"],
            data_seconds=values["perf/data_seconds"],
            tokens=train.batch_size * train.sequence_length * train.accumulate,
            steps=planned,
        )
        for step, values in by_step.items()
    }
