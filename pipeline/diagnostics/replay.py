"""A training's steps made once more, from a state that it kept, beside what its record says."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from pipeline import paths
from pipeline.compute import runtime
from pipeline.compute.determinism import deterministic
from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import Ranks
from pipeline.config import Config, load
from pipeline.data.token_files import Tokens
from pipeline.diagnostics import token_spans
from pipeline.errors import InputError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model
from pipeline.records import dvc_history
from pipeline.records.run_data import RunData
from pipeline.resume.checkpoints import machine
from pipeline.resume.fork import Kept
from pipeline.resume.snapshot import read_facts, read_tensors, restore
from pipeline.storage.digests import tree_digest
from pipeline.training import training_step
from pipeline.training.loop import StepReport, fit, micro_batches
from pipeline.training.training_step import Batch, Look, TrainState

COMPARED = {"train/loss": "loss", "train/grad_norm": "grad_norm"}  # those of a record and a report


@dataclass(frozen=True)
class Replay:
    """A state that a training kept, opened to go on from."""

    kept: Kept
    config: Config
    state: TrainState
    tokens: Tokens
    planned: int  # steps of the whole run
    elsewhere: tuple[str, ...]  # what was different where the state was written
    processes: int = 1  # that trained it, whose batches this one makes in turn

    def steps(self, until: int, look: Look | None = None) -> Iterator[StepReport]:
        """The steps before `until`, counted from 0; `look` is called in each before its update."""
        end = min(until, self.planned)
        reports = fit(
            self.state,
            self.config.train,
            self.batches,
            look,
            range(self.state.step, end),
            lambda _: self.planned,
        )
        # Not one step further: what follows may be launched another time.
        for _ in range(self.state.step, end):
            yield next(reports)

    def batches(self, step: int) -> list[Batch]:
        """A step's micro-batches, those of each process behind those of the one before."""
        if not isinstance(self.state.ranks, InTurn):
            return micro_batches(self.tokens, self.config.train, step, self.state.ranks)
        places = [Ranks(rank, self.processes) for rank in range(self.processes)]
        shares = [micro_batches(self.tokens, self.config.train, step, place) for place in places]
        return [batch for share in shares for batch in share]

    def differences(self, reports: Sequence[StepReport]) -> list[str]:
        """A phrase for each number that is another one in the record, to the record's digits."""
        run = RunData({"train": self.kept.record})
        known = {name: dict(run.curves.get(name, [])) for name in COMPARED}
        return [
            f"{name} of step {report.step:,} is {now:.6g}, {then:.6g} then"
            for report in reports
            for name, field in COMPARED.items()
            if (then := known[name].get(report.step)) is not None
            and f"{(now := getattr(report, field)):.6g}" != f"{then:.6g}"
        ]


@contextlib.contextmanager
def opened(kept: Kept, step: int, changes: Sequence[str] = ()) -> Iterator[Replay]:
    """The state after so many steps, under the training's settings with these changed.

    It is one that was kept, or the very first, see `beginning`. Unchanged, the steps equal the
    training's to the bit on the same machine; `elsewhere` says what is different here. What several
    processes trained is made by one: see `InTurn`. Raises InputError where the state or the tokens
    are not those.
    """
    config, tokens = inputs(kept, changes)
    run = RunData({"train": kept.record})
    device = runtime.choose_device(config.device)
    paths.runs().mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=paths.runs()) as scratch,
        deterministic(config.train.deterministic, device),
    ):
        precision = choose_precision(config.precision, device)
        folder = _state(kept, step, Path(scratch))
        facts = read_facts(folder) if folder else {}
        others: tuple[str, ...] = ()
        if folder:
            model = GPT(GPTConfig(**asdict(config.model))).to(device)
            narrowing = config.init.narrowing(config.model.n_embd)
            state = training_step.start(model, config.train, precision, narrowing)
        else:
            first, others = _first_model(kept, config, Path(scratch))
            told = config.model, config.train, precision, config.init
            state = training_step.from_folder(first, *told)
        processes = int(run.tags.get("distributed.processes", 1))
        state.ranks = _ranks(processes, config)
        then = facts.get("machine", {})
        if folder:
            restore(state, read_tensors(folder), facts, forked=True)
            runtime.set_rng_state(state.rng, device)
        now = machine(state) | {"processes": then.get("processes", "")}
        elsewhere = [*others]
        elsewhere += [f"{k}: {v} then, {now[k]} now" for k, v in then.items() if v != now.get(k)]
        if processes > 1 and not config.distributed.ordered:
            elsewhere.append(f"{processes} processes then, one in their place now")
        planned = facts["budget"]["planned"] if facts and config.train.time_budget else 0
        planned = planned or config.train.steps
        yield Replay(kept, config, state, tokens, planned, tuple(elsewhere), processes)


