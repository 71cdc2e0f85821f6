"""A training's steps made once more, from a state that it kept, beside what its record says."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pipeline import paths
from pipeline.compute import runtime
from pipeline.compute.determinism import deterministic
from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import Ranks
from pipeline.config import Config, load
from pipeline.data.token_files import Tokens, open_tokens
from pipeline.errors import InputError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.records.run_data import RunData
from pipeline.resume.checkpoints import ORDERED, machine
from pipeline.resume.fork import Kept
from pipeline.resume.snapshot import read_facts, read_tensors, restore
from pipeline.training import training_step
from pipeline.training.loop import StepReport, fit, micro_batches
from pipeline.training.training_step import Look, TrainState

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

    def steps(self, until: int, look: Look | None = None) -> Iterator[StepReport]:
        """The steps before `until`, counted from 0; `look` is called in each before its update."""
        batches = partial(micro_batches, self.tokens, self.config.train, ranks=self.state.ranks)
        end = min(until, self.planned)
        reports = fit(
            self.state,
            self.config.train,
            batches,
            look,
            range(self.state.step, end),
            lambda _: self.planned,
        )
        # Not one step further: what follows may be launched another time.
        for _ in range(self.state.step, end):
            yield next(reports)

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

    Unchanged, the steps equal the training's to the bit on the same machine; `elsewhere` says what
    is different here. Raises InputError where the state or the tokens are not those.
    """
    config = load(paths.root() / paths.PARAMS, changes, kept.settings)
    tokens = open_tokens(paths.TOKENS, "train", verify=False)
    theirs = RunData({"train": kept.record}).tags.get("digest.train", "")
    if tokens.sha256 != theirs:
        raise InputError(
            f"{tokens.path}: not the tokens that {kept.name} was trained on (SHA-256 "
            f"{tokens.sha256[:12]}..., there {theirs[:12] or 'not known'}...)"
        )
    device = runtime.choose_device(config.device)
    paths.runs().mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=paths.runs()) as scratch,
        deterministic(config.train.deterministic, device),
    ):
        precision = choose_precision(config.precision, device)
        model = GPT(GPTConfig(**asdict(config.model))).to(device)
        narrowing = config.init.narrowing(config.model.n_embd)
        state = training_step.start(model, config.train, precision, narrowing)
        folder = kept.copy(step, Path(scratch))
        facts = read_facts(folder)
        state.ranks = Ranks(ordered=str(facts["machine"].get("processes")).endswith(ORDERED))
        restore(state, read_tensors(folder), facts, forked=True)
        runtime.set_rng_state(state.rng, device)
        then, now = facts["machine"], machine(state)
        elsewhere = [f"{k}: {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k]]
        planned = facts["budget"]["planned"] if config.train.time_budget else config.train.steps
        yield Replay(kept, config, state, tokens, planned, tuple(elsewhere))
