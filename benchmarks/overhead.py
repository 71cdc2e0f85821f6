"""What the pipeline around the training loop costs: by part, and by how much steps slow down.

    python benchmarks/overhead.py [--size nano|124m] [--steps N] [--rounds N]

Whole train stages, store, record, checkpoints and all, take turns with the bare loop over the
same model and batches: tokens, `fit`, and nothing else. Whatever the stage does is timed by the
function that does it, without what that calls of the others. Validation is training, not cost.
Nano is the default recipe, whole: every cost of the run counts. At 124m a few steps stand for a
run of an hour: checkpoints count at the 124M recipe's one in so many minutes, and what comes once
against the hour. Then the imports of each stage, and a `dvc repro` that has nothing to do beside
one of a project with a single empty stage. Writes benchmarks/results/overhead-SIZE.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import OmegaConf

from benchmarks.side_by_side import in_a_fresh_process
from pipeline import config as configuration
from pipeline import paths
from pipeline.compute import machine
from pipeline.compute.precision import choose_precision
from pipeline.compute.runtime import choose_device
from pipeline.config import Config
from pipeline.data import token_files
from pipeline.diagnostics import doctor, forecast, glimpse
from pipeline.records import stage_graph
from pipeline.records.record_file import Record
from pipeline.resume import run_folder
from pipeline.resume.checkpoints import Checkpoints
from pipeline.storage.folders import remove
from pipeline.tracking import recording
from pipeline.training import inputs, loop
from pipeline.training.history import History
from stages import common, train

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# At 124m, the steps that neither what a stage begins with nor a checkpoint on its way to the disk
# slows down: the process that ships has imported what it needs, and nothing was saved yet.
UNDISTURBED = slice(3, 16)
SIZES = {
    "nano": (),
    "124m": (
        *("model.n_layer=12", "model.n_head=12", "model.n_embd=768", "model.block_size=256"),
        *("train.batch_size=2", "train.sequence_length=256", "train.val_tokens=512"),
        *("train.steps=20", "train.warmup_steps=2", "train.val_every=20"),
        *(f"checkpoint.every_steps={UNDISTURBED.stop}", "checkpoint.every_minutes=0"),
    ),
}
MINUTES = 10  # between checkpoints of the 124M recipe
STAGES = ("tokenize_corpus", "import_hf_weights", "train", "evaluate", "sample", "numerics")
STEPS, VALIDATION, CHECKPOINT = "steps", "validation", "checkpoints"
SLOWER = "steps slower than the bare loop's"
INSTANT = 0.05  # seconds: what is shorter at 124m only asked for free space
EACH_STEP = ("batches", "record: metrics")  # what grows with the steps
HOUR = 3600.0  # the run that costs which come once are held against at 124m
# Who does what in `stages.train`: the label, and where the function is looked up.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    STEPS: ((loop, "launch"), (loop, "finish")),
    VALIDATION: ((train, "validate"),),
    "batches": ((loop, "micro_batches"), (train, "micro_batches")),
    CHECKPOINT: tuple((Checkpoints, name) for name in ("save", "keep_best", "check_room")),
    "verification": (
        (inputs, "open_tokens"),
        (inputs, "check_model"),
        (Checkpoints, "newest"),
    ),
    "record: metrics": ((Record, "metrics"),),
    "record: tags, artifacts, checkpoints": (
        *((Record, name) for name in ("tags", "artifact", "checkpoint")),
    ),
    "tracking: to begin and to end": (
        *((recording.Courier, name) for name in ("__init__", "close")),
    ),
    "forecast": ((forecast, "before_training"), (forecast, "after_first_steps")),
    "a text at each validation": ((glimpse, "lines"),),
    "doctor": ((doctor.Rounds, "look"), (doctor, "judge")),
    "matrix rate": ((machine, "matrix_rate"),),
    "loading the model": ((train, "from_folder"),),
    "results": (
        (Checkpoints, "write_models"),
        (History, "summary"),
        (History, "write_curves"),
        (common, "write_metrics"),
        (run_folder.Run, "share"),
    ),
}


class Clock:
    """Seconds by label, each without those of the labels that it called."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = defaultdict(list)
        self._inner: list[float] = []  # seconds of inner labels, for each label that is open

    @contextlib.contextmanager
    def timing(self, label: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            self.calls[label].append(whole - self._inner.pop())
            if self._inner:
                self._inner[-1] += whole

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, the functions of PARTS are timed."""
        with contextlib.ExitStack() as stack:
            for label, places in PARTS.items():
                for owner, name in places:
                    plain = getattr(owner, name)
                    setattr(owner, name, self._timed(label, plain))
                    stack.callback(setattr, owner, name, plain)
            yield

    def _timed(self, label: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.timing(label):
                return plain(*args, **kwargs)

        return call


Seconds = dict[str, list[float]]  # of every call, by label


def whole_stage(config: Config) -> tuple[float, Seconds]:
    """Seconds of `stages.train.main` from tokens and model to its last byte, and by part."""
    for made in (paths.runs(), *map(Path, stage_graph.stages()["train"].outs)):
        remove(made)
    clock = Clock()
    began = time.perf_counter()
    with clock.watching(), contextlib.redirect_stdout(sys.stderr):
        train.main(config)
    return time.perf_counter() - began, clock.calls


def bare_loop(config: Config) -> tuple[float, Seconds]:
    """The same of `fit` on the same tokens from the same weights, and nothing else."""
    clock = Clock()
    precision = choose_precision(config.precision, choose_device(config.device))
    began = time.perf_counter()
    with clock.watching():
        tokens = token_files.open_tokens(paths.TOKENS, "train")
        state = train.from_folder(paths.INIT, config.model, config.train, precision, config.init)
        batches = functools.partial(loop.micro_batches, tokens, config.train)
        for _ in loop.fit(state, config.train, batches):
            pass
    return time.perf_counter() - began, clock.calls


def costs_of(
    bare: list[tuple[float, Seconds]], stages: list[tuple[float, Seconds]], every_minutes: float
) -> tuple[float, dict[str, float]]:
    """Seconds of training, and what each part costs beyond it in seconds.

    `every_minutes` 0: the run as it was. Else a run of an hour: its steps, its checkpoints at one
    in so many minutes, and once what comes once.
    """

    def total(turns: list[tuple[float, Seconds]], label: str) -> float:
        return statistics.median(sum(calls.get(label, [])) for _, calls in turns)

    costs = {label: total(stages, label) - total(bare, label) for label in PARTS}
    trained = statistics.median(whole for whole, _ in bare) + costs.pop(VALIDATION)
    known = [whole - sum(map(sum, calls.values())) for whole, calls in stages]
    costs["the rest of the stage"] = statistics.median(known)
    costs[SLOWER] = costs.pop(STEPS)
    if not every_minutes:
        return trained, costs
    step, first, steady, last = (
        statistics.median(steps_of(turns, part))
        for turns, part in (
            (bare, slice(UNDISTURBED.start, None)),
            (stages, slice(UNDISTURBED.start)),
            (stages, UNDISTURBED),
            (stages, slice(UNDISTURBED.stop, None)),
        )
    )
    longer = HOUR / total(bare, STEPS)
    for label in EACH_STEP:
        costs[label] *= longer
    costs[SLOWER] = (steady - step) * HOUR / step
    costs["first steps slower than later ones"] = (first - steady) * UNDISTURBED.start
    saves = [s for _, calls in stages for s in calls[CHECKPOINT] if s > INSTANT]
    after = len(steps_of(stages, slice(UNDISTURBED.stop, None))) / len(stages)
    save = statistics.median(saves) + (last - steady) * after
    costs[CHECKPOINT] = save * HOUR / (60 * every_minutes)
    return HOUR, costs


def steps_of(turns: list[tuple[float, Seconds]], part: slice = slice(None)) -> list[float]:
    """Seconds of every training step, or of a part of each turn's."""
    return [seconds for _, calls in turns for seconds in calls[STEPS][part]]


def table(
    bare: list[tuple[float, Seconds]], stages: list[tuple[float, Seconds]], every_minutes: float
) -> list[str]:
    """The costs, the largest first, with their sum."""
    trained, costs = costs_of(bare, stages, every_minutes)
    steps = steps_of(bare)
    rows = [
        f"| {name} | {cost:.2f} | {cost / trained:.2%} |"
        for name, cost in sorted(costs.items(), key=lambda item: -item[1])
    ]
    whole = sum(costs.values())
    return [
        f"A step of the bare loop: {statistics.median(steps):.3f} s, median of {len(steps)} "
        f"({min(steps):.3f} to {max(steps):.3f}). Costs against {trained:,.0f} s of training:",
        "",
        "| | seconds | of training |",
        "|---|---:|---:|",
        *rows,
        f"| **all of it** | **{whole:.2f}** | **{whole / trained:.2%}** |",
    ]


def imports(stage: str) -> str:
    """A table row: seconds until a stage's imports are done, the large libraries among them."""
    libraries = ["torch", "transformers", "mlflow", "matplotlib", "pyarrow", "tiktoken"]
    code = (
        f"import sys, time; t = time.perf_counter(); import stages.{stage}; "
        f"print(f'{{time.perf_counter() - t:.2f}} |', "
        f"', '.join(n for n in {libraries} if n in sys.modules) or '-')"
    )
    return f"| {stage} | {said(ROOT, sys.executable, '-c', code).strip()} |"


def nothing_to_do(rounds: int) -> list[str]:
    """`dvc repro` in this checkout, where all is up to date, beside one of a single empty stage."""
    repro = (sys.executable, "-m", "dvc", "repro")
    with tempfile.TemporaryDirectory() as name:
        alone = Path(name)
        (alone / "one").write_text("1")
        (alone / "dvc.yaml").write_text("stages: {one: {cmd: echo, deps: [one]}}\n")
        said(alone, "git", "init", "--quiet")
        said(alone, sys.executable, "-m", "dvc", "init", "--quiet")
        seconds: dict[Path, list[float]] = {alone: [], ROOT: []}
        said(alone, *repro)
        if "up to date" not in said(ROOT, sys.executable, "-m", "dvc", "status"):
            return ["This checkout is not up to date: after `dvc repro`, its no-op is timed, too."]
        for _ in range(rounds):
            for folder, found in seconds.items():
                began = time.perf_counter()
                said(folder, *repro)
                found.append(time.perf_counter() - began)
    theirs, ours = (statistics.median(found) for found in seconds.values())
    return [
        f"A `dvc repro` with nothing to do: {ours:.2f} s; in a project of one empty stage "
        f"{theirs:.2f} s, DVC's own; {ours - theirs:.2f} s are this pipeline's."
    ]


def said(folder: Path, *words: str) -> str:
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout


def prepare(config: Config, changes: tuple[str, ...]) -> None:
    """Tokens and an initial model in the working directory, whose root it becomes."""
    from stages import import_hf_weights, tokenize_corpus

    Path(".dvc").mkdir()
    settings = OmegaConf.merge(
        OmegaConf.load(ROOT / "recipes" / "nano.yaml"), OmegaConf.from_dotlist(list(changes))
    )
    OmegaConf.save(settings, paths.PARAMS)
    with contextlib.redirect_stdout(sys.stderr):
        tokenize_corpus.main(config)
        import_hf_weights.main(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--steps", type=int, help="instead of the size's own")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.size == "124m" and asked.steps and asked.steps <= UNDISTURBED.stop:
        parser.error(f"--steps {asked.steps}: expected more than {UNDISTURBED.stop} at 124m")
    changes = SIZES[asked.size] + ((f"train.steps={asked.steps}",) if asked.steps else ())
    config = configuration.load(ROOT / "recipes" / "nano.yaml", changes)
    home, bare, stages = Path.cwd(), [], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            prepare(config, changes)
            for _ in range(asked.rounds):
                bare.append(in_a_fresh_process(bare_loop, config))
                stages.append(in_a_fresh_process(whole_stage, config))
        finally:
            os.chdir(home)
    c = config.model
    text = [
        f"{asked.size}: {c.n_layer} layers, {c.n_embd} channels, batches of "
        f"{config.train.batch_size}x{config.train.sequence_length}; torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/overhead.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        *table(bare, stages, 0 if asked.size == "nano" else MINUTES),
        "",
        "| imports of stage | seconds | large libraries among them |",
        "|---|---:|---|",
        *map(imports, STAGES),
        "",
        *nothing_to_do(asked.rounds),
    ]
    page = "\n".join(text) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"overhead-{asked.size}.md").write_text(page, encoding="utf-8", newline="\n")
    print(page)


if __name__ == "__main__":
    main()
