"""The operation table: what it says of a step, and that it says otherwise where a step is other."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pipeline.compute import emulation
from pipeline.compute import precision as precision_module
from pipeline.compute.precision import choose_precision
from pipeline.model import gpt as model_module
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.studies import op_dtypes
from pipeline.studies.op_dtypes import MATRIX_PRODUCTS, PRODUCTS, Watch
from pipeline.training import loop, optimizers, training_step

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 97}
CPU = torch.device("cpu")


@pytest.fixture
def bare_cpu(monkeypatch):
    """A CPU that multiplies nothing but fp32."""
    monkeypatch.setattr(precision_module, "_cpu_capabilities", dict)


@pytest.fixture
def new_cpu(monkeypatch):
    """A CPU that says it multiplies bf16 and fp16; torch's kernels do so, if slowly."""
    known = {"avx512_bf16": True, "avx512_fp16": True}
    monkeypatch.setattr(precision_module, "_cpu_capabilities", lambda: known)


@pytest.fixture
def config(make_config):
    return make_config(train__steps=2, train__warmup_steps=1)


def start(config, name: str, attention: str = "sdpa") -> training_step.TrainState:
    model = GPT(GPTConfig(**SHAPE, vocab_rows=128, attention=attention))
    initialize(model, config.init, torch.Generator().manual_seed(0))
    return training_step.start(model, config.train, choose_precision(name, CPU), narrowing=1.0)


def batches(step: int) -> list[training_step.Batch]:
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(step))
    return [(ids[:, :-1], ids[:, 1:])] * 2


def watched(state: training_step.TrainState, config) -> Watch:
    watch = Watch(state)
    reports = list(watch.first_of(loop.fit(state, config.train, batches)))
    assert [report.step for report in reports] == [0, 1]
    return watch


def formats(watch: Watch, phase: str, *names: str, view: str = "mode") -> set[str]:
    """Formats that rows of a phase show, of all operations or of the named ones."""
    rows = [r for r in watch.rows if r.phase == phase and (not names or r.operation in names)]
    assert rows, f"no {names} in {phase}"
    return {getattr(row, view) for row in rows}


def test_an_fp32_step_is_fp32_everywhere(config) -> None:
    watch = watched(start(config, "fp32"), config)
    for phase in ("forward", "backward", "update"):
        assert formats(watch, phase) == formats(watch, phase, view="kernel") == {"fp32 -> fp32"}
    assert {next(iter(found)) for found in watch.tensors.values()} == {"fp32"}
    assert "No module's output was in a low format." in watch.sentences()[0]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_emulated_products_show_the_modes_format_beside_the_kernels(
    config, bare_cpu, name: str, attention: str
) -> None:
    watch = watched(start(config, name, attention), config)
    for phase in ("forward", "backward"):
        products = [row for row in watch.rows if row.phase == phase and row.is_product()]
        assert {row.mode for row in products} == {f"{name} -> {name}"}
        assert {row.kernel for row in products} == {"fp32 -> fp32"}


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_native_products_have_one_format_in_both_columns(config, new_cpu, name: str) -> None:
    watch = watched(start(config, name), config)
    assert all(row.mode == row.kernel for row in watch.rows)
    for phase in ("forward", "backward"):
        assert formats(watch, phase, *MATRIX_PRODUCTS) == {f"{name} -> {name}"}


def test_tf32_rounds_operands_and_leaves_results_in_fp32(config, bare_cpu) -> None:
    watch = watched(start(config, "tf32"), config)
    for phase in ("forward", "backward"):
        assert formats(watch, phase, *MATRIX_PRODUCTS) == {"tf32 -> fp32"}
    assert formats(watch, "forward", "native_layer_norm") == {"fp32 -> fp32"}


def test_under_bf16_norms_and_the_losss_softmax_stay_fp32_and_state_is_fp32(
    config, bare_cpu
) -> None:
    watch = watched(start(config, "bf16"), config)
    assert formats(watch, "forward", "native_layer_norm", "softmax", "log") == {"fp32 -> fp32"}
    assert formats(watch, "update") == {"fp32 -> fp32"}
    assert formats(watch, "backward", "add_") == {"fp32 -> fp32"}  # micro-batches accumulate
    for what in ("gradients (.grad)", "optimizer state", "parameters after"):
        assert set(watch.tensors[what]) == {"fp32"}
    leaving, backward = watch.sentences()
    assert "fp32 before, fp32 inside, fp32 afterwards" in leaving
    assert "output of h.*.attn.c_attn" in leaving and "is still bf16" in leaving
    assert "backward pass: bf16 -> bf16. What accumulates in .grad: fp32." in backward


