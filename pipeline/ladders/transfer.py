"""Several widths at several learning rates: the trainings, what they cost, what came of them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import paths
from pipeline.config import UNSET_PATH, Config, load
from pipeline.diagnostics.forecast import duration
from pipeline.drawing import figures
from pipeline.experiments import sweep
from pipeline.ladders import ladder
from pipeline.ladders.best_rate import VAGUE, Verdict, judge
from pipeline.ladders.ladder import Done, Trained
from pipeline.ladders.plan import (
    FORK,
    SEEDED,
    Rung,
    base_of,
    listed,
    not_another,
    not_fresh,
    raise_if,
)
from pipeline.published import SIZES
from pipeline.tables import markdown
from pipeline.tracking.mlflow_run import attach

log = logging.getLogger(__name__)

AROUND = (0.25, 0.5, 1, 2, 4, 8)  # times train.lr: the rates where none are given
OWN = (
    *("train.seed", "init.seed", "train.steps", "train.time_budget", "train.val_every", FORK),
    *("checkpoint.keep_every", *(f"model.{name}" for name in SIZES[:3])),
)
LEAST = 3  # rates: a parabola takes three points


@dataclass(frozen=True)
class Place:
    """Where a training stands among the others."""

    width: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Transfer:
    """A training for each width, rate and seed, in this order."""

    rungs: dict[Place, Rung]

    @property
    def config(self) -> Config:
        """Of the first one; all have its scheme and optimizer."""
        return next(iter(self.rungs.values())).config

    @property
    def widths(self) -> list[int]:
        return list(dict.fromkeys(place.width for place in self.rungs))

    @property
    def rates(self) -> list[float]:
        return list(dict.fromkeys(place.rate for place in self.rungs))

    def of_width(self, width: int) -> list[Rung]:
        return [rung for place, rung in self.rungs.items() if place.width == width]


def plan(
    widths: Sequence[int],
    rates: Sequence[float],
    steps: int,
    seeds: Sequence[int] = (),
    layers: int = 2,
    changes: Sequence[str] = (),
) -> Transfer:
    """The trainings over params.yaml with the `changes`; raises one ConfigError with all problems.

    No `rates` are those AROUND train.lr. `seeds` are further ones than params.yaml's, of data order
    and weights. All widths have heads of one size, since muP is about widths that differ in the
    number of heads, and train.min_lr stays the share of the rate that it is in params.yaml.
    """
    widths, rates = sorted(set(widths)), sorted(set(rates))
    refused = [word for word in changes if word.partition("=")[0] in OWN]
    problems = [f"{word}: `transfer` sets it itself" for word in refused]
    changes = [word for word in changes if word not in refused]
    if len(widths) < 2:
        problems.append(f"--widths {listed(widths)}: expected two or more")
    if rates and len(rates) < LEAST:
        problems.append(f"--rates {listed(rates)}: expected {LEAST} or more")
    base = base_of(changes, problems)
    problems += not_fresh(base, "`transfer`")
    problems += filter(None, (not_another(seed, base) for seed in seeds))
    own = base.model.n_embd // base.model.n_head
    if (head := head_size(widths, own)) < own / 2:
        problems.append(
            f"--widths {listed(widths)}: heads of one size in all of them have {head} channels, "
            f"those of params.yaml {own}; expected widths with more in common"
        )
    rates = rates or [_digits(base.train.lr * factor) for factor in AROUND]
    every = dict.fromkeys([base.train.seed, *seeds])
    places = [Place(w, rate, seed) for w in widths for rate in rates for seed in every]
    shape = {"n_layer": layers}
    rungs = {}
    for place in places:
        shape |= {"n_head": place.width // head, "n_embd": place.width}
        with sweep.noting(problems):
            rungs[place] = _rung(place, base, steps, [*changes, *_words("model", shape)])
    raise_if(problems)
    return Transfer(rungs)


def _words(section: str, values: dict[str, int]) -> list[str]:
    return [f"{section}.{name}={value}" for name, value in values.items()]


def head_size(widths: Sequence[int], own: int) -> int:
    """The widest head that divides all widths and is no wider than params.yaml has it."""
    return max(size for size in range(1, own + 1) if math.gcd(*widths) % size == 0)


def _rung(place: Place, base: Config, steps: int, changes: Sequence[str]) -> Rung:
    train = base.train
    own = [
        *(
            f"train.lr={place.rate}",
            f"train.min_lr={_digits(place.rate * train.min_lr / train.lr)}",
        ),
        *(f"train.steps={steps}", f"train.val_every={steps}", "train.time_budget=0"),
        *(f"{FORK}={UNSET_PATH}", "checkpoint.keep_every=0"),
    ]
    another = place.seed != train.seed
    own += [f"{name}={place.seed}" for name in SEEDED if another]
    config = load(paths.root() / paths.PARAMS, [*changes, *own])
    size = f"{config.model.n_layer}x{place.width}"
    name = sweep.dvc_name(f"transfer-{size}-{place.rate:g}{f'-seed-{place.seed}' * another}")
    return Rung(name, size, config)


def _digits(rate: float) -> float:
    return float(f"{rate:.6g}")


def planned(asked: Transfer, known: Sequence[Trained]) -> str:
    """What is about to be run, and how long that takes here."""
    done, missing = ladder.collect(asked.rungs.values(), known)
    failed = ladder.diverged(missing, done)
    seconds = ladder.seconds_of(rung for rung in missing if rung.name not in failed)
    rows = []
    for width in asked.widths:
        rungs = asked.of_width(width)
        left = [rung for rung in rungs if rung.name in seconds]
        about = duration(sum(seconds[rung.name] for rung in left)) if left else "-"
        rows.append((width, rungs[0].parameters, rungs[0].tokens, len(rungs), len(left), about))
    columns = ("channels", "parameters", "tokens each", "trainings", "left", "about")
    before = f", {len(failed)} failed before" if failed else ""
    return (
        f"{len(asked.rungs)} trainings, {len(done)} of them finished{before}; the rest takes about "
        f"{duration(sum(seconds.values()))} here\n"
        f"train.lr: {', '.join(f'{rate:g}' for rate in asked.rates)}\n\n{markdown(columns, rows)}"
    )


# --- what came of them


@dataclass(frozen=True)
class Found:
    """What came of the trainings; one that failed is not among the finished."""

    asked: Transfer
    done: dict[Place, Done]

    @functools.cached_property
    def losses(self) -> dict[int, dict[float, list[float]]]:
        """Validation losses by width, rate and seed, nats/token; infinite where one failed."""
        found: dict[int, dict[float, list[float]]] = {}
        for place in self.asked.rungs:
            loss = self.done[place].loss if place in self.done else math.inf
            found.setdefault(place.width, {}).setdefault(place.rate, []).append(loss)
        return found

    @functools.cached_property
    def verdict(self) -> Verdict:
        return judge(self.losses)


def found_of(asked: Transfer, done: Sequence[Done]) -> Found:
    """`done` are those that did not fail; raises InputError for different tokens."""
    ladder.check_same_tokens(done)
    by_name = {one.rung.name: one for one in done}
    places = asked.rungs.items()
    return Found(asked, {p: by_name[rung.name] for p, rung in places if rung.name in by_name})


def page(found: Found) -> str:
    """Markdown: losses by rate, the best rate of each width, the verdict."""
    config, widths = found.asked.config, found.asked.widths
    seeds = len(found.asked.rungs) // (len(widths) * len(found.asked.rates))
    head = (
        f"init.scheme={config.init.scheme}, train.optimizer={config.train.optimizer}: "
        f"{config.model.n_layer} layers, {config.train.steps} steps, validation losses in "
        f"nats/token, {f'means of {seeds} seeds' if seeds > 1 else 'of one seed'}."
    )
    rows = [
        (f"{rate:g}", *(_mean(found, width, rate) for width in widths))
        for rate in found.asked.rates
    ]
    table = markdown(("train.lr", *(f"{width} channels" for width in widths)), rows)
    best = [
        (one.width, one.loss, f"{one.rate:g}", one.words(), _copied(found, one.width))
        for one in found.verdict.found
    ]
    columns = (
        "channels",
        "lowest loss",
        "at",
        "best rate ± std",
        f"loss at the rate of {widths[0]}",
    )
    said = [head, table, markdown(columns, best), found.verdict.words()]
    return "\n\n".join(part.strip() for part in said)


def _mean(found: Found, width: int, rate: float) -> str:
    losses = found.losses[width][rate]
    mean = sum(losses) / len(losses)
    return f"{mean:.3f}" if math.isfinite(mean) else "failed"


def _copied(found: Found, width: int) -> str:
    """The loss of a width at the rate, of those tried, that is best for the narrowest one."""
    return _mean(found, width, found.verdict.found[0].rate)


def lines(found: Found) -> Iterator[tuple[str, figures.Points, tuple[float, float, float] | None]]:
    """Of each width: its name, (rate, loss) of every training, and the best rate with its std."""
    for one in found.verdict.found:
        points = [(p.rate, d.loss) for p, d in found.done.items() if p.width == one.width]
        std = one.std if one.std <= VAGUE else math.nan
        low = None if one.try_ else (2**one.log2, one.loss, std)
        yield f"{one.width} channels", points, low


def conclude(found: Found) -> None:
    """The page to the log, to a folder with the figure, and to the rows."""
    text, config = page(found), found.asked.config
    name = f"transfer-{config.init.scheme}-{config.train.optimizer}"
    log.info("\n%s\n", text)
    folder = paths.root() / Path("comparisons") / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "transfer.md").write_text(f"# Does the rate transfer?\n\n{text}\n", "utf-8")
    figures.save(figures.transfer(list(lines(found))), folder / "transfer.png")
    log.info("figure: %s", folder / "transfer.png")
    attach([one.head["id"] for one in found.done.values()], folder, "transfer")
