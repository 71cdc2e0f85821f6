"""A spike is made again from a kept state: its text, the layer that grew, and the ways past it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import paths
from pipeline.data import token_files, token_writer
from pipeline.data.documents import Document
from pipeline.diagnostics import replay, spikes, token_spans
from pipeline.errors import InputError, NumericsError
from pipeline.records import record_file
from pipeline.records.run_data import Log
from pipeline.resume import fork
from stages import train
from tests.conftest import recipe
from tests.resume.test_checkpoints import prepared, settings, workspace  # noqa: F401

MAD = 3  # the document that is of other text than all the rest, from 1


@pytest.fixture
def spiked(workspace: Path, settings) -> tuple[fork.Kept, int]:  # noqa: F811
    """A training with one batch of a text like no other, and that batch's step."""
    Path("params.yaml").write_text(recipe(), "utf-8")
    chance = np.random.default_rng(0)
    words = [" ".join(chance.choice(["on", "in", "up", "off", "to"], 900)) for _ in range(6)]
    words[MAD - 1] = " ".join(f"{n:x}" for n in chance.integers(1 << 60, size=3))
    documents = [Document(str(n), "train", text, True) for n, text in enumerate(words)]
    documents.append(Document("val", "val", words[0][:200], True))
    token_writer.write_tokens(iter(documents), paths.TOKENS, workers=1)
    tokens = token_files.open_tokens(paths.TOKENS, "train")
    own = {
        "train__steps": 50,
        "train__lr": 0.02,
        "train__batch_size": 1,
        "train__accumulate": 1,
        "train__val_every": 50,
        "checkpoint__keep_every": 12,
    }

    def steps_of(seed: int) -> list[int]:
        config = settings(**own, train__seed=seed)
        return [
            step
            for step in range(50)
            for span in token_spans.of_sequences(tokens, config.train, step)
            if f"document {MAD} " in token_spans.place(tokens, span)
        ]

    seed, (step, *_) = next(
        (seed, found)
        for seed in range(99)
        if (found := steps_of(seed)) and found[0] in range(30, 36)
    )
    train.main(settings(**own, train__seed=seed))
    kept = tuple(json.loads((paths.CHECKPOINTS / "kept.json").read_text()))
    record = record_file.read(paths.record("train"))
    return fork.Kept("base", record, kept, paths.CHECKPOINTS.absolute()), step


def test_a_spike_is_replayed_to_the_bit_and_its_text_and_ways_are_told(
    spiked: tuple[fork.Kept, int],
) -> None:
    kept, step = spiked
    assert kept.steps == (12, 24, 36, 48)
    said: list[str] = []
    ways = spikes.explain(kept, step, 6, said.append)
    print("\n\n".join(said))
    opening, documents, growth, table = said
    assert f"step {step:,}: loss" in opening and "equal to the record" in opening
    assert "NOT" not in opening
    assert f"document {MAD} of" in documents.splitlines()[1]
    assert documents.startswith("Its one sequence, and its loss:\n")
    assert documents.endswith("` has all of it.")
    assert [way.name for way in ways] == ["as it was", "skip", "lower rate"]
    as_it_was, skip, lower = table.splitlines()[4:]
    assert "made" in as_it_was and "skipped" in skip and "made" in lower
    assert "gradient" in growth
    assert spikes.ways(kept, 30.0, 1.0)[1].changes == ("train.skip_spikes=5.5",)
    assert spikes.ways(kept, 1.9, 1.0)[1].changes == spikes.ways(kept, 9.0, 0.0)[1].changes == ()


def test_replayed_steps_are_held_against_the_record(spiked: tuple[fork.Kept, int]) -> None:
    kept, step = spiked
    seen: list[int] = []
    with replay.opened(kept, 36) as again:
        reports = list(again.steps(40, lambda state: seen.append(state.step)))
        reports += again.steps(60)  # no further than the run
        assert again.differences(reports) == []
        assert seen == [36, 37, 38, 39] and [r.step for r in reports] == list(range(36, 50))
    events = [
        {**e, "values": {**e["values"], "train/loss": 1.0}} if e.get("step") == step else e
        for e in kept.record
    ]
    other, said = replace(kept, record=Log(events)), []
    spikes.explain(other, step, 1, said.append)
    assert f"NOT equal to the record: train/loss of step {step} is " in said[0]
    with pytest.raises(InputError, match=r"no checkpoint before step 5; .* checkpoint.keep_every"):
        spikes.explain(kept, 5, 3, print)


def test_a_step_that_breaks_and_one_that_breaks_later_are_told_with_the_ways_past_them(
    spiked: tuple[fork.Kept, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, step = spiked
    steps = replay.Replay.steps

    def breaks_at(bad: int):
        def broken(self, until, look=None):
            for report in steps(self, until, look):
                if report.step == bad and self.config.train.lr == kept.params["train.lr"]:
                    raise NumericsError(f"step {bad}: the loss is nan\nmore")
                yield report

        return broken

    for bad in (step, step + 2):
        said: list[str] = []
        monkeypatch.setattr(replay.Replay, "steps", breaks_at(bad))
        ways = spikes.explain(kept, step, 6, said.append)
        assert f"document {MAD} of" in said[1].splitlines()[1]
        as_it_was, skip, lower = said[-1].splitlines()[4:]
        assert ("not reached" in as_it_was) == (bad == step) and "made" in lower
        assert len(ways) == 3
        broke = "the loss is nan; replayed from the state after" in said[0]
        assert broke == (bad == step)
