"""The network as sampling runs it: the model's own blocks, with matrix products for few rows.

A step of sampling multiplies every weight by one row per text, so it is as fast as weights come
out of memory, provided that the product keeps up. The model's file stays the only definition of
the network: a `Decoder` is a copy that shares its parts and replaces its products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.compute import fp8
from pipeline.compute.precision import Precision
from pipeline.inference.int8 import Int8Linear
from pipeline.model.gpt import GPT, KVCache
from pipeline.model.loss import mean_of, token_losses

Product = Callable[[Tensor], Tensor]


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
        return KVCache(self.config, len(idx), idx.device, self.dtype, capacity=columns)


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
    children = module._modules.items()
    twin._modules = {name: _with_products(child, make) for name, child in children}
    return twin


class Step:
    """The pass of one token per row behind a filled cache: on a GPU as one CUDA graph.

    A step launches some 200 kernels, which takes the host longer than the GPU needs for them; a
    graph of them is launched at once. It has fixed shapes and addresses, so the tokens see a mask
    over the whole cache, and the column to write is a number on the device.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder, self._cache = decoder, FixedCache(cache)
        self._token = cache.keys.new_zeros(cache.keys.size(1), 1, dtype=torch.int64)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def __call__(self, token: Tensor, column: int) -> Tensor:
        """Tokens (B, 1) for `column`, the first free one -> logits (B, V).

        They are valid until the next call, which writes to the same memory.
        """
        self._token.copy_(token)
        self._cache.column.fill_(column)
        if self._token.device.type != "cuda":
            return self._run()
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._logits

    def _run(self) -> Tensor:
        self._cache.length = 0  # the column is counted on the device: see FixedCache
        return self._decoder.logits(self._decoder.hidden(self._token, self._cache)[:, -1])

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # A first run by itself: libraries allocate their workspaces, which no graph may record.
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._run()
        return graph


class FixedCache(KVCache):
    """The buffers of another cache, with one token per row going to `column`, a 0-dim tensor."""

    def __init__(self, filled: KVCache) -> None:
        self.keys, self.values, self.padding = filled.keys, filled.values, filled.padding
        self.column = torch.zeros((), dtype=torch.int64, device=filled.keys.device)
        self._columns = torch.arange(filled.keys.size(3), device=filled.keys.device)
        self.length, self.mask = 0, None

    def begin(self, tokens: int) -> Tensor:
        """Positions (1,) or (B, 1), and the mask that leaves out all columns after the token's."""
        assert tokens == 1, "a step is one token a row"
        column = self.column.view(1)
        if self.padding is not None:
            return self._unpadded(column, self._columns)
        self.mask = (self._columns <= column)[None, None, None]  # (1, 1, 1, S)
        return column

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, 1, D) at `column`; return the whole buffers."""
        column = self.column.view(1)
        for all_of_them, new in ((self.keys[layer], k), (self.values[layer], v)):
            all_of_them.index_copy_(2, column, new.to(all_of_them.dtype))
        return self.keys[layer].to(k.dtype), self.values[layer].to(v.dtype)


@torch.inference_mode()
def mean_loss(decoder: Decoder, windows: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean loss in nats/target over inputs and targets (B, T), by the products of sampling.

    `loss.mean_loss` has those of training: the difference is what int8 costs.
    """

    def nats(x: Tensor, y: Tensor) -> Tensor:
        return token_losses(decoder.logits(decoder.hidden(x)), y).sum()  # of (B, T, V), (B, T)

    with decoder.computing():
        return mean_of(nats, windows, decoder.precision.device)
