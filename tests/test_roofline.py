"""Roofs and points: intensities by hand, errors by theory, bounds by logic. No time is asserted."""

from __future__ import annotations

import pytest
import torch

from pipeline import figures, roofline
from pipeline import precision as precision_module
from pipeline.formats import unit_roundoff
from pipeline.precision import choose_precision
from pipeline.roofline import Operation, Product, Roofline, Shape, fitted, shapes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bare_cpu(monkeypatch):
    """A CPU that multiplies nothing but fp32."""
    monkeypatch.setattr(precision_module, "_cpu_capabilities", dict)


@pytest.fixture(scope="module")
def found() -> Roofline:
    small = {"cpu": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision_module, "_cpu_capabilities", dict)
        patch.setattr(roofline, "SQUARE", small)
        patch.setattr(roofline, "STREAM_BYTES", {"cpu": 1 << 16})
        return roofline.measure(shapes(32, 2, 512, 2, 16), CPU, "a cpu")


def product(mode: str, flops_a_byte: float, seconds: float = 1.0, error: float = 0.0) -> Product:
    shape = Shape("p", 10, 10, 10)
    return Product(seconds, shape.flops / flops_a_byte, shape, choose_precision(mode, CPU), error)


def test_the_shapes_are_those_of_the_models_own_products() -> None:
    named = {
        s.name: s for s in shapes(n_embd=768, n_head=12, vocab_rows=50304, sequences=4, tokens=1024)
    }
    assert named["attn.c_attn"] == Shape("attn.c_attn", 4096, 768, 2304)
    assert named["mlp.c_proj"] == Shape("mlp.c_proj", 4096, 3072, 768)
    assert named["attn q k^T"] == Shape("attn q k^T", 1024, 64, 1024, batch=48)
    assert named["head"].columns == 50304
    # Forward FLOPs a token of a block's four weights: 2 * 12 C^2.
    weights = [s for s in named.values() if s.name.startswith(("attn.", "mlp."))]
    assert sum(s.flops for s in weights) / 4096 == 2 * 12 * 768**2


def test_flops_and_bytes_of_a_product_by_hand() -> None:
    shape = Shape("p", 3, 5, 7, batch=2)
    assert shape.flops == 2 * 2 * 3 * 5 * 7
    assert shape.bytes_moved(2, 4) == 2 * (2 * (3 * 5 + 5 * 7) + 4 * 3 * 7)
    assert product("fp32", flops_a_byte=8.0).intensity == pytest.approx(8.0)


def test_memory_bounds_left_of_the_ridge_and_products_right_of_it() -> None:
    roofs = Roofline("d", bandwidth=100.0, rates={"fp32": 1000.0}, products=[], operations=[])
    assert roofs.ridge("fp32") == 10
    assert (roofs.bound(9.9, "fp32"), roofs.bound(10.1, "fp32")) == ("memory", "compute")
    assert (roofs.roof(5, "fp32"), roofs.roof(50, "fp32")) == (500, 1000)


def test_the_share_is_of_the_roof_that_bounds() -> None:
    slow = Operation(seconds=2.0, bytes_moved=100.0, name="copy", flops=0.0)
    roofs = Roofline("d", 100.0, {"fp32": 1000.0}, [product("fp32", 50.0, 4.0)], [slow])
    rows = {row[0]: row for row in roofs.operation_rows()}
    assert rows["copy"][2] == "memory" and rows["copy"][5] == 0.5
    assert rows["p"][2] == "compute" and rows["p"][5] == 2000 / 4 / 1000
    assert "That is so for 1 of 2: copy." in roofs.operations_page()


def test_speeds_are_against_fp32_of_the_same_shape() -> None:
    points = [product("fp32", 8, 2.0, 1e-7), product("bf16", 8, 0.5, 1e-3)]
    roofs = Roofline("d", 1.0, {"fp32": 1.0, "bf16": 1.0}, points, [])
    assert roofs.speed_and_error() == {"fp32": (1.0, 1e-7), "bf16": (4.0, 1e-3)}


@pytest.mark.parametrize("mode", ["tf32", "bf16", "fp16"])
def test_the_error_of_a_product_is_that_of_its_rounded_operands(found, mode: str) -> None:
    expected = unit_roundoff(mode)
    for p in found.products:
        if p.precision.asked == mode:
            assert 0.3 * expected < p.error < 1.2 * expected, p.name
        if p.precision.asked == "fp32":
            assert p.error < 4 * unit_roundoff("fp32"), p.name


