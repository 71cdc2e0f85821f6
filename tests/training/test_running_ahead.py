"""A step launched before the one before it is read: the same to the bit, and nothing in between."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import paths
from pipeline.compute import runtime, throughput
from pipeline.compute.precision import choose_precision
from pipeline.diagnostics import debugger, nonfinite
from pipeline.errors import InputError, NumericsError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.resume import snapshot
from pipeline.training import loop, training_step
from pipeline.training.history import History
from pipeline.training.optimizers import parameter_groups
from pipeline.training.time_budget import Budget
from tests.helpers import stand_in

SHAPE = GPTConfig(
    n_layer=1,
    n_head=2,
    n_embd=16,
    block_size=16,
    vocab_size=97,
    vocab_rows=128,
    dropout=0.2,
    attention="naive",  # on a card, too, it adds in one order
)
STEPS, BAD = 8, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")  # what a card warns of


@pytest.fixture(params=["cpu", "stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> Iterator[torch.device]:
    """A device that may be given a step ahead."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield torch.device("cuda")
        torch.use_deterministic_algorithms(False)
        return
    if request.param == "cpu":
        monkeypatch.setattr(loop, "AHEAD", ("cpu",))
        yield torch.device("cpu")
    else:
        with stand_in.gpu(monkeypatch):
            yield torch.device("cuda")


