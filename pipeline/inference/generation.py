"""Sampling from a model: one token at a time, as tokens or as text."""

from __future__ import annotations

import codecs
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from pipeline.compute.precision import choose_precision
from pipeline.data.tokenizer import EOT
from pipeline.errors import InputError, NumericsError
from pipeline.inference.decoding import Decoder, Step

if TYPE_CHECKING:
    import tiktoken

    from pipeline.config import SampleConfig
    from pipeline.model.gpt import GPT, KVCache

    Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


def generate(
    model: GPT | Decoder,
    idx: Tensor,
    config: SampleConfig,
    generator: Generators,
    padding: Tensor | None = None,
) -> Tensor:
    """Prompts (B, T) int64 -> prompts and continuations (B, T + max_new_tokens).

    Nothing stops at end-of-text: `until_eot` cuts there. Prompts of unequal length come from
    `pad`, and what is raised and what else is taken from `stream`.
    """
    batch, prompt = idx.shape
    tokens = idx.new_empty(batch, prompt + config.max_new_tokens)
    tokens[:, :prompt] = idx
    for step, column in enumerate(stream(model, idx, config, generator, padding)):
        tokens[:, prompt + step] = column
    return tokens


def pad(prompts: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths -> (B, T) int64 filled up on the left, and by how much (B,)."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    padding = [longest - len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(padding, device=device)


@torch.inference_mode()
def stream(
    model: GPT | Decoder,
    idx: Tensor,
    config: SampleConfig,
    generator: Generators,
    padding: Tensor | None = None,
) -> Iterator[Tensor]:
    """Continue prompts (B, T) int64 by `max_new_tokens`, yielding one column (B,) int64 a step.

    The model sees the last `block_size` tokens, in `config.precision`. Randomness comes from
    `generator` alone, one for all rows or one for each of as many equal groups of rows, and the
    result is the same with `kv_cache` on or off. `padding` (B,) is the number of filler tokens on
    the left of each row: the row continues as it would alone. Whoever samples often makes a
    `Decoder` once (with its own precision): reordering or rounding weights takes as long as some
    tokens.

    Raises InputError for an empty prompt or an id beyond the vocabulary, NumericsError where logits
    are not finite: at once for those of the prompt, later on a GPU with the last token.
    """
    _check_prompt(model, idx, padding)
    if padding is not None and not padding.any():
        padding = None  # the kernels without a mask are faster
    if config.compile and not (config.kv_cache and idx.device.type == "cuda"):
        why = "what is compiled is a step behind the cache on a CUDA device"
        warnings.warn(f"sample.compile=true runs eagerly: {why}", stacklevel=2)
    if not isinstance(model, Decoder):
        precision = choose_precision(config.precision, idx.device)
        model = Decoder(model, precision, config.weights, len(idx))
    window = Window(model, idx, config, padding)
    finite = torch.ones((), dtype=torch.bool, device=idx.device)
    looks = {0, config.max_new_tokens - 1}  # on a GPU each look waits for it
    for step in range(config.max_new_tokens):
        logits = window.next_logits()  # (B, V)
        finite = finite & logits.isfinite().all()
        if (step in looks or idx.device.type == "cpu") and not finite:
            whose = "a continuation" if step else "the prompt"
            raise NumericsError(f"the logits of {whose} are not finite: the weights are broken")
        column = choose(logits, config, generator)  # (B,)
        yield column
        window.append(column)


class Window:
    """The last `block_size` tokens of every row, and the logits of those after them.

    With `kv_cache` the prompt takes one pass, each token after it a pass of its own, until the
    window slides: positions are learned, so every token then stands at another one and what was
    cached is void. Padding leaves the window first.
    """

    def __init__(
        self, decoder: Decoder, idx: Tensor, config: SampleConfig, padding: Tensor | None
    ) -> None:
        batch, self._end = idx.shape
        self._decoder, self._padding = decoder, padding
        self._keep, self._compile = config.kv_cache, config.compile
        self._tokens = idx.new_empty(batch, self._end + config.max_new_tokens)
        self._tokens[:, : self._end] = idx
        self._cache: KVCache | None = None
        if config.kv_cache or padding is not None:  # without the former for its mask alone
            self._cache = decoder.new_cache(idx, config.max_new_tokens)
        self._step: Step | None = None

    def append(self, column: Tensor) -> None:
        """One more token (B,) a row."""
        self._tokens[:, self._end] = column
        self._end += 1

    def next_logits(self) -> Tensor:
        """(B, V): of the tokens after the newest; valid until the next call."""
        cache, start = self._cache, max(0, self._end - self._decoder.config.block_size)
        if cache is not None and self._keep and cache.length == self._end - start - 1 > 0:
            start = self._end - 1  # the tokens before it are cached
            if self._tokens.device.type == "cuda":
                self._step = self._step or Step(self._decoder, cache, self._compile)
                logits = self._step(self._tokens[:, start : self._end], cache.length)
                cache.length += 1
                return logits
        elif cache is not None:
            cache.reset()
            if self._padding is not None:
                cache.padding = (self._padding - start).clamp(min=0)
        with self._decoder.computing():
            newest = self._decoder.hidden(self._tokens[:, start : self._end], cache)[:, -1]
            return self._decoder.logits(newest)  # (B, C) -> (B, V): the head is needed once a step


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
    device = model.transformer.wte.weight.device
    idx = torch.tensor([tokenizer.encode_ordinary(prompt) or [EOT]], device=device)
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


def choose(logits: Tensor, config: SampleConfig, generator: Generators) -> Tensor:
    """Logits (B, V) -> one token each (B,): the likeliest at temperature 0, else drawn.

    Each of several generators draws for its part of the rows. The draw happens on the generator's
    device, so that one on the CPU gives the same random numbers whatever the model runs on.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    values, ids = candidates(logits, config.temperature, config.top_k, config.top_p)
    weights = values.softmax(dim=-1).to(generators[0].device)  # (B, K)
    # torch.multinomial to the bit, without its two looks at the weights, which wait for a GPU.
    times = torch.empty_like(weights)
    for part, own in zip(times.split(len(times) // len(generators)), generators, strict=True):
        part.exponential_(generator=own)
    drawn = (weights / times).argmax(dim=-1, keepdim=True)  # (B, 1): the first to arrive
    return ids.gather(-1, drawn.to(ids.device))[:, 0]


def candidates(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Logits (B, V) -> what to draw from: fp32 logits (B, K), -inf where excluded, and ids (B, K).

    In this order: keep exactly the `top_k` largest whatever ties there are (0 keeps all), divide
    by `temperature` (above 0), keep the fewest whose probabilities reach `top_p` (1 keeps all;
    nucleus sampling, Holtzman et al. 2020), added up in fp64: fp32 would leave the edge to the
    order of 50,257 additions. At least one is left. K is `top_k`, or V.
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
        # MPS has no fp64, and a GPU no such sum in one order.
        host = values.device.type == "mps" or torch.are_deterministic_algorithms_enabled()
        exact = values.cpu() if host else values
        reached = exact.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)[:, :-1]
        beyond = (reached >= top_p).to(values.device)  # the mass of all likelier tokens suffices
        values[:, 1:] = values[:, 1:].masked_fill(beyond, -math.inf)
    return values, ids.expand_as(values)


def _check_prompt(model: GPT | Decoder, idx: Tensor, padding: Tensor | None) -> None:
    short = padding is not None and bool((padding >= idx.size(1)).any())
    if idx.numel() == 0 or short:
        raise InputError(f"prompt of shape {tuple(idx.shape)}: expected at least one token a row")
    vocabulary, low, high = model.config.vocab_size, int(idx.min()), int(idx.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"prompt: token ids {low} to {high}, expected 0 to {vocabulary - 1}")
