"""train: tokens and an initial model in, the best and the last model out."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline import paths
from pipeline.compute import runtime, throughput
from pipeline.compute.precision import Precision, choose_precision
from pipeline.config import Config
from pipeline.data import batches, token_files
from pipeline.diagnostics import debugger, doctor, forecast, nonfinite, token_spans
from pipeline.drawing import figures
from pipeline.errors import NumericsError, ResumeError, together
from pipeline.model.gpt import GPT
from pipeline.model.loss import mean_loss
from pipeline.model.model_dir import load_model, save_model
from pipeline.records import record_file
from pipeline.records.record_file import Record
from pipeline.records.run_data import Experiment
from pipeline.resume import interruption, run_folder
from pipeline.resume.checkpoints import Checkpoint, Checkpoints
from pipeline.resume.course import Course, step_metrics
from pipeline.resume.interruption import Interruption, Stopped
from pipeline.storage import folders
from pipeline.storage.folders import copy, recover
from pipeline.studies import loss_scaling, op_dtypes
from pipeline.tracking import recording
from pipeline.training import loop
from pipeline.training.optimizers import update_ratio
from stages import announce, check_model, run, write_csv, write_curve, write_metrics

log = logging.getLogger(__name__)

OUTPUTS = [
    paths.MODEL,
    paths.LAST,
    paths.TRAIN_STUDY,
    paths.METRICS / "train.json",
    paths.PLOTS / "train.csv",
    paths.PLOTS / "validation.csv",
    paths.record("train"),
]


def main(config: Config) -> None:
    tokens, held_out, _ = together(
        functools.partial(token_files.open_tokens, paths.TOKENS, "train"),
        functools.partial(token_files.open_tokens, paths.TOKENS, "val"),
        functools.partial(check_model, paths.INIT),
    )
    batches.check_length(tokens, config.train.sequence_length)
    inputs = {
        "train": tokens.sha256,
        "val": held_out.sha256,
        "init": record_file.tree_digest(paths.INIT),
    }
    with run_folder.claim(
        run_folder.identity("train", config, inputs), config.checkpoint.wait
    ) as run:
        for output in OUTPUTS:
            recover(output)
        if config.checkpoint.resume == "never" and not run.waited:
            run.start_over()
        if run.adopt():
            print("train: this very training has been done; its checked result is taken over")
            return
        checkpoints = Checkpoints(run.folder, config.checkpoint)
        found = checkpoints.newest()
        announce_start(config, run, found)
        machine = measure(config)  # before the process that ships takes a core for its libraries
        with recording.record("train", config, run.journal) as record:
            record.dataset("tokens", tokens.sha256, str(tokens.path), "train")
            record.tags({f"digest.{name}": digest for name, digest in inputs.items()})
            course = Course(config, record, run, checkpoints)
            train(course, found, tokens, held_out, machine)
        run.share(OUTPUTS)


@dataclass(frozen=True)
class Machine:
    """How this training computes, and how fast products are here."""

    precision: Precision
    matrix_rate: float  # FLOP/s


def measure(config: Config) -> Machine:
    precision = choose_precision(config.precision, runtime.choose_device(config.device))
    return Machine(precision, throughput.matrix_rate(precision))


def announce_start(config: Config, run: run_folder.Run, found: Checkpoint | None) -> None:
    """Where this training starts, and why not elsewhere; raises ResumeError where it may not."""
    if found:
        print(
            f"train: goes on after step {found[1]['step']:,} of {config.train.steps:,}: {found[0]}"
        )
        return
    why = "there is no checkpoint to go on from"
    if other := run_folder.unfinished(but=run.folder):
        changed = "; ".join(run_folder.differences(run.identity, other)) or "nothing else"
        why += f"; the training interrupted last, {other}, is another one: here {changed}"
    if config.checkpoint.resume == "require":
        raise ResumeError(f"checkpoint.resume=require: {why}")
    if other:
        print(f"train: starts afresh: {why}")


def train(
    course: Course,
    found: Checkpoint | None,
    tokens: token_files.Tokens,
    held_out: token_files.Tokens,
    machine: Machine,
) -> None:
    config, record = course.config, course.record
    precision, device = machine.precision, machine.precision.device
    announce("train", precision, record)
    foresee(config, precision, record, len(tokens))
    shown = loss_scaling.demonstrate(
        device
    )  # now: nothing is to fail once days of training are done
    throughput.forget_peak(device)
    torch.manual_seed(runtime.derived_seed(config.train.seed, "dropout"))
    model = load_model(
        paths.INIT,
        vocab_rows=config.model.vocab_rows,
        dropout=config.model.dropout,
        attention=config.model.attention,
        device=device,
    )
    course.checkpoints.check_room(model.parameter_count())
    state = course.begin(loop.start(model, config.train, precision), found)
    go_through(course, state, tokens, held_out)
    save_model(model, paths.LAST)
    copy(course.best_model(), paths.MODEL)
    record.checkpoint("best", paths.MODEL, course.best_step)
    record.checkpoint("last", paths.LAST, len(course.curve))
    write_results(course, model, precision, machine.matrix_rate)
    write_study(record, course.study, precision, shown, course.curve)


def go_through(
    course: Course, state: loop.TrainState, tokens: token_files.Tokens, held_out: token_files.Tokens
) -> None:
    """Every step that is left, and what comes between them."""
    config, record = course.config, course.record
    watch = op_dtypes.Watch(state)
    rounds = doctor.Rounds()
    with interruption.listening() as stop:
        reports = loop.fit(
            state,
            config.train,
            functools.partial(loop.micro_batches, tokens, config.train),
            look=functools.partial(stop_and_look, config, record, watch, stop),
            look_at=config.debug.interact_at_step,
            steps_at=course.budget.steps,
        )
        text = functools.partial(token_spans.of_step, tokens, config.train)
        steps = nonfinite.explaining(watched(reports, watch, course.study), state, text)
        try:
            validate_if_due(course, state, held_out, stop, rounds)  # a stopped one may owe it
            for report in progress(steps, config, state.step):
                course.step(report)
                record.metrics(step_metrics(report) | update_metric(state, report), report.step)
                if report.step + 1 == forecast.MEASURED_AT:
                    foresee_time(config, record, course.curve)
                validate_if_due(course, state, held_out, stop, rounds)
                if course.checkpoint_due() and not stop.asked():
                    course.save(state)
                leave_if_asked(course, state, stop)
            leave_if_asked(course, state, stop)  # no step was left, and validation was stopped
        except NumericsError as error:
            keep_for_a_look(state, config, record, str(error))
            raise


def leave_if_asked(course: Course, state: loop.TrainState, stop: Interruption) -> None:
    """After a signal: save, say so, and end."""
    if stop.asked():
        course.save(state)
        tqdm.write(
            f"train: saved after step {state.step:,}; `dvc repro`, or the same experiment, "
            "goes on from there"
        )
        stop.leave()


def watched(
    reports: Iterator[loop.StepReport], watch: op_dtypes.Watch, study: Path
) -> Iterator[loop.StepReport]:
    """The reports; what the first step of the whole training did is noted in `study`."""
    if study.exists():
        yield from reports
        return
    for report in watch.first_of(reports):
        if not study.exists():
            with folders.writing(study, needed=1 << 20, sums=False) as partial:
                write_csv(partial / "dtypes.csv", op_dtypes.COLUMNS, watch.cells())
                (partial / "dtypes.md").write_text(watch.page(), "utf-8")
        yield report


def validate_if_due(
    course: Course,
    state: loop.TrainState,
    held_out: token_files.Tokens,
    stop: Interruption,
    rounds: doctor.Rounds,
) -> None:
    """Validation, and the doctor's word on it; left undone where somebody asks to stop."""
    if course.validation_due():
        with contextlib.suppress(Stopped):
            course.validated(state, validate(state, held_out, course.config, stop))
            for finding in rounds.look(len(course.curve), course.record.so_far):
                log.warning("%s", doctor.line(finding))
            for edit in course.new_edits():
                log.warning(
                    "edited while this training is at work: %s. It goes on as it began, and DVC "
                    "takes its result only if the old is back when it ends",
                    edit,
                )


