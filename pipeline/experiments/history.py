"""Every stage that ever ran, oldest first, as far as its record is kept: what `sync` replays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.records.record_file import Event
from pipeline.records.run_data import Experiment
from pipeline.records.stage_graph import upstream


@dataclass(frozen=True)
class Step:
    """One stage that ran: its record, and those that were there when it started."""

    record: Sequence[Event]
    others: list[Sequence[Event]]
    where: Experiment  # whose files these records speak of

    @property
    def head(self) -> Event:
        return self.record[0]


def steps(found: Iterable[Experiment]) -> list[Step]:
    """Each record once, however many experiments share it, in the order in which they started.

    What stood beside it is taken from the experiment that holds most of it: a stage that DVC took
    from its cache stands in other experiments, too, beside records that were made later. What a
    stage at work or a failed one has written so far is left to its own process.
    """
    best: dict[str, Step] = {}
    for experiment in found:
        finished = (r for r in experiment.records.values() if r[-1].get("status") == "FINISHED")
        for record in finished:
            step = Step(record, _before(record[0], experiment), experiment)
            known = best.get(step.head["id"])
            if known is None or len(step.others) > len(known.others):
                best[step.head["id"]] = step
    return sorted(best.values(), key=lambda step: step.head["time"])


def _before(head: Event, experiment: Experiment) -> list[Sequence[Event]]:
    """The records upstream and those of the same command, as the stage itself met them."""
    return [
        record
        for stage, record in experiment.records.items()
        if record[0]["time"] < head["time"]
        and (stage in upstream(head["stage"]) or record[0]["invocation"] == head["invocation"])
    ]
