import contextlib
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.config import SampleConfig
from pipeline.data.tokenizer import EOT, gpt2
from pipeline.errors import InputError, NumericsError
from pipeline.inference import decoding, generation
from pipeline.inference.decoding import Decoder
from pipeline.inference.generation import (
    Window,
    candidates,
    choose,
    generate,
    pad,
    stream,
    stream_text,
    until_eot,
)
from pipeline.model.gpt import GPT, GPTConfig, KVCache
from pipeline.model.hf_layout import hf_config, to_hf
from tests.helpers import stand_in

VOCABULARY = 61
BLOCK = 16


def tiny(*, dropout: float = 0.0, vocab_size: int = VOCABULARY, attention: str = "sdpa") -> GPT:
    """Random weights large enough that greedy text wanders; padded rows that would always win."""
    shape = GPTConfig(2, 4, 32, BLOCK, vocab_size, vocab_size + 2, dropout, attention)
    model = GPT(shape)
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_((0.03 if name.endswith("bias") else 0.3) * noise)
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                parameter.fill_(1.0)
        model.transformer.wpe.weight.mul_(4)
        ahead = 100 * torch.randn(32, generator=random)
        model.transformer.wte.weight[vocab_size:] = torch.stack([ahead, -ahead])
    return model.eval()


def prompts(batch: int = 2, tokens: int = 5, seed: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, tokens), generator=random)


