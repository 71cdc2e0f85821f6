"""Every rule of the run doctor on a run that has the trouble and on one that just has not.

Three kinds of trouble come from real trainings: a diverging norm, a loss stuck at ln V, and
overfitting; so does a healthy run.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import config as configuration
from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.compute.runtime import generator
from pipeline.data import token_writer
from pipeline.diagnostics import doctor, rules
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model
from pipeline.records import record_file
from pipeline.records.run_data import Experiment, RunData
from pipeline.tracking import recording
from pipeline.training import training_step
from tests.conftest import NoCourier, params

LN_V = math.log(50257)


def run(summary: dict[str, float] | None = None, changes: dict[str, Any] | None = None, **curves):
    """A run of these curves, `train__loss=[...]` for train/loss, and of these last values."""
    settings = configuration.from_dict(params(**(changes or {})))
    start = {"kind": "start", "time": 0, "name": "", "params": configuration.flatten(settings)}
    events: list[dict[str, Any]] = [start]
    for name, values in curves.items():
        events += [
            {"kind": "metrics", "step": step, "values": {name.replace("__", "/"): value}}
            for step, value in enumerate(values)
        ]
    events.append({"kind": "metrics", "step": 0, "values": summary or {}})
    return RunData({"train": events})


def falling(steps: int = 200, noise: float = 0.1, start: float = 10.8, end: float = 6.0):
    """A training loss as it should be."""
    chance = random.Random(0)
    return [end + (start - end) * math.exp(-s / 20) + chance.gauss(0, noise) for s in range(steps)]


def norms(last: float, steps: int = 200) -> list[float]:
    """About 1 after warm-up, `last` at the end."""
    return [1.0] * (steps // 2) + [last] * (steps - steps // 2)


def with_spike(height: float, noise: float = 0.1) -> list[float]:
    losses = falling(noise=noise)
    losses[150] += height
    return losses


def rising(by: float, noise: float = 0.1) -> list[float]:
    return [loss + by * max(0, s - 100) / 100 for s, loss in enumerate(falling(noise=noise))]


def validated(last: float) -> RunData:
    found = run(train__loss=falling())
    events = found.records["train"]
    for step, loss in ((49, 6.5), (99, 6.0), (149, 6.02), (199, last)):
        events.append({"kind": "metrics", "step": step, "values": {"train/val_loss": loss}})
    return found


def straight(end: float) -> list[float]:
    return [10.8 + (end - 10.8) * step / 199 for step in range(200)]


CASES: dict[rules.Rule, list[tuple[Callable[[], RunData], bool]]] = {
    rules.gradient_norm_grows: [
        (lambda: run(train__grad_norm=norms(11.0)), True),
        (lambda: run(train__grad_norm=norms(91_000.0)), True),
        (lambda: run(train__grad_norm=norms(9.0)), False),
        (lambda: run(train__grad_norm=[50.0] * 20 + [1.0] * 180), False),
        (lambda: run(train__grad_norm=[1.0] * 5 + [99.0] * 14), False),
    ],
    rules.always_clipped: [
        (lambda: run(train__grad_norm=[3.1] * 200), True),
        (lambda: run(train__grad_norm=[2.9] * 200), False),
        (lambda: run(train__grad_norm=[3.1] * 180 + [0.9] * 20), False),
        (lambda: run(train__grad_norm=[3.1] * 200, changes={"train__grad_clip": 0.0}), False),
    ],
    rules.stuck: [
        (lambda: run(train__loss=[LN_V] * 200), True),
        (lambda: run(train__loss=[LN_V - 0.4] * 200), False),
        (lambda: run(train__loss=[LN_V] * 10), False),
    ],
    rules.dead_scaler: [
        (lambda: run(train__loss_scale=[65536.0, 0.5], train__found_inf=[0.0, 0.0]), True),
        (lambda: run(train__loss_scale=[65536.0] * 4, train__found_inf=[1.0, 0, 0, 0]), True),
        (lambda: run(train__loss_scale=[65536.0] * 9, train__found_inf=[1.0] + [0.0] * 8), False),
        (lambda: run(train__loss_scale=[1.0] * 9, train__found_inf=[0.0] * 9), False),
        (
            lambda: run(
                train__loss_scale=[65536.0] * 4,
                train__found_inf=[0.0] * 4,
                train__skipped=[1.0] * 4,  # as spikes
            ),
            False,
        ),
    ],
    rules.spike: [
        (lambda: run(train__loss=with_spike(1.5)), True),
        (lambda: run(train__loss=with_spike(0.8)), False),
        (lambda: run(train__loss=with_spike(1.5, noise=0.4)), False),
        (lambda: run(train__loss=falling()), False),
    ],
    rules.gradient_spike: [
        (lambda: run(train__grad_norm=[1.0] * 100 + [11.0] + [1.0] * 99), True),
        (lambda: run(train__grad_norm=[1.0] * 100 + [9.0] + [1.0] * 99), False),
        (lambda: run(train__grad_norm=[1.0] * 100 + [11.0]), True),  # as a validation comes
        (lambda: run(train__grad_norm=norms(11.0)), False),  # growth, not a leap
        (lambda: run(train__grad_norm=[1.0] * 5 + [11.0] + [1.0] * 99), False),  # in warm-up
    ],
    rules.overfitting: [
        (lambda: validated(6.1), True),
        (lambda: validated(6.05), False),
        (lambda: validated(5.9), False),
    ],
    rules.rate_too_high: [
        (lambda: run(train__loss=rising(0.6)), True),
        (lambda: run(train__loss=rising(0.2)), False),
        (lambda: run(train__loss=rising(0.6, noise=0.6)), False),
        (lambda: run(train__loss=[8.0] * 5 + [20.0] * 5 + falling(190)), True),
        (lambda: run(train__loss=falling(), train__update_ratio=[0.5] * 200), False),
    ],
    rules.rate_too_low: [
        (lambda: run(train__loss=straight(9.9), train__update_ratio=[2e-3] * 200), True),
        (lambda: run(train__loss=straight(9.9), train__update_ratio=[4e-3] * 200), False),
        (lambda: run(train__loss=falling(), train__update_ratio=[2e-3] * 200), False),
        (
            lambda: run(
                train__loss=straight(9.9),
                train__update_ratio=[2e-3] * 200,
                changes={"init__source": "hf", "init__hf_model": "me/tiny"},
            ),
            False,
        ),
    ],
    rules.slow: [
        (lambda: run({"perf/of_matrix_rate": 0.14, **SPEED}), True),
        (lambda: run({"perf/of_matrix_rate": 0.16, **SPEED}), False),
        (lambda: run({"perf/of_matrix_rate": 0.14}), False),  # of another version
        (lambda: run(), False),
    ],
    rules.data_bound: [
        (lambda: run(perf__data_seconds=[0.3] * 20, perf__step_seconds=[1.0] * 20), True),
        (lambda: run(perf__data_seconds=[0.1] * 20, perf__step_seconds=[1.0] * 20), False),
        (lambda: run(perf__data_seconds=[0.3] * 20, perf__step_seconds=[0.0] * 20), False),
        (lambda: run(perf__data_seconds=[9.0] + [0.1] * 19, perf__step_seconds=[10.0] * 20), False),
    ],
    rules.uneven: [
        (lambda: run(perf__step_seconds=[1.0] * 100 + [2.1] * 100), True),
        (lambda: run(perf__step_seconds=[1.0] * 100 + [1.9] * 100), False),
        (lambda: run(perf__step_seconds=[1.0] * 180 + [9.0] * 20), False),  # of few steps
        (lambda: run(perf__step_seconds=[9.0] * 10 + [1.0] * 20), False),  # a warm-up
        (lambda: run(perf__step_seconds=[0.0] * 100 + [2.0] * 100), False),  # a coarse clock
    ],
    rules.idle: [
        (lambda: run(system__gpu_1_utilization_percentage=[99.0] + [49.0] * 10), True),
        (lambda: run(system__gpu_1_utilization_percentage=[0.0] * 3 + [51.0] * 10), False),
        (lambda: run(system__gpu_0_utilization_percentage=[0.0] * 9), False),  # a short run
        (lambda: run(system__cpu_utilization_percentage=[1.0] * 20), False),
    ],
    rules.throttled: [
        (lambda: run(system__gpu_0_throttled=[0.0] * 7 + [1.0] * 3), True),
        (lambda: run(system__gpu_0_throttled=[0.0] * 9 + [1.0]), False),
    ],
    rules.worse_than_frequencies: [
        (lambda: run({"val/loss": 9.05, "val/unigram_loss": 6.64}), True),
        (lambda: run({"val/loss": 6.64, "val/unigram_loss": 6.64}), True),
        (lambda: run({"val/loss": 6.63, "val/unigram_loss": 6.64}), False),
        (lambda: run({"val/loss": 9.05}), False),
    ],
    rules.leak: [
        (lambda: run({"data/val_overlap": 0.11}), True),
        (lambda: run({"data/val_overlap": 0.09}), False),
    ],
}
SPEED = {"perf/matrix_gflops": 180.0, "perf/tokens_per_second": 900.0}


def test_every_rule_has_a_positive_and_a_negative_case() -> None:
    assert set(CASES) == set(rules.RULES)
    assert all({True, False} == {expected for _, expected in cases} for cases in CASES.values())


@pytest.mark.parametrize(
    ("rule", "number"), [(rule, n) for rule, cases in CASES.items() for n in range(len(cases))]
)
def test_a_rule_speaks_where_its_trouble_is_and_nowhere_else(rule, number: int) -> None:
    make, expected = CASES[rule][number]
    finding = rule(make())
    assert (finding is not None) == expected, finding
    if finding:
        assert all((finding.rule, finding.verdict, finding.evidence))
        known = {name for name, *_ in configuration.describe()} | {"data/tokens"}
        assert any(name in finding.advice for name in known), finding.advice


def test_a_run_without_trouble_is_healthy_and_a_bare_record_no_error() -> None:
    healthy = run(train__loss=falling(), train__grad_norm=norms(1.0))
    assert doctor.examine(healthy) == [] == doctor.examine(run())
    assert doctor.headline([]) == "no problems found"
    assert doctor.lines([]) == [f"no problems found ({len(rules.RULES)} checks)"]
    assert doctor.health(run(), []) == {"health/findings": 0.0}


def test_a_norm_of_91_000_is_told_in_every_place() -> None:
    found = run(train__grad_norm=norms(91_000.0), train__loss=falling())
    findings = doctor.examine(found)
    assert doctor.headline(findings) == "gradient norm grows, always clipped"
    assert doctor.norm_words(found) == "grows 91,000x"
    assert "9.1e+04 at the end" in doctor.lines(findings)[0]
    assert "train.lr" in doctor.lines(findings)[0]
    numbers = doctor.health(found, findings)
    assert numbers["health/findings"] == 2
    assert numbers["health/grad_norm_max"] == 91_000
    assert numbers["health/clipped_share"] == 0.5


def judged(make_config, stage: str, *points: dict[str, float], **tags: str) -> tuple[Any, ...]:
    """(events that the verdict adds to the record, numbers, lines to print)."""
    record = record_file.Record(stage, make_config())
    for step, values in enumerate(points):
        record.metrics(values, step)
    record.tags(tags)
    before = len(record.so_far())
    numbers, said = doctor.judge(record, 200)
    added = record.so_far()[before:]
    record.close("FINISHED")
    return [e["values"] for e in added], numbers, said


def test_the_verdict_on_a_training_is_put_on_its_record(make_config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    points = [{"train/loss": 5.0, "train/grad_norm": norm} for norm in norms(91_000.0)]
    added, numbers, said = judged(make_config, "train", *points)
    verdict = {"health.verdict": "gradient norm grows, always clipped"}
    assert added == [numbers, verdict | {"health.grad_norm": "grows 91,000x"}]
    assert numbers["health/findings"] == 2 and numbers["health/grad_norm_max"] == 91_000
    assert [line.partition(": ")[0] for line in said] == ["gradient norm grows", "always clipped"]


@pytest.mark.parametrize(
    ("loss", "verdict"), [(9.05, "no better than word frequencies"), (5.92, "no problems found")]
)
def test_a_run_is_judged_once_more_when_the_yardstick_is_known(
    make_config, tmp_path, monkeypatch, loss: float, verdict: str
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"val/loss": loss, "val/unigram_loss": 6.64}
    assert judged(make_config, "evaluate", values) == ([], {}, []), "nothing was trained"
    judged(make_config, "train", {"train/loss": 10.0})
    added, numbers, said = judged(make_config, "evaluate", values)
    assert added == [{"health/findings": float(loss > 6.64)}, {"health.verdict": verdict}]
    assert numbers == added[0]
    assert ("no better than word frequencies" in "".join(said)) == (loss > 6.64)


def test_what_training_has_reported_is_not_printed_again(
    make_config, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    points = [{"train/loss": 5.0, "train/grad_norm": norm} for norm in norms(91_000.0)]
    judged(make_config, "train", *points)
    values = {"val/loss": 9.05, "val/unigram_loss": 6.64}
    added, _, said = judged(make_config, "evaluate", values)
    assert added[0] == {"health/findings": 3.0}
    assert [line.partition(": ")[0] for line in said] == ["no better than word frequencies"]


# --- real trainings through the real stage


REAL = {
    "model__n_layer": 1,
    "model__n_head": 1,
    "model__n_embd": 16,
    "model__block_size": 16,
    "train__sequence_length": 16,
    "train__batch_size": 4,
    "train__steps": 80,
    "train__warmup_steps": 4,
    "train__val_every": 20,
    "train__val_tokens": 400,
    "train__lr": 0.004,
    "train__min_lr": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that follow a pattern with chance in it, a training split of 500 tokens."""
    made = tmp_path_factory.mktemp("real")
    chance = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("on", "in", "up", "off") for b in ("to", "side", "ward", "set")]
    for_split = {"train": 1, "val": 1}
    documents = [
        (split, " ".join(chance.choice(words, 100)))
        for split, count in for_split.items()
        for _ in range(count)
    ]
    token_writer.write_tokens(iter(_documents(documents)), made / paths.TOKENS, workers=1)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=16))
    initialize(model, configuration.from_dict(params()).init, generator(0, "init"))
    save_model(model, made / paths.INIT)
    return made


