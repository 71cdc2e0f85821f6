"""Forecasts on record: written before their run, named in the run's own record, never changed.

A forecast's file has its digest in its name. The run is an experiment whose name ends in that
digest, and the first line of a training's record holds the name that it started under. So that
line shows that the forecast, as it is, was there when the training began.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import paths, regular
from pipeline.errors import InputError
from pipeline.ladders.scaling_law import Band, Law, Point
from pipeline.records.run_data import Event
from pipeline.storage.digests import digest_of

SEEDED = ("train.seed", "init.seed")  # a size's noise is that of its data order and its weights
# Settings with which the outcome is the same but for rounding, or looked at at other times.
BESIDE = (
    *("device", "distributed.", "train.val_every", "train.val_tokens", "train.max_skipped"),
    *("train.compile", "train.deterministic", "train.checkpoint_activations", "model.attention"),
)
FOLDER = Path("ladders")  # below the root, for git to keep: a forecast is made to be shown
DIGITS = 32  # of the digest in a name: with 64 bits two contents that share one could be found
_NAME = re.compile(rf"[\w.-]+-([0-9a-f]{{{DIGITS}}})\.json")


@dataclass(frozen=True)
class Forecast:
    """What was expected of a training, by whom and from what, before it began."""

    run: str  # what its experiment's name begins with
    time: int  # of writing, in milliseconds since 1970
    commit: str  # of git; "" without one
    code: str  # digest of the code that decides a training's result
    data: str  # digest of the training tokens
    settings: Mapping[str, Any]  # those of the training, by dotted name
    parameters: int
    tokens: int
    loss: float  # expected, nats/token
    low: float  # of the band
    high: float
    noise: float  # std of seeds, nats/token; 0 where it is unknown
    law: Mapping[str, float]
    points: Sequence[Mapping[str, Any]]  # that it was fitted to: name, record, size, tokens, loss
    curve: Sequence[Sequence[float]]  # at this size: tokens, then loss, low and high
    seen: Sequence[str] = field(default_factory=list)  # begun by then, of other code or seeds

    @property
    def digest(self) -> str:
        return digest_of(asdict(self))[:DIGITS]

    @property
    def name(self) -> str:
        """Of the experiment that this is the forecast of."""
        return f"{self.run}-{self.digest}"

    @property
    def band(self) -> Band:
        return Band(self.loss, self.low, self.high)

    def fitted(self) -> tuple[Law, list[Point]]:
        points = [Point(p["parameters"], p["tokens"], p["loss"]) for p in self.points]
        return Law(**self.law), points


@dataclass(frozen=True)
class Outcome:
    """What came of the training, beside its forecast."""

    forecast: Forecast
    record: str  # id of the training's record
    loss: float  # nats/token
    problem: str  # why the forecast does not count as registered before the run; "" where it does

    @property
    def inside(self) -> bool:
        return self.forecast.band.has(self.loss)

    def words(self) -> str:
        """The verdict, in two sentences."""
        f = self.forecast
        off = self.loss - f.loss
        noise = f", {abs(off) / f.noise:.1f} times the std of seeds" if f.noise else ""
        where = "inside the band" if self.inside else "outside the band: the forecast was wrong"
        said = f"{self.loss:.3f} came of a forecast of {f.band.words()}: {where}, {off:+.3f}{noise}"
        seen = f" Seen before it, of other code, corpus or seeds: {', '.join(f.seen)}."
        seen = seen if f.seen else ""
        how = "Registered before the run" if not self.problem else "NOT registered before the run"
        shown = f", as {f.name} in the training's record shows" if not self.problem else ""
        return f"{said}. {how}{shown}{f': {self.problem}' if self.problem else ''}.{seen}"


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def write(forecast: Forecast) -> Path:
    """Keep a forecast for good; its file. A file that is there is left as it is."""
    path = paths.root() / FOLDER / f"{forecast.name}.json"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(forecast), indent=1) + "\n", "utf-8", newline="\n")
        part.replace(path)
    return path


def read(path: Path) -> Forecast:
    """The forecast of a file; raises InputError for one that was changed after it was written."""
    named = _NAME.fullmatch(path.name)
    try:
        found = Forecast(**regular.read_json(path))
        numbers = found.loss, found.low, found.high, found.noise, *found.law.values()
        whole = all(map(math.isfinite, numbers)) and f"{found.name}.json" == path.name
        found.fitted()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a forecast that `ladder` wrote ({error})") from None
    if not named or not whole:
        raise InputError(
            f"{path}: changed after it was written: its content has another digest than its name"
        )
    return found


def every(problems: list[str]) -> list[Forecast]:
    """All that were ever written here, the oldest first; a phrase in `problems` for those changed.

    So one that was wrong cannot be left out by writing another.
    """
    found = []
    for path in sorted((paths.root() / FOLDER).glob("*.json")):
        try:
            found.append(read(path))
        except InputError as error:
            problems.append(str(error))
    return sorted(found, key=lambda one: one.time)


def outcome(forecast: Forecast, head: Event, loss: float, data: str) -> Outcome:
    """A training, by its record's first event and tokens, held against the forecast of it."""
    return Outcome(forecast, head["id"], loss, _problem(forecast, head, data))


def _problem(forecast: Forecast, head: Event, data: str) -> str:
    if head["name"] != forecast.name:
        began = f"under the name {head['name']}" if head["name"] else "without a name"
        return f"that training began {began}, which does not end in {forecast.digest}"
    if head["time"] < forecast.time:
        return "by its clock that training began before the forecast was written"
    if data != forecast.data:
        return "that training had other tokens"
    differing = [n for n, v in forecast.settings.items() if head["params"].get(n) != v]
    return f"that training has another {differing[0]}" if differing else ""


def of_training(
    known: Iterable[Forecast], settings: Mapping[str, Any], code: str
) -> Forecast | None:
    """The first forecast of a training of these settings and this code: no later one counts."""
    same = (one for one in known if dict(one.settings) == dict(settings) and one.code == code)
    return min(same, key=lambda one: one.time, default=None)


def seen_before(settings: Mapping[str, Any], begun: Iterable[tuple[Event, bool]]) -> list[str]:
    """Names of the trainings that differ from this one in code, corpus or seeds alone.

    `begun` are the first events of every training that there is, finished or not, and whether by
    this code and corpus. Raises InputError where this very training is among them, whatever it
    looked at on its way: a forecast would come after it.
    """
    seen: dict[str, None] = {}
    for head, here in begun:
        name = head["name"] or head["id"]
        if here and _alike(settings, head["params"], ()):
            raise InputError(
                f"{name}: this very training has begun already, without a forecast; one made now "
                "would come too late. Choose a --next that nobody has seen"
            )
        if _alike(settings, head["params"], SEEDED):
            seen[name] = None
    return sorted(seen)


def _alike(settings: Mapping[str, Any], params: Mapping[str, Any], but: Sequence[str]) -> bool:
    return all(
        params.get(name) == value
        for name, value in settings.items()
        if name not in but and not name.startswith(BESIDE)
    )
