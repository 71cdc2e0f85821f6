"""GPT-2, whole: config, attention, MLP, block, GPT and the cache for keys and values.

Read it from top to bottom. Shapes: B batch, T tokens of this call, S tokens seen so far
(the cached ones and these T), C channels, H heads, D = C / H, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class GPTConfig:
    """What shapes the network; nothing about its training.

    The embedding holds `vocab_rows` rows of which the first `vocab_size` are tokens. The rest
    is padding: 50304 is a multiple of 64 and its matrix product is faster than 50257's.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int = 50257
    vocab_rows: int = 50304
    dropout: float = 0.0
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd}: not a multiple of n_head={self.n_head}")
        if self.vocab_rows < self.vocab_size:
            raise ValueError(f"vocab_rows={self.vocab_rows}: below vocab_size={self.vocab_size}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention}: one of {', '.join(ATTENTION)}")


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, no query seeing a later key (Vaswani et al. 2017, eq. 1).

    q (B, H, T, D), k and v (B, H, S, D) with T <= S, the queries being the last T of the S
    positions unless a boolean `mask` (B, 1, T, S) says what they see. Returns (B, H, T, D).
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    scores = scores.masked_fill(~(visible(q, k) if mask is None else mask), -math.inf)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    return weights @ v.to(weights.dtype)  # (B, H, T, D)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None
) -> Tensor:
    """The same formula in one fused kernel, which never stores the (T, S) scores."""
    queries, keys = q.size(-2), k.size(-2)
    # is_causal counts positions from 0 on both sides, which is right only without a past:
    # a lone query behind a cache would see key 0 and nothing else.
    if mask is None and 1 < queries < keys:
        mask = visible(q, k)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and queries > 1
    )


def preferring(kernels: tuple[SDPBackend, ...], *given: Any) -> Tensor:
    """`sdpa_attention` by the first of these kernels that takes such tensors, mask and dropout."""
    with sdpa_kernel(list(kernels), set_priority=True):
        return sdpa_attention(*given)


def visible(q: Tensor, k: Tensor) -> Tensor:
    """(T, S) booleans: may this query see this key? Query t stands at position S - T + t."""
    queries, keys = q.size(-2), k.size(-2)
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


FLASH = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
ATTENTION: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa_attention,  # torch's choice
    "cudnn": partial(preferring, (SDPBackend.CUDNN_ATTENTION, *FLASH)),
    "flash": partial(preferring, FLASH),
    "naive": naive_attention,
}


class Attention(nn.Module):
    """Causal self-attention with H heads; queries, keys and values come from one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.attend = ATTENTION[config.attention]
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, layer: int, cache: KVCache | None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); reads and extends this layer's part of the cache."""
        batch, tokens, channels = x.shape
        q, k, v = (
            part.view(batch, tokens, self.n_head, channels // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(channels, dim=2)
        )  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, S, D)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, mask)
        y = y.transpose(1, 2).reshape(batch, tokens, channels)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear maps with four times the channels between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        # The published weights were trained with GELU's tanh form, so it is part of the model.
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention, then MLP: each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, layer: int, cache: KVCache | None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.ln_1(x), layer, cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). Weights are whatever torch gives: see `init.initialize`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # idx -> positions and mask of a pass without a cache; None: each token sees all before it.
        self.layout: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_rows, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS),
            }
        )

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, looked_up: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) int64 -> (B, T, C) after the last norm, behind what the cache holds.

        `looked_up` is `wte(idx)`, from a caller who wants its gradient handled in a way of its own.
        Raises ValueError where the positions run beyond `block_size`.
        """
        tokens, past = idx.size(1), cache.length if cache is not None else 0
        if past + tokens > self.config.block_size:
            raise ValueError(
                f"{tokens} tokens behind {past} cached ones: "
                f"expected at most block_size={self.config.block_size} together"
            )
        mask = None  # (B, 1, T, S)
        if cache is not None:
            positions, mask = cache.begin(tokens), cache.mask  # (T,), or (B, T) with padded rows
        elif self.layout is not None:
            positions, mask = self.layout(idx)  # (B, T)
        else:
            positions = torch.arange(tokens, device=idx.device)
        x = self.transformer.wte(idx) if looked_up is None else looked_up
        x = x + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, layer, cache, mask)
        if cache is not None:
            cache.length += tokens
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V): the head is the token embedding itself, so nothing can untie it.

        The product takes the padded rows along for speed; nobody outside sees them.
        """
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) int64 -> logits (B, T, V); raises ValueError as `hidden` does."""
        return self.logits(self.hidden(idx, cache))

    def parameter_count(self) -> int:
        """Every parameter, the tied embedding once, padded rows included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of training on one token: 6 N + 12 L H D T.

        Forward and backward, matrix products only; N leaves out the position embedding, which
        multiplies nothing (Chowdhery et al. 2022, PaLM, appendix B).
        """
        c = self.config
        n = self.parameter_count() - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * c.n_layer * c.n_embd * sequence_length


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of `capacity` columns made once.

    Memory: 2 L B C capacity numbers; `block_size` columns where none are asked for. `length` is
    the number of tokens held; a forward pass advances it. For inference under `torch.no_grad()`:
    the buffers are written in place.

    `padding` (B,) int64 is for rows of unequal length: that many columns on the left of a row
    are none of its tokens. Its positions count from behind them, and no token of it sees them.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        capacity: int | None = None,
    ) -> None:
        head_size = config.n_embd // config.n_head
        columns = config.block_size if capacity is None else capacity
        shape = (batch_size, config.n_head, columns, head_size)
        # A tensor a layer: a compiler that sees one written leaves the others where they are.
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
            for _ in range(2)
        )
        self.padding: Tensor | None = None
        self.length = 0
        self.mask: Tensor | None = None  # what the tokens of this pass see; None: all before them

    def reset(self) -> None:
        """Forget every token and keep the memory; what lies beyond `length` is never read."""
        self.length = 0

    def begin(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` columns, (T,) or (B, T), and the mask that they need."""
        columns = torch.arange(self.length + tokens, device=self.keys[0].device)
        queries = columns[self.length :]
        if self.padding is not None:
            return self._unpadded(queries, columns)
        self.mask = None
        return queries

    def _unpadded(self, queries: Tensor, columns: Tensor) -> Tensor:
        first, query = self.padding[:, None, None], queries[:, None]  # (B, 1, 1), (T, 1)
        # A column of padding sees itself, or its softmax would divide nothing by nothing.
        self.mask = ((columns <= query) & ((columns >= first) | (columns == query)))[:, None]
        return (queries - self.padding[:, None]).clamp_(min=0)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) behind the cached ones; return all of them (B, H, S, D)."""
        assert k.size(0) == self.keys[layer].size(0), (
            "a cache serves the batch size it was made for"
        )
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end].to(k.dtype), self.values[layer][:, :, :end].to(v.dtype)
