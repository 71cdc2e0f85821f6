"""Commands over several experiments: run them, compare them, show them."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import InputError, StorageError

# Each verb imports what it needs itself: torch and MLflow take seconds.

log = logging.getLogger(__name__)


def sweep(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Run an experiment for each value of one setting, and compare them.

    python -m pipeline sweep precision=fp32,tf32,bf16,fp16
    python -m pipeline sweep train.lr=0.0005,0.002,0.008 train.steps=100 --seeds 1,2

    To run several at a time, use DVC's queue and compare afterwards:
    dvc exp run --queue -S train.lr=0.0005,0.002,0.008
    dvc queue start --jobs 2
    python -m pipeline compare train.lr
    """
    from pipeline.experiments import sweep
    from pipeline.records import dvc_history

    asked = sweep_words(parser, words)
    planned = sweep.plan(asked.words, asked.seeds, asked.name, dvc_history.names())
    log.info("%s", planned.page())
    if not asked.dry_run:
        sweep.conclude(planned, sweep.run_all(planned))


def sweep_words(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """What `sweep` is asked for."""
    help_ = "one with several: train.lr=A,B,C"
    parser.add_argument("words", nargs="+", metavar="SETTING=VALUE", help=help_)
    help_ = "more seeds of the baseline, for the noise"
    parser.add_argument("--seeds", type=_seeds, default=[], help=help_)
    parser.add_argument("--name", type=_prefix, default="", help="what the names begin with")
    parser.add_argument("--dry-run", action="store_true", help="check and show, run nothing")
    return parser.parse_intermixed_args(words)


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers, as 1,2")
    return [int(number) for number in text.split(",")]


def _prefix(text: str) -> str:
    from pipeline.experiments.sweep import dvc_name

    if text != dvc_name(text):
        raise argparse.ArgumentTypeError(f"{text}: expected letters, digits, _ and -")
    return text


def compare(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Compare the experiments that differ in one setting: curves, differences, noise of seeds.

    python -m pipeline compare precision
    python -m pipeline compare init.std --steps 100
    """
    from pipeline.experiments import comparison

    parser.add_argument("setting", help="such as precision or init.std")
    parser.add_argument("--steps", type=int, default=0, help="the first steps only")
    asked = parser.parse_args(words)
    comparison.check_setting(asked.setting)
    comparison.conclude(asked.setting, max(0, asked.steps))


def report(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Write one self-contained HTML page for a run, or for several side by side.

    python -m pipeline report                the run of this workspace
    python -m pipeline report NAME ...       DVC experiments, or `workspace`; the first is the base
    python -m pipeline report --all          the workspace and every experiment
    """
    from pipeline import paths
    from pipeline.reports import report

    parser.add_argument("names", nargs="*", metavar="NAME", help="a DVC experiment, or workspace")
    parser.add_argument("--all", action="store_true", help="the workspace and every experiment")
    parser.add_argument("--out", type=Path, help="a file; default: report.html")
    asked = parser.parse_args(words)
    if asked.all and asked.names:
        parser.error("expected names or --all, not both")
    out = asked.out or paths.root() / "report.html"
    text = report.report(asked.names, asked.all)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)  # DVC may have linked it to its cache
        out.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(f"--out {out}: {error.strerror}") from None
    log.info("report: %s (%.0f KiB)", out, out.stat().st_size / 1024)


def sync(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Fill MLflow's store from the records of every experiment.

    python -m pipeline sync
    """
    parser.parse_args(words)
    return _of_the_store(_bring_up_to_date)


def ui(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Do what `sync` does, then serve MLflow's page for this machine.

    python -m pipeline ui [PORT]
    """
    from pipeline.tracking import mlflow_ui

    parser.add_argument("port", type=int, nargs="?", default=5000)
    asked = parser.parse_args(words)
    code = _of_the_store(_bring_up_to_date)
    if code == StorageError.exit_code:
        return code
    return _of_the_store(lambda: mlflow_ui.show(asked.port))  # what was left out, too


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
