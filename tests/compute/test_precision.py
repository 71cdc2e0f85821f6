import subprocess
import sys
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.compute import precision as precision_module
from pipeline.compute.emulation import (
    EmulatedProducts,
    exact_products,
    round_tf32,
    round_to,
)
from pipeline.compute.precision import PRECISIONS, Precision, choose_precision
from pipeline.errors import ConfigError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.loss import linear_cross_entropy
from tests.helpers import stand_in

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "linear", "matmul", "scaled_dot_product")


@pytest.fixture
def bare_cpu(monkeypatch):
    """A CPU that multiplies nothing but fp32."""
    monkeypatch.setattr(precision_module, "_cpu_capabilities", dict)


@pytest.fixture(params=["sdpa", "naive"])
def model(request):
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 2, 32, 16, 100, 104, attention=request.param))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def mode(name, emulated):
    """A precision of this CPU, emulated or not whatever instructions it has."""
    return Precision(name, name, "", emulated, CPU, PRECISIONS[name])


def gradients(model, precision, scale=1.0, products=None):
    """{name: gradient} of one batch, the loss through `linear_cross_entropy`."""
    precision.prepare(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 100, (4, 17), generator=generator)
    model.zero_grad()
    with products or precision.products():
        with precision.autocast():
            loss = linear_cross_entropy(
                model.hidden(x[:, :-1]),
                model.transformer.wte.weight,
                x[:, 1:],
                precision,
                vocab_size=100,
                scale=scale / 64,
            )
        loss.backward()
    assert loss.dtype is torch.float32
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(a, b):
    """Relative, over all of two dictionaries of tensors."""
    a, b = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


class KernelDtypes(TorchDispatchMode):
    """Entered first, it sees what is left after the modes inside it: what kernels really get."""

    def __init__(self):
        super().__init__()
        self.low = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        product = any(part in PRODUCTS for part in str(func).split(".")) or "dot_product" in str(
            func
        )
        if product and any(getattr(a, "dtype", None) in LOW.values() for a in args):
            self.low.append(str(func))
        return func(*args, **(kwargs or {}))


# What is asked, what is effective, why


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_cpu_without_instructions_emulates_and_says_so(name, bare_cpu):
    chosen = choose_precision(name, CPU)
    assert (chosen.asked, chosen.effective, chosen.device) == (name, name, CPU)
    assert chosen.dtype is PRECISIONS[name]
    assert chosen.emulated == (name != "fp32") == ("emulated" in chosen.reason)


@pytest.mark.parametrize(
    "name, instruction", [("bf16", "avx512_bf16"), ("bf16", "amx_bf16"), ("fp16", "amx_fp16")]
)
def test_a_cpu_with_the_instructions_uses_them(name, instruction, monkeypatch):
    monkeypatch.setattr(precision_module, "_cpu_capabilities", lambda: {instruction: True})
    chosen = choose_precision(name, CPU)
    assert (chosen.effective, chosen.reason, chosen.emulated) == (name, "", False)
    assert choose_precision("tf32", CPU).emulated, "no CPU has tf32"


@pytest.mark.parametrize(
    "capability, effective",
    [((7, 5), "fp32"), ((8, 0), "bf16"), ((8, 6), "bf16"), ((8, 9), "fp8"), ((9, 0), "fp8")],
)
def test_cuda_has_fp8_from_capability_8_9(capability, effective, monkeypatch):
    stand_in.pretend(monkeypatch, capability)
    chosen = choose_precision("fp8", CUDA)
    assert chosen.effective == effective and not chosen.emulated
    said = f"fp8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    assert (said in chosen.reason) == (effective != "fp8")
    assert chosen.dtype is PRECISIONS[effective]


@pytest.mark.parametrize(
    "capability, effective", [((7, 5), "fp32"), ((8, 0), None), ((9, 0), None)]
)
def test_cuda_has_tf32_and_bf16_from_capability_8(capability, effective, monkeypatch):
    stand_in.pretend(monkeypatch, capability)
    for name in ("tf32", "bf16"):
        chosen = choose_precision(name, CUDA)
        assert chosen.effective == (effective or name) and not chosen.emulated
        assert chosen.dtype is PRECISIONS[chosen.effective]
        assert ("compute capability 8.0, this GPU has 7.5" in chosen.reason) == bool(effective)
    assert choose_precision("fp16", CUDA).effective == "fp16"
    assert choose_precision("fp16", CUDA).reason == ""


def test_fp16_runs_on_a_gpu_without_tensor_cores_and_says_so(monkeypatch):
    stand_in.pretend(monkeypatch, (6, 1))
    chosen = choose_precision("fp16", CUDA)
    assert (chosen.effective, chosen.emulated, chosen.dtype) == ("fp16", False, torch.float16)
    assert "tensor cores need compute capability 7.0, this GPU has 6.1" in chosen.reason
    stand_in.pretend(monkeypatch, (7, 0))
    assert choose_precision("fp16", CUDA).reason == ""


