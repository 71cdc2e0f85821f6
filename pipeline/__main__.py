"""`python -m pipeline VERB`, or `gpt2 VERB`: commands are to people what stages are to DVC."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from pipeline import paths, terminal
from pipeline.commands import experiments, fetch, manage, models, runs
from pipeline.errors import UserError

log = logging.getLogger(__name__)

# The first line of a verb's docstring is its help, the rest the examples below it.
VERBS: dict[str, Callable[..., int | None]] = {
    "fetch": fetch.fetch,
    "forecast": runs.forecast,
    "sweep": experiments.sweep,
    "fork": experiments.fork,
    "ladder": experiments.ladder,
    "transfer": experiments.transfer,
    "ls": manage.ls,
    "watch": manage.watch,
    "show": experiments.show,
    "compare": experiments.compare,
    "doctor": runs.doctor,
    "explain": runs.explain,
    "diverge": runs.diverge,
    "report": experiments.report,
    "ui": experiments.ui,
    "sample": models.sample,
    "export": manage.export,
    "text": runs.text,
    "debug": runs.debug,
    "sync": experiments.sync,
    "verify": manage.verify,
    "rm": manage.rm,
}
WIDTH = 100  # columns of a help page at most


def main(words: list[str] | None = None) -> None:
    """Do what the words say; leave with an exit code other than 0 where that fails."""
    terminal.guard()
    _speak()
    words = sys.argv[1:] if words is None else words
    try:
        if words[:1] == ["ship"]:  # which stages start, and nobody else
            manage.ship(words[1:])
        name = "gpt2" if Path(sys.argv[0]).stem == "gpt2" else "python -m pipeline"
        code = _table(name)(words or ["--help"], prog_name=name, standalone_mode=False)
    except UserError as error:
        log.error("error: %s", error)
        code = error.exit_code
    except typer.TyperException as error:  # a word that no verb or option takes
        log.error("error: %s", error.format_message())
        if context := getattr(error, "ctx", None):
            log.error("`%s --help` says more", context.command_path)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    if code:
        sys.exit(code)


def _table(name: str) -> Callable[..., int | None]:
    """The verbs with their options; completion is by a shell, which knows `gpt2` alone."""
    app = typer.Typer(
        help=f"Experiments with GPT-2. `{name} VERB --help` says more.",
        add_completion=name == "gpt2",
        rich_markup_mode=None,
        subcommand_metavar="VERB ...",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "max_content_width": WIDTH,
            "color": False,
        },
    )
    app.callback()(lambda: None)  # a table of verbs, however few there are
    for verb, function in VERBS.items():
        text = inspect.getdoc(function) or ""
        app.command(
            verb,
            help=text.replace("\n\n", "\n\n\b\n"),  # examples stay in their lines
            short_help=text.partition("\n")[0].rstrip("."),
        )(_from_the_root(function))
    return get_command(app)


def _from_the_root(verb: Callable[..., int | None]) -> Callable[..., int | None]:
    """The verb as from the folder of params.yaml, where it is said in a folder below."""

    @functools.wraps(verb)
    def run(**asked: Any) -> int | None:
        root = paths.root()
        if not paths.PARAMS.exists() and (root / paths.PARAMS).exists():
            asked = {name: _absolute(value) for name, value in asked.items()}
            os.chdir(root)
        return verb(**asked)

    return run


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    return Path(os.path.abspath(value)) if isinstance(value, Path) else value


def _speak() -> None:
    """Results go to standard output, warnings and errors to the other stream."""
    results, problems = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    results.addFilter(lambda record: record.levelno < logging.WARNING)
    problems.setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=[results, problems])


if __name__ == "__main__":
    main()
