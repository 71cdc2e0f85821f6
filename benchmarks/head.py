"""What the output layer and its loss cost, alone: ours, the plain formula, torch's own.

    python benchmarks/head.py [--device cuda] [--tokens 32768] [--rounds 20] [--precision bf16]

GPT-2 124M's shapes: hidden states (tokens, 768), 50,304 rows of which 50,257 are tokens. Forward
and backward pass by turns, each from the same numbers; milliseconds, the peak of
memory, and how far the weight's gradient is from the plain formula's in fp32, in units of its
norm. torch's own (`torch.nn.functional.linear_cross_entropy`, where it works in chunks) takes no
factor for the logits' gradient, so fp16's loss scale would come after the rounding, and gives the
loss itself in the low format.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.compute import runtime, throughput
from pipeline.compute.precision import Precision, choose_precision
from pipeline.model import loss
from pipeline.tables import markdown

WIDTH, ROWS, TOKENS = 768, 50304, 50257
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
COLUMNS = ("way", "ms", "from", "to", "peak MiB", "loss", "gradient off")


def ways(precision: Precision, compiles: bool) -> dict[str, Formula]:
    """Each gives the mean loss of hidden states, weight and targets."""

    def plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return loss.token_losses(F.linear(h, w)[:, :TOKENS], y).mean()

    def ours(passes: loss.Passes) -> Formula:
        return lambda h, w, y: loss.linear_cross_entropy(
            h, w, y, precision, vocab_size=TOKENS, scale=1 / len(y), passes=passes
        )

    found = {"plain formula": plain, "ours": ours(loss.softmax_passes)}
    if compiles:
        fixed = {"dynamic": False, "fullgraph": True}
        found["plain formula, compiled"] = torch.compile(plain, **fixed)
        found["ours, compiled"] = ours(torch.compile(loss.fusible_passes, **fixed))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()

        def torchs(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            low = precision.dtype
            return F.linear_cross_entropy(h.to(low), w[:TOKENS].to(low), y, options=options)

        found["torch's own"] = torchs
    return found


def once(formula: Formula, given: tuple[Tensor, ...], precision: Precision) -> tuple[float, Tensor]:
    """(loss, the weight's gradient) of one forward and backward pass."""
    h, w = (x.detach().requires_grad_() for x in given[:2])
    with precision.products():
        with precision.autocast():
            made = formula(h, w, given[2])
        made.backward()
    return made.item(), w.grad


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "tf32", "bf16", "fp16"])
    asked = parser.parse_args(words)
    device = runtime.choose_device(asked.device)
    precision, chance = choose_precision(asked.precision, device), torch.Generator().manual_seed(0)
    hidden = torch.randn(asked.tokens, WIDTH, generator=chance)
    weight = 0.02 * torch.randn(ROWS, WIDTH, generator=chance)
    targets = torch.randint(TOKENS, (asked.tokens,), generator=chance)
    given = tuple(x.to(device) for x in (hidden, weight, targets))
    watch, found = throughput.Stopwatch(device), ways(precision, not precision.emulated)
    exact = once(found["plain formula"], given, choose_precision("fp32", device))[1]
    seconds: dict[str, list[float]] = {name: [] for name in found}
    facts = {}
    for name, formula in found.items():
        once(formula, given, precision)  # compiles
        throughput.forget_peak(device)
        value, gradient = once(formula, given, precision)
        off = ((gradient - exact).norm() / exact.norm()).item()
        facts[name] = (throughput.peak_memory_mib(device), value, f"{off:.1e}")
    for _ in range(asked.rounds):
        for name, formula in found.items():
            watch.start()
            once(formula, given, precision)
            seconds[name].append(1e3 * watch.stop())
    rows = [(n, statistics.median(ms), min(ms), max(ms), *facts[n]) for n, ms in seconds.items()]
    print(f"{precision.device_name}, torch {torch.__version__}, {precision.effective}\n")
    print(markdown(COLUMNS, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
