"""int8 weights: what rounding does, and products that add nothing to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.inference import int8
from pipeline.inference.int8 import Int8Linear, exact_kernel, quantize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The fp32 weights (N, K) that int8 ones stand for."""
    return weight * scale[:, None]


def product(weight: Tensor, bias: Tensor | None, *, kernel: bool) -> Int8Linear:
    made = Int8Linear(weight, bias, torch.float32)
    if kernel and not made.kernel:
        pytest.skip("this CPU's int8 product is not exact")
    made.kernel = kernel
    return made


def test_a_weight_is_off_by_at_most_half_its_channels_unit() -> None:
    weight = normal(12, 40) * torch.logspace(-6, 6, 12)[:, None]
    rounded, scale = quantize(weight)
    assert rounded.dtype is torch.int8 and rounded.abs().amax(1).tolist() == [127] * 12
    off = (dequantize(rounded, scale) - weight).abs()
    assert (off <= 0.5001 * scale[:, None]).all() and off.max() > 0


def test_what_int8_can_hold_comes_back_exactly() -> None:
    held = torch.randint(-127, 128, (5, 30), generator=torch.Generator().manual_seed(0))
    held[:, 0] = 127
    units = torch.tensor([0.25, 0.5, 1.0, 2.0, 64.0])
    rounded, scale = quantize(held * units[:, None])
    assert torch.equal(rounded.long(), held) and torch.equal(scale, units)


def test_a_channel_of_zeros_stays_zeros() -> None:
    for kernel in (False, True):
        y = product(torch.zeros(3, 8), None, kernel=kernel)(normal(2, 8))
        assert torch.equal(y, torch.zeros(2, 3))


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_a_product_is_that_of_the_rounded_weights(kernel: bool, rows: int) -> None:
    weight, bias = normal(70, 96, seed=1), normal(70, seed=2)
    x = normal(rows, 1, 96, seed=3) * torch.logspace(-3, 3, rows)[:, None, None]
    rounded = dequantize(*quantize(weight)).double()
    expected = F.linear(x.double(), rounded)
    y = product(weight, bias, kernel=kernel)(x).double() - bias
    assert y.shape == (rows, 1, 70)
    # Half a unit of the second part is 2^-16 of a row's largest activation, and errors add up
    # like a random walk; the bias takes as much of the smallest rows as fp32 cuts off.
    largest = x.abs().amax(-1, keepdim=True).double()
    most = largest * 2**-16 * 6 * rounded.norm(dim=1) + 1e-6
    assert ((y - expected).abs() <= most).all()


def test_a_low_precision_goes_in_and_comes_out() -> None:
    weight, x = normal(6, 32), normal(3, 32, seed=1)
    low = Int8Linear(weight, None, torch.bfloat16)(x.bfloat16())
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), F.linear(x, weight), rtol=0.05, atol=0.2)


def test_a_product_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(x: Tensor, weight: Tensor) -> Tensor:
        return (x.long() @ weight.long()).clamp(max=127 * 127 * 255).int()

    monkeypatch.setattr(torch, "_int_mm", saturating)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    exact_kernel.cache_clear()
    try:
        assert not int8.exact_kernel()
        monkeypatch.setattr(torch, "_int_mm", lambda x, w: (x.long() @ w.long()).int())
        exact_kernel.cache_clear()
        assert int8.exact_kernel()
    finally:
        exact_kernel.cache_clear()
