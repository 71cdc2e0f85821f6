"""train.deterministic: what torch and cuBLAS are asked for, in time, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.compute import buffers, determinism, machine
from pipeline.compute.determinism import WORKSPACE, deterministic
from pipeline.compute.precision import choose_precision
from pipeline.errors import ConfigError, exit_code, to_user
from pipeline.inference.generation import candidates
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.training import loop, training_step
from tests.helpers import stand_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ASKED = torch.are_deterministic_algorithms_enabled


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    """As no test has left it; what is set here is taken back."""
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)


def losses(name: str, make_config, threads: int = 1, stop: int = 0) -> tuple[list[float], bytes]:
    """Three steps with dropout, of sizes for which torch and MKL take every thread; weights, too.

    With `stop`, the state of that step is put into a fresh one, which makes the rest.
    """
    config = make_config(train__steps=3, train__warmup_steps=0).train
    ids = torch.randint(1000, (2, 8, 65), generator=torch.Generator().manual_seed(0))
    batches = [(part[:, :-1], part[:, 1:]) for part in ids]

    def start() -> training_step.TrainState:
        torch.manual_seed(1)
        model = GPT(GPTConfig(1, 2, 64, 64, vocab_size=1000, vocab_rows=1024, dropout=0.2))
        return training_step.start(model, config, choose_precision(name, CPU), narrowing=1.0)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, state = [], start()
        for report in loop.fit(state, config, lambda _: batches):
            found.append(report.loss)
            if state.step == stop:
                break
        if stop:
            chance, old, state = torch.get_rng_state(), state, start()
            state.model.load_state_dict(old.model.state_dict())
            state.optimizer.load_state_dict(old.optimizer.state_dict())
            state.scaler.load_state_dict(old.scaler.state_dict())
            state.step = stop
            torch.set_rng_state(chance)
            found += [r.loss for r in loop.fit(state, config, lambda _: batches)]
    finally:
        torch.set_num_threads(before)
    weights = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    return found, weights.numpy().tobytes()


@pytest.mark.alone  # two threads that wait for each other, and for who else is at work
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_on_two_threads_a_repeated_and_a_resumed_run_are_equal_to_the_bit(
    name: str, make_config
) -> None:
    whole = losses(name, make_config, threads=2)
    assert losses(name, make_config, threads=2) == whole
    assert losses(name, make_config, threads=2, stop=2) == whole
    assert losses(name, make_config, threads=1) != whole, "these sizes use both threads"


@pytest.mark.parametrize("asked", [True, False])
def test_torch_and_cublas_are_asked_before_the_first_product(asked, make_config, monkeypatch):
    seen = []

    def rate(precision) -> float:
        seen.append((ASKED(), os.environ.get(WORKSPACE)))
        return 1.0

    monkeypatch.setattr(machine, "matrix_rate", rate)
    with stand_in.gpu(monkeypatch):
        config = make_config(device="cuda", train__deterministic=asked)
        with machine.measured(config.precision, config.device, config.train.deterministic):
            assert ASKED() is asked
            assert torch._inductor.config.deterministic is asked
    assert seen == [(True, ":4096:8") if asked else (False, None)]
    assert not ASKED() and torch.utils.deterministic.fill_uninitialized_memory


def test_after_an_error_torch_is_as_it_was() -> None:
    with pytest.raises(KeyError), deterministic(True, CPU):
        assert ASKED() and not torch.utils.deterministic.fill_uninitialized_memory
        raise KeyError
    assert not ASKED() and torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(
    ("said", "started", "held", "refused"),
    [
        (None, False, 0, False),
        (None, True, 0, False),  # CUDA was asked for its name, no more
        (None, True, 1, True),
        (":16:8", True, 1, False),
        (":4096:2:16:8", False, 0, True),
    ],
)
def test_what_cublas_cannot_learn_any_more_is_refused(
    said, started, held, refused, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held)
    if said:
        monkeypatch.setenv(WORKSPACE, said)
    if refused:
        words = f"train.deterministic=true: {WORKSPACE}={said or ''}: .*:4096:8.*before CUDA"
        with pytest.raises(ConfigError, match=words), deterministic(True, CUDA):
            pass
    else:
        with deterministic(True, CUDA):
            assert os.environ[WORKSPACE] == said or determinism.FIXED[0]


def test_a_device_that_promises_nothing_is_refused() -> None:
    words = "train.deterministic=true.*device=cpu or cuda, got mps"
    with pytest.raises(ConfigError, match=words), deterministic(True, torch.device("mps")):
        pass


def test_an_operation_without_an_order_is_an_error_that_names_the_setting() -> None:
    """In torch's own words: this fails where they change."""
    with deterministic(True, CPU), pytest.raises(RuntimeError) as told:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    said = to_user(told.value)
    assert "train.deterministic=true: put_ does not have a deterministic impl" in said
    assert said.endswith("train.deterministic=false does without") and "\n" not in said
    assert exit_code(told.value) == 2
    assert to_user(RuntimeError("something else")) == ""


def test_a_text_by_top_p_can_be_sampled_meanwhile(monkeypatch) -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    expected = candidates(logits, 1.0, 0, 0.9)
    with stand_in.gpu(monkeypatch), deterministic(True, CUDA):
        found = candidates(logits.to(CUDA), 1.0, 0, 0.9)
        assert [x.tolist() for x in found] == [x.tolist() for x in expected]


def test_no_memory_is_read_before_it_is_written(make_config) -> None:
    """So that it need not be filled: here torch fills every new tensor with NaN."""
    expected = losses("fp32", make_config)
    for kept in (buffers._kept, buffers._spare):
        kept.__dict__.clear()
    with deterministic(True, CPU):
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()
        assert losses("fp32", make_config) == expected
