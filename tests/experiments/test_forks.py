"""Forks by name, their settings, and the tree of a run's ancestors and forks."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import InputError
from pipeline.experiments import forks, sweep
from pipeline.records import dvc_history
from pipeline.records.run_data import Experiment, Log
from pipeline.tracking import run_note


def experiment(name: str, own: str, *parents: tuple[str, int, str]) -> Experiment:
    lineage = [{"name": n, "step": s, "record": r * 32, "tokens": 1} for n, s, r in parents]
    head = {"kind": "start", "stage": "train", "id": own * 32, "time": 1, "name": name}
    head |= {"params": {"train.steps": 400}}
    tags = {"kind": "tags", "values": {"fork.lineage": json.dumps(lineage)}}
    loss = {"kind": "metrics", "step": 399, "values": {"train/val_loss": 5.25}}
    return Experiment(name, "rev", {"train": [head, *([tags] if parents else []), loss]})


def test_the_tree_has_ancestors_and_forks_by_the_step_where_they_part() -> None:
    base = experiment("base", "a")
    late = experiment("late", "b", ("base", 300, "a"))
    early = experiment("early", "c", ("base", 100, "a"))
    child = experiment("child", "d", ("base", 300, "a"), ("late", 350, "b"))
    orphan = experiment("orphan", "e", ("gone", 50, "f"))
    alone = experiment("alone", "1")
    known = [late, early, child, base, orphan, alone]
    tail = ": 400 steps, validation loss while training 5.250"
    whole = [
        f"base{tail}",
        f"    @100 early{tail}",
        f"    @300 late{tail}",
        f"        @350 child{tail}",
    ]
    assert forks.tree([child], known) == forks.tree([base, late], known) == whole
    assert forks.tree([orphan], known) == ["gone", f"    @50 orphan{tail}"]
    assert forks.tree([alone], known) == []


def test_a_lineage_that_goes_in_a_circle_or_is_no_lineage_has_no_tree() -> None:
    one, other = experiment("x", "a", ("y", 1, "b")), experiment("y", "b", ("x", 1, "a"))
    assert forks.tree([one], [one, other]) == []
    (head, *_) = one.records["train"]
    for text in ("{", "7", '[{"name": "n"}]', '[{"name": "n", "step": 1, "record": "\'"}]'):
        tags = {"kind": "tags", "values": {"fork.lineage": text}}
        assert Experiment("x", "", {"train": [head, tags]}).lineage == []


@pytest.mark.parametrize("text", ["x", "@5", "x@", "x@-1", "x@1.5", "x@²"])
def test_what_names_no_state_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected RUN@STEP"):
        forks.parse(text)
    assert forks.parse("a@b@7") == ("a@b", 7)


def test_a_list_of_texts_reaches_dvc_in_hydras_grammar(make_config) -> None:
    from dvc.utils.hydra import to_hydra_overrides

    texts = ["a, 'b'", "c", "null"]
    member = sweep.Member("n", {"sample.prompts": texts}, make_config())
    assert member.words() == [r"sample.prompts=['a, \'b\'',c,'null']"]
    (override,) = to_hydra_overrides(member.words())
    assert override.value() == texts


def test_a_rows_note_names_and_links_the_parent() -> None:
    head = {"git": {"commit": "c" * 40}, "parent": {"changed": {}}}
    tags = {"fork": "base@100", run_note.FORKED: "#/experiments/1/runs/ab"}
    for known, said in (
        (tags, "[base&#64;100](#/experiments/1/runs/ab)"),
        ({"fork": "b@1"}, "b&#64;1"),
    ):
        note = run_note.note(head, run_note.Facts("n", {}, known), None)
        assert f"**Forked** from {said}." in note
    assert "Forked" not in run_note.note(head, run_note.Facts("n", {}, {}), None)


def test_an_unchanged_fork_keeps_the_evaluation_that_dvc_gives_it_and_another_does_not() -> None:
    params = {"train.fork": "data/unset", "checkpoint.keep_every": 0, "train.lr": 0.1}
    evaluated = Log([{"kind": "start", "stage": "evaluate", "params": params}])
    for changes, belongs in (
        ({"train.fork": "data/forks/x", "checkpoint.keep_every": 5}, True),
        ({"train.fork": "data/forks/x", "train.lr": 0.2}, False),
    ):
        head = {"kind": "start", "stage": "train", "params": params | changes}
        trained = Log([head, {"kind": "end", "status": "FINISHED"}])
        assert dvc_history._builds_on(evaluated, trained, vouched=False) == belongs
