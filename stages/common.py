"""What every stage does alike: run as a process, check, announce."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline import config as configuration
from pipeline import paths, terminal
from pipeline.config import Config
from pipeline.drawing import dvc_plots
from pipeline.errors import ChangedError, ConfigError, exit_code, reason, to_user
from pipeline.records import git, provenance
from pipeline.resume import run_folder
from pipeline.tables import write_json
from pipeline.tracking import notify

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.records.record_file import Record
    from pipeline.resume.checkpoints import Checkpoint, Checkpoints
    from pipeline.resume.run_folder import Run
    from pipeline.training.loop import StepReport
    from pipeline.training.training_step import TrainState

log = logging.getLogger(__name__)

# Here and not in `run`: a stage's module imports the libraries that may crash before it calls it.
if sys.stderr and not faulthandler.is_enabled():
    faulthandler.enable()
# Here, too: a module that is edited while the libraries are imported has been read already.
provenance.find_code()

LINE_EVERY_SECONDS = 30.0  # of `progress` in a log
# The stages whose end is told, and what is told of it: a file below metrics/ and a metric in it.
ENDS = {"train": ("train.json", "train/best_val_loss"), "sample": ("evaluate.json", "val/loss")}

# `dvc exp show` gives every metric a column: what the settings fix, what all experiments share,
# and error bars are in the record and in MLflow alone.
BESIDE = re.compile(
    r"train/(steps|tokens)|model/.*|init_val/.*|val/unigram_loss|.*(_count|_acc|_per_token|_stderr)"
    r"|health/(grad_norm_last|clipped_share|update_ratio)|perf/(matrix_gflops|warm_up_seconds)"
)


def run(
    main: Callable[[Config], None],
    stage: str = "",
    others: Callable[[Config], None] | None = None,
) -> None:
    """A stage as a process: checked settings in, an exit code out.

    A mistake that the user can mend ends in one message; a bug keeps its traceback, a crash in a
    library's machine code too. With the name of a `stage` in dvc.yaml its result is handed to DVC
    only if it rests on what DVC will file it under, see `held`. `others` is what processes but the
    first do, for a stage beside `train` that works in several.
    """
    terminal.guard()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    stream: Any  # guarded: it hands the call on to the stream itself
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a sample may hold what a pipe's encoding does not
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that records and rows are closed
    try:
        if words := " ".join(sys.argv[1:] if Path(sys.argv[0]).parent.name == "stages" else []):
            raise ConfigError(
                f"{words}: a stage takes no options; its settings stand in {paths.PARAMS}, and "
                "`python -m pipeline --help` lists what else there is"
            )
        config = configuration.load()
        work = partial(begun, main, stage, config)
        if stage == "train" or others:
            from pipeline.distributed import start  # which imports torch

            start.run(config, work, others)
        else:
            work()
    except (Exception, KeyboardInterrupt) as error:
        if not (said := to_user(error)):
            raise
        print(said, file=sys.stderr)
        sys.exit(exit_code(error))


def begun(main: Callable[[Config], None], stage: str, config: Config) -> None:
    """A stage, once its settings are read; of several processes the first one does this."""
    git.warn()
    git.check_hellaswag(Path(config.evaluate.hellaswag))
    if stage:
        notified(main, stage, config)
    else:
        main(config)
    dvc_plots.keep_script()


def notified(main: Callable[[Config], None], stage: str, config: Config) -> None:
    """A stage's work, with a message where it fails, or ends a training or the pipeline."""
    notify.check(config.tracking)
    try:
        held(main, stage, config)
    except Exception as error:
        notify.tell(config.tracking, f"{stage} failed: {reason(error)}")
        raise
    if stage in ENDS and config.tracking.notify != "none":
        file, metric = ENDS[stage]
        with contextlib.suppress(FileNotFoundError):  # sampling needs no evaluation
            group, name = metric.split("/")
            loss = json.loads((paths.METRICS / file).read_text("utf-8"))[group][name]
            notify.tell(config.tracking, f"{stage} has ended, {metric} {loss:.4f}")


