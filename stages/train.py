"""train: tokens and an initial model in, the best and the last model out."""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from pipeline import paths
from pipeline.config import Config
from pipeline.data import token_files
from pipeline.diagnostics import debugger, doctor, forecast, nonfinite
from pipeline.errors import together
from pipeline.records.provenance import NewEdits
from pipeline.resume import run_folder
from pipeline.resume.checkpoints import Checkpoint, Checkpoints
from pipeline.resume.interruption import Interruption, Stopped, listening
from pipeline.storage.digests import tree_digest
from pipeline.tracking import recording
from pipeline.training.history import History
from pipeline.training.loop import fit, micro_batches
from pipeline.training.training_step import TrainState, from_folder
from pipeline.training.validation import validate
from stages.common import (
    Machine,
    announce,
    check_model,
    measure,
    progress,
    run,
    write_metrics,
)

log = logging.getLogger(__name__)


@dataclass
class Job:
    """What one training works with."""

    config: Config
    tokens: token_files.Tokens
    held_out: token_files.Tokens
    run: run_folder.Run
    checkpoints: Checkpoints
    record: recording.Record


def main(config: Config) -> None:
    tokens, held_out, _ = together(
        partial(token_files.open_tokens, paths.TOKENS, "train"),
        partial(token_files.open_tokens, paths.TOKENS, "val"),
        partial(check_model, paths.INIT),
    )
    token_files.check_length(tokens, config.train.sequence_length)
    inputs = {"train": tokens.sha256, "val": held_out.sha256, "init": tree_digest(paths.INIT)}
    with run_folder.claim(run_folder.identity("train", config, inputs)) as claimed:
        if config.checkpoint.resume == "never":
            claimed.start_over()
        if claimed.adopt():
            print("train: identical training already finished; reusing its verified result")
            return
        checkpoints = Checkpoints(claimed.folder, config.checkpoint)
        newest = checkpoints.newest()
        if where := run_folder.where_to_start(claimed, newest and newest.step, config):
            print(f"train: {where}")
        machine = measure(config)  # before the process that ships takes a core for its libraries
        with recording.record("train", config, claimed.journal) as record:
            record.dataset("tokens", tokens.sha256, str(tokens.path), "train")
            record.tags({f"digest.{name}": digest for name, digest in inputs.items()})
            train(Job(config, tokens, held_out, claimed, checkpoints, record), newest, machine)
        claimed.share()


def train(job: Job, newest: Checkpoint | None, machine: Machine) -> None:
    config, record, precision = job.config, job.record, machine.precision
    announce("train", precision, record)
    for line in forecast.before_training(config, precision, record, len(job.tokens)):
        print(f"train: {line}", flush=True)
    state = from_folder(paths.INIT, config, precision)
    job.checkpoints.check_room(state.model.parameter_count())
    history = History(config.train, record)
    if newest:
        newest.restore(state)
        history.restore(newest.path, newest.facts, state.step)
    loop(job, state, history)
    job.checkpoints.write_models(paths.LAST, paths.MODEL, state, history.best_step)
    record.checkpoint("best", paths.MODEL, history.best_step)
    record.checkpoint("last", paths.LAST, state.step)
    summary = history.summary(state, machine.matrix_rate)
    record.metrics(summary, state.step)
    health, verdict = doctor.judge(record, state.step)
    write_metrics(paths.METRICS / "train.json", summary | health)
    history.write_curves(paths.PLOTS)
    for line in (*history.lines(summary), *verdict):
        print(f"train: {line}")


def loop(job: Job, state: TrainState, history: History) -> None:
    """Every step that is left; validations and checkpoints when they are due."""
    config, record = job.config, job.record
    rounds, edits = doctor.Rounds(), NewEdits("train", config)
    with (
        listening() as stop,
        debugger.attached(state, config, record, job.tokens, stop.suspended) as look,
    ):
        reports = fit(
            state,
            config.train,
            partial(micro_batches, job.tokens, config.train),
            look=look,
            look_at=config.debug.interact_at_step,
            steps_at=history.budget.steps,
        )
        validate_if_due(job, state, history, stop)  # a training that was stopped may owe it
        for report in progress(reports, config.train.steps, state.step):
            history.add(report, state)
            if state.step == forecast.MEASURED_AT:
                seconds = [report.seconds for report in history.curve]
                line = forecast.after_first_steps(seconds, config.train, record)
                tqdm.write(f"train: {line}", file=sys.stdout)
            if validate_if_due(job, state, history, stop):
                for warning in (*rounds.look(state.step, record.so_far), *edits.found()):
                    log.warning("%s", warning)
            if not (report.last or stop.asked()) and job.checkpoints.due(state.step):
                save_checkpoint(job, state, history)
            if stop.asked():
                break
        if stop.asked():
            save_checkpoint(job, state, history)
            tqdm.write(f"train: stopped; the same command resumes from step {state.step:,}")
            stop.leave()


def validate_if_due(job: Job, state: TrainState, history: History, stop: Interruption) -> bool:
    """Whether a validation was due and done; it is left where somebody asks to stop."""
    if not history.validation_due():
        return False
    config = job.config.train
    with contextlib.suppress(Stopped):
        loss = validate(state, job.held_out, config, stop.unless_asked)
        nonfinite.check_validation(loss, state, job.held_out, config)
        if history.validated(loss):
            job.checkpoints.keep_best(state.model, state.step)
        return True
    return False


def save_checkpoint(job: Job, state: TrainState, history: History) -> None:
    job.record.persist()  # no checkpoint knows more than the record
    job.checkpoints.save(state, history.facts())
    job.run.say("running", step=state.step)


if __name__ == "__main__":
    run(main, "train")