def _documents(found: list[tuple[str, str]]) -> Iterator[Any]:
    from pipeline.data.documents import Document

    for number, (split, text) in enumerate(found):
        yield Document(str(number), split, text, True)


@pytest.fixture
def trained(folder: Path, monkeypatch, make_config) -> Callable[..., RunData]:
    from stages import train

    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.setattr(recording, "Courier", NoCourier)

    def call(**changes: Any) -> RunData:
        train.main(make_config(**REAL | changes))
        return RunData({"train": record_file.read(paths.record("train"))})

    return call


def named(found: RunData) -> set[str]:
    of_the_machine = {"slow for this machine", "uneven speed"}  # while something else is at work
    return {finding.rule for finding in doctor.examine(found)} - of_the_machine


def test_all_looks_at_a_training_read_a_constant_number_of_times_its_steps() -> None:
    events = run(train__loss=[5.0]).records["train"]
    read = {}
    for steps in (2000, 8000):
        looked: list[int] = []
        rounds = doctor.Rounds()
        for step in range(1, steps + 1):
            rounds.look(step, lambda step=step, looked=looked: looked.append(step) or events)
        assert all(later <= 1.05 * earlier + 1 for earlier, later in pairwise(looked))
        read[steps] = sum(looked) / steps
    assert read[8000] <= 1.1 * read[2000] < 25


