"""fp8: numbers rounded as a float64 reference does, products exact where they can be, gradients."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.compute import fp8
from pipeline.compute import precision as precision_module
from pipeline.compute.fp8 import BACKWARD, FORWARD, scaled
from pipeline.compute.precision import choose_precision
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.loss import linear_cross_entropy
from pipeline.studies.number_formats import formats, unit_roundoff
from pipeline.studies.op_dtypes import Watch
from pipeline.training import loop, training_step

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=97, vocab_rows=128)
NAMES = {FORWARD: "fp8_e4m3", BACKWARD: "fp8_e5m2"}


@pytest.fixture(params=["native bf16", "no bf16"])
def cpu(request, monkeypatch):
    known = {"avx512_bf16": True} if request.param == "native bf16" else {}
    monkeypatch.setattr(precision_module, "_cpu_capabilities", lambda: known)


@pytest.fixture
def model(make_config) -> GPT:
    made = GPT(SHAPE)
    initialize(made, make_config().init, torch.Generator().manual_seed(0))
    return made


def rounded(x: np.ndarray, name: str) -> np.ndarray:
    """float64 to the nearest number of the format, ties to even, by arithmetic alone."""
    kind = next(f for f in formats() if f.name == name)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(x)))
    gap = 2.0 ** np.maximum(exponent, math.log2(kind.smallest_normal)) * kind.epsilon
    return np.clip(np.round(x / gap) * gap, -kind.largest, kind.largest)


# Rounding


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
@pytest.mark.parametrize("largest", [1.0, 448.0, 449.0, 57344.0, 3e-30, 2.0**100, 1.7 * 2.0**-7])
def test_rounding_equals_a_float64_reference_at_every_kind_of_number(dtype, largest) -> None:
    chance = np.random.default_rng(0)
    spread = chance.choice([-1, 1], 4000) * 2.0 ** chance.uniform(-40, 0, 4000)
    ties = np.arange(1, 256) / 256  # halfway cases of both formats, and neighbours
    x = np.float32(largest) * np.concatenate([[1.0, -1.0, 0.0], ties, -ties, spread])
    x = torch.from_numpy(x.astype(np.float32))
    found = scaled(x, dtype, emulated=True)
    unit = found.unit.double().item()
    assert math.frexp(unit)[0] == 0.5, "a power of two"
    expected = rounded(x.double().numpy() / unit, NAMES[dtype])
    assert np.array_equal(found.values.double().numpy(), expected)
    top = found.values.abs().max().item()
    limit = torch.finfo(dtype).max
    assert limit / 2 <= top <= limit, "the range is used to its last power of two"


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_emulated_numbers_are_those_of_torchs_dtype(dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    held, real = scaled(x, dtype, emulated=True), scaled(x, dtype, emulated=False)
    assert real.values.dtype is dtype and held.values.dtype is torch.float32
    assert torch.equal(held.values, real.values.float()) and held.unit == real.unit


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_what_is_not_finite_stays_so(dtype, value) -> None:
    found = scaled(torch.tensor([1.0, value]), dtype, emulated=True)
    assert not (found.values * found.unit)[1].isfinite()


def test_zeros_stay_zeros() -> None:
    found = scaled(torch.zeros(3), FORWARD, emulated=True)
    assert torch.equal(found.values, torch.zeros(3)) and found.unit.isfinite()


# Products


@pytest.mark.parametrize("emulated", [True, False])
def test_products_of_small_integers_are_exact(emulated) -> None:
    chance = torch.Generator().manual_seed(2)
    x, weight, bias = (
        torch.randint(-3, 4, size, generator=chance).float()
        for size in ((2, 5, 16), (24, 16), (24,))
    )
    x[0, 0, 0], weight[0, 0] = 15.0, 15.0  # the largest that 4 significant bits hold beside 1
    exact = F.linear(x.double(), weight.double(), bias.double())
    found = fp8.linear(x, weight, bias, emulated=emulated)
    assert torch.equal(found, exact.bfloat16()), "sums within bf16's 8 bits, or rounded once"
    assert exact.abs().max() > 200


def test_gradients_of_small_integers_are_exact() -> None:
    chance = torch.Generator().manual_seed(3)
    x, weight, bias, grad = (
        torch.randint(-2, 3, size, generator=chance).float()
        for size in ((7, 16), (24, 16), (24,), (7, 24))
    )
    results = []
    for function in (lambda *a: fp8.linear(*a, emulated=True), F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        function(*leaves).backward(grad)
        results.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shape", [(48, 32, 64), (5, 24, 40), (1, 16, 16)])
def test_the_emulation_equals_torchs_own_kernel_bit_for_bit(shape) -> None:
    """On the CPU torch has one too, slow; it stands for the GPU's, padding and layout included."""
    rows, inner, columns = shape
    results = []
    for emulated in (True, False):
        torch.manual_seed(4)
        x, weight, bias = (
            torch.randn(rows, inner),
            torch.randn(columns, inner),
            torch.randn(columns),
        )
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        y = fp8.linear(*leaves, emulated=emulated)
        y.backward(torch.randn(rows, columns).bfloat16())
        results.append([y, *(leaf.grad for leaf in leaves)])
    for held, real in zip(*results, strict=True):
        assert held.dtype is real.dtype
        # Sums in another order may round to the neighbour.
        torch.testing.assert_close(held, real, rtol=2 * unit_roundoff("bf16"), atol=1e-5)


