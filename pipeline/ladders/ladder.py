"""A ladder at work: trainings run, a law fitted, its forecast kept, the run held against it."""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline import paths
from pipeline.compute.precision import choose_precision
from pipeline.compute.runtime import choose_device
from pipeline.config import Config, flatten, load
from pipeline.errors import InputError, NumericsError
from pipeline.experiments import forks, sweep
from pipeline.ladders import registered, scaling_law
from pipeline.ladders.plan import FORK, Ladder, Rung, same_training
from pipeline.ladders.registered import Forecast, Outcome
from pipeline.ladders.scaling_law import Fit, Point
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.published import VOCAB_SIZE
from pipeline.records import dvc_history, git, provenance, record_reader, stage_graph
from pipeline.records.run_data import Event, Experiment
from pipeline.resume import fork, run_folder
from pipeline.storage.digests import digest_of, dvc_md5
from pipeline.training.loop import fit as training
from pipeline.training.time_budget import validation_seconds
from pipeline.training.training_step import Batch, start

log = logging.getLogger(__name__)

STAGE = "train"  # the last one that a rung needs: evaluation and samples would double its time
MEASURED = 5  # steps whose median is the time of one
STARTING = 15.0  # seconds of an experiment beside its training: DVC, initial weights, Python
CURVE = 9  # lengths at which a forecast's band is drawn


@dataclass(frozen=True)
class Done:
    """A finished training of a rung."""

    rung: Rung
    name: str
    head: Event
    loss: float  # of the last validation, nats/token
    tokens_per_second: float
    data: str  # digest of its training tokens
    corpus: float | None  # tokens of it, where known

    @property
    def point(self) -> Point:
        return Point(self.rung.parameters, self.rung.tokens, self.loss)


@dataclass(frozen=True)
class Found:
    """What a ladder has come to so far."""

    done: tuple[Done, ...]
    fit: Fit
    noise: float  # std of seeds of the smallest rung, nats/token; 0 where it is unknown
    forecast: Forecast | None = None
    outcome: Outcome | None = None

    @property
    def largest(self) -> Done:
        return max(self.done, key=lambda one: (one.rung.parameters, one.rung.tokens))


# --- what has been trained already


@dataclass(frozen=True)
class Trained:
    """An experiment, or the workspace's run, whose training has ended."""

    run: Experiment
    code: str  # digest of the code and the corpus that DVC vouches for

    @property
    def head(self) -> Event:
        return self.run.records[STAGE][0]

    @property
    def data(self) -> str:
        """Digest of its training tokens."""
        return self.run.tags.get("digest.train", "")

    def has(self, settings: Mapping[str, Any], code: str) -> bool:
        return self.code == code and same_training(settings, self.head["params"])


def trained() -> list[Trained]:
    """Every one that there is, by the ends of its record: settings, tags and last values."""
    ended = [
        one
        for one in dvc_history.experiments(("tokenize", STAGE), brief=True)
        if one.records.get(STAGE) and one.records[STAGE][-1].get("status") == "FINISHED"
    ]
    locks = git.contents("dvc.lock", [one.rev for one in ended if one.rev])
    if any(not one.rev for one in ended) and STAGE in dvc_history.fitting(paths.root()):
        locks[""] = (paths.root() / "dvc.lock").read_bytes()
    return [Trained(one, _locked_code(locks.get(one.rev, b""))) for one in ended]


def _locked_code(lock: bytes) -> str:
    """As `code_here` of the files that a dvc.lock has; "" where its training had other tokens."""
    if STAGE not in stage_graph.fitting(lock):
        return ""
    names = stage_graph.code_paths(STAGE)
    code = {n: md5 for n, md5 in stage_graph.locked_deps(lock, STAGE).items() if n in names}
    before = [stage_graph.locked_deps(lock, one) for one in stage_graph.upstream(STAGE)]
    made = stage_graph.locked(lock).keys() | names
    return _digest(code, {n: md5 for deps in before for n, md5 in deps.items() if n not in made})