def test_a_leap_of_the_norm_is_not_called_fine() -> None:
    leap = [1.0] * 150 + [40.0] + [1.0] * 49
    found = run(train__loss=falling(), train__grad_norm=leap)
    assert named(found) == {"gradient spike"}
    assert doctor.norm_words(found) == "spike 40x"
    assert doctor.norm_words(run(train__loss=falling(), train__grad_norm=norms(1.0))) == "fine"


def test_a_spike_of_another_run_names_it_where_its_text_is_to_be_read() -> None:
    leap = [1.0] * 150 + [40.0] + [1.0] * 49
    found = run(train__loss=falling(), train__grad_norm=leap)
    (here,) = doctor.examine(found)
    assert "text --step 150 for" in here.advice
    (kept,) = doctor.examine(Experiment("hot", "abc", found.records))
    assert "text --step 150 --of hot for" in kept.advice
    found.records["train"][0]["name"] = "queued"
    (at_work,) = doctor.examine(found)
    assert "text --step 150 --of queued for" in at_work.advice
    for every, told in ((100, "explain queued@150 for"), (151, "text --step 150 --of queued")):
        found.records["train"][0]["params"]["checkpoint.keep_every"] = every
        (kept,) = doctor.examine(found)  # with a state before it, or without one
        assert f"python -m pipeline {told}" in kept.advice
    found.records["train"][0]["params"]["checkpoint.keep_every"] = 100
    forked = {"fork.lineage": json.dumps([{"name": "p", "step": 120, "record": "a" * 32}])}
    found.records["train"].insert(1, {"kind": "tags", "values": forked})
    (parents,) = doctor.examine(RunData({"train": list(found.records["train"])}))
    assert "text --step 150 --of queued" in parents.advice, "a fork keeps no state before its own"


