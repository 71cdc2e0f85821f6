"""GPT-2 itself: counts, attention, the cache, tying, padding."""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from pipeline.model import gpt as model_file
from pipeline.model.gpt import (
    ATTENTION,
    GPT,
    GPTConfig,
    KVCache,
    naive_attention,
    preferring,
    sdpa_attention,
)

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=101, vocab_rows=128)
SIZES = {  # layers, heads, channels, parameters with 50257 rows
    "gpt2": (12, 12, 768, 124_439_808),
    "medium": (24, 16, 1024, 354_823_168),
    "large": (36, 20, 1280, 774_030_080),
    "xl": (48, 25, 1600, 1_557_611_200),
}


def tiny(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(dataclasses.replace(TINY, **changes)).eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TINY.vocab_size, (batch, length), generator=generator)


def meta(size: str, vocab_rows: int) -> GPT:
    layers, heads, channels, _ = SIZES[size]
    with torch.device("meta"):
        return GPT(GPTConfig(layers, heads, channels, 1024, vocab_rows=vocab_rows))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_those_of_the_published_models(size: str) -> None:
    assert meta(size, 50257).parameter_count() == SIZES[size][3]


def test_padding_to_50304_rows_adds_47_rows_and_nothing_else() -> None:
    assert meta("gpt2", 50304).parameter_count() == 124_475_904 == 124_439_808 + 47 * 768


def test_a_forward_pass_on_the_meta_device_gives_the_shape_of_the_logits() -> None:
    idx = torch.zeros(2, 1024, dtype=torch.long, device="meta")
    assert meta("gpt2", 50304)(idx).shape == (2, 1024, 50257)


def test_flops_per_token_follow_the_formula_without_the_position_embedding() -> None:
    without_wpe = 124_439_808 - 1024 * 768
    expected = 6 * without_wpe + 12 * 12 * 768 * 1024
    assert meta("gpt2", 50257).flops_per_token(1024) == expected == 855_166_464


def test_flops_per_token_are_what_a_forward_and_backward_pass_really_multiply() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    gpt = tiny(attention="naive", vocab_size=128)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens(2, 24)).sum().backward()
    vectors = sum(p.numel() for p in gpt.parameters() if p.dim() == 1)  # biases multiply nothing
    assert counter.get_total_flops() == 2 * 24 * (gpt.flops_per_token(24) - 6 * vectors)


