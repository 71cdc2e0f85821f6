"""The compiler: eager where it cannot be, the same losses where it can, no graph made twice."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.compute import precision
from pipeline.compute.precision import choose_precision
from pipeline.inference import generation
from pipeline.model import loss
from pipeline.model.gpt import ATTENTION, GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import mean_loss
from pipeline.training import compiling, loop, training_step
from pipeline.training.compiling import why_not_compile

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97, vocab_rows=128)
CPU = torch.device("cpu")


@pytest.fixture
def model(make_config) -> GPT:
    made = GPT(SHAPE)
    initialize(made, make_config().init, torch.Generator().manual_seed(0))
    return made


def batch(rows: int, seed: int = 0) -> training_step.Batch:
    ids = torch.randint(97, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def start(model: GPT, config, name: str = "fp32") -> training_step.TrainState:
    return training_step.start(
        copy.deepcopy(model), config, choose_precision(name, CPU), narrowing=1.0
    )


def test_compile_where_it_cannot_work_warns_and_trains_eagerly(model, make_config) -> None:
    config = make_config(train__compile=True, train__steps=1, train__warmup_steps=0).train
    mode = choose_precision("tf32", CPU)
    assert mode.emulated
    with pytest.warns(UserWarning, match="train.compile=true runs eagerly: tf32 is emulated"):
        state = training_step.start(model, config, mode, narrowing=1.0)
    assert len(list(loop.fit(state, config, lambda step: [batch(2)]))) == 1


def test_a_missing_compiler_is_a_reason_not_an_error(monkeypatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert why_not_compile(choose_precision("fp32", CPU)) == "no C++ compiler was found"


def test_a_compiler_that_fails_on_the_first_step_is_left_for_eager(
    model, make_config, monkeypatch
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def broken(*_: object, **__: object) -> torch.Tensor:
        raise TorchDynamoException("no Python.h\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(compiling, "why_not_compile", lambda precision: "")
    config = make_config(train__compile=True, train__steps=2, train__warmup_steps=0).train
    state = start(model, config)
    with pytest.warns(UserWarning, match="runs eagerly: no Python.h$"):
        reports = list(loop.fit(state, config, lambda step: [batch(2)]))
    assert len(reports) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("head", ["in_one_buffer", "by_chunks"])  # of a CPU, of a GPU
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_compiled_step_equals_an_eager_one_and_leaves_names_alone(
    model, make_config, head: str, dtype: str, monkeypatch
) -> None:
    monkeypatch.setattr(loss._Head, "in_one_buffer", getattr(loss._Head, head))
    monkeypatch.setitem(precision.DEVICES, "cpu", lambda name, device: (name, "", False))
    results = []
    for compiled in (False, True):
        config = make_config(train__compile=compiled, train__steps=3, train__warmup_steps=1).train
        state = start(model, config, dtype)
        two = lambda step: [batch(2, seed=step), batch(2, seed=step + 9)]  # noqa: E731
        reports = list(loop.fit(state, config, two))
        assert not [name for name in state.model.state_dict() if "_orig_mod" in name]
        results.append([report.loss for report in reports])
    near = 1e-4 if dtype == "fp32" else 2**-9  # the compiler leaves out roundings between fused ops
    assert results[1] == pytest.approx(results[0], rel=near)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def traced(monkeypatch):
    """torch.compile as it is, without its last and slow part: what is traced is run as it is."""
    real = torch.compile

    def compiled(function, **how):
        how.pop("mode", None)
        return real(function, backend="aot_eager", **how)

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compiling, "why_not_compile", lambda precision: "")
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_evaluation_and_sampling_between_steps_make_no_new_graph(
    model, make_config, traced, accumulate: int
) -> None:
    config = make_config(train__compile=True, train__steps=4, train__warmup_steps=1)
    state = start(model, config.train)
    assert graphs() == 0
    for report in loop.fit(
        state, config.train, lambda step: [batch(2, seed=step + n) for n in range(accumulate)]
    ):
        assert graphs() == 1, f"after step {report.step}"
        mean_loss(state.model, [batch(3), batch(1)], state.precision, CPU)
        state.model.eval()  # and left so: the step has to put it right itself
        generation.generate(
            state.model, torch.zeros(2, 5, dtype=torch.int64), config.sample, torch.Generator()
        )
        assert graphs() == 1, f"evaluation or sampling after step {report.step}"
    assert counters["stats"]["calls_captured"] > 0


def test_the_counter_sees_a_graph_made_anew(model, make_config, traced) -> None:
    config = make_config(train__compile=True, train__steps=2, train__warmup_steps=0).train
    state = start(model, config)
    list(loop.fit(state, config, lambda step: [batch(2 + step)]))  # another shape
    assert graphs() == 2


@pytest.mark.parametrize("attention", ATTENTION)
def test_the_whole_model_is_one_graph_without_a_break(make_config, traced, attention: str) -> None:
    config = make_config(train__compile=True, train__steps=1, train__warmup_steps=0).train
    model = GPT(replace(SHAPE, attention=attention))
    list(loop.fit(start(model, config), config, lambda step: [batch(2)]))
    assert graphs() == 1 and not counters["graph_break"]


def test_a_gpus_passes_over_the_logits_are_one_graph_more(
    model, make_config, traced, monkeypatch
) -> None:
    monkeypatch.setattr(loss._Head, "in_one_buffer", loss._Head.by_chunks)
    monkeypatch.setattr(loss, "MAX_LOGIT_BYTES", 4 * 128 * 8)  # four chunks of one size
    config = make_config(train__compile=True, train__steps=2, train__warmup_steps=0).train
    list(loop.fit(start(model, config), config, lambda step: [batch(2), batch(2, seed=1)]))
    assert graphs() == 2 and not counters["graph_break"]