@pytest.mark.parametrize("beta2", [0.95, 0.99])
def test_a_spike_is_told_in_words_that_fit_it(beta2: float) -> None:
    losses = [5.0] * 80 + [9.0] + [5.0] * 19
    found = run(changes={"train__beta2": beta2}, train__loss=losses)
    (spike,) = (one for one in doctor.examine(found) if one.rule == "loss spike")
    assert spike.verdict.endswith("recovered within 1 step.")
    assert ("train.beta2=0.95" in spike.advice) == (beta2 > 0.95)


def test_one_spike_is_no_rate_too_high_and_a_skipped_one_is_told_once() -> None:
    losses, leap = falling(100), [1.0] * 80 + [40.0] + [1.0] * 19
    losses[80] += 20
    assert named(run(train__loss=losses)) == {"loss spike"}
    curves = {"train__loss": losses, "train__grad_norm": leap}
    skipped = [float(step == 80) for step in range(100)]
    assert named(run(**curves)) == {"loss spike", "gradient spike"}
    told = run(**curves, train__skipped=skipped)
    assert named(told) == {"gradient spike"}
    norms = [e for e in told.records["train"] if e.get("values", {}).get("train/grad_norm") == 40]
    told.records["train"].remove(norms[0])  # as of an overflow, which is no spike of a gradient
    assert named(RunData({"train": list(told.records["train"])})) == {"loss spike"}
    twice = [loss + 8 * (step == 60) for step, loss in enumerate(losses)]
    assert "loss spike" in named(
        run(train__loss=twice, train__grad_norm=leap, train__skipped=skipped)
    )
    for step in range(85, 100):  # and a rise that stays is none of a spike
        losses[step] += 4
    assert "learning rate too high" in named(run(train__loss=losses))