def test_mps_has_no_tf32():
    assert choose_precision("tf32", MPS).effective == "fp32"
    assert choose_precision("fp8", MPS).effective == "bf16"
    assert "no tf32" in choose_precision("tf32", MPS).reason
    assert choose_precision("bf16", MPS).effective == "bf16"


def test_an_unknown_precision_is_named_with_the_choices():
    with pytest.raises(
        ConfigError, match=r"precision=fp4: expected one of fp32, tf32, bf16, fp16, fp8"
    ):
        choose_precision("fp4", CPU)


def test_only_fp16_scales_its_loss():
    enabled = {name: choose_precision(name, CPU).make_scaler().is_enabled() for name in PRECISIONS}
    assert [name for name, on in enabled.items() if on] == ["fp16"]


@pytest.mark.parametrize("name", PRECISIONS)
def test_autocast_makes_products_of_the_chosen_dtype(name):
    chosen = choose_precision(name, CPU)
    with chosen.products(), chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is PRECISIONS[name]


# torch's settings


def test_products_set_cuda_tf32_and_restore_it_even_after_an_error(monkeypatch):
    stand_in.pretend(monkeypatch, (9, 0))
    before = torch.get_float32_matmul_precision()
    for name, inside in (("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")):
        with pytest.raises(KeyError), choose_precision(name, CUDA).products():
            assert torch.get_float32_matmul_precision() == inside
            raise KeyError
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("both", [(True, True), (False, True), (False, False)])
def test_cuda_products_add_up_in_fp32_and_leave_torchs_settings_as_they_were(monkeypatch, both):
    stand_in.pretend(monkeypatch, (9, 0))
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{name}_reduced_precision_reduction" for name in LOW]

    def settings():
        return [(getattr(matmul, n), getattr(matmul, f"{n}_split_k")) for n in names]

    first = settings()
    try:
        for name in names:
            setattr(matmul, name, both)
        for name in PRECISIONS:
            with pytest.raises(KeyError), choose_precision(name, CUDA).products():
                assert settings() == [(False, both[1])] * 2
                raise KeyError
            assert settings() == [both] * 2
    finally:
        for name, values in zip(names, first, strict=True):
            setattr(matmul, name, values)


