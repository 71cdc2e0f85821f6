"""Commands over a model that has been trained."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from typer import BadParameter, Option

from pipeline import paths, terminal
from pipeline.errors import InputError

# Each verb imports what it needs itself: torch and MLflow take seconds.


def sample(
    prompt: Annotated[str | None, Option(help="The text to continue")] = None,
    n: Annotated[int, Option("-n", min=1, help="Texts of each prompt")] = 1,
    of: Annotated[
        str | None, Option(metavar="NAME", help="Whose model: a DVC experiment; this workspace's")
    ] = None,
    model: Annotated[Path | None, Option(help="Any other folder with a GPT-2")] = None,
    tokens: Annotated[int | None, Option(help="Of a text, at most")] = None,
    temperature: Annotated[float | None, Option(help="0 is greedy")] = None,
    top_k: Annotated[int | None, Option(help="Of the likeliest tokens; 0 for all")] = None,
    top_p: Annotated[float | None, Option(help="Of their total mass")] = None,
    seed: Annotated[int | None, Option(help="Another one gives another text")] = None,
) -> None:
    """Continue a prompt with a trained model, or many in a session.

    python -m pipeline sample --prompt "HAMLET:" -n 3
    python -m pipeline sample --prompt "HAMLET:" --of lr-0.002 --temperature 0.8
    python -m pipeline sample              asks for prompts, until an empty one or Ctrl-D

    What is not said is as in params.yaml's `sample`.
    """
    if of and model:
        raise BadParameter("expected --of or --model, not both")
    if prompt is None and not (sys.stdin and sys.stdin.isatty()):
        raise BadParameter("expected a text: no terminal asks for one here", param_hint="--prompt")
    told = {"max_new_tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    told["seed"] = seed
    changes = [f"sample.{name}={value}" for name, value in told.items() if value is not None]
    with _folder(of, model) as folder:
        write = _writer(folder, changes)
    for text in _prompts() if prompt is None else [prompt]:
        for number in range(n):
            sys.stdout.write("\n" if number else "")
            # In a session Ctrl-C ends the text, not the session.
            with contextlib.suppress(*([KeyboardInterrupt] if prompt is None else [])):
                write(text)
            sys.stdout.write("\n")
            sys.stdout.flush()


@contextlib.contextmanager
def _folder(of: str | None, model: Path | None) -> Iterator[Path]:
    """Where the model lies; a copy out of DVC's cache for an experiment."""
    from pipeline.records import dvc_history

    if not of or of == dvc_history.WORKSPACE:
        yield model or paths.MODEL
        return
    known = {one.name: one for one in dvc_history.experiments(()) if one.rev}
    if of not in known:
        raise InputError(
            f"--of {of}: no experiment of that name; known: {', '.join(known) or 'none'}"
        )
    with tempfile.TemporaryDirectory() as folder:
        copy = dvc_history.copy_of(known[of].rev, paths.MODEL.as_posix(), folder)
        if not copy:
            raise InputError(f"--of {of}: its {paths.MODEL.as_posix()} is in no cache any more")
        yield copy


def _writer(folder: Path, changes: list[str]) -> Callable[[str], None]:
    """A function that streams a prompt's continuation; each call draws anew."""
    from pipeline import config as configuration
    from pipeline.compute import runtime
    from pipeline.data import tokenizer
    from pipeline.inference.generation import stream_text
    from pipeline.model.model_dir import load_model

    config = configuration.load(paths.PARAMS, changes)
    device = runtime.choose_device(config.device)
    rows, attention = config.model.vocab_rows, config.model.attention
    model = load_model(folder, vocab_rows=rows, attention=attention, device=device)
    generator = runtime.generator(config.sample.seed, "sample 0", device)

    def write(prompt: str) -> None:
        sys.stdout.write(prompt)
        for piece in stream_text(model, tokenizer.gpt2(), prompt, config.sample, generator):
            sys.stdout.write(terminal.shown(piece))  # a piece may begin with "\r"
            sys.stdout.flush()

    return write


def _prompts() -> Iterator[str]:
    """What a person types, until an empty line or the end."""
    with contextlib.suppress(EOFError):
        while True:
            with terminal.unguarded():
                text = input("> ")
            if not text:
                return
            yield text
