"""Two trainings up to where they part: by their records, then replayed to the first difference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import paths
from pipeline.diagnostics import replay, token_spans, trace
from pipeline.diagnostics.replay import Replay
from pipeline.diagnostics.trace import Key, Trace
from pipeline.errors import InputError, NumericsError, UserError, cut
from pipeline.records.run_data import RunData
from pipeline.resume.checkpoints import machine, name_of
from pipeline.resume.fork import Kept
from pipeline.resume.snapshot import save_snapshot
from pipeline.training.fingerprint import METRIC, PARTS
from pipeline.training.loop import StepReport

NAMES = {"weights": "weights", "batch": "batch", "random": "random state"}
CURVES = {"train/loss": "loss", "train/grad_norm": "gradient norm"}
EPSILONS = {  # the gap above 1, of what a product's result or its operands are rounded to
    "fp32": torch.finfo(torch.float32).eps,
    "tf32": 2.0**-10,
    "bf16": torch.finfo(torch.bfloat16).eps,
    "fp16": torch.finfo(torch.float16).eps,
    "fp8": torch.finfo(torch.float8_e4m3fn).eps,
}
ROUNDING = 16  # epsilons of the largest number up to which a difference is taken for rounding
MOST_OPERATIONS = 10  # that are named
# Tags that say where and how a training was computed.
TAGS = ("env.", "device.", "precision.e", "distributed.", "digest.", "attention.")
EVERY = ("train.fingerprint_every=1",)
Both = tuple[Kept, Kept]


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
    tell(seen.words() + _losses(both, seen))
    if seen.differs is None:
        return
    try:
        for paragraph in _replayed(both, seen):
            tell(paragraph)
    except UserError as error:
        tell(f"Not replayed, so that nobody can say more: {error}")


# --- what the records say


def circumstances(both: Both) -> str:
    """Settings, code, versions and machine, as far as they differ: a line each."""
    a, b = (_facts(kept) for kept in both)
    lines = [
        f"  {name}: {_shown(a, name)} in {both[0].name}, {_shown(b, name)} in {both[1].name}"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    ]
    head = f"{both[0].name} and {both[1].name}"
    if not lines:
        return f"{head} have the same settings, code, versions and machine."
    return "\n".join([f"{head} differ in", *lines])


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return cut(str(facts.get(name, "not known"))) or "nothing"


def _facts(kept: Kept) -> dict[str, Any]:
    head, tags = kept.record[0], RunData({"train": kept.record}).tags
    about = {f"machine.{name}": value for name, value in head["environment"].items()}
    about |= {name: value for name, value in tags.items() if name.startswith(TAGS)}
    about |= {name: value[:12] for name, value in about.items() if name.startswith("digest.")}
    code = {"code": head["code"][:12], "commit": head["git"].get("commit", "")[:12]}
    return {"distributed.processes": "1", **head["params"], **code, **about}


@dataclass(frozen=True)
class Recorded:
    """The steps that two records have, up to the first one in which they differ."""

    by: str  # by what they were compared
    equal: int | None  # the last step before that is equal
    differs: int | None
    parts: tuple[str, ...]  # that differ in it
    last: int  # common step

    def words(self) -> str:
        by = f"By {self.by}, which both records have"
        if self.differs is None:
            return f"{by}, they do not differ: compared were steps up to {self.last:,}."
        first = f"step {self.differs:,} is the first that differs, in {_listed(self.parts)}."
        if self.equal is None:
            return f"{by}, {first}"
        return f"{by}, step {self.equal:,} is the last that is equal, and {first}"


def recorded(both: Both) -> Recorded:
    """The records compared by fingerprints, or where one has none by loss and gradient norm.

    A random state that nothing is drawn from is left aside. Raises InputError where there is no
    common step.
    """
    runs = [RunData({"train": kept.record}) for kept in both]
    parts = PARTS if _drawn(both) else PARTS[:2]
    found = _compared(runs, "fingerprints", {METRIC + part: NAMES[part] for part in parts})
    if found := found or _compared(runs, "loss and gradient norm to six digits", CURVES):
        return found
    raise InputError(
        f"{both[0].name} and {both[1].name} have no step in common: the first has "
        f"{_span(runs[0])}, the second {_span(runs[1])}"
    )


def _compared(runs: Sequence[RunData], by: str, metrics: Mapping[str, str]) -> Recorded | None:
    """By metrics with their names; None where no step of both has them."""
    a, b = ({name: dict(run.curves.get(name, [])) for name in metrics} for run in runs)
    steps = sorted({step for name in metrics for step in a[name].keys() & b[name].keys()})
    equal = None
    for step in steps:
        # A gradient norm that is not finite has no point: one alone has one.
        if parts := tuple(metrics[n] for n in metrics if a[n].get(step) != b[n].get(step)):
            return Recorded(by, equal, step, parts, steps[-1])
        equal = step
    return Recorded(by, equal, None, (), steps[-1]) if steps else None


def _losses(both: Both, seen: Recorded) -> str:
    """What the losses say besides, which records have of every step."""
    runs = [RunData({"train": kept.record}) for kept in both]
    found = _compared(runs, "loss", {"train/loss": "loss"})
    if seen.differs is None or not found or found.differs is None or "loss" in seen.parts:
        return ""
    return f" The losses on record differ from step {found.differs:,} on."


def _span(run: RunData) -> str:
    steps = [step for step, _ in run.curves.get("train/loss", [])]
    return f"steps {min(steps):,} to {max(steps):,}" if steps else "none"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


# --- what replays say


@dataclass(frozen=True)
class Walk:
    """The steps of a training made once more, each with its fingerprint."""

    kept: Kept
    start: int
    reports: dict[int, StepReport]
    problem: str  # why they are not its record's, or ""

    def words(self) -> str:
        where = f"the state after {self.start:,} steps" if self.start else "its first weights"
        said = f"{self.kept.name}, from {where} up to step {max(self.reports):,}: "
        return said + (self.problem or "equal to its record")


def _replayed(both: Both, seen: Recorded) -> Iterator[str]:
    """Paragraphs about the first difference of the two, made again up to where records differ."""
    assert seen.differs is not None
    first, second = (_walked(kept, _start(kept, seen), seen.differs) for kept in both)
    yield f"Replayed. {first.words()}. {second.words()}."
    found = _parting(first, second, _drawn(both))
    if found is None:
        last = min(max(first.reports), max(second.reports))
        yield (
            f"The replays do not differ, up to step {last:,}: what made the records differ is not "
            "here: another machine, another version, other code."
        )
        return
    step, parts = found
    if "batch" in parts:
        yield f"First difference: the batch of step {step:,}.\n{_batches(both, step)}"
        if "weights" not in parts:  # else both are others from the start
            return
    with tempfile.TemporaryDirectory(dir=paths.runs()) as scratch:
        yield _traced((first, second), step, parts, Path(scratch))


def _start(kept: Kept, seen: Recorded) -> int:
    """The newest state at which both were equal; of a fork it may be its first, a little later."""
    if seen.equal is None:
        return replay.beginning(kept)
    try:
        return replay.newest(kept, seen.equal)
    except InputError:
        return replay.newest(kept, seen.differs or seen.equal)


def _drawn(both: Both) -> bool:
    return any(kept.params.get("model.dropout") for kept in both)


def _walked(kept: Kept, start: int, last: int) -> Walk:
    reports: list[StepReport] = []
    with replay.opened(kept, start, EVERY) as again, suppress(NumericsError):
        for report in again.steps(last + 1):
            reports.append(report)
    if not reports:
        raise InputError(f"{kept.name}: its replay broke in step {start:,}, where it began")
    return Walk(kept, start, {one.step: one for one in reports}, _problem(again, reports))


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
    lines, spans = [], []
    for kept in both:
        with replay.opened(kept, replay.newest(kept, step)) as again:
            own = token_spans.of_sequences(again.tokens, again.config.train, step)
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
    lines.append(f"  {_size(values[0], values[1], made.phase, traces)}")
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


def _size(
    a: Mapping[Key, Tensor], b: Mapping[Key, Tensor], phase: int, traces: Sequence[Trace]
) -> str:
    """The largest difference, beside the epsilon of the coarser format in use there."""
    pairs = [(a[key].double(), b[key].double()) for key in a.keys() & b.keys()]
    if not pairs:
        return "It is there in one of them alone."
    if any(one.shape != other.shape for one, other in pairs):
        shapes = " and ".join(str(tuple(one.shape)) for one in pairs[0])
        return f"Their shapes are {shapes}."
    largest = max((one - other).abs().max().item() for one, other in pairs)
    scale = max(max(one.abs().max().item(), other.abs().max().item()) for one, other in pairs)
    relative = largest / scale if scale else 0.0
    low = phase in (trace.FORWARD, trace.BACKWARD, trace.GRADIENTS)
    name = max((found.precision if low else "fp32" for found in traces), key=EPSILONS.__getitem__)
    times = relative / EPSILONS[name]
    verdict = "rounding" if times <= ROUNDING else "more than rounding, another computation"
    return (
        f"Largest difference {largest:.3g}, which is {relative:.3g} of the largest number there "
        f"and {times:,.3g} epsilons of {name} ({EPSILONS[name]:.3g}): {verdict}."
    )


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
