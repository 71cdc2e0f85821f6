"""The history of a training: its steps and validations so far, and what they come to."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.compute import runtime, throughput
from pipeline.compute.runtime import Numbers
from pipeline.compute.sharding import own
from pipeline.errors import InputError
from pipeline.tables import write_csv, write_curve
from pipeline.training.loop import StepReport
from pipeline.training.time_budget import Budget

if TYPE_CHECKING:
    from pipeline.config import TrainConfig
    from pipeline.model.gpt import GPT
    from pipeline.records.record_file import Record
    from pipeline.training.training_step import TrainState

log = logging.getLogger(__name__)


class History:
    """Steps and validations of one training, also those of processes before this one.

    `curve` holds a report for every step, of a fork those of its parents first (`lineage`). A step
    that is done again after the last checkpoint keeps its first report. Every step and validation
    goes to the record at once. `budget` says how many steps there are to be; its clock starts when
    this is made. By how much a step changes the weights is measured: one matrix in the middle of
    `model` speaks for all.
    """

    def __init__(self, config: TrainConfig, record: Record, model: GPT):
        self.curve: list[StepReport] = []
        self.validations: list[tuple[int, float]] = []  # (steps done, loss in nats/token)
        self.best, self.best_step = math.inf, 0
        self.budget = Budget(config)
        self.lineage: list[dict[str, Any]] = []  # the trainings forked from, the oldest first
        self._config, self._record = config, record
        self._earlier: dict[int, StepReport] = {}
        self._warned = False
        blocks = model.transformer.h
        self._weight = own(blocks[len(blocks) // 2].mlp.c_fc.weight.detach())
        self._before = self._weight.clone()
        self._ratio: Numbers | None = None  # of the step at work

    def restore(self, checkpoint: Path, facts: Mapping[str, Any], done: int) -> None:
        """Take the steps before a checkpoint from the record, and the rest from its `facts`.

        The model has been restored by then.

        Raises InputError where the record lacks one of the `done` steps.
        """
        metrics = list(self._record.so_far().of_kind("metrics"))
        self.lineage = facts.get("lineage", [])
        budget = {**facts["budget"]}
        budget["planned"] = budget["planned"] or self._config.steps  # a fork has a plan of its own
        self._earlier = read_back(metrics, self._config, budget["planned"], self.lineage)
        if missing := set(range(done)) - self._earlier.keys():
            raise InputError(
                f"{checkpoint}: the record of this training lacks step {min(missing)}; "
                "checkpoint.resume=never starts it anew"
            )
        self.curve = [self._earlier[step] for step in range(done)]
        measured = [e for e in metrics if "train/val_loss" in e["values"]][: facts["validations"]]
        self.validations = [(e["step"] + 1, e["values"]["train/val_loss"]) for e in measured]
        self.best, self.best_step = float(facts["best_loss"]), facts["best_step"]
        self.budget = Budget(self._config, first=done, **budget)
        self._before.copy_(self._weight)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps for `restore`, as plain values."""
        return {
            "best_loss": repr(self.best),  # JSON knows no infinity
            "best_step": self.best_step,
            "validations": len(self.validations),  # the record may know of later ones
            "budget": self.budget.facts(),
            "lineage": self.lineage,
        }

    @property
    def parents_steps(self) -> int:
        """How many of the first steps were made by the training that this one was forked from."""
        return self.lineage[-1]["step"] if self.lineage else 0

    @property
    def own(self) -> list[StepReport]:
        """The steps that are not a parent's."""
        return self.curve[self.parents_steps :]

    def pause(self) -> bool:
        """What `fit` asks with a step launched that `add` is to get next."""
        self._ratio, done = self._changed(), len(self.curve) + 1
        return done % self._config.val_every == 0 or self.budget.ends_soon(done)

    def add(self, report: StepReport) -> None:
        """Note a step that has just been made."""
        earlier = self._earlier.get(report.step)
        if earlier and not self._warned and f"{report.loss:.6g}" != f"{earlier.loss:.6g}":
            self._warned = True
            mend = self._weight.is_cuda and not self._config.deterministic
            log.warning(
                "step %d is done again and its loss is %.6g instead of %.6g: not bit-equal here%s",
                *(report.step, report.loss, earlier.loss),
                "; train.deterministic=true makes it so" if mend else "",
            )
            self._record.tags({"resume.not_bit_equal_at": report.step})
        # How many steps there are to be is the plan of now, with a time budget another one.
        self.curve.append(replace(earlier, steps=report.steps) if earlier else report)
        values = step_metrics(report)
        if report.fingerprint:
            values |= report.fingerprint.metrics()
        ratio, self._ratio = self._ratio or self._changed(), None
        if not report.skipped:
            (values["train/update_ratio"],) = ratio.read()
        self._record.metrics(values, report.step)

    def _changed(self) -> Numbers:
        """Norm of what the last step changed in the weight, by the norm that it had before."""
        change = (self._weight - self._before).norm() / self._before.norm()
        self._before.copy_(self._weight)
        return Numbers(change)

    def validation_due(self) -> bool:
        """Whether the model as it stands is to be validated and was not yet."""
        done = len(self.curve)
        if not done or (self.validations and self.validations[-1][0] == done):
            return False
        return done % self._config.val_every == 0 or self.curve[-1].last

    def validated(self, loss: float) -> bool:
        """Note a validation loss, in nats/token; whether this model is the best so far."""
        done = len(self.curve)
        self.validations.append((done, loss))
        self._record.metrics({"train/val_loss": loss}, done - 1)
        if better := loss < self.best:
            self.best, self.best_step = loss, done
        return better

    def line(self) -> str:
        """The last validation for a person: losses, learning rate and speed since the one before.

        The training loss is the mean of these steps, the speed their tokens by their time.
        """
        done, loss = self.validations[-1]
        since = self.validations[-2][0] if len(self.validations) > 1 else 0
        since = max(since, self.parents_steps)
        steps = self.curve[since:done]
        train = statistics.fmean(report.loss for report in steps)
        rate = sum(report.tokens for report in steps) / sum(report.seconds for report in steps)
        return (
            f"step {done:,}/{steps[-1].steps:,}  train {train:.3f}  val {loss:.3f}  "
            f"lr {steps[-1].learning_rate:.1e}  {rate:,.0f} tokens/s"
            + ("  best" if done == self.best_step else "")
        )

    def summary(self, state: TrainState, matrix_rate: float) -> dict[str, float]:
        """What the whole training came to, in numbers; `matrix_rate` is in FLOP/s."""
        curve, model, precision = self.curve, state.model, state.precision
        seconds = [report.seconds for report in self.own]
        rate = throughput.tokens_per_second(seconds, self.own[0].tokens)
        peak = throughput.peak_flops(runtime.device_name(precision.device), precision.effective)
        flops = model.flops_per_token(self._config.sequence_length)
        each = rate / state.ranks.world  # of the processes, which have a device each
        mfu = throughput.utilisation(each, flops, peak)
        return {
            "train/final_loss": curve[-1].loss,
            "train/best_val_loss": self.best,
            "train/steps": float(len(curve)),
            "train/tokens": float(sum(report.tokens for report in curve)),
            "train/skipped_steps": float(sum(report.skipped for report in curve)),
            "model/parameters": float(model.parameter_count()),
            "perf/tokens_per_second": rate,
            "perf/peak_memory_mib": throughput.peak_memory_mib(precision.device),
            "perf/warm_up_seconds": throughput.warm_up_seconds(seconds),
            "perf/matrix_gflops": matrix_rate / 1e9,
            **({"perf/mfu": mfu} if mfu is not None else {}),
            "perf/of_matrix_rate": each * flops / matrix_rate,
        }

    def lines(self, summary: Mapping[str, float]) -> list[str]:
        """The summary for a person."""
        steps, budget, own = len(self.curve), self._config.time_budget, self.own
        rate = sum(report.tokens for report in own) / sum(report.seconds for report in own)
        lines = [
            f"loss {own[0].loss:.3f} -> {self.curve[-1].loss:.3f} nats/token, best "
            f"validation loss {self.best:.3f}, {rate:,.0f} tokens/s over all steps, "
            f"{summary['perf/tokens_per_second']:,.0f} in the median step, "
            f"{summary['perf/peak_memory_mib']:,.0f} MiB; warm-up "
            f"{summary['perf/warm_up_seconds']:.1f} s"
        ]
        if steps < self._config.steps:
            fitted = f"{steps:,} of {self._config.steps:,} steps fitted into"
            lines.insert(0, f"{fitted} train.time_budget={budget:g} minutes")
        return lines

    def write_curves(self, folder: Path) -> None:
        """`train.csv` and `validation.csv` for DVC's plots; the record has every point."""
        rows = [{"step": report.step} | step_metrics(report) for report in self.curve]
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = [name.rpartition("/")[2] for name in names]
        table = [[row.get(name, math.nan) for name in names] for row in rows]
        write_curve(folder / "train.csv", columns, table)
        write_csv(folder / "validation.csv", ["step", "loss"], self.validations)


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


def read_back(
    metrics: Iterable[Mapping[str, Any]],
    config: TrainConfig,
    planned: int,
    lineage: Sequence[Mapping[str, Any]] = (),
) -> dict[int, StepReport]:
    """`step_metrics` read from a record's events, by step, to the digits that a record keeps."""
    own = config.batch_size * config.sequence_length * config.accumulate

    def tokens(step: int) -> int:
        return next((parent["tokens"] for parent in lineage if step < parent["step"]), own)

    by_step = {e["step"]: e["values"] for e in metrics if "train/loss" in e["values"]}
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
            tokens=tokens(step),
            steps=planned,
        )
        for step, values in by_step.items()
    }