@pytest.fixture
def start(make_config, device):
    """start("fp16", train__lr=...) -> the state before the first step, and the whole settings."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    initialize(model, make_config().init, torch.Generator().manual_seed(0))

    def started(precision: str = "fp32", **changes: Any):
        torch.manual_seed(1)
        settings = {"train__steps": STEPS, "train__warmup_steps": 0, "train__lr": 0.01}
        settings |= {"train__fingerprint_every": 2} | changes
        config = make_config(**settings)
        mode = choose_precision(precision, device)
        return training_step.start(
            copy.deepcopy(model).to(device), config.train, mode, narrowing=1.0
        ), config

    return started


def batches_of(step: int) -> list[training_step.Batch]:
    ids = torch.randint(97, (2, 2, 17), generator=torch.Generator().manual_seed(step))
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]


def held(state: training_step.TrainState) -> list[torch.Tensor]:
    """Weights, moments and counts of AdamW, on the host."""
    values = [*state.model.parameters()]
    for parameter in state.model.parameters():
        values += state.optimizer.state.get(parameter, {}).values()
    return [value.detach().clone().cpu() for value in values]


def spoil(state: training_step.TrainState, value: float, *steps: int) -> None:
    """Make a gradient `value` in these steps, in which the loss stays as it is."""
    state.model.transformer.ln_f.bias.register_hook(
        lambda grad: torch.full_like(grad, value) if state.step in steps else grad
    )


def never(done: int) -> bool:
    return False


def plain(report: loop.StepReport) -> loop.StepReport:
    """Without what is a clock's, and whether it ran ahead."""
    return replace(report, seconds=0.0, data_seconds=0.0, settled=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_number_is_that_of_a_loop_that_waits(start, precision: str) -> None:
    """With dropout, and in fp16 with overflows in the middle."""
    ends, reports = [], []
    for pause in (None, never, lambda done: done % 3 == 0):
        state, config = start(precision)
        if precision == "fp16":
            spoil(state, math.inf, 2, BAD)
        seen = list(loop.fit(state, config.train, batches_of, pause=pause))
        reports.append(seen)
        ends.append([*held(state), *state.rng.values(), torch.tensor(state.norms)])
        assert state.scaler.state_dict() == {} or state.scaler.get_scale() == 2.0**14
    waiting, ahead, some = reports
    for other in (ahead, some):
        assert [plain(r) for r in other] == [plain(r) for r in waiting]
    for other in ends[1:]:
        assert all(map(torch.equal, ends[0], other))
    assert [r.settled for r in waiting] == [True] * STEPS
    assert [r.settled for r in ahead] == [False] * (STEPS - 1) + [True]
    assert [r.step for r in some if r.settled] == [2, 5, STEPS - 1]


@pytest.mark.parametrize("device", ["stand-in"], indirect=True)
def test_the_host_waits_for_nothing_between_a_step_and_the_launch_of_the_next(
    start, monkeypatch
) -> None:
    state, config = start("fp16")
    order, gradients = stand_in.WAITS, training_step.gradients

    def launched(*args: Any) -> torch.Tensor:
        order.append(f"step {state.step}")
        return gradients(*args)

    monkeypatch.setattr(training_step, "gradients", launched)
    reports = loop.fit(state, config.train, batches_of, pause=never)
    next(reports)
    order.clear()
    list(reports)
    # A fingerprint, of every other step, has come before the numbers of its step.
    events = [["event"] * (2 if n % 2 == 0 else 1) for n in range(STEPS)]
    expected = [word for n in range(2, STEPS) for word in (f"step {n}", *events[n - 1])]
    assert order == [*expected, "event", "synchronize"]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_on_a_card_no_operation_of_a_step_makes_the_host_wait(start, precision: str) -> None:
    state, config = start(precision)
    reports = loop.fit(state, config.train, batches_of, pause=never)
    next(reports)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert not any(next(reports).settled for _ in range(STEPS - 3))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_settled_state_is_that_of_its_report(start) -> None:
    state, config = start()
    expected = {r.step: held(state) for r in loop.fit(state, config.train, batches_of)}
    asked: list[int] = []

    def pause(done: int) -> bool:
        asked.append(done)
        return done == 3

    state, config = start()
    for report in loop.fit(state, config.train, batches_of, pause=pause):
        assert state.step == report.step + 1
        same = all(map(torch.equal, held(state), expected[report.step]))
        assert same == report.settled == (report.step in (2, STEPS - 1))
    assert asked == list(range(1, STEPS)), "once a step, but for the last"


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_stops_the_run_leaves_it_as_it_found_it_though_the_next_was_launched(
    start, device, what: str, precision: str, tmp_path: Path, monkeypatch
) -> None:
    """Of the step after it every number is finite: nothing but the step before can forbid it."""
    if (what, precision) == ("gradient", "fp16"):
        pytest.skip("an overflow, which stops nothing")
    monkeypatch.setattr(paths, "runs", lambda: tmp_path)
    bundles, launched = [], []
    for pause in (None, never):
        state, whole = start(precision)
        config = whole.train
        compute = state.loss_function

        def loss(x, y, factor, state=state, compute=compute):
            launched.append(state.step)
            bad = math.nan if what == "loss" and state.step == BAD else 0.0
            return compute(x, y, factor) + bad

        state.loss_function = state.eager_loss = loss
        spoil(state, math.inf, *([BAD] if what == "gradient" else []))
        before: list[torch.Tensor] = []
        with pytest.raises(NumericsError, match=rf"^step {BAD}: the .* is (nan|inf); no update"):
            for report in loop.fit(state, config, batches_of, pause=pause):
                if report.step == BAD - 1 and not pause:
                    before = held(state)
        assert launched[-1] == (BAD if pause is None else BAD + 1)
        if pause is None:
            waited = before
        assert all(map(torch.equal, held(state), waited)), "weights, moments and counts"
        assert state.step == BAD and len(state.norms) == BAD
        bundles.append(debugger.write_bundle(state, whole, "to see"))
        said = str(nonfinite.explain(NumericsError("it"), state, lambda step, _: f"of {step}"))
        assert said.endswith(f"of {BAD}") and "First not finite" in said
    kept = [(snapshot.read_facts(b), snapshot.read_tensors(b)) for b in bundles]
    assert kept[0][0] == kept[1][0], "count, scale and rate, and those of the optimizer"
    assert kept[0][1].keys() == kept[1][1].keys()
    assert all(torch.equal(kept[0][1][name], kept[1][1][name]) for name in kept[0][1])


def test_too_many_overflows_stop_the_run_before_another_step_is_made(start) -> None:
    state, config = start("fp16", train__max_skipped=2)
    spoil(state, math.inf, BAD, BAD + 1)
    with pytest.raises(NumericsError, match=rf"^step {BAD + 1}: 2 steps skipped .* down to 16384;"):
        for report in loop.fit(state, config.train, batches_of, pause=never):
            assert report.step != BAD or not report.settled, "the first of two stops nothing"
    found = held(state)
    before = state.before  # that step, which is the second of the two
    assert (before["skipped_in_a_row"], before["scaler"]["scale"]) == (1, 2.0**15)
    state, config = start("fp16", train__max_skipped=2)
    for report in loop.fit(state, config.train, batches_of):
        if report.step == BAD - 1:
            break
    assert all(map(torch.equal, found, held(state)))


@pytest.mark.parametrize("why", ["spikes are skipped", "no kernel asks the device"])
def test_where_a_step_depends_on_what_the_host_reads_none_is_ahead(start, why: str) -> None:
    spikes = why.startswith("spikes")
    state, config = start(train__skip_spikes=9.0 if spikes else 0.0)
    if not spikes:
        groups = parameter_groups(state.model, 0.1)
        state.optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=False)
    assert all(r.settled for r in loop.fit(state, config.train, batches_of, pause=never))