def _digest(code: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Of the code by path, and of the user's own files by content: they may lie anywhere.

    A single file has its name as well, which decides the split.
    """
    alone = {md5 if md5.endswith(".dir") else f"{Path(n).name} {md5}" for n, md5 in own.items()}
    return digest_of([code, sorted(alone)])


def code_here(config: Config) -> str:
    """Digest of the code and the corpus that decide a training's result, as they are now.

    As of `Trained`. Not the record's: after an edit of a later stage DVC gives the same training
    from its cache. The corpus is told by content: the same path may hold another one tomorrow.
    """
    own = {name: paths.root() / name for name in stage_graph.own_files(STAGE, flatten(config))}
    return _digest(_code_here(), {name: _md5(path, _stamp(path)) for name, path in own.items()})


@functools.cache
def _code_here() -> dict[str, str]:
    return {name: dvc_md5(stage_graph.ROOT / name) for name in stage_graph.code_paths(STAGE)}


@functools.cache
def _md5(path: Path, stamp: object) -> str:
    return dvc_md5(path)


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times: a large corpus is read again only where one of them has changed."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    facts = ((str(file), file.stat()) for file in files)
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in facts)


def find(rung: Rung, known: Sequence[Trained]) -> Done | None:
    """The newest finished training of a rung by this code and corpus; None where there is none.

    Raises InputError where none of them has a finite last validation.
    """
    mine = matches(rung, known)
    for one in mine:
        run, loss = one.run, one.run.last("train/val_loss")
        speed = run.last("perf/tokens_per_second")
        if loss is not None and math.isfinite(loss) and speed:
            corpus = run.last("data/train_tokens")
            return Done(rung, run.name, one.head, loss, speed, one.data, corpus)
    if mine:
        name, loss = mine[0].run.name, mine[0].run.last("train/val_loss")
        raise InputError(
            f"{name}: its validation loss is {loss}, and no law holds such a training; lower "
            f"train.lr (-S train.lr=...), or remove {name} to have it trained anew"
        )
    return None


def matches(rung: Rung, known: Sequence[Trained]) -> list[Trained]:
    """The finished trainings of a rung by this code and corpus, the newest first."""
    code = code_here(rung.config)
    parent = rung.parent and rung.parent.settings
    begun_with = {one.head["id"] for one in known if parent and one.has(parent, code)}
    mine = (
        one
        for one in known
        if one.has(rung.settings, code) and _begins_as(rung, one.run, begun_with)
    )
    return sorted(mine, key=lambda one: one.head["time"], reverse=True)


def _begins_as(rung: Rung, run: Experiment, parents: Set[str]) -> bool:
    """A fork of the long run where one of its length begins to fall has the same bits as that."""
    if not run.lineage:
        return True
    (first, *more) = run.lineage
    return not more and first["step"] == rung.begins and first["record"] in parents


def collect(rungs: Iterable[Rung], known: Sequence[Trained]) -> tuple[list[Done], list[Rung]]:
    """The finished ones, and those that are missing."""
    found = [(rung, find(rung, known)) for rung in rungs]
    return [done for _, done in found if done], [rung for rung, done in found if not done]


def possible(rung: Rung, known: Sequence[Trained]) -> Rung:
    """A cool-down is trained from its beginning where the long run is done and kept no such state.

    That one may have been asked for with other horizons, or as the forecast run.
    """
    if rung.parent and matches(rung.parent, known) and not _kept(rung, rung.parent, known):
        return replace(rung, parent=None)
    return rung


def _kept(rung: Rung, parent: Rung, known: Sequence[Trained]) -> fork.Kept | None:
    """The finished long run with the state that a cool-down begins with."""
    for one in matches(parent, known):
        kept = fork.find(one.run.name)
        if kept.record[0]["id"] == one.head["id"] and rung.begins in kept.steps:
            return kept
    return None


# --- run


def diverged(rungs: Iterable[Rung], done: Sequence[Done]) -> dict[str, str]:
    """What is said, by name, of those that left the finite numbers before.

    Only that repeats itself: a full disk does not. The `done` ones tell which tokens the corpus
    makes now; without any of them, nothing on the disk does.
    """
    here = {one.data for one in done}
    found = {}
    for left, head in _unfinished():
        failed = left.state == "failed" and left.status.get("exit_code") == NumericsError.exit_code
        same = left.identity.get("code") == provenance.code_of(STAGE)
        same = same and left.identity.get("inputs", {}).get("train") in here
        for rung in rungs if failed and same else ():
            alike = head["params"].get(FORK) == rung.config.train.fork
            if alike and same_training(rung.settings, head["params"]):
                why = str(left.status.get("message")).partition("\n")[0]
                found[rung.name] = (
                    f"{rung.name}: failed before with these settings, this code and corpus: {why}; "
                    f"after `python -m pipeline rm {left.folder.name[:7]}` it is trained again"
                )
    return found


def seconds_per_step(rung: Rung) -> float:
    """Of a few real steps on random tokens, here and now."""
    config = rung.config
    train = replace(config.train, compile=False, steps=MEASURED)
    precision = choose_precision(config.precision, choose_device(config.device))
    with torch.random.fork_rng(devices=[]):
        model = GPT(GPTConfig(**asdict(config.model)))
        initialize(model, config.init, torch.default_generator)
        size = train.batch_size, train.sequence_length + 1
        ids = torch.randint(VOCAB_SIZE, (train.accumulate, *size))
        batches: list[Batch] = [(one[:, :-1], one[:, 1:]) for one in ids]
        narrowing = config.init.narrowing(config.model.n_embd)
        state = start(model.to(precision.device), train, precision, narrowing)
        steps = training(state, train, lambda step: batches)
        return statistics.median(report.seconds for report in steps)


def seconds_of(rungs: Iterable[Rung]) -> dict[str, float]:
    """What each takes, in seconds by name, with DVC and the validation at its end."""
    paces: dict[str, float] = {}
    needed = {}
    for rung in rungs:
        if rung.size not in paces:
            paces[rung.size] = seconds_per_step(rung)
        pace = paces[rung.size]
        checked = validation_seconds(pace, rung.config.train)
        needed[rung.name] = STARTING + checked + pace * (rung.steps - rung.begins)
    return needed


def state_bytes(rungs: Iterable[Rung]) -> int:
    """Of the states that the rungs keep to fork from: weights and two moments each, in fp32."""
    kept = (
        (rung.steps - 1) // every * 12 * rung.parameters
        for rung in rungs
        if (every := rung.config.checkpoint.keep_every)
    )
    return sum(kept)


def run_missing(
    rungs: Sequence[Rung], known: list[Trained], failed: list[str] | None = None
) -> list[Done]:
    """All of them trained, the missing ones now, one after another.

    What is said of one that fails goes to `failed`, without which it raises InputError; there,
    what is known to diverge is told and not run. KeyboardInterrupt leaves the finished ones
    finished.
    """
    done, missing = collect(rungs, known)
    if failed is not None:
        before = diverged(missing, done)
        failed += before.values()
        missing = [rung for rung in missing if rung.name not in before]
        for said in before.values():
            log.warning("%s", said)
    for number, rung in enumerate(missing, 1):
        member = _member(rung, known)
        log.info("\n%d/%d %s: %s", number, len(missing), member.name, member.shown())
        try:
            run(member)
        except InputError as error:
            if failed is None:
                raise
            log.warning("%s; the others go on", error)
            failed.append(str(error))
            continue
        known[:] = trained()
        if not find(rung, known):
            raise InputError(f"{member.name}: ended, and its record is not there")
    return collect(rungs, known)[0]


def run(member: sweep.Member) -> None:
    try:
        forks.run(member)
    except KeyboardInterrupt:
        log.info("\nStopped in %s. The same command goes on from there.", member.name)
        raise


def _member(rung: Rung, known: Sequence[Trained]) -> sweep.Member:
    """The experiment that trains a rung."""
    rung = possible(rung, known)
    if rung.parent:
        kept = _kept(rung, rung.parent, known)
        assert kept, "a size's long run comes before its cool-downs"
        steps = rung.steps
        own = [f"train.steps={steps}", f"train.val_every={steps}", "checkpoint.keep_every=0"]
        member = forks.plan(kept, rung.begins, rung.name, own)
    else:
        name = sweep.new_name(rung.name, dvc_history.names())
        member = sweep.Member(name, changes(rung), rung.config, inputs(rung))
    return replace(member, stage=STAGE)


def changes(rung: Rung) -> dict[str, object]:
    """A rung's settings that params.yaml has otherwise."""
    here = flatten(load(paths.root() / paths.PARAMS))
    return {n: value for n, value in flatten(rung.config).items() if value != here[n]}


def inputs(rung: Rung) -> tuple[str, ...]:
    return tuple(git.to_take_along(rung.config))


# --- the law and the forecast


def fitted(ladder: Ladder, known: Sequence[Trained]) -> Found:
    """The law of the finished rungs; raises InputError where one is missing."""
    done, missing = collect(ladder.rungs, known)
    seeds, absent = collect(ladder.seeds, known)
    if missing or absent:
        names = ", ".join(rung.name for rung in [*missing, *absent])
        raise InputError(f"not trained yet: {names}; the same command without --ask runs them")
    check_same_tokens([*done, *seeds])
    noise = statistics.stdev(one.loss for one in seeds) if len(seeds) > 1 else 0.0
    law = scaling_law.fit([one.point for one in done], noise, len(seeds))
    return Found(tuple(done), law, noise)


def check_same_tokens(done: Iterable[Done]) -> None:
    """Raises InputError where not all have seen the same ones."""
    if len({one.data for one in done}) > 1:
        raise InputError(
            "these were trained on different tokens, as the corpus was edited between them: "
            "no law holds for both; the edit put back, the same command goes on"
        )


def register(own: Rung, found: Found, seen: Sequence[Trained]) -> Forecast:
    """The forecast of a training: the one on record, else a new one, written before its run.

    Raises InputError where that training has begun without one.
    """
    code, settings = code_here(own.config), own.settings
    problems: list[str] = []
    known = registered.of_training(registered.every(problems), settings, code)
    for problem in problems:
        log.warning("%s", problem)
    if known:
        return known
    before = registered.seen_before(settings, begun(seen, code, found.done[0].data))
    forecast = replace(forecast_of(own, found), seen=before)
    path = registered.write(forecast)
    log.info("\nforecast registered: %s", path.relative_to(paths.root()))
    return forecast


def begun(finished: Iterable[Trained], code: str, data: str) -> Iterator[tuple[Event, bool]]:
    """The first events of all trainings, and whether by this code and corpus.

    Those at work and stopped as well, which are known by their tokens' digest: `data`, if this.
    """
    yield from ((one.head, one.code == code) for one in finished)
    for left, head in _unfinished():
        tokens = left.identity.get("inputs", {}).get("train", data)
        here = (left.identity.get("code"), tokens) == (provenance.code_of(STAGE), data)
        yield head, here


def _unfinished() -> Iterator[tuple[run_folder.Left, Event]]:
    """Trainings at work or stopped, each with its first event."""
    for left in run_folder.every():
        journal = left.folder / run_folder.JOURNAL
        if left.identity.get("stage") == STAGE and journal.exists():
            try:
                begun = record_reader.ends(journal, STAGE, whole=False)
            except (InputError, OSError) as error:  # the latter of one that has just ended
                log.warning("%s: %s; left out", journal, error)
                continue
            yield from ((left, head) for head in begun[:1])


def forecast_of(own: Rung, found: Found) -> Forecast:
    """What is expected of a training, from the rungs as they are now."""
    band = found.fit.at(own.parameters, own.tokens)
    points = [
        {"name": one.name, "record": one.head["id"], "size": one.rung.size, **asdict(one.point)}
        for one in found.done
    ]
    first, last = min(p.tokens for p in found.fit.points), max(p.tokens for p in found.fit.points)
    span = [first * (max(last, own.tokens) / first) ** (n / (CURVE - 1)) for n in range(CURVE)]
    bands = [(tokens, found.fit.at(own.parameters, tokens)) for tokens in span]
    return Forecast(
        run=own.name,
        time=registered.now(),
        commit=git.state()["commit"],
        code=code_here(own.config),
        data=found.done[0].data,
        settings=own.settings,
        parameters=own.parameters,
        tokens=own.tokens,
        loss=band.loss,
        low=band.low,
        high=band.high,
        noise=found.noise,
        law=asdict(found.fit.law),
        points=points,
        curve=[[tokens, one.loss, one.low, one.high] for tokens, one in bands],
    )


def run_next(own: Rung, forecast: Forecast, known: list[Trained]) -> Outcome:
    """Train what was forecast, under the name that shows it, and hold it against the forecast."""
    if not held(forecast, known):
        member = sweep.Member(forecast.name, changes(own), own.config, inputs(own), STAGE)
        log.info("\n%s, the run that was forecast: %s", member.name, member.shown())
        run(member)
        known[:] = trained()
    if not (outcome := held(forecast, known)):
        raise InputError(f"{forecast.name}: ended, and its record is not there")
    return outcome


def forecast_and_run(asked: Ladder, known: list[Trained], register_only: bool) -> Found:
    """The law of the finished rungs, its forecast on record, and what came of it, if it ran."""
    found = fitted(asked, known)
    forecast = register(asked.next, found, known)
    if register_only:
        return replace(found, forecast=forecast, outcome=held(forecast, known))
    if found.done[0].data != forecast.data:
        raise InputError(
            f"{forecast.name}: a forecast for other tokens than these rungs were trained on, so "
            "its run would show nothing; the corpus put back as it was, the same command goes on"
        )
    outcome = run_next(asked.next, forecast, known)
    return replace(found, forecast=forecast, outcome=outcome)


def held(forecast: Forecast, known: Iterable[Trained]) -> Outcome | None:
    """A forecast beside the first training that it is of: no later one counts.

    One under its name is of it whatever dvc.yaml lists as code by now.
    """
    asked = forecast.settings, forecast.code
    runs = [
        one
        for one in known
        if one.head["name"] == forecast.name or (one.has(*asked) and not one.run.lineage)
    ]
    one = min(runs, key=lambda one: one.head["time"], default=None)
    loss = one.run.last("train/val_loss") if one else None
    if not one or loss is None:
        return None
    return registered.outcome(forecast, one.head, loss, one.data)


def outcomes(known: Sequence[Trained]) -> list[tuple[Forecast, Outcome | None]]:
    """Every forecast ever registered here, the oldest first, with what came of it so far."""
    problems: list[str] = []
    found = [(forecast, held(forecast, known)) for forecast in registered.every(problems)]
    for problem in problems:
        log.warning("%s", problem)
    return found