def test_the_error_of_a_product_is_that_of_rounded_operands() -> None:
    chance = torch.Generator().manual_seed(5)
    a, b = (torch.randn(64, 256, generator=chance) for _ in range(2))
    found = fp8.product(scaled(a, FORWARD, True), scaled(b, FORWARD, True).t()).double()
    error = ((found - a.double() @ b.double().t()).norm() / (a @ b.t()).norm()).item()
    # Uniform within a roundoff of 2^-4, of two operands: 2^-4 * sqrt(2 / 3) at the very most.
    assert unit_roundoff("fp8_e4m3") / 3 < error < unit_roundoff("fp8_e4m3") * math.sqrt(2 / 3)


# Training


def gradients(model: GPT, name: str) -> torch.Tensor:
    chosen = choose_precision(name, CPU)
    chosen.prepare(model)
    ids = torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(6))
    model.zero_grad()
    with chosen.products():
        with chosen.autocast():
            loss = linear_cross_entropy(
                *(model.hidden(ids[:, :-1]), model.transformer.wte.weight, ids[:, 1:], chosen),
                vocab_size=97,
                scale=1 / 64,
            )
        loss.backward()
    assert loss.dtype is torch.float32
    assert all(p.grad.dtype is torch.float32 for p in model.parameters())
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_are_fp32s_within_the_formats_roundoff_and_not_bf16s(model, cpu) -> None:
    exact = gradients(model, "fp32")
    off = {n: ((gradients(model, n) - exact).norm() / exact.norm()).item() for n in ("bf16", "fp8")}
    assert off["bf16"] < off["fp8"] / 4
    assert unit_roundoff("fp8_e4m3") / 8 < off["fp8"] < 2 * unit_roundoff("fp8_e5m2")


def test_the_linear_layers_of_the_blocks_are_fp8_and_nothing_else_is(
    model, make_config, cpu
) -> None:
    config = make_config(train__steps=1, train__warmup_steps=0).train
    state = training_step.start(model, config, choose_precision("fp8", CPU), narrowing=1.0)
    watch = Watch(state)
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(7))
    batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    list(watch.first_of(loop.fit(state, config, lambda step: batches)))
    products = [row for row in watch.rows if row.is_product()]
    forward = {row.where: row.mode for row in products if row.phase == "forward"}
    layers = ("h.*.attn.c_attn", "h.*.attn.c_proj", "h.*.mlp.c_fc", "h.*.mlp.c_proj")
    assert {forward[layer] for layer in layers} == {"fp8_e4m3 -> bf16"}
    assert forward["head and loss"] == "bf16 -> bf16"
    assert not [m for where, m in forward.items() if where not in layers and "fp8" in m]
    backward = {row.mode for row in products if row.phase == "backward" and "fp8" in row.mode}
    assert backward == {"fp8_e5m2+fp8_e4m3 -> bf16"}
    assert "is still bf16" in watch.page()


def test_a_tiny_training_learns(model, make_config) -> None:
    config = make_config(train__steps=30, train__warmup_steps=2, train__lr=3e-3).train
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(8))
    batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    ends = {}
    for name in ("fp32", "fp8"):
        state = training_step.start(
            copy.deepcopy(model), config, choose_precision(name, CPU), narrowing=1.0
        )
        losses = [report.loss for report in loop.fit(state, config, lambda step: batches)]
        assert losses[0] == pytest.approx(math.log(97), rel=0.05)
        ends[name] = losses[-1]
    assert ends["fp8"] < losses[0] - 1.5
    assert ends["fp8"] == pytest.approx(ends["fp32"], rel=0.02) and ends["fp8"] != ends["fp32"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_the_compiler_takes_the_products_in_one_graph(model) -> None:
    """The layers are Python that a compiled step has to see through."""
    torch._dynamo.reset()
    x = torch.randn(2, 4, 32)
    block = model.transformer.h[0]
    compiled = torch.compile(
        lambda x: block(x, 0, None), backend="aot_eager", fullgraph=True, dynamic=False
    )
    fp8.mark(block, fp8=True, emulated=False)
    expected = block(x, 0, None)
    torch.testing.assert_close(compiled(x), expected)
    fp8.mark(block, fp8=False, emulated=False)
    plain = compiled(x)
    assert not torch.equal(plain, expected), "without marks the same function is fp32's"
    torch.testing.assert_close(plain, block(x, 0, None))
    torch._dynamo.reset()


class Reductions(TorchDispatchMode):
    """What is reduced along columns, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if len(args) > 1 and args[1] == [0]:
            self.columns.append((func.overloadpacket.__name__, args[0].shape))
        return func(*args, **(kwargs or {}))


def test_a_gradients_magnitude_and_its_bias_are_reductions_of_one_shape() -> None:
    """So the compiler makes both in one pass; elsewhere the gradient would be computed again."""
    leaves = [torch.randn(*size, requires_grad=True) for size in ((48, 32), (64, 32), (64,))]
    y = fp8.linear(*leaves, emulated=True)
    with Reductions() as seen:
        y.backward(torch.randn(48, 64).bfloat16())
    assert seen.columns == [("amax", (48, 64)), ("sum", (48, 64))]


@pytest.mark.parametrize("value", [3.0, -7.0, math.nan, math.inf])
def test_the_order_in_which_the_largest_is_sought_changes_nothing(value: float) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(9))
    x[3, 2] = value
    whole, by_columns = (scaled(x, BACKWARD, True, first) for first in ((), 0))
    both = (map(torch.nan_to_num, vars(s).values()) for s in (whole, by_columns))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)