def test_a_softmax_forced_low_shows_in_the_table(config, monkeypatch) -> None:
    def low(scores: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.softmax(scores.bfloat16(), dim).float()

    before = watched(start(config, "fp32", "naive"), config)
    assert formats(before, "forward", "_softmax") == {"fp32 -> fp32"}
    monkeypatch.setattr(model_module.F, "softmax", low)
    after = watched(start(config, "fp32", "naive"), config)
    monkeypatch.undo()
    assert F.softmax is not low
    assert formats(after, "forward", "_softmax") == {"bf16 -> bf16"}
    assert {row.where for row in after.rows if row.operation == "_softmax"} == {"h.*.attn"}
    assert "bf16 -> bf16" in after.page()


def test_a_product_that_goes_round_the_emulation_shows_as_fp32(
    config, bare_cpu, monkeypatch
) -> None:
    monkeypatch.delitem(emulation.OPERANDS, torch.ops.aten.addmm.default)
    watch = watched(start(config, "tf32"), config)
    blocks = {r.mode for r in watch.rows if r.operation == "addmm" and r.where.startswith("h.")}
    assert blocks == {"fp32 -> fp32"}
    assert formats(watch, "backward", "mm") == {"tf32 -> fp32"}


def test_parameters_in_bf16_are_reported_as_such(config, new_cpu) -> None:
    state = start(config, "bf16")
    state.model.bfloat16()
    watch = watched(state, config)
    assert set(watch.tensors["parameters before"]) == {"bf16"}
    assert set(watch.tensors["gradients (.grad)"]) == {"bf16"}
    assert "What accumulates in .grad: bf16." in watch.sentences()[1]


def test_watching_changes_no_weight_and_leaves_nothing_behind(config, bare_cpu) -> None:
    plain, seen = start(config, "bf16"), start(config, "bf16")
    for attribute in ("_forward_hooks", "_forward_pre_hooks"):
        assert not [m for m in seen.model.modules() if getattr(m, attribute)]
    loss_function = seen.loss_function
    watched(seen, config)
    list(loop.fit(plain, config.train, batches))
    for a, b in zip(plain.model.parameters(), seen.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for attribute in ("_forward_hooks", "_forward_pre_hooks"):
        assert not [m for m in seen.model.modules() if getattr(m, attribute)]
    assert seen.loss_function is loss_function
    assert not seen.optimizer._optimizer_step_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in seen.model.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_a_first_step_that_is_skipped_is_told_like_any_other(
    config, bare_cpu, monkeypatch, fused: bool
) -> None:
    """A scaler does not even call an optimizer that cannot skip by itself."""
    monkeypatch.setattr(optimizers, "SKIPPING", ("cpu",) if fused else ())
    state = start(config, "fp16")
    bias = state.model.transformer.ln_f.bias
    bias.register_hook(lambda g: torch.full_like(g, torch.inf) if state.step == 0 else g)
    watch = watched(state, config)
    assert state.skipped == 1
    assert watch.tensors["gradients (.grad)"] == {"fp32": len(list(state.model.parameters()))}
    assert "What accumulates in .grad: fp32." in watch.page()


def test_every_product_is_an_operation_of_torch_with_tensors_at_its_places() -> None:
    for name, positions in PRODUCTS.items():
        arguments = getattr(torch.ops.aten, name).default._schema.arguments
        kinds = {str(arguments[position].type) for position in positions}
        assert kinds == {"Tensor"}, name
    on_mps = {"linear", "linear_backward", "_scaled_dot_product_attention_math_for_mps"}
    assert on_mps <= PRODUCTS.keys()


def test_the_eager_loss_is_watched_where_the_step_is_compiled(config) -> None:
    state = start(config, "fp32")
    calls = []

    def compiled(*words: torch.Tensor) -> torch.Tensor:
        calls.append(state.step)
        return state.eager_loss(*words)

    state.loss_function = compiled
    watch = watched(state, config)
    assert calls == [1, 1], "the first step runs eagerly, the second as compiled"
    assert formats(watch, "forward", "addmm") == {"fp32 -> fp32"}


def test_calls_are_counted(config) -> None:
    watch = watched(start(config, "fp32"), config)
    calls = {(r.phase, r.where, r.operation): n for r, n in watch.rows.items()}
    micro_batches, layers = 2, 2
    assert calls["forward", "h.*.attn.c_attn", "addmm"] == micro_batches * layers
    assert calls["backward", "Addmm", "mm"] == micro_batches * layers * 4 * 2
    assert len(watch.cells()) == len(watch.rows)
    assert [c[-1] for c in watch.cells() if c[1:3] == ("wte", "embedding")] == [micro_batches]


def test_the_page_is_a_table_a_phase(config) -> None:
    watch = watched(start(config, "fp32"), config)
    page = watch.page()
    for heading in ("## Forward", "## Backward", "## Update", "## Tensors outside"):
        assert heading in page


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_the_tiny_training_shows_the_formats_of_its_precision(bare_cpu, name: str) -> None:
    before = torch.random.get_rng_state()
    shown = formats(op_dtypes.watched(name, CPU), "forward", "addmm", "mm")
    assert any(name[:2] in mode.partition(" -> ")[0] for mode in shown), shown
    assert torch.equal(before, torch.random.get_rng_state())
