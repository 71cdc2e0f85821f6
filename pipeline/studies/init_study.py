"""What initialisation does to the residual stream and to gradients, measured block by block."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compute.precision import choose_precision
from pipeline.compute.runtime import generator
from pipeline.config import InitConfig
from pipeline.model.gpt import GPT
from pipeline.model.init import initialize
from pipeline.model.loss import linear_cross_entropy
from pipeline.tables import markdown

ADDS, WIDTH = 100, 768  # of the note's experiment
PROBE = (2, 64)  # sequences and tokens that a model is measured on
# Parameters in the blocks of a model that is built only to be measured: 1.6 GB, and its gradients
# are gone one by one.
LARGEST_TWIN = 400_000_000


@dataclass(frozen=True)
class RandomAdds:
    """std of a stream after k = 1 .. n random adds, plain and with addends times n^-0.5."""

    plain: list[float]
    scaled: list[float]


@dataclass(frozen=True)
class Measured:
    """One model at one initialisation. Lists have an entry a block, the first one a block early."""

    name: str
    n_layer: int
    residual_scale: bool | None  # None: the model as it is, wherever its weights come from
    stream_std: list[float]  # after the embedding, then after every block
    grad_norm: list[float]  # of the embeddings, then of every block


@dataclass(frozen=True)
class InitStudy:
    adds: RandomAdds
    as_is: Measured
    twins: list[Measured]


def study(model: GPT, config: InitConfig) -> InitStudy:
    """The note's experiment, `model` as it is, and fresh twins of other depths, on the CPU.

    Leaves the model and the global generators as they were.
    """
    adds = random_adds(ADDS, WIDTH, generator(config.seed, "random adds"))
    return InitStudy(
        adds, measure(model, "as it is", None, config.seed), list(_twins(model, config))
    )


def random_adds(n: int, width: int, chance: torch.Generator) -> RandomAdds:
    """std over `width` channels after each of n adds of N(0, 1): sqrt(k), and sqrt(k / n)."""
    addends = torch.randn(n, width, generator=chance)
    return RandomAdds(
        addends.cumsum(0).std(1).tolist(), (addends * n**-0.5).cumsum(0).std(1).tolist()
    )


def depths(n_layer: int) -> list[int]:
    """Depths that the twins have: a quarter to four times the model's own."""
    candidates = {n_layer // 4, n_layer // 2, n_layer, 2 * n_layer, 4 * n_layer}
    return sorted(candidates - {0})


def measure(model: GPT, name: str, residual_scale: bool | None, seed: int) -> Measured:
    """std of the residual stream after every block, and gradient norms, on random tokens.

    A gradient is dropped as soon as its norm is known, so that they never exist all together.
    """
    batch, tokens = PROBE[0], min(PROBE[1], model.config.block_size)
    chance = generator(seed, "init study")
    ids = torch.randint(model.config.vocab_size, (batch, tokens + 1), generator=chance)
    stream: list[float] = []
    squares: dict[str, float] = {}
    was_training = model.training
    model.eval()  # no dropout: it is the weights that are measured
    with ExitStack() as hooks, torch.enable_grad():
        _watch_stream(model, stream, hooks)
        _watch_gradients(model, squares, hooks)
        hidden = model.hidden(ids[:, :-1])
        loss = linear_cross_entropy(
            hidden,
            model.transformer.wte.weight,
            ids[:, 1:],
            choose_precision("fp32", ids.device),
            vocab_size=model.config.vocab_size,
            scale=1 / ids[:, 1:].numel(),
        )
        loss.backward()
    model.train(was_training)
    blocks = [squares[f"h.{layer}"] for layer in range(model.config.n_layer)]
    norms = [math.sqrt(value) for value in (squares["embeddings"], *blocks)]
    return Measured(name, model.config.n_layer, residual_scale, stream, norms)


def _watch_stream(model: GPT, stds: list[float], hooks: ExitStack) -> None:
    def note(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not stds:
            stds.append(inputs[0].detach().std().item())
        stds.append(output.detach().std().item())

    for block in model.transformer.h:
        hooks.callback(block.register_forward_hook(note).remove)


def _watch_gradients(model: GPT, squares: dict[str, float], hooks: ExitStack) -> None:
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("transformer.").split(".")
        place = "embeddings" if parts[0] in ("wte", "wpe") else ".".join(parts[:2])

        def note(p: Tensor, place: str = place) -> None:
            squares[place] = squares.get(place, 0.0) + p.grad.norm().item() ** 2
            p.grad = None

        hooks.callback(parameter.register_post_accumulate_grad_hook(note).remove)


def _twins(model: GPT, config: InitConfig) -> Iterator[Measured]:
    """Fresh models of the same width at several depths, with and without the residual scale."""
    a_block = sum(p.numel() for p in model.transformer.h[0].parameters())
    for n_layer in depths(model.config.n_layer):
        if n_layer * a_block > LARGEST_TWIN:
            continue
        with torch.random.fork_rng(devices=[]):  # a new module draws weights that nobody uses
            twin = GPT(replace(model.config, n_layer=n_layer, dropout=0.0))
        for residual_scale in (True, False):
            settings = replace(config, scheme="gpt2", residual_scale=residual_scale)
            initialize(twin, settings, generator(config.seed, "init"))
            name = f"{n_layer} layers, {'scaled' if residual_scale else 'not scaled'}"
            yield measure(twin, name, residual_scale, config.seed)


def growth(twins: list[Measured], residual_scale: bool) -> float | None:
    """d log std / d log depth of the last block's stream: 0.5 is growth with the square root.

    Least squares over the twins; None for fewer than two depths.
    """
    points = [
        (math.log(t.n_layer), math.log(t.stream_std[-1]))
        for t in twins
        if t.residual_scale == residual_scale
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def page(study: InitStudy) -> str:
    """Markdown: what came out, in words and as tables."""
    adds = study.adds
    n = len(adds.plain)
    parts = [
        "# Initialisation\n\n"
        f"{n} random adds of N(0, 1) over {WIDTH} channels: std {adds.plain[-1]:.3f} at the end, "
        f"sqrt({n}) is {math.sqrt(n):.3f}. With every addend multiplied by {n}^-0.5: "
        f"{adds.scaled[-1]:.3f}.\n"
    ]
    exponents = [growth(study.twins, scaled) for scaled in (False, True)]
    if None not in exponents:
        parts.append(
            "\nFresh models of this width at several depths: the last block's stream grows with "
            f"depth to the power {exponents[0]:.2f} without the residual scale (0.5 is the square "
            f"root) and {exponents[1]:.2f} with it (0 is not at all).\n"
        )
    columns = ("model", "std first", "std last", "gradient norm first", "gradient norm last")
    rows = [
        (m.name, m.stream_std[1], m.stream_std[-1], m.grad_norm[1], m.grad_norm[-1])
        for m in (study.as_is, *study.twins)
    ]
    parts.append(f"\nFirst and last are blocks.\n\n{markdown(columns, rows)}")
    return "".join(parts)


def stream_rows(study: InitStudy) -> list[tuple[str, int, float, float]]:
    """(model, block, std of the stream after it, gradient norm of it); block 0 the embeddings."""
    return [
        (m.name, block, std, norm)
        for m in (study.as_is, *study.twins)
        for block, (std, norm) in enumerate(zip(m.stream_std, m.grad_norm, strict=True))
    ]
