"""A row in words: changed settings, results, the size of the model."""

from __future__ import annotations

from typing import Any

from pipeline import config as configuration
from pipeline.tracking import run_note
from pipeline.tracking.run_note import Facts


def head(changed: dict[str, list[Any]] | None) -> dict[str, Any]:
    parent = {} if changed is None else {"settings": "s", "changed": changed}
    return {"git": {"commit": "a1b2c3d4e5"}, "parent": parent}


RESULTS = {"val/loss": 5.92, "val/bits_per_byte": 2.44, "perf/tokens_per_second": 2199.0}


def test_only_changed_settings_are_named() -> None:
    changed = {"train.lr": [0.002, 0.001], "train.compile": [False, True]}
    said = run_note.note(head(changed), Facts("r", {}, {}), None)
    assert said == (
        "**Changed** against commit `a1b2c3d`: `train.lr` from `0.002` to `0.001`; "
        "`train.compile` from `false` to `true`.\n\n**No results** yet.\n"
    )


def test_the_changes_of_a_row_fit_in_a_column() -> None:
    changed = {"train.lr": [0.002, 0.006], "model.n_new": [None, 1], "precision": ["fp32", "bf16"]}
    said = run_note.changes(head(changed))
    assert said == "lr 0.002 -> 0.006, n_new - -> 1, precision fp32 -> bf16"
    recipe = {f"train.{name}": ["x" * 60, "y" * 60] for name in "abcdefghij"}
    assert len(run_note.changes(head(recipe))) == run_note.MOST
    assert run_note.changes(head({})) == run_note.changes(head(None)) == ""


def test_settings_that_came_and_went_are_said_so() -> None:
    said = run_note.note(head({"a.new": [None, 1], "a.old": ["x", None]}), Facts("r", {}, {}), None)
    assert "`a.new` = `1` (new); `a.old` removed (was `x`)." in said


def test_a_long_value_is_cut_and_cannot_break_the_markdown() -> None:
    said = run_note.note(
        head({"sample.prompts": ["a", "`" * 10 + "x\n" * 99]}), Facts("r", {}, {}), None
    )
    (line,) = [line for line in said.splitlines() if "sample.prompts" in line]
    assert len(line) < 200
    assert line.count("`") == 8


def test_unchanged_and_unknown_settings_are_said_so() -> None:
    unchanged = run_note.note(head({}), Facts("r", {}, {}), None)
    assert unchanged.startswith("**Nothing changed** against the settings of commit `a1b2c3d`.")
    unknown = run_note.note(head(None), Facts("r", {}, {}), None)
    assert "is unknown: commit `a1b2c3d` has no settings to read" in unknown
    nowhere = run_note.note({"git": {"commit": ""}}, Facts("r", {}, {}), None)
    assert "is unknown: there is no commit" in nowhere


def test_results_are_held_against_the_parents_as_far_as_it_has_them() -> None:
    parent = Facts("repro-1", {"val/loss": 6.0, "perf/tokens_per_second": 2000.0}, {})
    said = run_note.note(head({"train.lr": [2, 1]}), Facts("r", RESULTS, {}), parent)
    assert (
        "**Results:** Validation loss 5.9200 (-0.0800); bits per byte 2.440; "
        "tokens/s 2,199 (+199). In brackets: the difference from repro-1" in said
    )
    alone = run_note.note(head({"train.lr": [2, 1]}), Facts("r", RESULTS, {}), None)
    assert "(" not in alone


def test_the_whole_verdict_is_told_where_there_is_one() -> None:
    said = run_note.note(head({}), Facts("r", RESULTS, {"health.verdict": "The norm grew."}), None)
    assert said.endswith("\n\n**Health:** The norm grew.\n")


def test_the_model_size_counts_what_the_model_has(make_config) -> None:
    from pipeline.model.gpt import GPT, GPTConfig

    config = make_config(model__n_layer=3, model__n_embd=64)
    c = config.model
    shape = GPTConfig(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        block_size=c.block_size,
        vocab_rows=c.vocab_rows,
        dropout=c.dropout,
        attention=c.attention,
    )
    count = GPT(shape).parameter_count()
    params = configuration.flatten(config)
    assert run_note.model_size(params) == f"{count / 1e6:.1f}M: 3 x 64"


def test_initial_weights_are_told_in_a_few_words(make_config) -> None:
    def words(**changes) -> str:
        return run_note.initial_weights(configuration.flatten(make_config(**changes)))

    assert words() == "std 0.02, scaled"
    assert words(init__residual_scale=False, init__std=0.1) == "std 0.1, unscaled"
    assert words(init__scheme="mup", init__mup_base=64) == "std 0.02, scaled, muP from 64"
    assert words(init__source="hf", init__hf_model="me/tiny") == "hf me/tiny"
