"""Commands over several experiments: run them, compare them, show them."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from pipeline.errors import InputError, StorageError

# Each verb imports what it needs itself: torch and MLflow take seconds.

log = logging.getLogger(__name__)


def sweep(
    words: Annotated[
        list[str], Argument(metavar="SETTING=VALUE", help="One of several: train.lr=A,B,C")
    ],
    seeds: Annotated[str, Option(help="More seeds of the baseline, for the noise: 1,2")] = "",
    name: Annotated[str, Option(help="What the experiments' names begin with")] = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Check and show, run nothing")] = False,
) -> None:
    """Run an experiment for each value of a setting, and compare.

    python -m pipeline sweep precision=fp32,tf32,bf16,fp16
    python -m pipeline sweep train.lr=0.0005,0.002,0.008 train.steps=100 --seeds 1,2

    To run several at a time, use DVC's queue and compare afterwards:
    dvc exp run --queue -S train.lr=0.0005,0.002,0.008
    dvc queue start --jobs 2
    python -m pipeline compare train.lr
    """
    from pipeline.experiments import sweep
    from pipeline.records import dvc_history

    if name != sweep.dvc_name(name):
        raise BadParameter(f"{name}: expected letters, digits, _ and -", param_hint="--name")
    more = _numbers(seeds, "--seeds", "1,2")
    planned = sweep.plan(words, more, name, dvc_history.names())
    log.info("%s", planned.page())
    if not dry_run:
        sweep.conclude(planned, sweep.run_all(planned))


def _numbers(text: str, option: str, example: str) -> list[int]:
    if text and not re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        raise BadParameter(f"{text}: expected whole numbers, as {example}", param_hint=option)
    return [int(number) for number in text.split(",") if number]


def fork(
    state: Annotated[str, Argument(metavar="RUN@STEP", help="A run, and the steps it had done")],
    name: Annotated[str, Option("-n", "--name", help="Of the new experiment")] = "",
    changes: Annotated[
        list[str] | None, Option("-S", metavar="SETTING=VALUE", help="Else as in RUN; repeatable")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and show, run nothing")] = False,
) -> None:
    """Run an experiment from the middle of another one.

    python -m pipeline fork RUN@200 -n cooled -S train.schedule=linear -S train.steps=250

    RUN is named as `show` or `ls` names it. The states that there are to start from are those of
    checkpoint.keep_every and, while a training is at work or stopped, its newest ones.
    """
    from pipeline.experiments import forks, sweep
    from pipeline.resume import fork

    if name != sweep.dvc_name(name):
        raise BadParameter(f"{name}: expected letters, digits, _ and -", param_hint="-n")
    parent, step = forks.parse(state)
    member = forks.plan(fork.find(parent), step, name, changes or [])
    log.info("%s, a fork of %s: %s", member.name, state, member.shown())
    if dry_run:
        log.info("%s", shlex.join(["dvc", *member.command("--queue")]))
    else:
        forks.run(member)


def ladder(
    changes: Annotated[
        list[str] | None, Option("-S", metavar="SETTING=VALUE", help="Of all; repeatable")
    ] = None,
    sizes: Annotated[
        str, Option(metavar="SIZE,...", help="BLOCKSxCHANNELS each")
    ] = "1x16,2x32,3x48,3x64",
    horizons: Annotated[str, Option(metavar="STEPS,...", help="Of each size")] = "200,400,800",
    beyond: Annotated[
        str,
        Option("--next", metavar="SIZE[:STEPS]", help="To forecast; one size up if not said"),
    ] = "",
    seeds: Annotated[str, Option(help="More seeds of the smallest, for the noise")] = "1,2",
    ask: Annotated[
        list[str] | None,
        Option(metavar="SIZE:TOKENS", help="Or SIZE:3h. Runs nothing; repeatable"),
    ] = None,
    register_only: Annotated[
        bool, Option("--register-only", help="Leave the run that was forecast for later")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and show, run nothing")] = False,
) -> None:
    """Forecast a larger run from small ones, then hold it against that.

    python -m pipeline ladder --dry-run                what it trains, and how long that takes
    python -m pipeline ladder                          all of it; given again, what is missing
    python -m pipeline ladder --ask 124m:3h            is that worth it? of the finished rungs
    python -m pipeline ladder --next 4x128:1600 --register-only
    """
    from pipeline.ladders import ladder, page, plan

    words = [word for word in sizes.split(",") if word]
    steps = _numbers(horizons, "--horizons", "200,400,800")
    asked = plan.plan(words, steps, beyond, _numbers(seeds, "--seeds", "1,2"), changes or [])
    known = ladder.trained()
    if ask:
        found = ladder.fitted(asked, known)
        log.info("%s", "\n\n".join(page.answer(one, found, asked.changes) for one in ask))
        return
    plan.check_here([*asked, asked.next])
    log.info("%s", page.planned(asked, known, register_only))
    if dry_run:
        return
    ladder.run_missing(list(asked), known)
    page.conclude(ladder.forecast_and_run(asked, known, register_only))


def transfer(
    changes: Annotated[
        list[str] | None, Option("-S", metavar="SETTING=VALUE", help="Of all; repeatable")
    ] = None,
    widths: Annotated[str, Option(metavar="CHANNELS,...", help="Two or more")] = "32,64,128",
    rates: Annotated[
        str,
        Option(metavar="RATE,...", help="Three or more; train.lr / 4 to 8 train.lr if not said"),
    ] = "",
    steps: Annotated[int, Option(min=1, help="Of each training")] = 100,
    seeds: Annotated[str, Option(help="More seeds of every training, for the noise")] = "1",
    layers: Annotated[int, Option(min=1, help="Of every width")] = 2,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and show, run nothing")] = False,
) -> None:
    """Find the best learning rate of several widths: does it move?

    python -m pipeline transfer --dry-run              what it trains, and how long that takes
    python -m pipeline transfer                        all of it; given again, what is missing
    python -m pipeline transfer -S train.optimizer=muon --rates 0.004,0.008,0.016,0.032
    """
    from pipeline.ladders import ladder, plan, transfer

    asked = transfer.plan(
        _numbers(widths, "--widths", "32,64,128"),
        _rates(rates),
        steps,
        _numbers(seeds, "--seeds", "1,2"),
        layers,
        changes or [],
    )
    rungs = list(asked.rungs.values())
    plan.check_here(rungs)
    known = ladder.trained()
    log.info("%s", transfer.planned(asked, known))
    if not dry_run:
        failed: list[str] = []
        done = ladder.run_missing(rungs, known, failed)
        transfer.conclude(transfer.found_of(asked, done))
        if failed:
            raise InputError("\n".join(failed))


def _rates(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word]
    except ValueError:
        said = f"{text}: expected numbers, as 0.001,0.002,0.004"
        raise BadParameter(said, param_hint="--rates") from None


def compare(
    setting: Annotated[str, Argument(metavar="SETTING", help="Such as precision or init.std")],
    steps: Annotated[int, Option(min=0, help="The first steps only; 0 for all")] = 0,
) -> None:
    """Compare the experiments that differ in one setting.

    Outcomes, where the curves part, and how far seeds alone lie apart.

    python -m pipeline compare precision
    python -m pipeline compare init.std --steps 100
    """
    from pipeline.experiments import comparison

    comparison.check_setting(setting)
    comparison.conclude(setting, steps)


def show() -> None:
    """Show every experiment: what changed, loss, verdict, speed.

    python -m pipeline show            a table for each corpus, the best first
    """
    from pipeline.experiments import overview
    from pipeline.records import dvc_history

    log.info("%s", overview.page(dvc_history.experiments(("train", "evaluate"), brief=True)))


def report(
    names: Annotated[
        list[str] | None, Argument(metavar="NAME", help="DVC experiments, or `workspace`")
    ] = None,
    every: Annotated[bool, Option("--all", help="The workspace and every experiment")] = False,
    out: Annotated[Path | None, Option(help="A file; report.html if not said")] = None,
) -> None:
    """Write one HTML page for a run, or for several side by side.

    python -m pipeline report                the run of this workspace
    python -m pipeline report NAME ...       DVC experiments; the first is the base
    python -m pipeline report --all          the workspace and every experiment
    """
    from pipeline import paths
    from pipeline.reports import report

    if every and names:
        raise BadParameter("expected names or --all, not both")
    out = out or paths.root() / "report.html"
    text = report.report(names or [], every)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)  # DVC may have linked it to its cache
        out.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(f"--out {out}: {error.strerror}") from None
    log.info("report: %s (%.0f KiB)", out, out.stat().st_size / 1024)


def sync() -> int:
    """Fill MLflow's store from the records of every experiment.

    python -m pipeline sync
    """
    return _of_the_store(_bring_up_to_date)


def ui(port: Annotated[int, Argument(metavar="PORT", help="Of the page")] = 5000) -> int:
    """Do what `sync` does, then serve MLflow's page on this machine.

    python -m pipeline ui [PORT]
    """
    from pipeline.tracking import mlflow_ui

    code = _of_the_store(_bring_up_to_date)
    if code == StorageError.exit_code:
        return code
    return _of_the_store(lambda: mlflow_ui.show(port))  # what was left out, too


def _bring_up_to_date() -> int:
    """The exit code of an InputError where a record was left out."""
    from pipeline.experiments.sync import sync

    problems: list[str] = []
    rows = ", ".join(sync(problems))
    log.info("rows made or completed: %s", rows or "none, all are up to date")
    if problems:
        log.error("error: %d records were left out, each with a warning above", len(problems))
    return InputError.exit_code if problems else 0


def _of_the_store(command: Callable[[], int]) -> int:
    """The exit code of a command; what MLflow's store has done wrong is one message."""
    from pipeline.tracking.mlflow_store import said, store_errors, store_uri, without_secrets

    try:
        return command()
    except store_errors() as error:
        log.error("error: MLflow at %s: %s", without_secrets(store_uri()), said(error))
        return StorageError.exit_code