def test_naive_attention_is_the_formula_written_as_loops() -> None:
    q, k, v = (
        torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(s)) for s in range(3)
    )
    out = naive_attention(q, k, v, dropout=0.0)
    for t in range(5):
        weights = [math.exp(float(q[0, 0, t] @ k[0, 0, s]) / math.sqrt(4)) for s in range(t + 1)]
        expected = sum(w * v[0, 0, s] for s, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(out[0, 0, t], expected)


@pytest.mark.parametrize("queries", [1, 3, 7])
def test_naive_equals_sdpa_with_and_without_a_past(queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 3, 7, 8, generator=generator)
    q = torch.randn(2, 3, queries, 8, generator=generator)
    torch.testing.assert_close(sdpa_attention(q, k, v, 0.0), naive_attention(q, k, v, 0.0))


def test_only_the_preferred_kernels_are_taken_and_torchs_choice_is_free_afterwards() -> None:
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    flash, math_ = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    usual = sdpa_attention(x, x, x, 0.0).grad_fn.name()
    assert "Flash" in usual
    assert preferring((SDPBackend.CUDNN_ATTENTION, flash), x, x, x, 0.0).grad_fn.name() == usual
    assert "Flash" not in preferring((math_,), x, x, x, 0.0).grad_fn.name()
    assert sdpa_attention(x, x, x, 0.0).grad_fn.name() == usual


def test_naive_and_sdpa_models_agree_in_logits_and_gradients() -> None:
    naive, sdpa = tiny(attention="naive"), tiny(attention="sdpa")
    naive.load_state_dict(sdpa.state_dict())
    idx = tokens(2, 24)
    for gpt in (naive, sdpa):
        F.cross_entropy(gpt(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).backward()
    torch.testing.assert_close(naive(idx), sdpa(idx))
    for ours, theirs in zip(naive.parameters(), sdpa.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("attention", ATTENTION)
def test_no_logit_depends_on_a_later_token(attention: str) -> None:
    gpt, idx = tiny(attention=attention), tokens(1, 24)
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after = gpt(idx), gpt(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=0)
    assert not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("chunks", [[1] * 24, [24], [10, 1, 1, 12], [1, 7, 16], [23, 1]])
@torch.no_grad()
def test_cached_logits_equal_uncached_logits(attention: str, chunks: list[int]) -> None:
    gpt, idx = tiny(attention=attention), tokens(3, 24)
    cache = KVCache(TINY, batch_size=3)
    parts = [gpt(part, cache) for part in idx.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), gpt(idx))
    assert cache.length == 24


@torch.no_grad()
def test_a_reset_cache_remembers_nothing() -> None:
    gpt, cache = tiny(), KVCache(TINY, batch_size=1)
    gpt(tokens(1, 20, seed=5), cache)
    cache.reset()
    idx = tokens(1, 9)
    torch.testing.assert_close(gpt(idx, cache), gpt(idx))


@torch.no_grad()
def test_the_cache_never_grows() -> None:
    gpt, cache = tiny(), KVCache(TINY, batch_size=1)

    def places() -> list[tuple[int, torch.Size]]:
        return [(layer.data_ptr(), layer.shape) for layer in (*cache.keys, *cache.values)]

    before = places()
    for token in tokens(1, 24).split(1, dim=1):
        gpt(token, cache)
    assert places() == before
    assert [layer.shape for layer in cache.keys] == [(1, 2, 24, 16)] * 2  # (B, H, block_size, D)


@torch.no_grad()
def test_a_bf16_cache_serves_an_fp32_model() -> None:
    gpt, idx = tiny(), tokens(2, 24)
    cache = KVCache(TINY, batch_size=2, dtype=torch.bfloat16)
    parts = [gpt(part, cache) for part in idx.split([8, 1, 15], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), gpt(idx), rtol=0.05, atol=0.05)


def test_more_tokens_than_block_size_are_refused_with_and_without_a_cache() -> None:
    gpt, cache = tiny(), KVCache(TINY, batch_size=1)
    with pytest.raises(ValueError, match="25 tokens behind 0 cached ones.*block_size=24"):
        gpt(tokens(1, 25))
    with torch.no_grad():
        gpt(tokens(1, 20), cache)
        with pytest.raises(ValueError, match="5 tokens behind 20 cached ones.*block_size=24"):
            gpt(tokens(1, 5), cache)
    assert cache.length == 20


def test_a_cache_of_another_batch_size_is_refused_instead_of_broadcast() -> None:
    with torch.no_grad(), pytest.raises(AssertionError, match="batch size"):
        tiny()(tokens(1, 3), KVCache(TINY, batch_size=2))


def test_the_head_is_the_token_embedding_after_load_and_to() -> None:
    gpt = tiny()
    assert [name for name, _ in gpt.named_parameters() if "head" in name] == []
    gpt.load_state_dict(tiny().state_dict())
    gpt = gpt.to(torch.float64).to("cpu")
    idx = tokens(1, 4)
    with torch.no_grad():
        expected = gpt(idx) * 2
        gpt.transformer.wte.weight[7] *= 2  # no token of idx: only the head can notice
        assert 7 not in idx
        torch.testing.assert_close(gpt(idx)[..., 7], expected[..., 7])


def test_look_up_and_head_both_reach_the_one_embedding_gradient() -> None:
    gpt, idx = tiny(), tokens(1, 4)
    gpt(idx)[..., 7].sum().backward()
    touched = gpt.transformer.wte.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == sorted({*idx.flatten().tolist(), 7})


def test_padded_rows_are_invisible_and_get_no_gradient() -> None:
    gpt, idx = tiny(), tokens(2, 5)
    with torch.no_grad():
        gpt.transformer.wte.weight[TINY.vocab_size :] = 1e4
    logits = gpt(idx)
    assert logits.shape == (2, 5, TINY.vocab_size)
    logits.logsumexp(-1).sum().backward()
    assert gpt.transformer.wte.weight.grad[TINY.vocab_size :].eq(0).all()


def test_gelu_is_the_tanh_form() -> None:
    x = torch.linspace(-4, 4, 33)
    mlp = model_file.MLP(GPTConfig(1, 1, 33, 4))
    with torch.no_grad():
        for linear in (mlp.c_fc, mlp.c_proj):
            linear.weight.copy_(torch.eye(*linear.weight.shape))
            linear.bias.zero_()
        out = mlp(x)
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(out, tanh, rtol=1e-6, atol=1e-6)
    assert (out - F.gelu(x)).abs().max() > 1e-4  # the exact form is another function


def test_every_layer_norm_has_eps_1e_5_and_a_bias() -> None:
    norms = [m for m in tiny().modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 5
    assert all(norm.eps == 1e-5 and norm.bias is not None for norm in norms)


@pytest.mark.parametrize("attention", ATTENTION)
def test_dropout_acts_in_training_only_and_at_all_four_places(attention: str) -> None:
    gpt, idx = tiny(dropout=0.5, attention=attention), tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(gpt(idx), gpt(idx))
        gpt.train()
        assert not torch.equal(gpt(idx), gpt(idx))
        for module in gpt.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert not torch.equal(gpt(idx), gpt(idx))  # what is left is attention's own
        for block in gpt.transformer.h:
            block.attn.dropout = 0.0
        assert torch.equal(gpt(idx), gpt(idx))
    assert sum(isinstance(m, torch.nn.Dropout) for m in gpt.modules()) == 1 + 2 * TINY.n_layer


def test_names_are_those_of_the_published_checkpoint() -> None:
    names = [name for name in tiny().state_dict() if ".h.1." not in name]
    block = [
        f"transformer.h.0.{module}.{kind}"
        for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ]
    ends = ["transformer.wte.weight", "transformer.wpe.weight"]
    norm = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert names == ends + block + norm


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_head": 3}, "n_embd=32"),
        ({"vocab_rows": 100}, "vocab_rows=100"),
        ({"attention": "fast"}, "attention=fast: one of sdpa, cudnn, flash, naive"),
    ],
)
def test_an_impossible_config_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(TINY, **changes)


def test_model_py_imports_torch_and_the_standard_library_only() -> None:
    tree = ast.parse(Path(model_file.__file__).read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "pipeline").split(".")[0])
    assert modules - {"torch"} <= sys.stdlib_module_names