def test_what_is_urgent_is_told_once() -> None:
    calm, wild = [5.0] * 100, [5.0] * 80 + [9.0] + [5.0] * 19
    rounds = doctor.Rounds()
    for steps, losses, told in [(100, calm, []), (110, wild, ["loss spike"]), (120, wild, [])]:
        events = run(train__loss=losses).records["train"]
        assert [f.rule for f in rounds.look(steps, lambda events=events: events)] == told


def test_a_real_training_at_a_sound_rate_is_healthy(trained) -> None:
    found = trained()
    assert named(found) == set()
    assert found.tags["health.grad_norm"] == "fine"
    assert found.last("health/findings") == len(doctor.examine(found))


def test_a_real_training_whose_norm_diverges_is_told_while_it_runs_and_at_its_end(
    trained, caplog, capsys
) -> None:
    steps = {"train__steps": 150, "train__warmup_steps": 149}
    found = trained(
        train__lr=10.0, train__min_lr=10.0, train__beta2=0.5, train__grad_clip=0.0, **steps
    )
    assert max(found.values("train/grad_norm")) > 1000
    assert {"gradient norm grows", "learning rate too high"} <= named(found)
    assert found.tags["health.grad_norm"].startswith("grows ")
    assert "gradient norm grows" in found.tags["health.verdict"]
    warned = [r.getMessage() for r in caplog.records if "gradient norm grows" in r.getMessage()]
    assert len(warned) == 1  # by one of the validations on the way, not by each of them
    assert "train: gradient norm grows: " in capsys.readouterr().out


