"""One wait a step, whatever the precision; the next batches made before it, and the same ones."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.errors import InputError, NumericsError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.studies import tiny
from pipeline.training import loop, training_step
from pipeline.training.prefetch import Prefetch
from tests.helpers import stand_in
from tests.helpers.steps import one_step

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def batch(seed: int = 0) -> training_step.Batch:
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@pytest.fixture
def start(make_config):
    model = GPT(SHAPE)
    initialize(model, make_config().init, torch.Generator().manual_seed(0))
    config = make_config(train__steps=30, train__warmup_steps=0, train__skip_spikes=5.0).train

    def started(name: str) -> training_step.TrainState:
        return training_step.start(
            copy.deepcopy(model), config, choose_precision(name, CPU), narrowing=1.0
        )

    return started


class Waits(TorchDispatchMode):
    """Counts by dtype what makes a host wait for a device: numbers read out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[torch.dtype] = []
        self.launched: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launched.append(func.overloadpacket.__name__)
        if self.launched[-1] in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"):
            self.reads.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_waits_for_the_device_once_and_last(
    start, monkeypatch, name: str, accumulate: int
) -> None:
    monkeypatch.setattr(
        "pipeline.compute.precision._cpu_capabilities", lambda: {"avx512_bf16": True}
    )
    state, once, order = start(name), runtime.Numbers.read, []

    def read(numbers: runtime.Numbers) -> list[float]:
        order.append(len(waits.launched))
        assert "_fused_adamw_" in waits.launched, "the update has been launched"
        return once(numbers)

    batches = [batch(n) for n in range(accumulate)]
    one_step(state, batches, 1e-3, 1.0)  # the first one makes the optimizer's state
    monkeypatch.setattr(runtime.Numbers, "read", read)
    with Waits() as waits:
        training_step.train_step(state, batches, 1e-3, replace(tiny.TRAIN, skip_spikes=5.0))
    assert order == [len(waits.launched)], "and nothing comes after it"
    # The host's own: how many targets count (int64), and on a CPU alone whether the loss is scaled
    # and whether a target is ruled out (`loss.FAR`).
    assert waits.reads.count(torch.int64) == accumulate
    assert waits.reads.count(torch.bool) == 2 * accumulate
    assert len(waits.reads) == 3 * accumulate, waits.reads


def test_the_count_sees_a_number_read_in_between(start) -> None:
    state = start("fp32")
    with Waits() as waits:
        one_step(state, [batch()], 1e-3, 1.0, look=lambda state: None)
    assert torch.float32 in waits.reads


def norm_of(state: training_step.TrainState, value: float) -> None:
    state.model.transformer.ln_f.bias.register_hook(lambda g: torch.full_like(g, value))


def test_a_forbidden_update_that_was_launched_all_the_same_changes_nothing(start) -> None:
    state = start("fp32")
    for step in range(3):
        one_step(state, [batch(step)], 1e-3, 1.0)
    norm_of(state, math.inf)
    held = [
        *state.model.parameters(),
        *(t for s in state.optimizer.state.values() for t in s.values()),
    ]
    before = [t.detach().clone() for t in held]
    with pytest.raises(NumericsError, match="gradient norm is (inf|nan); no update was made"):
        one_step(state, [batch(3)], 1e-3, 1.0)
    assert all(map(torch.equal, before, held)), "parameters, moments and counts, bit for bit"
    assert not hasattr(state.optimizer, "found_inf"), "the next step is not forbidden, too"


# Batches


def test_on_the_cpu_nothing_is_ahead() -> None:
    asked = []
    source = Prefetch(lambda step: asked.append(step) or [batch(step)], CPU)
    source(0)
    source.prepare(1, 5)
    assert asked == [0]


@pytest.fixture
def gpu(monkeypatch):
    """A device that refuses what CUDA refuses."""
    with stand_in.gpu(monkeypatch):
        yield


def test_on_cuda_the_next_ones_are_made_before_they_are_asked_for(gpu) -> None:
    asked = []
    source = Prefetch(lambda step: asked.append(step) or [batch(step)], CUDA)
    for step in range(3):
        (x, y), *_ = source(step)
        assert torch.equal(x, batch(step)[0]) and torch.equal(y, batch(step)[1])
        assert x.is_pinned() and y.is_pinned()
        source.prepare(step + 1, 3)
    assert asked == [0, 1, 2], "each once, none beyond the last step"


def test_a_step_out_of_turn_gets_its_own_batches(gpu) -> None:
    source = Prefetch(lambda step: [batch(step)], CUDA)
    source.prepare(4, 9)
    assert torch.equal(source(7)[0][0], batch(7)[0])


def test_batches_that_cannot_be_made_are_told_in_their_own_step(gpu) -> None:
    def made(step: int) -> list[training_step.Batch]:
        if step == 1:
            raise InputError("the file is gone")
        return [batch(step)]

    source = Prefetch(made, CUDA)
    source(0)
    source.prepare(1, 5)
    with pytest.raises(InputError, match="the file is gone"):
        source(1)


@pytest.mark.fault(68)
def test_a_batch_that_already_lies_on_the_device_is_trained_on_as_it_is(gpu, start) -> None:
    def losses(batches_of) -> list[float]:
        state = start("fp32")
        state.model.to(CUDA)
        on_device = training_step.start(
            state.model, config, choose_precision("fp32", CUDA), narrowing=1.0
        )
        return [report.loss for report in loop.fit(on_device, config, batches_of)]

    config = replace(tiny.TRAIN, steps=4)
    there = [tuple(part.to(CUDA) for part in batch(step)) for step in range(4)]
    assert Prefetch(lambda step: [there[step]], CUDA)(2)[0][0] is there[2][0]
    assert losses(lambda step: [there[step]]) == losses(lambda step: [batch(step)])


@pytest.mark.fault(68, control=True)
def test_the_device_refuses_to_pin_its_own_batch_and_takes_the_hosts(gpu) -> None:
    x, _ = batch()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        x.to(CUDA).pin_memory()
    assert torch.equal(x.pin_memory().to(CUDA).cpu(), x)