def foresee(config: Config, precision: Precision, record: Record, corpus_tokens: int) -> None:
    """Before the first step: what this training needs, and a warning where that is not there."""
    try:
        found = forecast.forecast(config, precision, corpus_tokens)
    except RuntimeError as error:  # an operation that this device has no formula of sizes for
        log.warning("no memory forecast on %s: %s", precision.device.type, error)
        return
    for line in found.lines():
        print(f"train: {line}", flush=True)
    record.metrics({"perf/forecast_memory_mib": found.needed.total / 2**20})
    if problem := found.problem(config.train.accumulate):
        log.warning("%s", problem)


def foresee_time(config: Config, record: Record, curve: list[loop.StepReport]) -> None:
    """After the first measured steps: when this training ends."""
    seconds = [report.seconds for report in curve]
    record.metrics({"time/forecast_seconds": forecast.run_seconds(seconds, config.train)})
    tqdm.write(f"train: {forecast.time_words(seconds, config.train)}", file=sys.stdout)


def stop_and_look(
    config: Config,
    record: Record,
    watch: op_dtypes.Watch,
    stop: Interruption,
    state: loop.TrainState,
) -> None:
    """debug.interact_at_step: an interpreter where somebody sits, else the moment on disk."""
    if debugger.has_terminal():
        record.tags({"debug.interacted_at_step": state.step})
        with watch.looking_away(), stop.suspended():
            debugger.look(state)
    else:
        why = f"debug.interact_at_step={state.step}: no terminal here, so no interpreter"
        keep_for_a_look(state, config, record, why)


