"""Two trainings up to where they part: by their records, then replayed to the first difference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import paths
from pipeline.diagnostics import replay, token_spans, trace
from pipeline.diagnostics.replay import Replay
from pipeline.diagnostics.trace import Trace
from pipeline.errors import InputError, NumericsError, UserError
from pipeline.experiments import rounding
from pipeline.experiments.record_comparison import (
    Both,
    Recorded,
    by_clock,
    circumstances,
    drawn,
    recorded,
)
from pipeline.records.run_data import RunData
from pipeline.resume.checkpoints import machine, name_of
from pipeline.resume.fork import Kept
from pipeline.resume.snapshot import save_snapshot
from pipeline.training.fingerprint import METRIC, PARTS
from pipeline.training.loop import StepReport

MOST_OPERATIONS = 10  # that are named
EVERY = ("train.fingerprint_every=1",)
CLOCK = (
    "Not replayed: train.time_budget fits the number of steps to the clock, and with it the "
    "learning rate of every step, so a replay would be of another plan."
)


def diverge(a: Kept, b: Kept, tell: Callable[[str], None]) -> None:
    """Tell, in paragraphs, what differs about two trainings and where they first differ.

    Raises InputError where they are the same, or have no step in common.
    """
    if a.record[0]["id"] == b.record[0]["id"]:
        raise InputError(f"{a.name}, {b.name}: these are the same training; name two")
    if a.name == b.name:
        a, b = replace(a, name=f"{a.name} (1)"), replace(b, name=f"{b.name} (2)")
    both = a, b
    seen = recorded(both)
    tell(circumstances(both))
    tell(seen.words())
    if seen.differs is None:
        return
    if by_clock(both):
        tell(CLOCK)
        return
    told = 0
    try:
        for told, paragraph in enumerate(_answer(both, seen), 1):  # noqa: B007
            tell(paragraph)
    except UserError as error:
        tell(f"{'No further than that' if told else 'Not replayed'}: {error}")


# --- what replays say


@dataclass(frozen=True)
class Walk:
    """The steps of a training made once more, each with its fingerprint."""

    kept: Kept
    start: int
    reports: dict[int, StepReport]
    problem: str  # why they are not its record's, or ""
    broke: str  # why the step after the last was not made, or ""

    def words(self) -> str:
        where = f"the state after {self.start:,} steps" if self.start else "its first weights"
        said = f"{self.kept.name}, from {where} up to step {max(self.reports):,}: "
        return said + (self.problem or "equal to its record")


def _answer(both: Both, seen: Recorded) -> Iterator[str]:
    """Paragraphs about the first difference; replays are made where the records do not name it."""
    assert seen.differs is not None
    if seen.only_batch:
        yield _batches(both, seen.differs)
        return
    first, second = _walks(both, seen, seen.differs)
    yield f"Replayed. {first.words()}. {second.words()}."
    found = _parting(first, second, drawn(both))
    if found is None:
        yield _no_difference(first, second)
        return
    step, parts = found
    if _too_late(first, second):
        yield (
            f"The weights differ where the replays begin, in step {step:,}: the first difference "
            "lies before it, and there is no earlier state to begin with."
        )
        return
    if "batch" in parts:
        yield _batches(both, step)
        if "weights" not in parts:  # else both are others from the start
            return
    with tempfile.TemporaryDirectory(dir=paths.runs()) as scratch:
        yield _traced((first, second), step, parts, Path(scratch))


def _walks(both: Both, seen: Recorded, last: int) -> tuple[Walk, Walk]:
    """Both replayed up to a step, from states that were equal as far as there are any."""
    a, b = (_walked(kept, _start(kept, seen), last) for kept in both)
    begun = [replay.beginning(kept) for kept in both]
    if _too_late(a, b) and [a.start, b.start] != begun:  # six digits had not shown it
        a, b = (_walked(kept, step, last) for kept, step in zip(both, begun, strict=True))
    return a, b


def _too_late(a: Walk, b: Walk) -> bool:
    """Whether the weights of the two differ where they meet first, past a step that made them."""
    met = max(a.start, b.start)
    found = _parting(a, b, drawn=False)
    return met > 0 and found is not None and found[0] == met and "weights" in found[1]


def _start(kept: Kept, seen: Recorded) -> int:
    """The newest state at which both were equal; of a fork it may be its first, a little later.

    Raises InputError where that is later than the first step that differs.
    """
    assert seen.differs is not None
    begun = replay.beginning(kept)
    if seen.equal is not None and begun <= seen.equal:
        return replay.newest(kept, seen.equal)
    replay.check_begun(kept, seen.differs)
    return begun


def _no_difference(a: Walk, b: Walk) -> str:
    last = min(max(a.reports), max(b.reports))
    said = f"The replays do not differ, up to step {last:,}"
    if a.broke and b.broke:
        return f"{said}, and then both broke. {a.kept.name}: {a.broke}. {b.kept.name}: {b.broke}."
    return (
        f"{said}: what made the records differ is not here, which may be another machine, version "
        "or code, or chance in a kernel."
    )


def _walked(kept: Kept, start: int, last: int) -> Walk:
    reports, broke = [], ""
    with replay.opened(kept, start, EVERY) as again:
        try:
            for report in again.steps(last + 1):
                reports.append(report)
        except NumericsError as error:
            broke = str(error).partition("\n")[0]
    if not reports:
        why = f"broke in step {start:,}, where it began: {broke}"
        why = why if broke else f"has no step {start:,}: its plan is of {again.planned:,} steps"
        raise InputError(f"{kept.name}: its replay {why}")
    return Walk(kept, start, {one.step: one for one in reports}, _problem(again, reports), broke)


def _problem(again: Replay, reports: Sequence[StepReport]) -> str:
    """Why a replay is not what the record says, or ""."""
    run = RunData({"train": again.kept.record})
    said = again.differences(reports)
    known = dict(run.curves.get(f"{METRIC}weights", []))
    said += [
        f"the weights of step {report.step:,} are others"
        for report in reports
        if report.fingerprint and known.get(report.step, own := report.fingerprint.weights) != own
    ]
    if not said:
        return ""
    why = "; ".join(again.elsewhere) or "on what seems to be the same machine"
    return f"NOT equal to its record: {said[0]} ({why}), and what follows is of this replay"


def _parting(a: Walk, b: Walk, drawn: bool) -> tuple[int, tuple[str, ...]] | None:
    """(the first step that is another one in the two, which parts of its beginning differ).

    No part differs where the same beginning comes to something else: the step before the first
    with other weights, or one with another loss or gradient norm.
    """
    common = sorted(a.reports.keys() & b.reports.keys())
    for step in common:
        mine, theirs = a.reports[step], b.reports[step]
        if differ := tuple(
            part
            for part in (PARTS if drawn else PARTS[:2])
            if getattr(mine.fingerprint, part) != getattr(theirs.fingerprint, part)
        ):
            if differ[0] == "weights" and step > common[0]:
                return step - 1, ()
            return step, differ
        if repr((mine.loss, mine.grad_norm)) != repr((theirs.loss, theirs.grad_norm)):
            return step, ()
    ends = {max(walk.reports) for walk in (a, b)}
    return (min(ends) + 1, ()) if len(ends) > 1 else None  # one of them broke


def _batches(both: Both, step: int) -> str:
    """Where the first sequences of a step lie in the tokens of either, and how many both have."""
    lines, spans = [f"First difference: the batch of step {step:,}."], []
    for kept in both:
        config, tokens = replay.inputs(kept)
        own = token_spans.of_sequences(tokens, config.train, step)
        spans.append(set(own))
        shown = ", ".join(f"{begin}-{end}" for begin, end in own[:3])
        lines.append(f"  {kept.name}: {len(own):,} sequences, tokens {shown}, ...")
    return "\n".join([*lines, f"  {len(spans[0] & spans[1]):,} sequences are in both."])


# --- the first step that differs, and in it the first layer


def _traced(walks: tuple[Walk, Walk], step: int, parts: tuple[str, ...], scratch: Path) -> str:
    """What of a step differs first, where, and by how much."""
    states, traces = [], []
    for number, walk in enumerate(walks):
        place = scratch / str(number)
        traces.append(_first_trace(walk, step, place))
        states.append(replace(walk.kept, folder=place, steps=(step,)))
    a, b = traces
    head = f"First difference: step {step:,}"
    if "random" in parts and "weights" not in parts:
        head = f"First difference: the random state of step {step:,}, which changes first"
    found = trace.first_difference(a, b)
    if found is None:
        return f"{head}. Done again with its layers watched, it shows no difference."
    name, equal = found
    values = []
    for kept in states:
        with replay.opened(kept, step) as again:
            values.append(trace.traced(again, step, name).values)
    made = a.made[name]
    lines = [f"{head}, {trace.PHASES[made.phase]}: {name}"]
    lines += _place(walks, traces, name)
    lines.append(f"  {rounding.size(values, name, traces, [walk.kept.name for walk in walks])}")
    last = f", the last of them {equal[-1]}" if equal else ""
    lines.append(f"  Equal before it: {len(equal):,} parts of the step{last}.")
    lines += _besides(walks, traces)
    return "\n".join(lines)


def _first_trace(walk: Walk, step: int, folder: Path) -> Trace:
    """The trace of a step; the state that it begins with stays below the folder."""
    with replay.opened(walk.kept, walk.start) as again:
        for _ in again.steps(step):
            pass
        state = again.state
        state.begin([])
        facts = {"machine": machine(state), "budget": {"planned": again.planned}}
        save_snapshot(folder / name_of(step), state, facts)
        return trace.traced(again, step)


def _place(walks: tuple[Walk, Walk], traces: Sequence[Trace], name: str) -> list[str]:
    """The layer, and the operations of torch there, of either where they are not the same."""
    place = traces[0].made[name].place
    own = [found.made[name].operations if name in found.made else () for found in traces]
    lines = [f"  Layer: {place}"] if place else []
    if own[0] == own[1]:
        return lines + ([f"  Operations: {_some(own[0])}"] if own[0] else [])
    return lines + [
        f"  Operations in {walk.kept.name}: {_some(names) or 'none seen'}"
        for walk, names in zip(walks, own, strict=True)
    ]


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_OPERATIONS
    return ", ".join([*names[:MOST_OPERATIONS], *([f"and {more} more"] if more > 0 else [])])


def _besides(walks: tuple[Walk, Walk], traces: Sequence[Trace]) -> list[str]:
    lines = []
    if traces[0].cut != traces[1].cut:
        cuts = " and ".join(
            f"{found.cut[0]:,} times {found.cut[1]:,} sequences in {walk.kept.name}"
            for walk, found in zip(walks, traces, strict=True)
        )
        lines.append(f"  The step is made of {cuts}, so its sums go in another order.")
    for walk, found in zip(walks, traces, strict=True):
        if not found.seen:
            lines.append(
                f"  {walk.kept.name} is compiled, so its layers are not seen: the loss, the "
                "gradient of each parameter and the update were compared."
            )
        if found.broke:
            lines.append(f"  {walk.kept.name} broke in this step: {found.broke}")
    return lines
