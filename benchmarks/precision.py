"""Training speed of every precision, side by side in one process.

    python benchmarks/precision.py [--size nano|mini|124m] [--rounds N] [--emulate]
    python benchmarks/precision.py --machine H100 --size 124m-1024 [--compile]      on a GPU

Modes take turns, so that a machine that slows down slows all of them; medians are shown. The
gradient's difference from fp32 is taken at the first step, the weights' after five steps. With
`--emulate` a CPU counts as one without instructions for any low format. Writes
benchmarks/results/precision-SIZE.md, or precision-SIZE-emulated.md.

`--machine NAME` fills that column of docs/precision.md instead: bandwidth, matrix rates, and these
speeds, in results/machines.json; `python tools/readme.py precision.md` then shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import machines, outcomes
from benchmarks.peers import SIZES, Task
from pipeline.compute import precision as modes
from pipeline.compute import runtime
from pipeline.compute.precision import PRECISIONS, choose_precision
from pipeline.compute.throughput import Stopwatch, matrix_rate
from pipeline.studies import roofline
from pipeline.training import training_step

STEPS = 5


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def table(task: Task, rounds: int, compiled: bool) -> tuple[list[str], dict[str, float]]:
    """A line for each precision: its speed, and how far it is from fp32; and the tokens/s."""
    settings = replace(task.config().train, compile=compiled)
    device = runtime.choose_device(task.device)
    model = task.model().to(device)
    batches = [task.batch(step) for step in range(STEPS)]
    states, gradients, ends = {}, {}, {}
    for name in PRECISIONS:
        state = training_step.start(
            copy.deepcopy(model), settings, choose_precision(name, device), narrowing=1.0
        )
        gradients[name] = first_gradient(state, *batches[0])
        for batch in batches:
            training_step.train_step(state, [batch], settings.lr, settings)
        states[name], ends[name] = state, flat(state.model.parameters())
    watch = Stopwatch(device)
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for turn in range(rounds):
        for name, state in states.items():
            watch.start()
            training_step.train_step(state, [batches[turn % STEPS]], settings.lr, settings)
            seconds[name].append(watch.stop())
    lines = [
        f"{'precision':<11}{'tokens/s':>9}{'of fp32':>9}{'gradient off':>14}{'weights off':>13}"
    ]
    rates = {name: task.tokens / statistics.median(taken) for name, taken in seconds.items()}
    for name in PRECISIONS:
        off = (gradients[name] - gradients["fp32"]).norm() / gradients["fp32"].norm()
        moved = (ends[name] - ends["fp32"]).norm() / ends["fp32"].norm()
        speed = f"{rates[name]:>9,.0f}{rates[name] / rates['fp32']:>9.2f}"
        mark = " emulated" if states[name].precision.emulated else ""
        lines.append(f"{name:<11}{speed}{off:>14.1e}{moved:>13.1e}{mark}")
    return lines, rates


def first_gradient(state: training_step.TrainState, x: Tensor, y: Tensor) -> Tensor:
    """The unscaled gradient of the first batch, left without an update."""
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


def of_the_machine(name: str) -> dict[str, Any]:
    """What does not depend on a model: bandwidth, and the matrix rate of each precision."""
    device = runtime.choose_device("auto")
    modes = [choose_precision(mode, device) for mode in PRECISIONS]
    rates = {mode.asked: matrix_rate(mode) for mode in modes if mode.effective == mode.asked}
    found = {"bandwidth": roofline.bandwidth(device), "rates": rates}
    # A GPU has a name of its own; a CPU's stands among the circumstances.
    return found if device.type == "cpu" else found | {"machine": name}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="nano", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--compile", action="store_true", help="where the compiler can")
    parser.add_argument("--machine", metavar="NAME", help="fill this machine's column of the page")
    asked = parser.parse_args(words)
    bare = mock.patch.object(modes, "_cpu_capabilities", dict)
    with bare if asked.emulate else contextlib.nullcontext():
        found, tokens = table(Task(asked.size), asked.rounds, asked.compile)
    name = runtime.device_name(runtime.choose_device("auto"))
    head = f"{asked.size}: {name}, torch {torch.__version__}, {asked.rounds} rounds"
    print("\n".join([head, *found]))
    where = outcomes.circumstances()
    if asked.machine:
        kind = asked.size.removesuffix("-1024") + (" compiled" if asked.compile else "")
        entry = where | of_the_machine(name) | {"tokens_per_second": {kind: tokens}}
        machines.fill(asked.machine, entry | {"command": f"`{where['command']}`"})
        return
    page = f"`{where['command']}` on {where['date']} at {where['commit']}\n\n{where['machine']}\n"
    ending = "-emulated" if asked.emulate else ""
    path = outcomes.RESULTS / f"precision-{asked.size}{ending}.md"
    text = "\n".join(["```", head, *found, "```"])
    path.write_text(f"{text}\n\n{page}", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