@pytest.mark.fault(34)
@pytest.mark.parametrize("guard", [0.0, 10.0])
def test_a_real_step_of_a_thousandfold_gradient_is_told_at_the_next_validation_and_at_the_end(
    trained, monkeypatch, caplog, capsys, guard: float
) -> None:
    start = training_step.start

    def spiked(*given: Any) -> training_step.TrainState:
        state = start(*given)
        for parameter in state.model.parameters():
            parameter.register_hook(lambda g: 1000 * g if state.step == 45 else g)
        return state

    monkeypatch.setattr(training_step, "start", spiked)
    found = trained(train__skip_spikes=guard, train__seed=7)
    assert found.values("train/skipped") == [float(s == 45 and guard > 0) for s in range(80)]
    assert "gradient spike" in named(found) and "gradient spike" in found.tags["health.verdict"]
    made = "the step was skipped" if guard else "the step was made"
    warned = [r.getMessage() for r in caplog.records if r.getMessage().startswith("gradient spike")]
    assert len(warned) == 1 and "The gradient of step 45 was" in warned[0] and made in warned[0]
    assert "python -m pipeline text --step 45" in warned[0]
    assert f"times as long as usual; {made}" in capsys.readouterr().out
    assert ("skipped as a spike" in caplog.text) == (guard > 0)


def test_a_real_training_at_no_rate_is_stuck_at_ln_v(trained) -> None:
    found = trained(train__lr=1e-9)
    assert named(found) == {"stuck at ln V"}


def test_a_real_training_on_too_little_text_overfits(trained) -> None:
    found = trained(train__steps=200, train__lr=0.02, train__weight_decay=0.0)
    assert "overfitting" in named(found)


def test_a_real_training_with_a_budget_ends_in_good_order(trained, capsys) -> None:
    found = trained(train__steps=100_000, train__val_every=100_000, train__time_budget=0.04)
    done = int(found.last("train/steps"))
    assert 7 <= done < 100_000
    assert found.values("train/learning_rate")[-1] == 0.0  # train.min_lr
    assert found.curves["train/val_loss"] == [(done - 1, found.last("train/best_val_loss"))]
    assert (
        f"{done:,} of 100,000 steps fitted into train.time_budget=0.04" in capsys.readouterr().out
    )


# --- the command


def test_the_command_judges_the_runs_that_are_named_and_names_those_there_are(
    monkeypatch, caplog, capsys
) -> None:
    sick = Experiment("sick", "abc", run(train__grad_norm=norms(91_000.0)).records)
    well = Experiment("workspace", "", run(train__loss=falling()).records)
    bare = Experiment("bare", "def", {})
    monkeypatch.setattr(doctor, "experiments", lambda: iter([sick, bare, well]))
    monkeypatch.setattr(doctor, "of_workspace", lambda _: well)
    caplog.set_level("INFO")
    command(["doctor"])
    assert caplog.messages == ["workspace\n  no problems found (16 checks)"]
    command(["doctor", "sick", "workspace"])
    assert caplog.messages[1].startswith("sick\n  gradient norm grows: ")
    for name, words in (
        ("sik", "known: sick, bare, workspace"),
        ("bare", "bare: nothing trained yet"),
    ):
        with pytest.raises(SystemExit) as ended:
            command(["doctor", name])
        assert ended.value.code == 3
        assert words in caplog.messages[-1]
