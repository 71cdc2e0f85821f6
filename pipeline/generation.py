"""Sampling from a model: one token at a time, as tokens or as text."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import InputError, NumericsError
from pipeline.model import GPT, KVCache
from pipeline.tokenizer import EOT

if TYPE_CHECKING:
    import tiktoken

    from pipeline.config import SampleConfig


def generate(model: GPT, idx: Tensor, config: SampleConfig, generator: torch.Generator) -> Tensor:
    """Prompts of one length (B, T) int64 -> prompts and continuations (B, T + max_new_tokens).

    Nothing stops at end-of-text: `until_eot` cuts there. Raises as `stream` does.
    """
    batch, prompt = idx.shape
    tokens = idx.new_empty(batch, prompt + config.max_new_tokens)
    tokens[:, :prompt] = idx
    for step, column in enumerate(stream(model, idx, config, generator)):
        tokens[:, prompt + step] = column
    return tokens


@torch.inference_mode()
def stream(
    model: GPT, idx: Tensor, config: SampleConfig, generator: torch.Generator
) -> Iterator[Tensor]:
    """Continue prompts (B, T) int64 by `max_new_tokens`, yielding one column (B,) int64 a step.

    The model sees the last `block_size` tokens. Randomness comes from `generator` alone, and
    the result is the same with `kv_cache` on or off. Raises InputError for an empty prompt or an
    id beyond the vocabulary, NumericsError where the prompt's logits are not finite.
    """
    _check_prompt(model, idx)
    context = idx[:, -model.config.block_size :]
    cache = _new_cache(model, idx) if config.kv_cache else None
    for step in range(config.max_new_tokens):
        logits = next_logits(model, context, cache)  # (B, V)
        if step == 0 and not logits.isfinite().all():  # once: on a GPU each look waits for it
            raise NumericsError("the logits of the prompt are not finite: the weights are broken")
        column = choose(logits, config, generator)  # (B,)
        yield column
        context = torch.cat([context, column[:, None]], dim=1)[:, -model.config.block_size :]


def stream_text(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    prompt: str,
    config: SampleConfig,
    generator: torch.Generator,
) -> Iterator[str]:
    """Continue `prompt`, yielding pieces of text that together are the continuation.

    Ends at end-of-text or after `max_new_tokens`. A token may end inside a character: those bytes
    wait for the rest, and bytes that no character completes become U+FFFD. An empty prompt stands
    for the start of a document. Raises as `stream` does.
    """
    idx = torch.tensor([tokenizer.encode_ordinary(prompt) or [EOT]], device=_device(model))
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for column in stream(model, idx, config, generator):
        token = int(column)
        if token == EOT:
            break
        if piece := characters.decode(tokenizer.decode_single_token_bytes(token)):
            yield piece
    if rest := characters.decode(b"", final=True):
        yield rest


def until_eot(tokens: Sequence[int]) -> list[int]:
    """The tokens before the first end-of-text, all of them where there is none."""
    tokens = list(tokens)
    return tokens[: tokens.index(EOT)] if EOT in tokens else tokens


def next_logits(model: GPT, context: Tensor, cache: KVCache | None) -> Tensor:
    """Tokens (B, T), T at most block_size -> logits of the token after them (B, V).

    A cache that holds all but the newest token is extended by that one. Any other is built anew:
    positions are learned, so once the window slides every token stands at another position and
    what was cached is void. Dropout is off meanwhile.
    """
    fresh = context
    if cache is not None and cache.length == context.size(1) - 1:
        fresh = context[:, -1:]
    elif cache is not None:
        cache.reset()
    was_training = model.training
    model.eval()
    try:
        newest = model.hidden(fresh, cache)[:, -1]  # (B, C): the head is needed once a step
        return model.logits(newest)  # (B, V)
    finally:
        model.train(was_training)


def choose(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> Tensor:
    """Logits (B, V) -> one token each (B,): the likeliest at temperature 0, else drawn.

    The draw happens on the generator's device, so that a CPU generator gives one sequence of
    random numbers whatever the model runs on.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    values, ids = candidates(logits, config.temperature, config.top_k, config.top_p)
    weights = values.softmax(dim=-1).to(generator.device)  # (B, K)
    drawn = torch.multinomial(weights, num_samples=1, generator=generator)  # (B, 1)
    return ids.gather(-1, drawn.to(ids.device))[:, 0]


def candidates(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Logits (B, V) -> what to draw from: fp32 logits (B, K), -inf where excluded, and ids (B, K).

    In this order: keep exactly the `top_k` largest whatever ties there are (0 keeps all), divide
    by `temperature` (above 0), keep the fewest whose probabilities reach `top_p` (1 keeps all;
    nucleus sampling, Holtzman et al. 2020). At least one is left. K is `top_k`, or V.
    """
    assert temperature > 0, "temperature 0 is argmax, not a division"
    vocabulary = logits.size(-1)
    if top_k or top_p < 1:
        values, ids = logits.float().topk(min(top_k or vocabulary, vocabulary), dim=-1)  # sorted
    else:
        values, ids = logits.float(), torch.arange(vocabulary, device=logits.device)
    # Below the largest, nothing overflows upwards however small the temperature is.
    values = values - values.amax(dim=-1, keepdim=True)
    values = values / max(temperature, torch.finfo(torch.float32).tiny)
    if top_p < 1:
        reached = values.softmax(dim=-1).cumsum(dim=-1)[:, :-1]  # mass of all likelier tokens
        values[:, 1:] = values[:, 1:].masked_fill(reached >= top_p, -math.inf)
    return values, ids.expand_as(values)


def _check_prompt(model: GPT, idx: Tensor) -> None:
    if idx.numel() == 0:
        raise InputError(f"prompt of shape {tuple(idx.shape)}: expected at least one token")
    vocabulary, low, high = model.config.vocab_size, int(idx.min()), int(idx.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"prompt: token ids {low} to {high}, expected 0 to {vocabulary - 1}")


def _new_cache(model: GPT, idx: Tensor) -> KVCache:
    """A cache in the format that keys and values come in, so that no step converts it."""
    device = idx.device.type
    dtype = model.transformer.wte.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return KVCache(model.config, idx.size(0), idx.device, dtype)


def _device(model: GPT) -> torch.device:
    return model.transformer.wte.weight.device
