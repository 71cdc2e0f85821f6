"""Roofs and points: intensities by hand, errors by theory, bounds by logic. No time is asserted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.compute import precision as precision_module
from pipeline.compute.precision import choose_precision
from pipeline.drawing import figures
from pipeline.studies import roofline
from pipeline.studies.number_formats import unit_roundoff
from pipeline.studies.roofline import Operation, Product, Roofline, Shape, fitted, shapes
from tests.helpers import stand_in

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
    moved, precision = shape.flops / flops_a_byte, choose_precision(mode, CPU)
    return Product(seconds, moved, "p", shape, shape.flops, precision, error)


def test_the_shapes_are_those_of_the_models_own_products() -> None:
    named = {
        s.name: s for s in shapes(n_embd=768, n_head=12, vocab_rows=50304, sequences=4, tokens=1024)
    }
    assert named["attn.c_attn"] == Shape("attn.c_attn", 4096, 768, 2304)
    assert named["mlp.c_proj"] == Shape("mlp.c_proj", 4096, 3072, 768)
    assert named["attn q k^T"] == Shape("attn q k^T", 1024, 64, 1024, 48, linear=False)
    assert named["head"].columns == 50304
    # Forward FLOPs a token of a block's four weights: 2 * 12 C^2.
    weights = [s for s in named.values() if s.name.startswith(("attn.", "mlp."))]
    assert sum(s.flops for s in weights) / 4096 == 2 * 12 * 768**2


def test_flops_and_bytes_of_a_product_by_hand() -> None:
    shape = Shape("p", 3, 5, 7, batch=2)
    assert shape.flops == 2 * 2 * 3 * 5 * 7
    assert shape.bytes_moved(2, 4) == 2 * (2 * (3 * 5 + 5 * 7) + 4 * 3 * 7)
    assert product("fp32", flops_a_byte=8.0).intensity == pytest.approx(8.0)


@pytest.fixture
def one_second(monkeypatch):
    """Whatever is timed takes a second."""
    monkeypatch.setattr(roofline, "medians", lambda calls, device: [1.0 for _ in calls])


def test_flops_and_bytes_of_every_operation_by_hand(one_second) -> None:
    head = Shape("head", rows=6, inner=8, columns=10)
    found = {f.name: f for f in roofline._timed_operations(head, CPU)}
    # 6 tokens of 8 channels: 48 numbers, 192 after c_fc; logits 60; the weight 80. 4 bytes each.
    by_hand = {
        "embedding": ((6, 8), 0, 384),  # a row read, a row written
        "layer_norm": ((6, 8), 384, 384),
        "residual add": ((6, 8), 48, 576),  # two read, one written
        "gelu": ((6, 32), 2688, 1536),
        "softmax": ((6, 10), 300, 480),
        "cross_entropy": ((6, 10), 300, 240),  # one number a row comes out
        "AdamW": ((10, 8), 1200, 2240),  # weight, gradient, two moments; all but it written
    }
    assert {n: (f.shape, f.flops, f.bytes_moved) for n, f in found.items()} == by_hand
    assert {f.seconds for f in found.values()} == {1.0}


def test_only_logits_are_cut_where_a_cpu_would_take_long(one_second, monkeypatch) -> None:
    head = Shape("head", rows=1000, inner=8, columns=100)
    monkeypatch.setattr(roofline, "CPU_FLOPS", head.flops / 10)
    rows = {f.name: f.shape[0] for f in roofline._timed_operations(head, CPU)}
    assert rows.pop("softmax") == rows.pop("cross_entropy") == fitted(head, CPU).rows == 100
    assert rows.pop("AdamW") == 100 and set(rows.values()) == {1000}
    monkeypatch.setattr(roofline, "RESULT_BYTES", 4 * 4 * 8 * 70)  # of gelu's input: 70 rows
    rows = {f.name: f.shape[0] for f in roofline._timed_operations(head, CPU)}
    assert rows["gelu"] == rows["layer_norm"] == 70


def test_the_operations_compute_what_they_are_called() -> None:
    calls = []

    def kept(given, device) -> list[float]:
        calls.extend(call() for call in given)
        return [1.0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "medians", kept)
        names = [f.name for f in roofline._timed_operations(Shape("head", 6, 8, 10), CPU)]
    results = dict(zip(names, calls, strict=True))
    assert results["embedding"].shape == results["residual add"].shape == (6, 8)
    assert results["layer_norm"].mean(-1) == pytest.approx([1.0] * 6)  # weight and bias are 1
    assert results["layer_norm"].var(-1, correction=0) == pytest.approx([1.0] * 6, abs=1e-3)
    assert results["gelu"].shape == (6, 32) and -0.2 < results["gelu"].min() < 0
    assert results["softmax"].sum(-1) == pytest.approx([1.0] * 6)
    assert results["cross_entropy"].shape == ()


def test_the_bandwidth_counts_two_reads_and_a_write(one_second, monkeypatch) -> None:
    monkeypatch.setattr(roofline, "STREAM_BYTES", {"cpu": 4096})
    assert roofline.bandwidth(CPU) == 3 * 4096


def test_the_error_is_against_a_float64_product() -> None:
    a, b = (
        torch.randn(*size, generator=torch.Generator().manual_seed(2))
        for size in [(70, 300), (300, 9)]
    )
    product = a @ b
    exact = np.asarray(a[:64], np.longdouble) @ np.asarray(b, np.longdouble)
    off = np.asarray(product[:64], np.longdouble) - exact
    expected = float(np.sqrt((off**2).sum() / (exact**2).sum()))
    found = roofline.relative_error(product, a, b)
    assert 1e-8 < found == pytest.approx(expected, rel=1e-3), "against fp32 it would be 0"


def test_memory_bounds_left_of_the_ridge_and_products_right_of_it() -> None:
    roofs = Roofline("d", bandwidth=100.0, rates={"fp32": 1000.0}, products=[], operations=[])
    assert roofs.ridge("fp32") == 10
    assert (roofs.bound(9.9, "fp32"), roofs.bound(10.1, "fp32")) == ("memory", "compute")
    assert (roofs.roof(5, "fp32"), roofs.roof(50, "fp32")) == (500, 1000)


def test_the_share_is_of_the_roof_that_bounds() -> None:
    slow = Operation(seconds=2.0, bytes_moved=100.0, name="copy", shape=(5, 5), flops=0.0)
    points = [product("fp32", 50.0, 4.0)]
    roofs = Roofline("d", 100.0, {"fp32": 1000.0}, points, [slow], call_seconds=0.5)
    names = roofline.OPERATION_COLUMNS
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in roofs.operation_rows()}
    copy, p = rows["copy"], rows["p"]
    assert (copy["bound by"], copy["of its roof"], copy["of it the call"]) == ("memory", 0.5, 0.25)
    assert (copy["shape"], copy["MB moved"], copy["ms"]) == ("(5, 5)", 1e-4, 2000)
    assert (p["bound by"], p["of its roof"]) == ("compute", 2000 / 4 / 1000)
    assert (p["shape"], p["FLOP/byte"], p["GFLOP/s"]) == ("1 x (10, 10) (10)", 50, 5e-7)
    page = roofs.operations_page()
    assert "That is so for 1 of 2: copy." in page and "takes 500000.0 microseconds" in page


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
    assert len(found.products) == 7 * 5 and len(found.operations) == 7
    assert list(found.rates) == ["fp32", "tf32", "bf16", "fp16", "fp8"]
    assert len(found.product_rows()) == 35 and len(found.operation_rows()) == 14
    for row in (*found.product_rows(), *found.operation_rows()):
        assert len(row) in (len(roofline.PRODUCT_COLUMNS), len(roofline.OPERATION_COLUMNS))
    for mode in ("bf16", "fp16", "tf32", "fp8"):
        assert f"this CPU has no {mode} instructions" in found.products_page()


def test_the_figures_mark_every_point(found) -> None:
    (axis,) = figures.roofline(found).axes
    points = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(points) == 35 + 6  # an embedding look-up computes nothing
    drawn = [f for f in (*found.operations, *found.products) if f.flops]
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in points]
    assert places == [(f.flops / f.bytes_moved, f.flops / f.seconds) for f in drawn]
    names = next(t.get_text() for t in axis.texts if "\n" in t.get_text())
    assert all(name in names for name in ("gelu", "AdamW", "attn q k^T", "head"))
    (axis,) = figures.error_and_speed(found).axes
    assert len([line for line in axis.lines if line.get_marker() == "D"]) == 5


def test_a_number_stands_over_its_points_and_close_ones_share_a_place() -> None:
    # (name, intensity, rate): FLOPs in one second. The second is near the first, and faster.
    given = [("far", 10.0, 1000.0), ("low", 1.0, 100.0), ("near", 1.2, 150.0)]
    given += [("far", 10.0, 500.0), ("far", 20.0, 9000.0)]  # other modes, the last in fewer bytes
    drawn = [Operation(1.0, rate / at, name, (1,), rate) for name, at, rate in given]
    roofs = Roofline("d", 200.0, {"fp32": 1000.0}, [], drawn)
    (axis,) = figures.roofline(roofs).axes
    labels = {t.get_text(): t.xy for t in axis.texts if hasattr(t, "xy")}
    assert labels == {"1,2": (1.0, 150.0), "3": (10.0, 1000.0)}
    (listed,) = (t.get_text() for t in axis.texts if "\n" in t.get_text())
    assert [line.split() for line in listed.splitlines()] == [
        ["1", "low"],
        ["2", "near"],
        ["3", "far"],
    ]
    (roof,) = (line for line in axis.lines if line.get_marker() != "o")
    assert list(zip(*roof.get_data(), strict=True)) == [(0.5, 100), (5, 1000), (40, 1000)]


# --- where calls dominate


@pytest.fixture
def small_reference(monkeypatch):
    """In place of GPT-2 124M, and of what fills a GPU."""
    small = [replace(s, name=f"124M {s.name}") for s in shapes(64, 2, 512, 2, 32)]
    monkeypatch.setattr(roofline, "reference_shapes", lambda: small)
    for name in ("SQUARE", "STREAM_BYTES"):
        monkeypatch.setattr(roofline, name, {"cuda": 64})


def with_calls_of(monkeypatch, seconds: float) -> None:
    """Every call takes that long, and a nanosecond for each number of its result."""

    def medians(calls, device) -> list[float]:
        results = [call() for call in calls]
        return [seconds + 1e-9 * (1 if r is None else r.numel()) for r in results]

    monkeypatch.setattr(roofline, "medians", medians)


def test_where_calls_dominate_gpt2_124m_stands_beside_the_model(
    monkeypatch, small_reference
) -> None:
    with_calls_of(monkeypatch, seconds=1e-3)
    with stand_in.gpu(monkeypatch):
        there = roofline.measure(shapes(32, 2, 512, 2, 16), torch.device("cuda"), "a card")
    assert there.mostly_calls and 0.9 < there.call_share < 1
    assert len(there.products) == 2 * 7 * 5 and len(there.operations) == 2 * 7
    own, large = there.speed_and_error(), there.speed_and_error(reference=True)
    assert own.keys() == large.keys() and own["bf16"][1] != large["bf16"][1]
    for page in (there.products_page(), there.operations_page()):
        assert "of the time of the model's own products is the call, not the arithmetic" in page
        assert "124M mlp.c_fc" in page
    assert "124M AdamW" in there.operations_page()
    left, right = figures.error_and_speed(there).axes
    assert "the model's products" in left.get_title() and "GPT-2 124M's" in right.get_title()
    assert len(left.lines) == len(right.lines) == 2 * 5
    (axis,) = figures.roofline(there).axes
    assert any("124M gelu" in t.get_text() for t in axis.texts)


def test_where_they_do_not_the_model_stands_alone(monkeypatch, small_reference) -> None:
    with_calls_of(monkeypatch, seconds=1e-7)
    with stand_in.gpu(monkeypatch):
        there = roofline.measure(shapes(32, 2, 512, 2, 16), torch.device("cuda"), "a card")
    assert not there.mostly_calls and there.call_share > 0
    assert len(there.products) == 7 * 5 and len(there.operations) == 7
    for text in (there.products_page(), there.operations_page()):
        assert "124M" not in text and "is the call" not in text
    assert len(figures.error_and_speed(there).axes) == 1


def test_a_cpu_is_asked_for_no_larger_products(found) -> None:
    assert found.call_share == 0 and not found.mostly_calls


def test_the_shapes_beside_are_gpt2_124ms() -> None:
    beside = {s.name: s for s in roofline.reference_shapes()}
    assert beside["124M mlp.c_fc"] == Shape("124M mlp.c_fc", 32 * 1024, 768, 3072)
    assert not beside["124M head"].linear and beside["124M head"].columns == 50304
