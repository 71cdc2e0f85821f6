import math

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from pipeline.compute import buffers
from pipeline.compute.emulation import EmulatedProducts
from pipeline.compute.precision import PRECISIONS, Precision, choose_precision
from pipeline.model import loss as loss_module
from pipeline.model.loss import IGNORE, linear_cross_entropy, token_losses
from tests.helpers.memory import release

ROWS, VOCAB, WIDTH, TOKENS = 104, 100, 16, 24
CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)


def mode(name, emulated):
    """A precision of this CPU, emulated or not whatever instructions it has."""
    return Precision(name, name, "", emulated, CPU, PRECISIONS[name])


@pytest.fixture
def case():
    """hidden (TOKENS, WIDTH), weight (ROWS, WIDTH), targets (TOKENS,) of which two are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[0] = targets[5] = IGNORE
    return hidden, weight, targets


def plain(hidden, weight, targets, precision, *, vocab_size, scale=1.0):
    logits = F.linear(hidden, weight)[..., :vocab_size]
    return token_losses(logits, targets).sum() * scale


def measured(formula, hidden, weight, targets, precision=None, **settings):
    """(loss, hidden's gradient, weight's gradient) as autograd gives them."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    precision = precision or FP32
    with precision.products():
        with precision.autocast():
            loss = formula(hidden, weight, targets, precision, vocab_size=VOCAB, **settings)
        loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_token_losses_are_negative_log_probabilities_and_zero_where_ignored():
    logits = torch.tensor([[[0.0, math.log(3.0)], [2.0, 2.0], [0.0, 9.0]]])
    losses = token_losses(logits.half(), torch.tensor([[0, 1, IGNORE]]))
    assert losses.dtype is torch.float32
    torch.testing.assert_close(
        losses, torch.tensor([[math.log(4), math.log(2), 0.0]]), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("scale", [1.0, 0.3, torch.tensor(4096.0)])
def test_loss_and_gradients_equal_the_plain_formula(case, scale):
    ours, reference = (measured(f, *case, scale=scale) for f in (linear_cross_entropy, plain))
    for a, b in zip(ours, reference, strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(scale))


def test_batches_of_sequences_equal_rows(case):
    hidden, weight, targets = case
    batched = measured(linear_cross_entropy, hidden.view(4, 6, -1), weight, targets.view(4, 6))
    flat = measured(linear_cross_entropy, *case)
    assert torch.equal(batched[0], flat[0])
    assert torch.equal(batched[1].view_as(flat[1]), flat[1])
    assert torch.equal(batched[2], flat[2])


def test_ignored_targets_and_padded_rows_get_zero_gradients(case):
    hidden, weight, targets = case
    weight = torch.cat([weight[:VOCAB], torch.full((ROWS - VOCAB, WIDTH), 1e3)])
    _, grad_hidden, grad_weight = measured(linear_cross_entropy, hidden, weight, targets)
    assert not grad_hidden[targets == IGNORE].any()
    assert not grad_weight[VOCAB:].any()
    assert grad_hidden[targets != IGNORE].all() and grad_weight[:VOCAB].all()


def test_padded_rows_take_no_part_in_the_loss(case):
    hidden, weight, targets = case
    bare = linear_cross_entropy(hidden, weight[:VOCAB], targets, FP32, vocab_size=VOCAB)
    assert torch.equal(linear_cross_entropy(hidden, weight, targets, FP32, vocab_size=VOCAB), bare)


def test_all_targets_ignored_is_zero_loss_and_zero_gradients(case):
    nothing = torch.full_like(case[2], IGNORE)
    assert not any(part.any() for part in measured(linear_cross_entropy, *case[:2], nothing))


def test_micro_batches_of_ragged_masks_add_up_to_the_whole_batch(case):
    hidden, weight, targets = case
    count = (targets != IGNORE).sum()
    total, *whole = measured(linear_cross_entropy, *case, scale=1 / count)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = []
    for rows in (slice(0, 7), slice(7, 8), slice(8, None)):
        loss = linear_cross_entropy(
            hidden[rows], weight, targets[rows], FP32, vocab_size=VOCAB, scale=1 / count
        )
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(sum(losses), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, whole[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight.grad, whole[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_row_chunks_equal_one_buffer(case, name, monkeypatch):
    precision = choose_precision(name, CPU)
    whole = measured(linear_cross_entropy, *case, precision, scale=0.3)
    monkeypatch.setattr(loss_module, "MAX_LOGIT_BYTES", 4 * ROWS * 7)
    chunked = measured(linear_cross_entropy, *case, precision, scale=0.3)
    # Where the device multiplies the low format itself, each chunk's part is rounded to it.
    low = precision.dtype is not torch.float32
    bound = torch.finfo(precision.dtype).eps if low else 1e-6
    assert all(distance(a, b) < bound for a, b in zip(chunked, whole, strict=True))


PASSES = [
    loss_module.softmax_passes,
    pytest.param(
        loss_module.fusible_passes,
        marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")],
    ),
]


@pytest.fixture(params=PASSES, ids=["eager", "compiled"])
def passes(request, monkeypatch):
    """What a GPU does with the logits, here on the CPU, and there by chunks of at most 9 rows."""
    monkeypatch.setattr(loss_module._Head, "in_one_buffer", loss_module._Head.by_chunks)
    monkeypatch.setattr(loss_module, "MAX_LOGIT_BYTES", 4 * ROWS * 9)
    if request.param is loss_module.softmax_passes:
        return request.param
    torch._dynamo.reset()
    return torch.compile(request.param, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_a_gpus_chunks_give_what_float64_gives(case, passes, size):
    """At 1e3 there are targets that are ruled out, and logits that lose digits in fp32."""
    hidden, weight, targets = case[0] * size, *case[1:]
    ours = measured(linear_cross_entropy, hidden, weight, targets, scale=0.3, passes=passes)
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    loss = 0.3 * F.cross_entropy(h @ w[:VOCAB].t(), targets, reduction="sum")
    loss.backward()
    for a, b in zip(ours, (loss.detach(), h.grad, w.grad), strict=True):
        assert a.dtype is torch.float32 and distance(a.double(), b) < 1e-6 * max(1, size / 10)
    assert not ours[1][targets == IGNORE].any() and not ours[2][VOCAB:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 4096.0])
def test_the_gradient_of_low_logits_is_the_exact_one_times_the_scale_rounded_once(
    case, passes, dtype, scale
):
    """Rounding to nearest is off by half a unit, eps / 2 of the value, or half the least number.

    What is rounded is fp32's p - 1 or p: off by some 4 fp32 units of 1, and of the logits' size.
    """
    logits = (case[0] @ case[1].t()).to(dtype)
    known = logits[:, :VOCAB].double()
    valid = (case[2] != IGNORE)[:, None]
    target = F.one_hot(case[2].clamp(min=0), VOCAB)
    exact = (known.softmax(1) - target) * valid * scale
    loss = F.cross_entropy(known, case[2], reduction="sum") * scale
    with torch.no_grad():
        found = passes(logits, case[2], torch.tensor(scale), VOCAB)
    assert distance(found.double(), loss) < 1e-6
    half = torch.finfo(dtype).eps / 2
    least = torch.finfo(dtype).smallest_normal * half
    bound = exact.abs() * half * 1.01 + least + 4 * 2**-23 * scale * exact.abs().div(scale).sqrt()
    assert ((logits[:, :VOCAB].double() - exact).abs() <= bound).all()
    assert not logits[:, VOCAB:].any() and exact.any()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_gpus_chunks_in_a_low_precision_equal_linear_under_autocast(case, passes, name):
    """Each of 6 chunks rounds its part of the weight's gradient: eps / 2 of it, in the worst case.

    Parts add up to at most sqrt(6) times the norm of their sum where they are as good as random.
    """
    reference = measured(plain, *case, mode(name, False), scale=0.3)
    ours = measured(linear_cross_entropy, *case, mode(name, False), scale=0.3, passes=passes)
    bound = torch.finfo(PRECISIONS[name]).eps / 2 * math.sqrt(6)
    assert all(distance(a, b) < bound for a, b in zip(ours, reference, strict=True))
    exact = measured(plain, *case, scale=0.3)
    assert distance(ours[2], exact[2]) > 1e-4, "nothing was rounded"


def test_a_gpus_loss_that_is_no_number_stays_none(case, passes):
    case[0][3] = torch.nan
    assert torch.isnan(linear_cross_entropy(*case, FP32, vocab_size=VOCAB, passes=passes))


def largest(call):
    """Bytes of the largest piece of memory asked for in a call, compiled code's included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = seen.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def test_all_logits_never_exist_at_once_on_a_gpu(case, passes, monkeypatch):
    # So many that what a processor's kernels take for themselves, some 150 kB, is little beside.
    hidden, targets = case[0].repeat(500, 1), case[2].repeat(500)
    chunk, every = 2 * 4000 * ROWS, 2 * len(hidden) * ROWS
    monkeypatch.setattr(loss_module, "MAX_LOGIT_BYTES", chunk)
    given = hidden, case[1], targets, mode("bf16", False)
    measured(linear_cross_entropy, *given, passes=passes)  # a compiler's own memory
    ours = largest(lambda: measured(linear_cross_entropy, *given, passes=passes))
    assert ours <= (chunk if passes is not loss_module.softmax_passes else 2 * chunk) < every
    assert largest(lambda: measured(plain, *given)) >= every


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
def test_emulated_gradients_are_exact_where_products_and_sums_are(name):
    """64 equal logits, so that their gradient is 1 and, at the target, -63: all is whole."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (24, 16), generator=generator).float()
    weight = torch.randint(-4, 5, (64, 16), generator=generator).float()
    hidden[:, 8:], weight[:, :8] = 0, 1  # what tells the rows apart is multiplied by zero
    targets = torch.randint(0, 64, (24,), generator=generator)
    parts = torch.ones(24, 64, dtype=torch.float64) - 64 * F.one_hot(targets, 64)
    once = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    precision = mode(name, emulated=True)
    with precision.products():
        with precision.autocast():
            loss = linear_cross_entropy(*leaves, targets, precision, vocab_size=64, scale=64.0)
        loss.backward()
    exact = (parts @ weight.double(), parts.t() @ hidden.double())
    for leaf, expected in zip(leaves, exact, strict=True):
        assert torch.equal(leaf.grad, expected.to(once).float()) and expected.any()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("products", ["emulated", "native"])
def test_low_precision_equals_linear_under_autocast(case, name, products):
    """Against torch's own autocast and reference kernels: same roundings at the same places."""
    reference = measured(plain, *case, mode(name, False), scale=0.3)
    ours = measured(linear_cross_entropy, *case, mode(name, products == "emulated"), scale=0.3)
    assert all(part.dtype is torch.float32 for part in ours)
    assert all(distance(a, b) < 2e-4 for a, b in zip(ours, reference, strict=True))
    exact = measured(plain, *case, scale=0.3)
    assert distance(ours[2], exact[2]) > 2e-4, "nothing was rounded"


def test_tf32_rounds_the_operands_of_all_three_products(case):
    precision = choose_precision("tf32", CPU)
    ours, reference = (measured(f, *case, precision) for f in (linear_cross_entropy, plain))
    exact = measured(plain, *case)
    for a, b, c in zip(ours, reference, exact, strict=True):
        assert distance(a, b) < 2e-6 < distance(b, c) < 1e-3


@pytest.mark.parametrize("name", ["tf32", "bf16"])
def test_rounded_operands_are_not_copied_and_rounded_again(case, name):
    hidden, weight = (x.clone().requires_grad_() for x in case[:2])
    precision = mode(name, emulated=True)
    with EmulatedProducts(name) as products, precision.autocast():
        linear_cross_entropy(hidden, weight, case[2], precision, vocab_size=VOCAB).backward()
    assert products.count == 0


def test_scale_saves_fp16_gradients_from_underflow(case):
    """Mean over a million tokens: 1e-6 / V is no fp16 number; the scaled gradient is."""
    hidden, weight, targets = case
    precision = choose_precision("fp16", CPU)
    tiny, factor = 1e-6, 65536.0
    exact = measured(plain, hidden * 0.01, weight, targets, scale=tiny)[2]
    bare = measured(linear_cross_entropy, hidden * 0.01, weight, targets, precision, scale=tiny)[2]
    scaled = measured(
        linear_cross_entropy, hidden * 0.01, weight, targets, precision, scale=tiny * factor
    )[2]
    assert distance(bare, exact) > 0.05
    assert distance(scaled / factor, exact) < 0.01


def test_incoming_gradient_multiplies_both(case):
    once, thrice = (
        measured(lambda *a, k=k, **b: k * linear_cross_entropy(*a, **b), *case) for k in (1, 3)
    )
    assert all(torch.equal(3 * a, b) for a, b in zip(once[1:], thrice[1:], strict=True))


def test_a_graph_whose_gradients_were_handed_out_says_so(case):
    hidden, weight = (x.clone().requires_grad_() for x in case[:2])
    loss = linear_cross_entropy(hidden, weight, case[2], FP32, vocab_size=VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="went backward before"):
        loss.backward()


def test_gradients_survive_the_next_call(case):
    hidden, weight, targets = case
    first = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(first, weight, targets, FP32, vocab_size=VOCAB)
    linear_cross_entropy(-hidden, weight, targets, FP32, vocab_size=VOCAB)
    loss.backward()
    assert torch.equal(first.grad, measured(linear_cross_entropy, *case)[1])


def test_without_a_need_for_gradients_only_the_loss_is_computed(case, monkeypatch):
    hidden, weight, targets = case
    expected = measured(linear_cross_entropy, *case)[0]
    monkeypatch.setattr(loss_module._Head, "_gradients", None)
    with torch.no_grad():
        loss = linear_cross_entropy(
            hidden.clone().requires_grad_(), weight, targets, FP32, vocab_size=VOCAB
        )
    assert not loss.requires_grad and torch.equal(loss, expected)
    assert torch.equal(linear_cross_entropy(*case, FP32, vocab_size=VOCAB), expected)


def test_training_works_after_evaluation_in_inference_mode(case):
    release()
    with torch.inference_mode():
        linear_cross_entropy(*case, FP32, vocab_size=VOCAB)
    measured(linear_cross_entropy, *case)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_extreme_logits_stay_finite(case, name, monkeypatch):
    """A probability that underflows to zero still has its loss: logits are 10,000 apart."""
    monkeypatch.setattr(loss_module, "BLOCK", 7)
    hidden, weight, targets = case
    hidden = hidden.clone()
    hidden[::2] *= 1e3  # every other row
    precision = choose_precision(name, CPU)
    ours, reference = (
        measured(f, hidden, weight, targets, precision) for f in (linear_cross_entropy, plain)
    )
    assert torch.isfinite(ours[0]) and ours[0] > 1e4
    bound = 1e-5 if name == "fp32" else 2e-2
    assert all(distance(a, b) < bound for a, b in zip(ours, reference, strict=True))


def test_a_loss_that_is_no_number_stays_none(case):
    hidden, weight, targets = case
    hidden[3] = torch.nan
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), targets, FP32, vocab_size=VOCAB)
    assert torch.isnan(loss)


def test_a_second_call_maps_no_new_buffer(case):
    measured(linear_cross_entropy, *case)
    kept = {key: buffer.data_ptr() for key, buffer in buffers._kept.__dict__.items()}
    measured(linear_cross_entropy, *(x[:9] if i != 1 else x for i, x in enumerate(case)))
    assert {k: b.data_ptr() for k, b in buffers._kept.__dict__.items()} == kept
    release()
    assert not buffers._kept.__dict__