def held(main: Callable[[Config], None], stage: str, config: Config) -> None:
    """A stage's work, unless it was finished before; raises ChangedError after an edit meanwhile.

    What DVC hashes when the command has ended must be what the work began with: the settings that
    the stage reads, its code, its inputs.
    """
    stamps = provenance.input_stamps(stage, config)
    identity = run_folder.identity(stage, config, stamps)
    if run_folder.take_over(identity):
        print(f"{stage}: identical work already finished; reusing its verified result")
    else:
        main(config)
    replaced = provenance.changed_inputs(stamps, provenance.input_stamps(stage, config))
    edited = provenance.edits(stage, config)
    if replaced:
        raise ChangedError(
            f"changed while {stage} read them:{provenance.listed(replaced + edited)}\n"
            "Nobody can tell which of them the result is of. Give the same command again: the "
            "stage runs on what lies there now"
        )
    if edited:
        way = "put the old back, give the same command, and it is taken over"
        kept = f"The finished work is kept: {way}. " if run_folder.keep(identity) else ""
        raise ChangedError(
            f"edited while {stage} was at work:{provenance.listed(edited)}\n"
            "DVC files a result under what it finds when the stage ends, so it did not get this "
            f"one. {kept}With the new, the same command runs the stage anew. `dvc exp run --temp` "
            "works on a copy, which no edit reaches"
        )


def new_edits(stage: str, config: Config, told: set[str]) -> list[str]:
    """A warning for each edit made while a stage is at work, but for those `told` before."""
    new = [edit for edit in provenance.edits(stage, config) if edit not in told]
    told.update(new)
    return [
        f"edited while {stage} is at work: {edit}. It continues as it began, and DVC takes its "
        "result only if the old is back when it ends"
        for edit in new
    ]


def warn(config: Config, warnings: Iterable[object]) -> None:
    """Warnings in the middle of a stage, in its log and wherever its messages go."""
    for warning in map(str, warnings):
        log.warning("%s", warning)
        notify.tell(config.tracking, warning)


def start_of(run: Run, checkpoints: Checkpoints, config: Config) -> Checkpoint | None:
    """The checkpoint that a training starts from, a fork's first one among them; aloud, which."""
    from pipeline.resume import fork  # which imports torch

    forked = fork.begin(run, config)
    newest = checkpoints.newest()
    where = run_folder.where_to_start(run, newest.step if newest else None, config)
    if said := forked or where:
        print(f"train: {said}", flush=True)
    return newest


@contextlib.contextmanager
def several(
    state: TrainState, identity: dict[str, Any], newest: Checkpoint | None, record: Record
) -> Iterator[None]:
    """Around a training's loop, where other processes do it as well; see `distributed.team`."""
    from pipeline.distributed import team

    for line in team.begin(state, identity, newest, record):
        print(f"train: {line}", flush=True)
    with team.telling(lambda: f"step {state.step}: "):
        yield


def announce(stage: str, precision: Precision, record: Record) -> None:
    """What was asked for, what is in effect, and why: aloud, in the row, and as a warning if less.

    The tags of `train` are the row's own, those of another stage carry its name.
    """
    line = f"{stage}: device {precision.device_name}, precision {precision.effective}"
    print(line + (f" ({precision.reason})" if precision.reason else ""), flush=True)
    if precision.effective != precision.asked:
        log.warning(
            "%s: precision=%s is not in effect: %s", stage, precision.asked, precision.reason
        )
    prefix = "" if stage == "train" else f"{stage}."
    facts = {
        "precision.asked": precision.asked,
        "precision.effective": precision.effective,
        "precision.reason": precision.reason,
        "precision.emulated": precision.emulated,
        "device.name": precision.device_name,
    }
    record.tags({prefix + name: value for name, value in facts.items()})


def write_metrics(path: Path, values: dict[str, float]) -> None:
    """The metrics of DVC: what people compare first, without BESIDE."""
    write_json(path, {key: value for key, value in values.items() if not BESIDE.fullmatch(key)})


def say(line: str) -> None:
    """A line above the bar of `progress`, on standard output."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def progress(reports: Iterable[StepReport], steps: int, done: int) -> Iterator[StepReport]:
    """A bar with loss, tokens/s and time left; in a log, where no bar can be, lines now and then.

    Speed and time left are those since the last line, with validations and checkpoints.
    """
    said, since = time.monotonic(), done
    with tqdm(total=steps, initial=done, desc="train", unit="step", disable=None) as bar:
        for report in reports:
            bar.total = report.steps
            rate = report.tokens / report.seconds
            bar.set_postfix_str(f"loss {report.loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            yield report
            now, at = time.monotonic(), report.step + 1
            if bar.disable and not report.last and now >= said + LINE_EVERY_SECONDS:
                pace = (now - said) / (at - since)
                left = tqdm.format_interval(pace * (report.steps - at))
                say(
                    f"train: step {at:,}/{report.steps:,}, loss {report.loss:.3f}, "
                    f"{report.tokens / pace:,.0f} tokens/s, {left} left"
                )
                said, since = now, at
