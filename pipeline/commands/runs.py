"""Commands that look at one run, at a moment of it, or at what it will need."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

# Each verb imports what it needs itself: torch and MLflow take seconds.

log = logging.getLogger(__name__)


def doctor(
    names: Annotated[list[str] | None, Argument(metavar="NAME", help="DVC experiments")] = None,
) -> None:
    """Examine a run: a verdict, and the setting to change.

    python -m pipeline doctor             the run of this workspace
    python -m pipeline doctor NAME ...    finished DVC experiments
    """
    from pipeline.diagnostics import doctor
    from pipeline.records.dvc_history import WORKSPACE

    for found in doctor.asked(names or [WORKSPACE]):
        said = textwrap.indent("\n".join(doctor.lines(doctor.examine(found))), "  ")
        log.info("%s\n%s", found.name, said)


def explain(
    run: Annotated[str, Argument(metavar="RUN[@STEP]", help="As `show` or `ls` names it")],
    after: Annotated[int, Option(min=1, help="Steps past it, of each way on")] = 20,
    forks: Annotated[bool, Option("--forks", help="Run the other ways as experiments")] = False,
) -> None:
    """Explain a spike: its text, the layer that grew, three ways past it.

    python -m pipeline explain RUN           the step that stands out most
    python -m pipeline explain RUN@437       that very step, counted from 0

    It is made again from the newest state before it that checkpoint.keep_every has left.
    """
    from pipeline.diagnostics import spikes
    from pipeline.experiments import forks as experiments
    from pipeline.records.run_data import RunData
    from pipeline.resume import fork

    name, step = experiments.parse(run) if "@" in run else (run, None)
    kept = fork.find(name)
    step = spikes.worst_step(RunData({"train": kept.record})) if step is None else step
    ways = spikes.explain(kept, step, after, lambda paragraph: log.info("%s\n", paragraph))
    if not forks:
        log.info("--forks runs the others as experiments, to their end.")
        return
    first, members = spikes.start(kept, step), []
    for way in ways[1:]:  # the first one is RUN itself
        if way.changes:
            members.append(experiments.plan(kept, first, f"{name}-{way.name}", way.changes))
        else:
            log.info("%s: no setting skips it, as its gradient does not stand out", way.name)
    for member in members:
        log.info("%s, a fork of %s@%d: %s", member.name, name, first, member.shown())
        experiments.run(member)


def diverge(
    first: Annotated[str, Argument(metavar="A", help="A run, as `show` or `ls` names it")],
    second: Annotated[str, Argument(metavar="B", help="Another one")],
) -> None:
    """Find the first step, layer and operation where two runs part.

    python -m pipeline diverge A B

    By the fingerprints in their records (train.fingerprint_every), then by a replay of both.
    """
    from pipeline.experiments import divergence
    from pipeline.resume import fork

    both = fork.find(first), fork.find(second)
    divergence.diverge(*both, lambda paragraph: log.info("%s\n", paragraph))


def forecast(
    params: Annotated[Path, Argument(metavar="FILE", help="A recipe, say")] = Path("params.yaml"),
    memory: Annotated[float, Option(metavar="GB", min=0, help="Of a card, here or not")] = 0.0,
) -> None:
    """Forecast memory, tokens and time, and which settings fit.

    python -m pipeline forecast                                        params.yaml, here and now
    python -m pipeline forecast recipes/gpt2-124m.yaml --memory 4      on a card of 4 GB
    """
    from pipeline import config as configuration
    from pipeline.compute.precision import PRECISIONS, choose_precision, of_a_card
    from pipeline.compute.runtime import choose_device, device_name
    from pipeline.diagnostics import forecast

    config = configuration.load(params)
    device = choose_device("cpu" if memory else config.device)
    where = f"a card of {memory:g} GB" if memory else device_name(device)
    modes = {n: of_a_card(n) if memory else choose_precision(n, device) for n in PRECISIONS}
    found = forecast.forecast(config, modes[config.precision], free=int(memory * 2**30))
    log.info("%s, precision %s", where, config.precision)
    if config.distributed.launcher != "local":
        many = "distributed.launcher says how many processes there are, this is for %d"
        log.info(many, found.ranks.world)
    log.info("%s\n", "\n".join([*found.lines(), found.advice()]))
    log.info("%s", forecast.table(config, modes.values()))


def text(
    spans: Annotated[
        list[str] | None, Argument(metavar="FIRST-LAST", help="Tokens, counted from 0")
    ] = None,
    step: Annotated[int | None, Option(help="List every sequence of a training step")] = None,
    of: Annotated[str | None, Option(metavar="NAME", help="Whose step: a DVC experiment")] = None,
    split: Annotated[Literal["train", "val"], Option(help="For FIRST-LAST")] = "train",
    tokens: Annotated[str, Option(metavar="SHA256", help="Refuse any other tokens")] = "",
) -> None:
    """Print the text of tokens, or every sequence of a training step.

    python -m pipeline text 20480-20544             the text of these tokens
    python -m pipeline text --step 437              a step of this workspace's run
    python -m pipeline text --step 437 --of NAME    the same of a DVC experiment
    """
    from pipeline.diagnostics import token_spans

    if bool(spans) == (step is not None):
        raise BadParameter("expected either FIRST-LAST or --step")
    if of and step is None:
        raise BadParameter("--of is for --step; FIRST-LAST counts in data/tokens")
    if step is not None and step < 0:
        raise BadParameter(f"{step}: expected 0 or more", param_hint="--step")
    if step is None:
        log.info("%s", token_spans.of_spans(spans or [], split, tokens))
    else:
        log.info("%s", token_spans.of_run(step, of))


def debug(
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="As the run named it, below .runs/debug")
    ],
    device: Annotated[Literal["", "cpu", "cuda", "mps"], Option(help="Where its tensors go")] = "",
) -> None:
    """Open a moment of a training, kept on disk, in an interpreter.

    python -m pipeline debug .runs/debug/FOLDER     as the run named it

    IPython is used where it is installed, else Python's own `code.interact`.
    """
    from pipeline.diagnostics import debugger

    names, line = debugger.open_bundle(folder, device)
    odd = debugger.odd_gradients(names["gradients"])
    line += f"\nnot finite: the gradient of {', '.join(odd[:4])}" if odd else ""
    line += f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    if debugger.has_terminal():
        leave = f"In scope: {debugger.SCOPE}. Leave with exit() or Ctrl-D."
        debugger.interact(names, f"{line}\n{leave}")
    else:
        log.info("%s\nno terminal here, so no interpreter", line)