def test_a_mode_that_is_not_applied_would_show(monkeypatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(precision_module.Precision, "products", lambda self: nullcontext())
    points = roofline._timed_products(Shape("p", 64, 64, 64), [choose_precision("tf32", CPU)])
    tf32 = next(p for p in points if p.precision.asked == "tf32")
    assert tf32.error < 1e-6, "unrounded operands: the error is fp32's, and the test above fails"


def test_emulated_products_move_fp32_numbers(found) -> None:
    by_mode = {p.precision.asked: p for p in found.products if p.name == "mlp.c_fc"}
    assert by_mode["bf16"].precision.emulated
    assert by_mode["bf16"].bytes_moved == by_mode["fp32"].bytes_moved


def test_native_low_precision_moves_half_the_bytes(monkeypatch) -> None:
    monkeypatch.setattr(precision_module, "_cpu_capabilities", lambda: {"avx512_bf16": True})
    both = [choose_precision(name, CPU) for name in ("fp32", "bf16")]
    points = roofline._timed_products(Shape("p", 32, 32, 32), both)
    moved = {p.precision.asked: p.bytes_moved for p in points}
    assert moved["bf16"] == moved["fp32"] / 2


def test_rows_are_cut_until_a_cpu_takes_a_moment_and_a_small_gpu_has_the_memory() -> None:
    head = Shape("head", 16384, 768, 50304)
    cut = fitted(head, CPU)
    assert cut.flops <= roofline.CPU_FLOPS or cut.rows == roofline.REFERENCE_ROWS
    assert (cut.inner, cut.columns) == (head.inner, head.columns)
    on_a_gpu = fitted(head, torch.device("cuda"))
    assert on_a_gpu.rows * on_a_gpu.columns * 4 <= roofline.RESULT_BYTES
    assert on_a_gpu.rows > 2 * cut.rows
    small = Shape("p", 8, 8, 8)
    assert fitted(small, CPU) is small
    attention = fitted(Shape("qk", 1024, 64, 1024, batch=192), CPU)
    assert attention.rows == 1024 and attention.batch < 192


def test_a_mode_that_is_not_in_effect_has_no_figures_but_a_reason(monkeypatch) -> None:
    old = {"cpu": lambda name, device: ("fp32", "too old" if name == "tf32" else "", False)}
    monkeypatch.setattr(precision_module, "DEVICES", old)
    monkeypatch.setattr(roofline, "PRECISIONS", ("fp32", "tf32"))
    monkeypatch.setattr(roofline, "SQUARE", {"cpu": 16})
    monkeypatch.setattr(roofline, "STREAM_BYTES", {"cpu": 1 << 12})
    old_gpu = roofline.measure(shapes(8, 1, 64, 1, 8), CPU, "an old one")
    assert list(old_gpu.rates) == ["fp32"]
    assert {p.precision.asked for p in old_gpu.products} == {"fp32"}
    assert "- tf32: too old" in old_gpu.products_page()


def test_every_product_and_operation_is_measured_in_every_mode(found) -> None:
    assert len(found.products) == 7 * 4 and len(found.operations) == 7
    assert list(found.rates) == ["fp32", "tf32", "bf16", "fp16"]
    assert len(found.product_rows()) == 28 and len(found.operation_rows()) == 14
    for row in (*found.product_rows(), *found.operation_rows()):
        assert len(row) in (len(roofline.PRODUCT_COLUMNS), len(roofline.OPERATION_COLUMNS))
    for mode in ("bf16", "fp16", "tf32"):
        assert f"this CPU has no {mode} instructions" in found.products_page()


def test_the_figures_mark_every_point(found) -> None:
    (axis,) = figures.roofline(found).axes
    points = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(points) == 28 + 6  # an embedding look-up computes nothing
    names = next(t.get_text() for t in axis.texts if "\n" in t.get_text())
    assert all(name in names for name in ("gelu", "AdamW", "attn q k^T", "head"))
    (axis,) = figures.error_and_speed(found).axes
    assert len([line for line in axis.lines if line.get_marker() == "D"]) == 4