def test_getters_of_torch_work_after_every_precision_in_a_fresh_process():
    script = """
import pytest, torch
from pipeline.compute.precision import PRECISIONS, Precision, choose_precision
from tests.helpers import stand_in
stand_in.pretend(pytest.MonkeyPatch(), (9, 0))
before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
for device in ("cuda", "cpu", "mps"):
    for name in PRECISIONS:
        precision = choose_precision(name, torch.device(device))
        with precision.products():  # the getters agree inside as well: torch.compile asks there
            tf32 = device == "cuda" and name == "tf32"
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert torch.backends.cuda.matmul.allow_tf32 == tf32
after = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
assert before == after == ("highest", False), (before, after)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
def test_emulation_ends_with_its_context_and_stays_in_its_thread(name, bare_cpu):
    def multiply():
        torch.ones(2, 2, dtype=PRECISIONS[name]) @ torch.ones(2, 2, dtype=PRECISIONS[name])

    with choose_precision(name, CPU).products() as products:
        thread = threading.Thread(target=multiply)
        thread.start()
        thread.join()
        assert products.count == 0
        multiply()
        assert products.count == 1
        with exact_products():
            multiply()
        assert products.count == 1
    multiply()
    assert products.count == 1


# Roundings


def reference_tf32(x):
    """Nearest of the two neighbours with 10 mantissa bits, in exact float64, ties to the larger."""
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = np.abs(x.astype(np.float64))
        exponent = np.maximum(np.frexp(magnitude)[1] - 1, -126)
        unit = np.ldexp(1.0, exponent - 10)
        rounded = np.floor(magnitude / unit + 0.5) * unit
        return np.copysign(np.where(np.isfinite(x), rounded, magnitude), x).astype(np.float32)


def test_tf32_rounding_equals_a_float64_reference_at_every_kind_of_number():
    generator = np.random.default_rng(0)
    anything = generator.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (anything & 0xFFFFE000) | 0x1000
    around = np.concatenate([ties, ties - 1, ties + 1, anything & 0xFFFFE000])
    edges = np.array([0x7F800000, 0xFF800000, 0, 1 << 31, 1, 0x007FFFFF, 0x7F7FFFFF], np.uint32)
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32)
    x = np.concatenate([anything, around, edges, nans]).view(np.float32)
    ours = round_tf32(torch.from_numpy(x)).numpy()
    numbers = ~np.isnan(x)
    assert np.array_equal(ours[numbers].view(np.int32), reference_tf32(x[numbers]).view(np.int32))
    assert np.isnan(ours[~numbers]).all()
    finite = np.isfinite(x) & (np.abs(x) < 1e30)  # the quick way, where no NaN is about
    quick = round_tf32(torch.from_numpy(x[finite])).numpy()
    assert np.array_equal(quick, reference_tf32(x[finite]))


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
def test_rounding_in_place_and_in_pieces_equals_rounding_at_once(name, monkeypatch):
    x = torch.randn(7, 11)
    expected = round_tf32(x) if name == "tf32" else x.to(LOW[name]).float()
    monkeypatch.setattr("pipeline.compute.emulation.PIECE", 10)
    assert torch.equal(round_to(x, name), expected)
    assert torch.equal(round_to(x.t(), name), expected.t())
    assert round_to(x, name, out=x) is x and torch.equal(x, expected)


# Emulated products


def operations(a, b):
    """(name, product) for (M, K) and (K, N): every kind that the emulation knows."""
    bias, row = a.new_ones(b.size(1)), b[:, 0].contiguous()
    yield "mm", lambda: a @ b
    yield "linear", lambda: F.linear(a, b.t(), bias)
    yield "bmm", lambda: (a.expand(2, -1, -1) @ b.expand(2, -1, -1))[0]
    yield "baddbmm", lambda: torch.baddbmm(bias, a[None], b[None])[0]
    yield "mv", lambda: torch.mv(a, row)
    yield "addmv", lambda: torch.addmv(row.new_ones(a.size(0)), a, row)
    yield "dot", lambda: torch.dot(a[0], row)


@pytest.mark.parametrize("name", LOW)
def test_products_of_small_integers_are_exact(name):
    a, b = torch.randint(-4, 5, (8, 16)).to(LOW[name]), torch.randint(-4, 5, (16, 5)).to(LOW[name])
    exact = dict(operations(a.double(), b.double()))
    for kind, product in operations(a, b):
        with EmulatedProducts(name) as mode:
            result = product()
        assert mode.count == 1, kind
        assert result.dtype is LOW[name] and result.equal(exact[kind]().to(LOW[name])), kind


@pytest.mark.parametrize("name", LOW)
def test_products_are_within_one_unit_of_the_exact_value_rounded_once(name):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator).to(LOW[name]) for s in ((32, 64), (64, 24)))
    exact = dict(operations(a.double(), b.double()))
    for kind, product in operations(a, b):
        with EmulatedProducts(name):
            ours = product()
        once = exact[kind]().to(LOW[name])
        assert within_one_unit(ours, once), kind


def backward(a, b, outer, bias):
    """(name, gradients) of every kind of product that has matrix products for gradients."""
    forms = {
        "mm": lambda a, b: a @ b,
        "linear": lambda a, b: F.linear(a, b.t(), bias),
        "bmm": lambda a, b: (a[None] @ b[None])[0],
        "baddbmm": lambda a, b: torch.baddbmm(bias, a[None], b[None])[0],
    }
    for name, form in forms.items():
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        yield name, torch.autograd.grad(form(*leaves), leaves, outer)


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
def test_gradients_of_small_integers_are_exact(name):
    dtype = LOW.get(name, torch.float32)
    shapes = (8, 16), (16, 5), (8, 5), (5,)
    operands = [torch.randint(-4, 5, shape).to(dtype) for shape in shapes]
    exact = dict(backward(*(x.double() for x in operands)))
    with EmulatedProducts(name) as mode:
        found = dict(backward(*operands))
    assert mode.count == 3 * len(exact)
    for kind, gradients in found.items():
        for ours, double in zip(gradients, exact[kind], strict=True):
            assert ours.dtype is dtype and ours.equal(double.to(dtype)), kind


@pytest.mark.parametrize("name", LOW)
def test_gradients_are_within_one_unit_of_the_exact_value_rounded_once(name):
    generator = torch.Generator().manual_seed(0)
    shapes = (32, 64), (64, 24), (32, 24), (24,)
    operands = [torch.randn(s, generator=generator).to(LOW[name]) for s in shapes]
    exact = dict(backward(*(x.double() for x in operands)))
    with EmulatedProducts(name):
        found = dict(backward(*operands))
    for kind, gradients in found.items():
        for ours, double in zip(gradients, exact[kind], strict=True):
            assert within_one_unit(ours, double.to(LOW[name])), kind


@pytest.mark.parametrize("name", LOW)
def test_attention_is_within_one_unit_of_the_exact_value_rounded_once(name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 16, 8, generator=generator).to(LOW[name]) for _ in range(3))
    with EmulatedProducts(name):
        ours = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert within_one_unit(ours, exact.to(LOW[name]))


def within_one_unit(ours, once):
    up, down = (torch.nextafter(once, once.new_full((), s)) for s in (torch.inf, -torch.inf))
    near = ((down <= ours) & (ours <= up)).all()
    return bool(near) and (ours == once).float().mean() > 0.95


def test_tf32_rounds_operands_and_neither_bias_nor_result():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator) for s in ((32, 64), (64, 24)))
    rounded = [round_tf32(x).double() for x in (a, b)]
    for (kind, product), (_, exact) in zip(operations(a, b), operations(*rounded), strict=True):
        with EmulatedProducts("tf32") as mode:
            ours = product()
        assert mode.count == 1 and ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), exact(), rtol=1e-6, atol=1e-5, msg=kind)
    bias = torch.full((24,), 1 + 2.0**-20)
    with EmulatedProducts("tf32"):
        assert torch.equal(torch.addmm(bias, a * 0, b), bias.expand(32, -1))


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("recording", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model", ["sdpa", "naive"], indirect=True)
def test_no_low_product_reaches_a_kernel_forward_backward_or_inferring(name, recording, model):
    emulated = mode(name, emulated=True)
    with KernelDtypes() as kernels, emulated.products() as products, recording():
        if torch.is_grad_enabled():
            gradients(model, emulated, products=nullcontext())
        else:
            with emulated.autocast():
                model(torch.zeros(2, 8, dtype=torch.int64))
    assert not kernels.low
    # 4 linear products a block, each with two in its backward pass, and 1 or 2 of attention.
    assert products.count >= (3 * 8 + 4 if recording is torch.enable_grad else 9 + 2)
    with KernelDtypes() as kernels, torch.no_grad(), torch.autocast("cpu", dtype=LOW[name]):
        model(torch.zeros(2, 8, dtype=torch.int64))
    assert len(kernels.low) >= 11, "the witness itself sees nothing"


@pytest.mark.parametrize("name", LOW)
def test_emulated_gradients_agree_with_native_kernels(name, model):
    native, ours = (gradients(model, mode(name, emulated)) for emulated in (False, True))
    exact = gradients(model, mode("fp32", False))
    assert distance(ours, native) < 0.01
    assert distance(ours, exact) > 1e-4, "nothing was rounded"
    for key in exact:
        assert distance({key: ours[key]}, {key: native[key]}) < 0.03, key


def test_tf32_gradients_differ_from_fp32_by_tf32_roundings(model):
    exact = gradients(model, mode("fp32", False))
    ours = gradients(model, mode("tf32", True))
    assert 1e-5 < distance(ours, exact) < 2e-3


@pytest.mark.parametrize("name", PRECISIONS)
def test_parameters_and_gradients_stay_fp32(name, model):
    chosen = choose_precision(name, CPU)
    found = gradients(model, chosen)
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in found.values()}
    assert {g.dtype for g in found.values()} == {torch.float32}


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("name", LOW)
def test_autocast_table_of_the_operations_that_the_model_uses(name, emulate):
    """Measured, for this torch and device; emulation leaves the table as it is."""
    low, x = LOW[name], torch.randn(1, 2, 4, 4)
    with EmulatedProducts(name) if emulate else nullcontext(), torch.autocast("cpu", dtype=low):
        assert F.linear(x, x[0, 0]).dtype is low
        assert (x @ x).dtype is low
        assert F.scaled_dot_product_attention(x, x, x, is_causal=True).dtype is low
        for follows_its_input in (lambda v: F.softmax(v, -1), lambda v: F.gelu(v)):
            assert follows_its_input(x).dtype is torch.float32
            assert follows_its_input(x.to(low)).dtype is low
        assert F.layer_norm(x, (4,)).dtype is torch.float32
        assert (x + x.to(low)).dtype is torch.float32
        assert F.embedding(torch.zeros(2, dtype=torch.int64), x[0, 0]).dtype is torch.float32


def test_fp16_gradients_clip_to_the_same_at_loss_scales_1_and_65536(model):
    chosen = choose_precision("fp16", CPU)
    clipped = []
    for scale in (1.0, 65536.0):
        found = gradients(model, chosen, scale)
        found = {name: gradient / scale for name, gradient in found.items()}
        norm = torch.nn.utils.get_total_norm(found.values())
        clipped.append({name: gradient / norm for name, gradient in found.items()})
    assert distance(*clipped) < 2e-3


def test_fp16_unscales_steps_and_halves_the_scale_at_an_infinite_gradient(model):
    chosen = choose_precision("fp16", CPU)
    scaler = chosen.make_scaler()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.clone() for p in model.parameters()]
    gradients(model, chosen, scaler.scale(torch.ones(())).item())
    model.transformer.wpe.weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32768.0
    assert all(map(torch.equal, before, model.parameters()))
