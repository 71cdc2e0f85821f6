"""train: tokens and an initial model in, the best and the last model out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial

from pipeline import paths
from pipeline.compute.machine import Machine, measured
from pipeline.config import Config
from pipeline.diagnostics import debugger, doctor, forecast, glimpse
from pipeline.resume import run_folder
from pipeline.resume.checkpoints import Checkpoint, Checkpoints
from pipeline.resume.interruption import Interruption, Stopped
from pipeline.tracking import recording, system_metrics
from pipeline.training.history import History
from pipeline.training.inputs import Inputs, open_inputs
from pipeline.training.loop import fit, micro_batches
from pipeline.training.training_step import TrainState, from_folder
from pipeline.training.validation import validate
from stages import common


@dataclass
class Job:
    """What one training works with."""

    config: Config
    inputs: Inputs
    run: run_folder.Run
    checkpoints: Checkpoints
    record: recording.Record


def main(config: Config) -> None:
    inputs = open_inputs(config.train)
    with run_folder.claim(run_folder.identity("train", config, inputs.digests())) as run:
        if config.checkpoint.resume == "never":
            run.start_over()
        if run.adopt():
            print("train: identical training already finished; reusing its verified result")
            return
        checkpoints = Checkpoints(run.folder, config.checkpoint)
        newest = common.start_of(run, checkpoints, config)
        computing = measured(config.precision, config.device, config.train.deterministic)
        with computing as machine, recording.record("train", config, run.journal) as record:
            record.dataset("tokens", inputs.train.sha256, str(inputs.train.path), "train")
            record.tags({f"digest.{name}": sha256 for name, sha256 in inputs.digests().items()})
            train(Job(config, inputs, run, checkpoints, record), newest, machine)
        run.share()


def train(job: Job, newest: Checkpoint | None, machine: Machine) -> None:
    config, record, precision = job.config, job.record, machine.precision
    common.announce("train", precision, record)
    for line in forecast.before_training(config, precision, record, len(job.inputs.train)):
        print(f"train: {line}", flush=True)
    state = from_folder(paths.INIT, config.model, config.train, precision, config.init)
    history = History(config.train, record, state.model)
    job.checkpoints.check_room(state.model.parameter_count(), config.train)
    if newest:
        newest.restore(state)
        history.restore(newest.path, newest.facts, state.step)
    several = common.several(state, job.run.identity, newest, record)
    watched = system_metrics.watched(record, precision.device)
    with several, watched, forecast.explaining(config, precision):
        loop(job, state, history)
    job.checkpoints.write_models(paths.LAST, paths.MODEL, state, history.best_step)
    job.checkpoints.write_kept(paths.CHECKPOINTS)
    record.checkpoint("best", paths.MODEL, history.best_step)
    record.checkpoint("last", paths.LAST, state.step)
    summary = history.summary(state, machine.matrix_rate)
    record.metrics(summary, state.step)
    health, verdict = doctor.judge(record, state.step)
    common.write_metrics(paths.METRICS / "train.json", summary | health)
    history.write_curves(paths.PLOTS)
    for line in (*history.lines(summary), *forecast.at_peak(record, summary, precision), *verdict):
        print(f"train: {line}")


def loop(job: Job, state: TrainState, history: History) -> None:
    """Every step that is left; validations and checkpoints when they are due."""
    config, record = job.config, job.record
    rounds, told = doctor.Rounds(), set[str]()
    batches = partial(micro_batches, job.inputs.train, config.train, ranks=state.ranks)

    def validate_if_due() -> None:
        if history.validation_due():
            with contextlib.suppress(Stopped):  # somebody asks to stop: the next process does it
                if history.validated(validate(state, job.inputs.val, config.train, stop.going_on)):
                    job.checkpoints.keep_best(state)
                for line in (history.line(), *glimpse.lines(state, config, record)):
                    common.say(f"train: {line}")
                edited = common.new_edits("train", config, told)
                common.warn(config, [*rounds.look(state.step, record.so_far), *edited])

    def pause(done: int) -> bool:
        return history.pause() or job.checkpoints.due(done) or bool(stop.asked)

    def save() -> None:
        record.persist()  # a checkpoint knows no more than the record
        job.checkpoints.save(state, history.facts())
        job.run.say("running", step=state.step)

    with Interruption() as stop, debugger.attached(state, config, record, job.inputs, stop) as look:
        look_at, steps_at = config.debug.interact_at_step, history.budget.steps
        steps = fit(state, config.train, batches, look, look_at, steps_at, pause)
        validate_if_due()  # a training that was stopped may owe it
        for report in common.progress(steps, config.train.steps, state.step):
            history.add(report)
            if len(history.curve) == history.parents_steps + forecast.MEASURED_AT:
                times, before = [r.seconds for r in history.own], history.parents_steps
                said = forecast.after_first_steps(times, config.train, record, before)
                common.say(f"train: {said}")
            if not report.settled:  # the device is at work on the next one
                continue
            validate_if_due()
            if stop.asked:
                break
            if not report.last and job.checkpoints.due(state.step):
                save()
        if stop.asked:
            save()
            common.say(f"train: stopped; the same command resumes from step {state.step:,}")
            stop.leave()


if __name__ == "__main__":
    common.run(main, "train")