def keep_for_a_look(state: loop.TrainState, config: Config, record: Record, why: str) -> None:
    folder = debugger.write_bundle(state, config, why)
    record.tags({"debug.why": why, "debug.bundle": folder or "not written"})


def validate(
    state: loop.TrainState, held_out: token_files.Tokens, config: Config, stop: Interruption
) -> float:
    """Mean loss over the same first tokens of the validation split at every call.

    Raises Stopped where somebody asks to stop meanwhile.
    """
    windows = functools.partial(
        batches.validation_windows,
        held_out,
        batch_size=config.train.batch_size,
        sequence_length=config.train.sequence_length,
        limit=config.train.val_tokens,
    )
    device = state.precision.device
    loss = mean_loss(state.model, stop.unless_asked(windows()), state.precision, device)
    if not math.isfinite(loss):
        text = functools.partial(token_spans.of_validation, held_out, config.train)
        raise nonfinite.of_validation(state, windows(), loss, text)
    return loss


def progress(
    reports: Iterator[loop.StepReport], config: Config, done: int
) -> Iterator[loop.StepReport]:
    """A bar with loss, tokens/s and time left; rarely redrawn where it goes to a file."""
    every = 0.5 if sys.stderr.isatty() else 20.0
    total = config.train.steps
    with tqdm(total=total, initial=done, desc="train", unit="step", mininterval=every) as bar:
        for report in reports:
            bar.total = report.steps
            rate = report.tokens / report.seconds
            bar.set_postfix_str(f"loss {report.loss:.3f}, {rate:,.0f} tok/s", refresh=False)
            bar.update()
            yield report


def update_metric(state: loop.TrainState, report: loop.StepReport) -> dict[str, float]:
    """By how much the step changed the weights; one matrix in the middle speaks for all."""
    blocks = state.model.transformer.h
    ratio = update_ratio(state.optimizer, blocks[len(blocks) // 2].mlp.c_fc.weight)
    return {} if ratio is None or report.skipped else {"train/update_ratio": ratio}


def write_results(course: Course, model: GPT, precision: Precision, matrix_rate: float) -> None:
    """The summary for `dvc metrics`, the curves for `dvc plots`, both in the record as well."""
    config, record, curve = course.config, course.record, course.curve
    summary = course.summary(model, precision, matrix_rate)
    record.metrics(summary, len(curve))
    write_metrics(paths.METRICS / "train.json", summary | judge(record, len(curve)))
    columns, rows = course.table()
    write_curve(paths.PLOTS / "train.csv", columns, rows)
    write_csv(paths.PLOTS / "validation.csv", ["step", "loss"], course.validations)
    if len(curve) < config.train.steps:
        print(
            f"train: {len(curve):,} of {config.train.steps:,} steps fitted into "
            f"train.time_budget={config.train.time_budget:g} minutes"
        )
    print(
        f"train: loss {curve[0].loss:.3f} -> {curve[-1].loss:.3f}, best validation loss "
        f"{course.best:.3f}, {summary['perf/tokens_per_second']:,.0f} tokens/s, "
        f"{summary['perf/peak_memory_mib']:,.0f} MiB; the first steps took "
        f"{summary['perf/warm_up_seconds']:.1f} s more than later ones"
    )


def judge(record: Record, steps: int) -> dict[str, float]:
    """The doctor's verdict, aloud, in the row and as a page; its numbers are returned."""
    upstream = {events[0]["stage"]: events for events in record_file.upstream("train")}
    found = Experiment("", "", upstream | {"train": record.so_far()})
    findings = doctor.examine(found)
    numbers = doctor.health(found)
    record.metrics(numbers, steps)
    record.tags(
        {
            "health.verdict": doctor.headline(findings),
            "health.grad_norm": doctor.norm_words(found),
        }
    )
    for line in doctor.lines(findings):
        print(f"train: {line}")
    return numbers


def write_study(
    record: Record,
    study: Path,
    precision: Precision,
    shown: loss_scaling.Demonstration,
    curve: list[loop.StepReport],
) -> None:
    """Which operation ran in what, and the loss scale of this run and in a demonstration.

    Its time is that of the demonstration, of the files, and what the watched first step took
    longer than others; that step's warm-up is in it.
    """
    began = time.perf_counter()
    folder = paths.TRAIN_STUDY
    copy(study, folder)
    (folder / "loss_scale.md").write_text(shown.page(), "utf-8")
    scales = [(r.step, r.loss_scale, not math.isfinite(r.grad_norm), r.skipped) for r in curve]
    figures.save(figures.loss_scale(scales, shown, precision.effective), folder / "loss_scale.png")
    record.artifact(folder, "train_study")
    watched = curve[0].seconds - statistics.median(report.seconds for report in curve)
    seconds = shown.seconds + max(0.0, watched) + time.perf_counter() - began
    record.metrics({"time/train_study_seconds": seconds})
    print(f"train: which operation ran in what, and the loss scale: {folder}")


if __name__ == "__main__":
    run(main, "train")
