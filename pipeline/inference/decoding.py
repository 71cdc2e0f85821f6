"""The network as sampling runs it: the model's own blocks, with matrix products for few rows.

A step of sampling multiplies every weight by one row per text, so it is as fast as weights come
out of memory, provided that the product keeps up. The model's file stays the only definition of
the network: a `Decoder` is a copy that shares its parts and replaces its products.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.compute import fp8
from pipeline.compute.precision import Precision
from pipeline.inference.int8 import Int8Linear
from pipeline.model.gpt import GPT, KVCache
from pipeline.model.loss import mean_of, token_losses
from pipeline.training.compiling import compiled

Product = Callable[[Tensor], Tensor]

PIECE = 128  # columns: a cache has whole pieces, since kernels want multiples of 16
READ = 1024  # columns of all rows that a step reads at least: for fewer no new graph pays
SPARE = 16  # columns that no step reads: of a whole buffer a compiler would make another case


class Decoder:
    """A model for inference that mostly multiplies `rows` rows at a time.

    `weights` is fp32 or int8 (see `int8.py`). For the memory beside the model's see `product_for`.
    Later changes to the model's weights may go unseen. Everything runs inside `computing`.
    """

    @torch.no_grad()
    def __init__(
        self, model: GPT, precision: Precision, weights: str = "fp32", rows: int = 1
    ) -> None:
        self.config, self.precision = model.config, precision
        self.dtype = precision.dtype  # of keys and values, which products give
        self.body: GPT = _with_products(model, product_for(precision, weights, rows))
        make_head = product_for(precision.of_the_rest(), weights, rows)
        self.head = make_head(model.transformer.wte.weight, None)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around every call below: products and everything else in the decoder's precision."""
        with self.precision.products(), self.precision.autocast():
            yield

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> (B, T, C), as `GPT.hidden` without dropout."""
        return self.body.hidden(idx, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V), as `GPT.logits`."""
        return self.head(hidden)[..., : self.config.vocab_size]

    def new_cache(self, idx: Tensor, new_tokens: int) -> KVCache:
        """For prompts (B, T) and `new_tokens` more, in the format that keys and values come in."""
        columns = min(self.config.block_size, idx.size(1) + new_tokens)
        columns = _whole_pieces(columns) + SPARE
        return KVCache(self.config, len(idx), idx.device, self.dtype, capacity=columns)


