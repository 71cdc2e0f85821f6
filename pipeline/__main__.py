"""`python -m pipeline VERB`: commands are to people what stages are to DVC."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Callable

from pipeline import terminal
from pipeline.commands import experiments, inspect, manage
from pipeline.errors import UserError

log = logging.getLogger(__name__)

Verb = Callable[[argparse.ArgumentParser, list[str]], int | None]

# The first line of a verb's docstring is its help, the rest the examples below it.
VERBS: dict[str, Verb] = {
    "sweep": experiments.sweep,
    "compare": experiments.compare,
    "report": experiments.report,
    "sync": experiments.sync,
    "ui": experiments.ui,
    "doctor": inspect.doctor,
    "forecast": inspect.forecast,
    "text": inspect.text,
    "debug": inspect.debug,
    "runs": manage.runs,
    "verify": manage.verify,
    "ship": manage.ship,
}
INTERNAL = {"ship"}  # which stages start, and nobody else


def main(words: list[str]) -> None:
    """Do what the words say; leave with an exit code other than 0 where that fails."""
    terminal.guard()
    _speak()
    if not words or words[0] in ("-h", "--help"):
        log.info("%s", usage())
        return
    name, *rest = words
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS.keys() - INTERNAL, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        log.error("error: %s: no such command%s\n%s", name, meant, usage())
        sys.exit(2)
    try:
        code = VERBS[name](_parser(name), rest)
    except UserError as error:
        log.error("error: %s", error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    if code:
        sys.exit(code)


def usage() -> str:
    """The verbs and what each does, a line each."""
    lines = [f"  {name:<10}{_doc(name)[0]}" for name in VERBS if name not in INTERNAL]
    return "\n".join(
        ["usage: python -m pipeline VERB ...", "", *lines, "", "VERB --help says more"]
    )


def _doc(name: str) -> tuple[str, str]:
    """The first line of a verb's docstring without its full stop, and the rest."""
    first, _, rest = (VERBS[name].__doc__ or "").partition("\n")
    return first.rstrip("."), "\n".join(line.removeprefix("    ") for line in rest.splitlines())


def _parser(name: str) -> argparse.ArgumentParser:
    first, rest = _doc(name)
    return argparse.ArgumentParser(
        prog=f"python -m pipeline {name}",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _speak() -> None:
    """Results go to standard output, warnings and errors to the other stream."""
    results, problems = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    results.addFilter(lambda record: record.levelno < logging.WARNING)
    problems.setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=[results, problems])


if __name__ == "__main__":
    main(sys.argv[1:])
