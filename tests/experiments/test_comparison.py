"""Runs that differ in one setting: groups, differences, noise, figure."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest

from pipeline.drawing import figures
from pipeline.errors import ConfigError, InputError
from pipeline.experiments import comparison
from pipeline.experiments.comparison import COLUMNS, Comparison, Run, compare, cut, groups, runs_of
from pipeline.records.run_data import Experiment


def run(precision: str = "fp32", seed: int = 1, final: float = 5.0, **changes: Any) -> Run:
    params = {"precision": precision, "train.seed": seed, "train.lr": 0.1, "sample.seed": 3}
    made = Run(
        name=f"{precision}-{seed}",
        record=f"{precision}-{seed}-{final}",
        time=1,
        params=params,
        data="tokens",
        code="code",
        losses=[10.0, 9.0, 8.0, 7.0],
        validation=[8.0, 7.5],
        final=final,
        tokens_per_second=100.0,
        peak_memory_mib=10.0,
        skipped=0,
    )
    made.params.update(changes.pop("params", {}))
    return replace(made, **changes)


def test_runs_that_differ_in_the_setting_and_the_seed_alone_are_one_group() -> None:
    runs = [run(), run("bf16"), run(seed=2), run("bf16", params={"train.lr": 0.2})]
    (group,) = groups(runs, "precision")
    assert {value: [r.seed for r in found] for value, found in group.items()} == {
        "fp32": [1, 2],
        "bf16": [1],
    }
    assert group["bf16"][0].params["train.lr"] == 0.1


def test_settings_that_training_does_not_read_do_not_part_runs() -> None:
    runs = [run(), run("bf16", params={"sample.seed": 9, "evaluate.batch_size": 4})]
    assert len(groups(runs, "precision")) == 1


def test_the_group_of_the_newest_run_comes_first_and_of_equal_runs_the_newest_stays() -> None:
    other = {"train.lr": 0.2}
    runs = [
        run(time=5, final=1.0),
        run(time=6, final=2.0),
        run("bf16", time=7),
        run(time=8, params=other),
        run("bf16", time=3, params=other),
    ]
    first, second = groups(runs, "precision")
    assert first["fp32"][0].params["train.lr"] == 0.2
    assert [r.final for r in second["fp32"]] == [2.0]


def test_runs_on_other_tokens_are_no_group_and_other_code_is_said() -> None:
    assert groups([run(), run("bf16", data="other")], "precision") == []
    found = compare([run(), run("bf16", code="edited")], "precision", "fp32")
    assert "These runs come from 2 versions of the code." in found.page()
    assert "versions" not in compare([run(), run("bf16")], "precision", "fp32").page()


def test_one_value_alone_is_an_error_that_names_the_command() -> None:
    with pytest.raises(
        InputError, match=r"no two runs differ in precision .*pipeline sweep precision=A,B"
    ):
        compare([run(), run(seed=2)], "precision", "fp32")


@pytest.fixture
def drift() -> Comparison:
    runs = [
        run(seed=1, final=5.00),
        run(seed=2, final=5.10),
        run(seed=3, final=4.90),
        run("bf16", seed=1, final=5.05, losses=[10.0, 9.0, 8.2, 7.3], tokens_per_second=50.0),
        run("fp16", seed=1, final=5.5),
        run("tf32", seed=7, final=5.0),
    ]
    return compare(runs, "precision", "fp32")


def test_differences_are_against_the_base_at_the_same_seed(drift) -> None:
    assert drift.base == "fp32" and list(drift.runs)[0] == "fp32"
    assert drift.pair("bf16").difference == pytest.approx(0.05)
    assert drift.pair("fp32").difference == 0
    assert drift.pair("tf32") is None, "no fp32 run has seed 7"
    assert "tf32: no run of fp32 has its seed" in drift.verdict()


def test_the_noise_is_that_of_the_bases_seeds(drift) -> None:
    assert drift.seeds.std == pytest.approx(statistics.stdev([5.0, 5.1, 4.9]))
    assert (
        "3 seeds (fp32-1, fp32-2, fp32-3) have outcomes with a std of 0.1 nats/token."
        in drift.verdict()
    )
    assert "bf16: +0.05 nats/token from fp32-1, inside two std" in drift.verdict()
    assert "fp16: +0.5 nats/token from fp32-1, beyond two std" in drift.verdict()


def test_one_seed_gives_no_noise_and_says_what_to_queue() -> None:
    found = compare([run(), run("bf16")], "precision", "fp32")
    assert found.seeds is None
    assert "dvc exp run --queue -S train.seed=1,2" in found.verdict()


def test_the_row_has_gaps_speeds_and_where_curves_part(drift) -> None:
    row = dict(zip(COLUMNS, drift.row("bf16"), strict=True))
    assert row["largest gap"] == pytest.approx(0.3)
    assert row["apart from step"] == 2  # 8.2 against 8.0 is more than one percent
    assert row["of base"] == 0.5 and row["in noise std"] == pytest.approx(0.5)
    assert dict(zip(COLUMNS, drift.row("fp16"), strict=True))["apart from step"] is None


def test_the_outcome_is_evaluates_loss_else_the_last_validation_else_training() -> None:
    assert run().outcome() == 5.0
    assert run(final=None).outcome() == 7.5
    assert run(final=None, validation=[]).outcome() == 7.0
    assert cut(run(), 2).outcome() == 9.0 and cut(run(), 2).losses == [10.0, 9.0]


def test_runs_are_judged_by_what_every_one_of_them_has() -> None:
    found = compare([run(), run("bf16", final=None)], "precision", "fp32")
    assert [found.main(v).outcome() for v in found.runs] == [7.5, 7.5]
    assert found.pair("bf16").difference == 0
    assert "the outcome is the validation loss while training" in found.page()
    found = compare([run(), run("bf16", validation=[])], "precision", "fp32", steps=3)
    assert "the outcome is the training loss" in found.page()
    assert found.main("bf16").outcome() == 8.0


def test_a_base_that_did_not_run_is_replaced_by_the_first_value() -> None:
    runs = [run(params={"init.std": std}) for std in (0.2, 0.002)]
    found = compare(runs, "init.std", 0.02)
    assert found.base == 0.002 and list(found.runs) == [0.002, 0.2]


def event(step: int, **values: float) -> dict[str, Any]:
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return {"kind": "metrics", "step": step, "values": named}


def test_experiments_that_share_a_training_count_once() -> None:
    params = {"precision": "fp32", "train.seed": 1}
    head = {"kind": "start", "id": "r1", "time": 3, "params": params, "code": "c"}
    tags = {"kind": "tags", "values": {"digest.train": "d"}}
    summary = event(2, perf__tokens_per_second=9.0, perf__peak_memory_mib=1.0)
    summary["values"]["train/skipped_steps"] = 1.0
    training = [head, tags, event(0, train__loss=3.0), event(1, train__loss=2.0), summary]
    evaluation = [{"kind": "start", "id": "e1"}, event(2, val__loss=2.5)]
    both = {"train": training, "evaluate": evaluation}
    found = runs_of([Experiment("a", "x", both), Experiment("workspace", "", both)])
    assert [(r.name, r.losses, r.final, r.skipped) for r in found] == [("a", [3.0, 2.0], 2.5, 1)]
    assert (found[0].data, found[0].code) == ("d", "c")
    assert runs_of([Experiment("untrained", "x", {})]) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("precison", "precison: unknown setting; did you mean precision"),
        ("train.seed", "seeds are the noise"),
        ("sample.top_k", "does not change the training"),
    ],
)
def test_a_setting_that_cannot_be_compared_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        comparison.check_setting(name)


def test_the_figure_draws_a_curve_a_value_and_the_noise_of_seeds(drift) -> None:
    curves, distances = figures.comparison(drift).axes
    labels = [line.get_label() for line in curves.lines]
    assert [f"precision={v}" in labels for v in drift.runs] == [True] * 4
    drawn = {line.get_label(): list(line.get_ydata()) for line in distances.lines}
    assert drawn["bf16"] == pytest.approx([math.nan, math.nan, 0.2, 0.3], nan_ok=True)
    assert "tf32" not in drawn


def test_small_differences_and_the_noise_of_seeds_are_both_read_off_one_axis() -> None:
    losses = [10.0, 9.0, 8.0, 7.0]
    runs = [
        run(seed=1),
        run(seed=2, losses=[loss + 1.5 for loss in losses]),
        run("bf16", seed=1, losses=[loss - 0.01 for loss in losses]),
    ]
    _, distances = figures.comparison(compare(runs, "precision", "fp32")).axes
    (line,), (band,) = distances.lines, distances.collections
    low, high = distances.get_ylim()
    top = max(y for _, y in band.get_paths()[0].vertices)
    assert top == pytest.approx(2 * statistics.stdev([0, 1.5]))
    assert distances.get_yscale() == "log" and low < 0.01 < top < high
    assert list(line.get_ydata()) == pytest.approx([0.01] * 4), "a distance has no sign"


def test_runs_that_coincide_say_so_instead_of_an_empty_axis() -> None:
    _, distances = figures.comparison(compare([run(), run("bf16")], "precision", "fp32")).axes
    assert [text.get_text() for text in distances.texts] == ["no difference"]
