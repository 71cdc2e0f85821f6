"""The network as sampling runs it equals the network, whatever its products are made of."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pipeline.compute.precision import choose_precision
from pipeline.inference import decoding
from pipeline.inference.decoding import Decoder, FixedCache, Step, mean_loss
from pipeline.inference.int8 import quantize
from pipeline.model import loss
from pipeline.model.gpt import GPT, GPTConfig, KVCache
from pipeline.training import compiling
from tests.helpers import stand_in

SHAPE = GPTConfig(2, 4, 32, 16, 61, 64, dropout=0.5)
CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)


def tiny(**changes: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def ids(batch: int, tokens: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(batch)
    return torch.randint(SHAPE.vocab_size, (batch, tokens), generator=random)


def held(weight: torch.Tensor) -> torch.Tensor:
    """What int8 keeps of a weight."""
    rounded, scale = quantize(weight)
    return rounded * scale[:, None]


def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "has_onednn", lambda: False)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("onednn", [True, False])
@torch.no_grad()
def test_logits_are_the_models_whatever_the_layout(
    rows: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        without_onednn(monkeypatch)
    model = tiny()
    decoder = Decoder(model, FP32, rows=rows)
    idx = ids(rows, 9)
    expected = copy.deepcopy(model).eval()(idx)
    torch.testing.assert_close(decoder.logits(decoder.hidden(idx)), expected, rtol=1e-4, atol=1e-4)


def test_the_layout_follows_the_rows_the_precision_and_what_torch_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if decoding.has_onednn():
        assert type(Decoder(tiny(), FP32, rows=1).head) is decoding.OneDnnLinear
        assert type(Decoder(tiny(), FP32, rows=8).head) is decoding.OneDnnLinear
    for name in ("bf16", "fp16", "tf32"):
        precision = choose_precision(name, CPU)
        head = Decoder(tiny(), precision, rows=1).head
        assert type(head) is (decoding.Linear if precision.emulated or name != "tf32" else None)
        assert head.weight.dtype is precision.dtype
    without_onednn(monkeypatch)
    assert type(Decoder(tiny(), FP32, rows=1).head) is decoding.Linear
    assert type(Decoder(tiny(), FP32, rows=8).head) is decoding.Linear


@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
@torch.no_grad()
def test_a_low_precision_has_the_numerics_that_it_has_in_the_model(name: str) -> None:
    model, precision = tiny().eval(), choose_precision(name, CPU)
    decoder = Decoder(model, precision)
    with decoder.computing():
        ours, theirs = decoder.logits(decoder.hidden(ids(2, 9))), model(ids(2, 9))
    assert torch.equal(ours, theirs)


def test_one_row_multiplies_the_models_own_memory() -> None:
    if not decoding.has_onednn():
        pytest.skip("torch without oneDNN keeps a copy")
    model = tiny()
    assert (
        Decoder(model, FP32, rows=1).head.weight.data_ptr()
        == model.transformer.wte.weight.data_ptr()
    )


def test_the_model_is_left_as_it_is() -> None:
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    decoder = Decoder(model, FP32, "int8", rows=3)
    assert all(module.training for module in model.modules())
    assert type(model.transformer.h[0].attn.c_attn) is nn.Linear
    assert not decoder.body.transformer.h[1].mlp.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_int8_logits_are_those_of_a_model_with_the_rounded_weights() -> None:
    model, idx = tiny().eval(), ids(2, 9)
    decoder = Decoder(model, FP32, "int8")
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(held(module.weight))
    head = held(model.transformer.wte.weight)  # the look-up keeps its fp32
    expected = (rounded.hidden(idx) @ head.t())[..., : SHAPE.vocab_size]
    ours = decoder.logits(decoder.hidden(idx))
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4)
    assert (ours - model(idx)).abs().max() > 2e-3, "rounding that nobody sees would prove little"


def test_the_loss_by_fp32_products_is_the_validation_loss() -> None:
    model = tiny()
    windows = [(ids(4, 17)[:, :-1], ids(4, 17)[:, 1:]), (ids(1, 6)[:, :-1], ids(1, 6)[:, 1:])]
    expected = loss.mean_loss(model, windows, choose_precision("fp32", CPU), CPU)
    assert mean_loss(Decoder(model, FP32), windows) == pytest.approx(expected, rel=1e-5)
    assert mean_loss(Decoder(model, FP32, "int8"), windows) != pytest.approx(expected, rel=1e-5)


# --- what a CUDA graph holds, run step by step


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIECE", 4)
    monkeypatch.setattr(decoding, "READ", 4)


def compare(
    decoder: Decoder, padding: list[int] | None = None, compile: bool = False, near: float = 1e-5
) -> Step:
    """Seven steps behind a prompt of five, each against one of the growing cache."""
    rows = 1 if padding is None else len(padding)
    idx = ids(rows, 12).to(decoder.precision.device)
    growing = [decoder.new_cache(idx[:, :5], 7) for _ in range(2)]
    for cache in growing:
        cache.padding = None if padding is None else torch.tensor(padding, device=idx.device)
        decoder.hidden(idx[:, :5], cache)
    step = Step(decoder, growing[1], compile)
    for column in range(5, 12):
        token = idx[:, column : column + 1]
        expected = decoder.logits(decoder.hidden(token, growing[0])[:, -1]).cpu()
        torch.testing.assert_close(step(token, column).cpu(), expected, rtol=near, atol=near)
    return step


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
@pytest.mark.parametrize("padding", [None, [3, 0, 1]])
@torch.no_grad()
def test_a_step_at_fixed_addresses_equals_a_step_of_the_growing_cache(
    padding, attention: str, small_pieces
) -> None:
    compare(Decoder(tiny(attention=attention), FP32, rows=3 if padding else 1), padding)


@torch.no_grad()
def test_a_step_reads_the_cache_as_far_as_it_is_filled(small_pieces, monkeypatch) -> None:
    seen, extend = [], FixedCache.extend

    def look(cache: FixedCache, *given) -> tuple[torch.Tensor, torch.Tensor]:
        both = extend(cache, *given)
        seen.append({part.size(2) for part in both})
        return both

    monkeypatch.setattr(FixedCache, "extend", look)
    compare(Decoder(tiny(), FP32))
    assert seen[::2] == [{8}] * 3 + [{12}] * 4  # of columns 5 to 7, and 8 to 11


@torch.no_grad()
def test_the_fewer_rows_the_larger_is_a_piece() -> None:
    pieces = {}
    for rows in (1, 3, 8, 64):
        cache = KVCache(SHAPE, rows, capacity=decoding.PIECE)
        pieces[rows] = Step(Decoder(tiny(), FP32), cache)._piece
    assert pieces == {1: 1024, 3: 384, 8: 128, 64: 128}


# --- compiled


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch):
    """torch.compile as it is, but for its last and slow part, and the options of that."""
    real = torch.compile
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch, "compile", lambda f, options, **how: real(f, backend="aot_eager", **how)
    )
    monkeypatch.setattr(compiling, "why_not_compile", lambda precision: "")
    without_onednn(monkeypatch)
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_step_is_one_graph_for_every_length_cache_and_decoder(
    traced, small_pieces
) -> None:
    compare(Decoder(tiny(), FP32), compile=True)  # two pieces
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    decoder, idx = Decoder(tiny(), FP32), ids(1, 4)
    for prompt, new in ((3, 9), (1, 3)):  # caches of other lengths
        cache = decoder.new_cache(idx[:, :prompt], new)
        decoder.hidden(idx[:, :prompt], cache)
        Step(decoder, cache, compile=True)(idx[:, :1], prompt)
    assert counters["stats"]["unique_graphs"] == 1
    compare(Decoder(tiny(), FP32, rows=3), [3, 0, 1], compile=True)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("weights", ["fp32", "int8"])
@torch.no_grad()
def test_a_compiled_step_equals_an_eager_one(weights: str, small_pieces, monkeypatch) -> None:
    without_onednn(monkeypatch)
    if reason := compiling.why_not_compile(FP32):
        pytest.skip(reason)
    torch._dynamo.reset()
    counters.clear()
    # int8 products take activations in 16 bits, whose last one a fused kernel may round otherwise.
    near = 1e-4 if weights == "int8" else 1e-5
    compare(Decoder(tiny(), FP32, weights), compile=True, near=near)
    assert counters["stats"]["unique_graphs"] == 1, "it ran eagerly"


@torch.no_grad()
def test_a_step_that_cannot_be_compiled_says_why_and_runs_eagerly(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "why_not_compile", lambda precision: "no triton")
    with pytest.warns(UserWarning, match="sample.compile=true runs eagerly: no triton"):
        compare(Decoder(tiny(), FP32), compile=True)


# --- captured


@torch.no_grad()
def test_a_fixed_step_takes_a_cache_of_a_lower_format() -> None:
    decoder, idx = Decoder(tiny(), FP32), ids(1, 6)
    cache = KVCache(SHAPE, 1, dtype=torch.bfloat16, capacity=decoding.PIECE)
    decoder.hidden(idx, cache)
    logits = Step(decoder, cache)(idx[:, -1:], 6)
    assert logits.dtype is torch.float32 and logits.isfinite().all()


@torch.no_grad()
def test_a_piece_is_captured_once_and_replayed_with_new_tokens(
    small_pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in.gpu(monkeypatch):
        precision = choose_precision("fp32", torch.device("cuda"))
        step = compare(Decoder(tiny().to("cuda"), precision, rows=3), [3, 0, 1])
        replayed = {end: graph.replayed for end, (graph, _) in step._graphs.items()}
        assert replayed == {8: 3, 12: 4}


@torch.no_grad()
def test_a_step_that_waits_for_the_device_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stand_in.gpu(monkeypatch):
        decoder, idx = (
            Decoder(tiny().to("cuda"), choose_precision("fp32", torch.device("cuda")), rows=1),
            ids(1, 6).to("cuda"),
        )
        step = Step(decoder, decoder.new_cache(idx, 3))
        run = step._run
        monkeypatch.setattr(step, "_run", lambda c: run(c) if run(c).isfinite().all() else None)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            step(idx[:, -1:], 0)


def test_a_fixed_cache_takes_one_token_a_row() -> None:
    decoder = Decoder(tiny(), FP32)
    with pytest.raises(AssertionError, match="one token"):
        FixedCache(decoder.new_cache(ids(1, 3), 3), decoder).begin(2)
