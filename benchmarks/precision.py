"""Training speed of every precision on the default model, side by side in one process.

    python benchmarks/precision.py [ROUNDS]

Modes take turns, so that a machine that slows down slows all of them; medians are shown. The
gradient's difference from fp32 is taken at the first step, the weights' after five steps.
"""

from __future__ import annotations

import copy
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from pipeline import config as configuration
from pipeline import runtime, training
from pipeline.init import initialize
from pipeline.model import GPT, GPTConfig
from pipeline.precision import PRECISIONS, choose_precision
from pipeline.throughput import Stopwatch

STEPS = 5


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def main(rounds: int) -> None:
    config = configuration.load(Path(__file__).resolve().parent.parent / "recipes/nano.yaml")
    device = runtime.choose_device(config.device)
    c, t = config.model, config.train
    model = GPT(GPTConfig(c.n_layer, c.n_head, c.n_embd, c.block_size, attention=c.attention))
    initialize(model, config.init, runtime.generator(config.init.seed, "init"))
    model.to(device)
    draws = torch.Generator().manual_seed(0)
    shape = (t.batch_size, t.sequence_length + 1)
    batches = [torch.randint(50257, shape, generator=draws) for _ in range(STEPS)]

    states, ends, gradients = {}, {}, {}
    for name in PRECISIONS:
        state = training.start(copy.deepcopy(model), t, choose_precision(name, device))
        gradients[name] = first_gradient(state, batches[0])
        for ids in batches:
            training.train_step(state, [(ids[:, :-1], ids[:, 1:])], t.lr, t.grad_clip)
        states[name], ends[name] = state, flat(state.model.parameters())
    watch = Stopwatch(device)
    seconds = {name: [] for name in PRECISIONS}
    for turn in range(rounds):
        for name, state in states.items():
            ids = batches[turn % STEPS]
            watch.start()
            training.train_step(state, [(ids[:, :-1], ids[:, 1:])], t.lr, t.grad_clip)
            seconds[name].append(watch.stop())

    tokens = t.batch_size * t.sequence_length
    base = statistics.median(seconds["fp32"])
    print(f"{runtime.device_name(device)}, torch {torch.__version__}, {rounds} rounds")
    print(f"{'precision':<11}{'tokens/s':>9}{'of fp32':>9}{'gradient off':>14}{'weights off':>13}")
    for name in PRECISIONS:
        median = statistics.median(seconds[name])
        off = (gradients[name] - gradients["fp32"]).norm() / gradients["fp32"].norm()
        moved = (ends[name] - ends["fp32"]).norm() / ends["fp32"].norm()
        speed = f"{tokens / median:>9,.0f}{base / median:>9.2f}"
        mark = " emulated" if states[name].precision.emulated else ""
        print(f"{name:<11}{speed}{off:>14.1e}{moved:>13.1e}{mark}")


def first_gradient(state: training.TrainState, ids: torch.Tensor) -> torch.Tensor:
    """The unscaled gradient of the first batch, left without an update."""
    x, y = ids[:, :-1], ids[:, 1:]
    device = state.precision.device
    scale = 1024.0  # a power of two: exact to take away again, and fp16 keeps small gradients
    factor = torch.tensor(scale / y.numel(), device=device)
    with state.precision.products():
        with state.precision.autocast():
            loss = state.loss_function(x.to(device), y.to(device), factor)
        loss.backward()
    found = flat(p.grad for p in state.model.parameters()) / scale
    state.optimizer.zero_grad(set_to_none=True)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