def settings(**changes: object) -> SampleConfig:
    plain = SampleConfig(
        prompts=("x",),
        samples=1,
        max_new_tokens=12,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        while_training=False,
        kv_cache=True,
        weights="fp32",
        compile=False,
        precision="fp32",
        seed=0,
    )
    return replace(plain, **changes)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(B, V): what `candidates` leaves, in the order of the vocabulary."""
    values, ids = candidates(logits, temperature, top_k, top_p)
    return torch.zeros_like(logits).scatter(-1, ids, values.softmax(-1))


def seen_lengths(model: GPT) -> list[int]:
    """A list that grows by the number of tokens of every forward pass."""
    lengths: list[int] = []
    model.transformer.wte.register_forward_hook(lambda _m, ids, _o: lengths.append(ids[0].size(1)))
    return lengths


# --- greedy


def transformers_model(model: GPT) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel
    special = {"bos_token_id": None, "eos_token_id": None}  # beyond a vocabulary this small
    reference = GPT2LMHeadModel(GPT2Config(**hf_config(model.config) | special)).eval()
    weights = to_hf(model.state_dict(), model.config)
    reference.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    return reference


def test_temperature_zero_equals_transformers_greedy_tokens():
    model, idx = tiny(), prompts()
    theirs = transformers_model(model).generate(
        idx,
        attention_mask=torch.ones_like(idx),
        do_sample=False,
        max_new_tokens=BLOCK - idx.size(1),
        pad_token_id=0,
    )
    greedy = settings(temperature=0.0, max_new_tokens=BLOCK - idx.size(1))
    ours = generate(model, idx, greedy, seeded())
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[0, idx.size(1) :].tolist())) > 4, "a repeated token would prove little"


def test_a_tiny_temperature_is_greedy_and_overflows_nothing():
    greedy = generate(tiny(), prompts(), settings(temperature=0.0), seeded())
    for temperature in (1e-4, 1e-38, 1e-300):
        cold = generate(tiny(), prompts(), settings(temperature=temperature), seeded())
        assert cold.tolist() == greedy.tolist()


def test_rows_of_a_batch_do_not_see_each_other():
    model, idx, greedy = tiny(), prompts(batch=3), settings(temperature=0.0)
    together = generate(model, idx, greedy, seeded())
    alone = [generate(model, row[None], greedy, seeded()) for row in idx]
    assert together.tolist() == torch.cat(alone).tolist()


# --- the cache and the window


def test_cached_logits_equal_uncached_logits_to_block_size_plus_five():
    model, idx = tiny(), prompts(tokens=BLOCK + 5)
    window = Window(
        Decoder(model, choose_precision("fp32", torch.device("cpu")), rows=2),
        idx[:, :4],
        settings(max_new_tokens=BLOCK + 1),
        None,
    )
    with torch.inference_mode():
        for end in range(4, BLOCK + 5):
            expected = model(idx[:, :end][:, -BLOCK:])[:, -1]
            torch.testing.assert_close(window.next_logits(), expected, rtol=1e-5, atol=1e-5)
            window.append(idx[:, end])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_tokens_equal_uncached_tokens_beyond_the_block_size(temperature):
    model, idx = tiny(), prompts()
    config = settings(temperature=temperature, max_new_tokens=BLOCK + 5)
    cached = generate(model, idx, config, seeded())
    uncached = generate(model, idx, replace(config, kv_cache=False), seeded())
    assert cached.tolist() == uncached.tolist()


def test_a_window_slides_over_the_last_block_size_tokens():
    model, greedy = tiny(), settings(temperature=0.0, max_new_tokens=BLOCK + 5)
    tokens = generate(model, prompts(), greedy, seeded())
    for end in range(BLOCK, BLOCK + 5):
        expected = model(tokens[:, :end][:, -BLOCK:])[:, -1].argmax(-1)
        assert tokens[:, end].tolist() == expected.tolist()


def test_a_long_prompt_is_cropped_for_the_model_and_returned_whole():
    model, idx = tiny(), prompts(tokens=BLOCK + 7)
    whole = generate(model, idx, settings(), seeded())
    cropped = generate(model, idx[:, -BLOCK:], settings(), seeded())
    assert whole[:, : BLOCK + 7].tolist() == idx.tolist()
    assert whole[:, BLOCK + 7 :].tolist() == cropped[:, BLOCK:].tolist()


def test_the_cache_makes_a_step_one_token_wide_until_the_window_slides():
    model = tiny()
    lengths = seen_lengths(model)
    generate(model, prompts(tokens=BLOCK - 2), settings(max_new_tokens=5), seeded())
    assert lengths == [BLOCK - 2, 1, 1, BLOCK, BLOCK]


def test_without_the_cache_every_step_sees_the_whole_context():
    model = tiny()
    lengths = seen_lengths(model)
    config = settings(max_new_tokens=4, kv_cache=False)
    generate(model, prompts(tokens=BLOCK - 2), config, seeded())
    assert lengths == [BLOCK - 2, BLOCK - 1, BLOCK, BLOCK]


def test_a_stream_computes_no_further_than_it_is_read():
    model = tiny()
    lengths = seen_lengths(model)
    columns = stream(model, prompts(tokens=5), settings(), seeded())
    assert [next(columns).shape, next(columns).shape] == [(2,), (2,)]
    assert lengths == [5, 1]


def test_the_cache_holds_the_format_that_autocast_computes_in(monkeypatch):
    made = []

    def noted(*args: object, **kwargs: object) -> KVCache:
        made.append(args[3])
        return KVCache(*args, **kwargs)

    monkeypatch.setattr(decoding, "KVCache", noted)
    for name in ("fp32", "tf32", "bf16", "fp16"):
        generate(tiny(), prompts(), settings(max_new_tokens=2, precision=name), seeded())
    assert made == [torch.float32, torch.float32, torch.bfloat16, torch.float16]


# --- what is drawn


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_top_k_keeps_exactly_k_even_among_ties(top_k):
    logits = torch.tensor([[2.0, 2.0, 2.0, 2.0, 2.0, 2.0], [1.0, 3.0, 3.0, 3.0, 0.0, 3.0]])
    kept = probabilities(logits, 1.0, top_k, 1.0) > 0
    assert kept.sum(-1).tolist() == [top_k, top_k]
    least_kept = logits.masked_fill(~kept, torch.inf).amin(-1)
    most_dropped = logits.masked_fill(kept, -torch.inf).amax(-1)
    assert (least_kept >= most_dropped).all()


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
def test_the_edge_of_top_p_is_float64s(std: float):
    logits = std * torch.randn(64, 50257, generator=torch.Generator().manual_seed(8))
    ranked = np.sort(logits.double().numpy(), axis=-1)[:, ::-1]
    mass = np.exp(ranked - ranked[:, :1])
    mass = (mass / mass.sum(-1, keepdims=True)).cumsum(-1)
    for top_p in (0.5, 0.9, 0.99):
        values, _ = candidates(logits, 1.0, 0, top_p)
        kept = (values > -math.inf).sum(-1).tolist()
        assert kept == (1 + (mass[:, :-1] < top_p).sum(-1)).tolist()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.2, [1]), (0.49, [1]), (0.51, [1, 3]), (0.76, [0, 1, 3]), (1.0, [*range(4)])],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p, kept):
    logits = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()
    assert probabilities(logits, 1.0, 0, top_p)[0].nonzero()[:, 0].tolist() == kept


def test_filters_act_in_the_order_that_transformers_uses():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.generation import logits_process as theirs
    logits = 3 * torch.randn(4, 50, generator=seeded())
    for temperature, top_k, top_p in ((0.7, 10, 0.8), (3.0, 5, 0.5), (0.9, 5, 0.999)):
        expected = theirs.TemperatureLogitsWarper(temperature)(None, logits)
        expected = theirs.TopKLogitsWarper(top_k)(None, expected)
        expected = theirs.TopPLogitsWarper(top_p)(None, expected).softmax(-1)
        ours = probabilities(logits, temperature, top_k, top_p)
        torch.testing.assert_close(ours, expected)


def test_temperature_divides_the_logits():
    logits = torch.randn(2, 9, generator=seeded())
    ours = probabilities(logits, 0.5, 0, 1.0)
    torch.testing.assert_close(ours, (logits / 0.5).softmax(-1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, [0.15, 0.5, 0.05, 0.3]),
        (0.25, 0, 1.0, [0.00050625, 0.0625, 0.00000625, 0.0081]),
        (1.0, 2, 1.0, [0.0, 0.5, 0.0, 0.3]),
        (0.5, 3, 0.99, [0.0225, 0.25, 0.0, 0.09]),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p, expected):
    rows, logits = 20_000, torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    config = settings(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = choose(logits.expand(rows, -1), config, seeded())
    shares = torch.bincount(drawn, minlength=4) / rows
    wanted = torch.tensor(expected) / sum(expected)
    deviation = (wanted * (1 - wanted) / rows).sqrt()
    assert ((shares - wanted).abs() <= 4 * deviation).all()


@pytest.mark.parametrize("generators", [1, 3])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (50, 1.0), (7, 0.8), (0, 0.9)])
def test_a_draw_is_torch_multinomials_to_the_bit(generators: int, top_k: int, top_p: float):
    logits = 3 * torch.randn(6, 1009, generator=seeded(1))
    config = settings(temperature=0.9, top_k=top_k, top_p=top_p)
    ours, theirs = ([seeded(n) for n in range(generators)] for _ in range(2))
    for _ in range(5):
        expected = []
        for part, chance in zip(logits.chunk(generators), theirs, strict=True):
            values, ids = candidates(part, 0.9, top_k, top_p)
            drawn = torch.multinomial(values.softmax(-1), 1, generator=chance)
            expected += ids.gather(-1, drawn)[:, 0].tolist()
        chance = ours[0] if generators == 1 else ours
        assert choose(logits, config, chance).tolist() == expected


def test_a_draw_does_not_wait_for_the_device(monkeypatch):
    with stand_in.gpu(monkeypatch):
        logits = torch.randn(4, 61, device="cuda")
        chance = [torch.Generator("cuda").manual_seed(n) for n in range(2)]
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # in which nobody waits
            for config in (settings(temperature=0.0), settings(top_k=5), settings(top_p=0.9)):
                assert choose(logits, config, chance).shape == (4,)


def test_compile_where_nothing_is_compiled_says_so():
    with pytest.warns(UserWarning, match="sample.compile=true runs eagerly: what is compiled"):
        found = generate(tiny(), prompts(), settings(compile=True), seeded())
    assert found.tolist() == generate(tiny(), prompts(), settings(), seeded()).tolist()


def test_padded_ids_are_never_sampled():
    model = tiny()
    unmasked = F.linear(model.hidden(prompts()), model.transformer.wte.weight)  # (B, T, rows)
    assert (unmasked.argmax(-1) >= VOCABULARY).float().mean() > 0.9
    tokens = generate(model, prompts(), settings(max_new_tokens=64, temperature=100.0), seeded())
    assert tokens.max() < VOCABULARY


# --- chance and state


def test_the_seed_decides_the_tokens():
    model, idx = tiny(), prompts()
    first = generate(model, idx, settings(), seeded(1))
    assert first.tolist() == generate(model, idx, settings(), seeded(1)).tolist()
    assert first.tolist() != generate(model, idx, settings(), seeded(2)).tolist()


def test_sampling_neither_uses_nor_moves_the_global_generator():
    model = tiny(dropout=0.5).train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, prompts(), settings(), seeded())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert first.tolist() == generate(model, prompts(), settings(), seeded()).tolist()


def test_dropout_is_off_and_the_training_flag_as_before():
    trained, idx = tiny(dropout=0.5), prompts()
    expected = generate(trained, idx, settings(), seeded())
    trained.train()
    assert generate(trained, idx, settings(), seeded()).tolist() == expected.tolist()
    assert all(module.training for module in trained.modules())
    columns = stream(trained, idx, settings(), seeded())
    next(columns)
    assert trained.training, "a stream that nobody finishes must leave the model as it was"


def test_steps_run_in_inference_mode_and_their_reader_does_not():
    model, modes = tiny(), []
    note = model.transformer.wte.register_forward_hook
    note(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    for _ in stream(model, prompts(), settings(max_new_tokens=3), seeded()):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert modes == [True, True, True]


def test_what_was_generated_can_be_trained_on():
    model = tiny()
    tokens = generate(model, prompts(), settings(max_new_tokens=4), seeded())
    model(tokens).sum().backward()
    assert model.transformer.wte.weight.grad is not None


# --- refusals


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="at least one token"):
        generate(tiny(), torch.zeros(1, 0, dtype=torch.int64), settings(), seeded())


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_an_id_beyond_the_vocabulary_is_refused(token):
    with pytest.raises(InputError, match=f"expected 0 to {VOCABULARY - 1}"):
        generate(tiny(), torch.tensor([[3, token]]), settings(), seeded())


def test_broken_weights_are_reported_and_not_sampled_from():
    model = tiny()
    torch.nn.init.constant_(model.transformer.ln_f.bias, torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericsError, match="not finite"):
            generate(model, prompts(), settings(temperature=temperature), seeded())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("gpu", [False, True])
def test_numbers_that_break_behind_the_prompt_are_reported(
    temperature: float, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, idx = tiny(), prompts()
    with torch.no_grad():
        model.transformer.wpe.weight[idx.size(1) + 1] = torch.nan
    config = settings(temperature=temperature, max_new_tokens=4)
    with stand_in.gpu(monkeypatch) if gpu else contextlib.nullcontext():
        device = "cuda" if gpu else "cpu"
        chance = runtime.generator(0, "sample", device)
        with pytest.raises(NumericsError, match="of a continuation are not finite"):
            generate(model.to(device), idx.to(device), config, chance)


# --- text


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> list[str]:
    """The pieces of text that `tokens` come out as."""
    monkeypatch.setattr(
        generation, "stream", lambda *args: (torch.tensor([token]) for token in tokens)
    )
    return list(stream_text(tiny(), gpt2(), "x", settings(), seeded()))


def test_text_comes_in_whole_characters(monkeypatch):
    text = "naïve 🦊 in 東京, ok"
    tokens = gpt2().encode_ordinary(text)
    pieces = scripted(monkeypatch, tokens)
    assert "".join(pieces) == text
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert 5 < len(pieces) < len(tokens), "some tokens end inside a character, most do not"


def test_text_ends_at_end_of_text(monkeypatch):
    tokens = [*gpt2().encode_ordinary("one two"), EOT, *gpt2().encode_ordinary(" three")]
    assert "".join(scripted(monkeypatch, tokens)) == "one two"


def test_a_character_cut_off_by_the_end_is_marked(monkeypatch):
    tokens = gpt2().encode_ordinary("a🦊")[:-1]
    assert "".join(scripted(monkeypatch, tokens)) == "a\ufffd"


@pytest.mark.parametrize("prompt", ["Hello, I'm", ""])
def test_streamed_text_is_the_text_of_the_generated_tokens(prompt):
    model = tiny(vocab_size=EOT + 1)
    tokens = gpt2().encode_ordinary(prompt) or [EOT]
    new = generate(model, torch.tensor([tokens]), settings(), seeded())[0, len(tokens) :].tolist()
    pieces = stream_text(model, gpt2(), prompt, settings(), seeded())
    assert "".join(pieces) == gpt2().decode(until_eot(new), errors="replace")


def test_tokens_are_cut_before_the_first_end_of_text():
    assert until_eot([4, 5, EOT, 6, EOT]) == [4, 5]
    assert until_eot([EOT]) == []
    assert until_eot(torch.tensor([4, 5]).tolist()) == [4, 5]


# --- prompts of unequal length


UNEQUAL = (1, 5, 3, 7, 2, 5, 4, 6)


def unequal(lengths: tuple[int, ...] = UNEQUAL) -> list[list[int]]:
    return [prompts(1, length, seed=40 + n)[0].tolist() for n, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [(6,), UNEQUAL], ids=["one row", "eight rows"])
def test_unequal_prompts_continue_as_in_transformers(lengths):
    model, rows = tiny(), unequal(lengths)
    idx, padding = pad(rows, "cpu")
    new = BLOCK - idx.size(1)
    theirs = transformers_model(model).generate(
        idx,
        attention_mask=(torch.arange(idx.size(1)) >= padding[:, None]).long(),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
    )
    greedy = settings(temperature=0.0, max_new_tokens=new)
    assert generate(model, idx, greedy, seeded(), padding).tolist() == theirs.tolist()


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "cudnn", "flash", "naive"])
def test_a_padded_row_continues_as_it_would_alone_beyond_the_block_size(kv_cache, attention):
    model, rows = tiny(attention=attention), unequal()
    greedy = settings(temperature=0.0, max_new_tokens=BLOCK + 9, kv_cache=kv_cache)
    idx, padding = pad(rows, "cpu")
    together = generate(model, idx, greedy, seeded(), padding)[:, idx.size(1) :]
    alone = [generate(model, torch.tensor([row]), greedy, seeded())[0, len(row) :] for row in rows]
    assert together.tolist() == torch.stack(alone).tolist()


def test_prompts_longer_than_the_block_are_padded_and_cropped_alike():
    model, rows = tiny(), unequal((3, BLOCK + 4, BLOCK - 1))
    greedy = settings(temperature=0.0)
    idx, padding = pad(rows, "cpu")
    together = generate(model, idx, greedy, seeded(), padding)[:, idx.size(1) :]
    alone = [generate(model, torch.tensor([row]), greedy, seeded())[0, len(row) :] for row in rows]
    assert together.tolist() == torch.stack(alone).tolist()


def test_no_token_sees_what_stands_in_the_padding():
    model = tiny()
    idx, padding = pad(unequal(), "cpu")
    other = torch.where(torch.arange(idx.size(1)) < padding[:, None], 17, idx)
    assert not torch.equal(idx, other)
    first, second = (
        Window(
            Decoder(model, choose_precision("fp32", torch.device("cpu")), rows=8),
            ids,
            settings(),
            padding,
        )
        for ids in (idx, other)
    )
    with torch.inference_mode():
        assert torch.equal(first.next_logits(), second.next_logits())
        for window in (first, second):
            window.append(idx[:, -1])
        assert torch.equal(first.next_logits(), second.next_logits())


def test_a_generator_of_its_own_gives_a_group_of_rows_the_draws_that_it_has_alone():
    model, rows = tiny(), unequal((4, 4, 6, 6))
    idx, padding = pad(rows, "cpu")
    mixed = generate(model, idx, settings(), [seeded(1), seeded(2)], padding)
    first = generate(model, torch.tensor(rows[:2]), settings(), seeded(1))
    second = generate(model, torch.tensor(rows[2:]), settings(), seeded(2))
    assert mixed[:2, 2:].tolist() == first.tolist()
    assert mixed[2:].tolist() == second.tolist()


def test_a_row_of_padding_alone_is_refused():
    idx = prompts(batch=2)
    with pytest.raises(InputError, match="at least one token a row"):
        generate(tiny(), idx, settings(), seeded(), torch.tensor([0, idx.size(1)]))