def test_whoever_looks_into_a_step_sees_it_as_if_none_were_ahead(start) -> None:
    seen = []

    def look(state: training_step.TrainState) -> None:
        grads = [p.grad.detach().clone().cpu() for p in state.model.parameters()]
        seen.append([*held(state), *grads, *state.rng.values(), *state.batches[0]])
        seen[-1].append(torch.tensor([state.loss, state.step, *state.norms]))

    for pause in (None, never):
        state, config = start()
        reports = list(loop.fit(state, config.train, batches_of, look, BAD, pause=pause))
    assert [r.step for r in reports if r.settled] == [BAD - 1, STEPS - 1]
    assert all(map(torch.equal, *seen))


def test_a_step_that_cannot_be_launched_hides_none_that_was_made(start) -> None:
    def made(step: int) -> list[training_step.Batch]:
        if step == BAD:
            raise InputError("the file is gone")
        return batches_of(step)

    state, config = start()
    seen: list[int] = []
    with pytest.raises(InputError, match="the file is gone"):
        for report in loop.fit(state, config.train, made, pause=never):
            seen.append(report.step)
    assert seen == list(range(BAD))


def test_seconds_add_up_to_the_time_in_which_steps_were_at_work(start, monkeypatch) -> None:
    """On a clock that moves by 1 with every look at it, and by 100 while a report is dealt with."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    state, config = start()
    monkeypatch.setattr(throughput.time, "perf_counter", clock)
    spent, aside = 0.0, 0.0
    for report in loop.fit(state, config.train, batches_of, pause=lambda done: done == 3):
        spent += report.seconds
        assert report.data_seconds <= 3
        now[0] += 100
        aside += 100 * report.settled
    # Two stretches of steps: what lies between the end of one and the start of the next is aside.
    assert spent == now[0] - aside - 2


def test_the_ratio_of_the_update_is_that_of_each_steps_own(start) -> None:
    class Noted:
        def __init__(self) -> None:
            self.values: list[dict[str, float]] = []

        def metrics(self, values: dict[str, float], step: int) -> None:
            self.values.append({k: v for k, v in values.items() if not k.startswith("perf/")})

    notes = []
    for ahead in (False, True):
        state, config = start(train__val_every=3)
        history = History(config.train, record := Noted(), state.model)
        pause = (lambda done, h=history: h.pause()) if ahead else None
        for report in loop.fit(state, config.train, batches_of, pause=pause):
            history.add(report)
            if ahead:
                assert report.settled == ((report.step + 1) % 3 == 0 or report.last)
        notes.append(record.values)
    assert notes[0] == notes[1] and len({v["train/update_ratio"] for v in notes[0]}) == STEPS


def test_a_time_budget_is_spent_on_as_many_steps_with_none_at_work_in_the_end(start) -> None:
    ends = []
    for ahead in (False, True):
        state, config = start(train__steps=99, train__time_budget=1, train__val_tokens=64)
        now = [0.0]

        def made(step: int, now=now) -> list[training_step.Batch]:
            now[0] += 2.0
            return batches_of(step)

        budget = Budget(config.train, lambda now=now: now[0])
        pause = budget.ends_soon if ahead else None
        reports = list(loop.fit(state, config.train, made, steps_at=budget.steps, pause=pause))
        assert reports[-1].last and reports[-1].learning_rate == config.train.min_lr
        assert all(r.settled for r in reports[-3:]) and reports[9].settled != ahead
        ends.append(len(reports))
    assert ends[0] == ends[1] < 31


def test_numbers_on_their_way_are_those_of_when_they_were_sent(device) -> None:
    there = torch.ones((), device=device)
    sent: Callable[[], list[float]] = runtime.Numbers(there, there > 0).read
    there += 1
    assert sent() == [1.0, 1.0]