def _whole_pieces(columns: int) -> int:
    return -(-columns // PIECE) * PIECE


def product_for(
    precision: Precision, weights: str, rows: int
) -> Callable[[Tensor, Tensor | None], Product]:
    """A maker of products from weights (N, K) and a bias (N,) or None.

    int8 takes a quarter of the weights' memory beside the model, bf16, fp16 and fp8 half, and
    oneDNN, in plain fp32 on a CPU, for more than one row all of it.
    """
    dtype = precision.dtype
    if weights == "int8":
        return lambda weight, bias: Int8Linear(weight, bias, dtype)
    if precision.effective == "fp8":
        return lambda weight, bias: partial(
            fp8.linear, weight=weight.to(dtype), bias=bias, emulated=precision.emulated
        )
    if precision.device.type == "cpu" and precision.effective == "fp32" and has_onednn():
        return lambda weight, bias: OneDnnLinear(weight, bias, rows)
    return lambda weight, bias: Linear(weight.to(dtype), bias)


class Linear:
    """`F.linear` without a module around it, with weights that autocast need not convert."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None and x.numel() == x.size(-1) and torch.compiler.is_compiling():
            return F.linear(x, self.weight) + self.bias  # with a bias bound to it, no compiler's
        return F.linear(x, self.weight, self.bias)


class OneDnnLinear:
    """oneDNN's product, which torch.compile uses on CPUs; in fp32 `F.linear` takes MKL's.

    On AMD's CPUs MKL multiplies one row at a third of the memory's speed, oneDNN at nearly all of
    it. For more rows a copy of the weights is reordered into the blocks that oneDNN multiplies.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.weight, self.bias = weight.detach() if rows == 1 else pack(weight, rows), bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def has_onednn() -> bool:
    """Whether torch was built with oneDNN's linear product (not on macOS, for one)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _with_products(module: nn.Module, make: Callable[[Tensor, Tensor | None], Product]) -> Any:
    """A copy that shares every tensor, in evaluation mode, each nn.Linear replaced."""
    if isinstance(module, nn.Linear):
        return make(module.weight, module.bias)
    twin = copy.copy(module)
    twin.training = False
    parts = {name: _with_products(child, make) for name, child in module._modules.items()}
    twin._modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    vars(twin).update({name: part for name, part in parts.items() if name not in twin._modules})
    return twin


class Step:
    """The pass of one token per row behind a filled cache: on a GPU as one CUDA graph.

    A step launches some 200 kernels, which takes the host longer than the GPU needs for them; a
    graph of them is launched at once. It has fixed shapes and addresses, so the tokens see a mask
    over the cache, and the column to write is a number on the device. The cache is read in pieces
    as far as it is filled: a graph each.

    With `compile` the graph holds fewer and larger kernels: torch.compile joins what lies between
    the products, attention by its plain formula and, for one row, the products themselves. It
    takes its time once a shape of the model and a number of rows, not once a piece.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, compile: bool = False) -> None:
        keys = cache.keys[0]
        self._decoder, self._cache = decoder, FixedCache(cache, decoder)
        self._token = keys.new_zeros(len(keys), 1, dtype=torch.int64)
        self._columns = torch.arange(keys.size(2), device=keys.device)
        self._piece = _whole_pieces(max(1, READ // len(keys)))
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._run = self._compiled() if compile else self._eager

    def __call__(self, token: Tensor, column: int) -> Tensor:
        """Tokens (B, 1) for `column`, the first free one -> logits (B, V).

        They are valid until the next call, which writes to the same memory.
        """
        self._token.copy_(token)
        self._cache.column.fill_(column)
        end = min(-(-(column + 1) // self._piece) * self._piece, len(self._columns) - SPARE)
        if self._token.device.type == "cuda" and end in self._graphs:
            graph, logits = self._graphs[end]
            graph.replay()
            return logits
        with self._decoder.computing():
            if self._token.device.type != "cuda":
                return self._run(self._columns[:end])
            self._graphs[end] = self._capture(self._columns[:end])
        return self(token, column)

    def _eager(self, columns: Tensor) -> Tensor:
        self._cache.begin_at(columns)
        return self._decoder.logits(self._decoder.hidden(self._token, self._cache)[:, -1])

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        for buffer in (*self._cache.keys, *self._cache.values):
            torch._dynamo.mark_dynamic(buffer, 2)

        def plain(columns: Tensor) -> Tensor:
            # Kernels of attention serve many queries; of one, the formula's parts are fused better.
            with sdpa_kernel(SDPBackend.MATH):
                return self._eager(columns)

        # It is this option that makes the compiler write products of one row by itself.
        how = {"coordinate_descent_tuning": True}
        made = compiled(plain, self._eager, self._decoder.precision, "sample.compile", options=how)

        def call(columns: Tensor) -> Tensor:
            torch._dynamo.mark_dynamic(columns, 0)
            return made(columns)

        return call

    def _capture(self, columns: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # A first run by itself: libraries allocate their workspaces, and kernels are compiled,
        # which no graph may record.
        with torch.cuda.stream(side):
            self._run(columns)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run(columns)
        return graph, logits


class FixedCache(KVCache):
    """The buffers of another cache, with one token per row going to `column`, a 0-dim tensor."""

    def __init__(self, filled: KVCache, decoder: Decoder) -> None:
        self.keys, self.values, self.padding = filled.keys, filled.values, filled.padding
        self.column = torch.zeros((), dtype=torch.int64, device=filled.keys[0].device)
        # What SDPA adds to the scores; of booleans it would make that in every layer.
        self._added = None if decoder.config.attention == "naive" else decoder.dtype
        self.length, self.mask = 0, None

    def begin_at(self, columns: Tensor) -> None:
        """The next pass sees `columns` (S,), the first ones of the buffers, up to `column`."""
        self.length = 0  # the column is counted on the device
        self._columns = columns

    def begin(self, tokens: int) -> Tensor:
        """Positions (1,) or (B, 1), and the mask that leaves out all columns after the token's."""
        assert tokens == 1, "a step is one token a row"
        positions = column = self.column.view(1)
        self.mask = (self._columns <= column)[None, None, None]  # (1, 1, 1, S)
        if self.padding is not None:
            positions = self._unpadded(column, self._columns)
        if self._added is not None:
            nothing = torch.zeros_like(self.mask, dtype=self._added)
            self.mask = nothing.masked_fill(~self.mask, -math.inf)
        return positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, 1, D) at `column`; return the columns of the pass (B, H, S, D)."""
        column, end = self.column.view(1), self._columns.size(0)
        for all_of_them, new in ((self.keys[layer], k), (self.values[layer], v)):
            all_of_them.index_copy_(2, column, new.to(all_of_them.dtype))
        return self.keys[layer][:, :, :end].to(k.dtype), self.values[layer][:, :, :end].to(v.dtype)


@torch.inference_mode()
def mean_loss(decoder: Decoder, windows: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean loss in nats/target over inputs and targets (B, T), by the products of sampling.

    `loss.mean_loss` has those of training: the difference is what int8 costs.
    """

    def nats(x: Tensor, y: Tensor) -> Tensor:
        return token_losses(decoder.logits(decoder.hidden(x)), y).sum()  # of (B, T, V), (B, T)

    with decoder.computing():
        return mean_of(nats, windows, decoder.precision.device)
