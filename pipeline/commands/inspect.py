"""Commands that look at one run, at a moment of it, or at what it will need."""

from __future__ import annotations

import argparse
import logging
import textwrap
from pathlib import Path

# Each verb imports what it needs itself: torch and MLflow take seconds.

log = logging.getLogger(__name__)


def doctor(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Examine a run: rules over its record, a verdict, the setting to change.

    python -m pipeline doctor             the run of this workspace
    python -m pipeline doctor NAME ...    finished DVC experiments
    """
    from pipeline.diagnostics import doctor
    from pipeline.records.dvc_history import WORKSPACE

    parser.add_argument("names", nargs="*", metavar="NAME", default=[WORKSPACE])
    for found in doctor.asked(parser.parse_args(words).names):
        said = textwrap.indent("\n".join(doctor.lines(doctor.examine(found))), "  ")
        log.info("%s\n%s", found.name, said)


def forecast(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Forecast memory, tokens and time of params.yaml's training, without training.

    python -m pipeline forecast
    """
    from pipeline import config as configuration
    from pipeline.compute.precision import choose_precision
    from pipeline.compute.runtime import choose_device, device_name
    from pipeline.diagnostics import forecast

    parser.parse_args(words)
    config = configuration.load()
    device = choose_device(config.device)
    found = forecast.forecast(config, choose_precision(config.precision, device))
    log.info("%s, precision %s", device_name(device), config.precision)
    log.info("%s\n", "\n".join(found.lines()))
    log.info("%s", forecast.table(config, device))
    if problem := found.problem():
        log.warning("%s", problem)


def text(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Print the text of tokens, or every sequence of a training step.

    python -m pipeline text 20480-20544             the text of these tokens
    python -m pipeline text --step 437              a step of this workspace's run
    python -m pipeline text --step 437 --of NAME    the same of a DVC experiment
    """
    from pipeline.data import token_files
    from pipeline.diagnostics import token_spans

    parser.add_argument("spans", nargs="*", metavar="FIRST-LAST", help="tokens, counted from 0")
    parser.add_argument("--step", type=int, help="list every sequence of a training step")
    parser.add_argument("--of", metavar="NAME", help="the DVC experiment whose step it is")
    parser.add_argument("--split", default="train", choices=token_files.SPLITS)
    parser.add_argument("--tokens", metavar="SHA256", default="", help="refuse any other tokens")
    asked = parser.parse_args(words)
    if bool(asked.spans) == (asked.step is not None):
        parser.error("expected either FIRST-LAST or --step")
    if asked.of and asked.step is None:
        parser.error("--of is for --step; FIRST-LAST counts in data/tokens")
    if asked.step is not None and asked.step < 0:
        parser.error(f"--step {asked.step}: expected 0 or more")
    if asked.step is None:
        log.info("%s", token_spans.of_spans(asked.spans, asked.split, asked.tokens))
    else:
        log.info("%s", token_spans.of_run(asked.step, asked.of))


def debug(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Open a moment of a training that was kept on disk, in an interpreter.

    python -m pipeline debug .runs/debug/FOLDER     as the run named it

    IPython is used where it is installed, else Python's own `code.interact`.
    """
    from pipeline.diagnostics import debugger

    parser.add_argument("folder", type=Path, help="as the run named it, below .runs/debug")
    parser.add_argument("--device", default="", choices=("cpu", "cuda", "mps"))
    asked = parser.parse_args(words)
    names, line = debugger.open_bundle(asked.folder, asked.device)
    odd = debugger.odd_gradients(names["gradients"])
    line += f"\nnot finite: the gradient of {', '.join(odd[:4])}" if odd else ""
    line += f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    if debugger.has_terminal():
        leave = f"In scope: {debugger.SCOPE}. Leave with exit() or Ctrl-D."
        debugger.interact(names, f"{line}\n{leave}")
    else:
        log.info("%s\nno terminal here, so no interpreter", line)