def inputs(kept: Kept, changes: Sequence[str] = ()) -> tuple[Config, Tokens]:
    """The training's settings with these changed, and its tokens.

    Raises InputError where those of the workspace are others.
    """
    config = load(paths.root() / paths.PARAMS, changes, kept.settings)
    return config, token_spans.tokens_of(RunData({"train": kept.record}), kept.name, kept.rev)


def beginning(kept: Kept) -> int:
    """How many steps the very first state has behind it: a fork's has its parent's."""
    return lineage[-1]["step"] if (lineage := RunData({"train": kept.record}).lineage) else 0


def check_begun(kept: Kept, step: int) -> None:
    """Raises InputError where a step was made before the training's own first one."""
    if (begun := beginning(kept)) > step:
        raise InputError(
            f"{kept.name}: step {step:,} was made by the training that it is a fork of, before its "
            f"own first step {begun:,}: name that one"
        )


def newest(kept: Kept, step: int) -> int:
    """The newest state that can be opened from which `step` is still to be made.

    Raises InputError where a fork is not old enough.
    """
    check_begun(kept, step)
    return max(done for done in (beginning(kept), *kept.steps) if done <= step)


def _state(kept: Kept, step: int, scratch: Path) -> Path | None:
    """A folder with the state after so many steps; None for one that has to be made."""
    if step in kept.steps or step != beginning(kept):
        return kept.copy(step, scratch)
    if not step:
        return None
    folder = paths.root() / str(kept.params.get("train.fork"))
    if not folder.is_dir():
        raise InputError(f"{kept.name}: the state that it was forked from, {folder}, is gone")
    return folder


def _first_model(kept: Kept, config: Config, scratch: Path) -> tuple[Path, tuple[str, ...]]:
    """The model directory that a training began with: the workspace's, DVC's, or drawn anew.

    And what is different about one that was drawn.
    """
    wanted = RunData({"train": kept.record}).tags.get("digest.init")
    here = paths.root() / paths.INIT
    if here.is_dir() and tree_digest(here) == wanted:
        return here, ()
    found = kept.rev and dvc_history.copy_of(kept.rev, paths.INIT.as_posix(), scratch)
    if found and tree_digest(found) == wanted:
        return found, ()
    if config.init.source == "random":  # as `import_hf_weights` does
        model = GPT(GPTConfig(**asdict(config.model)))
        initialize(model, config.init, runtime.generator(config.init.seed, "init"))
        save_model(model, drawn := scratch / "init")
        same = tree_digest(drawn) == wanted
        return drawn, () if same else ("its first weights drawn again, not those of its digest",)
    raise InputError(
        f"{kept.name}: the weights that it began with, init.hf_model={config.init.hf_model}, are "
        f"neither in {paths.INIT} nor in DVC's cache"
    )


# --- one process in the place of several


class InTurn(Ranks):
    """One process that does what several do, one after the other: dropout and sums are theirs.

    Each has `count` micro-batches of a step. Losses and gradients of a process are added up before
    those of the next come to them. With two processes that is their sum to the bit; with more, and
    with FSDP, which adds up over processes after every micro-batch, the order of a sum may be
    another one.
    """

    def __init__(self, count: int):
        super().__init__()
        self._count, self._number = count, 0
        self._grads: list[Tensor | None] = []
        self._own: Tensor | None = None  # the loss of the process at work
        self._loss: Tensor | None = None  # of those before it, and then of all

    def seed(self, seed: int, step: int) -> None:
        super().seed(seed, step)
        self.draw_as(0)

    def next_draws(self, number: int) -> None:
        self._number = number
        if number == 0:
            self._grads, self._own, self._loss = [], None, None
        if number % self._count == 0:
            self.draw_as(number // self._count)

    def add_in_order(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        self._own = _sum(self._own, loss.clone())
        if (self._number + 1) % self._count:
            return
        self._loss, self._own = _sum(self._loss, self._own), None
        owners = list(parameters)
        own = [owner.grad for owner in owners]
        before = self._grads or [None] * len(own)
        self._grads = [_sum(*pair) for pair in zip(before, own, strict=True)]
        for owner in owners:
            owner.grad = None

    def add_up(self, total: Tensor, parameters: Iterable[Tensor]) -> None:
        assert self._loss is not None
        total.copy_(self._loss)
        for parameter, grad in zip(parameters, self._grads, strict=True):
            parameter.grad = grad


def _sum(before: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return before + grad if before is not None and grad is not None else grad


def _ranks(processes: int, config: Config) -> Ranks:
    if processes == 1 or config.distributed.ordered:
        return Ranks(ordered=config.distributed.ordered)
    _, count = Ranks(0, processes).share(config.train.batch_size, config.train.accumulate)
    return InTurn(count)
