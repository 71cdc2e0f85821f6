"""evaluate: the initial and the trained model, on the validation split and on multiple choice."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.compute.ranks import LEAVE, START, VALIDATE, here
from pipeline.config import UNSET_PATH, Config
from pipeline.data import token_files
from pipeline.diagnostics import doctor, forecast
from pipeline.distributed import team
from pipeline.errors import ConfigError, together
from pipeline.inference import evaluation as tasks
from pipeline.inference import multiple_choice
from pipeline.model.model_dir import check_model, load_model
from pipeline.records import git
from pipeline.resume import run_folder
from pipeline.storage.digests import digest_of, tree_digest
from pipeline.tracking import recording
from stages.common import announce, run, write_metrics

MODELS = {"init_val": paths.INIT, "val": paths.MODEL}  # the baseline beside the trained model
ITEMS = paths.ARTIFACTS / "choice_items.jsonl"
FIRST_SECONDS, EVERY_SECONDS = 10.0, 60.0  # of a task's lines on how long it takes


@dataclass(frozen=True)
class Inputs:
    """Tokens, what each task works on, and a number that tells all of it from other work."""

    train: token_files.Tokens
    val: token_files.Tokens
    tasks: dict[str, Any]
    number: int


def main(config: Config) -> None:
    run_folder.forget_result()
    with recording.record("evaluate", config) as record:
        inputs, at = open_inputs(config), context(config)
        announce("evaluate", at.precision, record)
        print(
            f"evaluate: all {len(inputs.val):,} validation tokens (train looked at the first "
            f"{min(config.train.val_tokens, len(inputs.val)):,}), in sequences of "
            f"{at.sequence_length}; the model takes {config.model.block_size}"
        )
        if at.ranks.world > 1:
            record.tags({"evaluate.processes": at.ranks.world})
            print(f"evaluate: by {at.ranks.world} processes", flush=True)
        results = {"val/unigram_loss": tasks.unigram_loss(inputs.train, inputs.val)}
        with team.telling(lambda: "evaluate: "):
            at.ranks.lead(START, inputs.number)
            for number, group in enumerate(MODELS):
                at.ranks.lead(VALIDATE, number)
                found = evaluated(group, config, inputs, at)
                results |= {metric_name(group, key): value for key, value in found.items()}
        record.metrics(results, config.train.steps)
        # Once more: whether frequencies alone do as well is known only now.
        for line in doctor.judge(record, config.train.steps)[1]:
            print(f"evaluate: {line}")
        record.dataset("tokens", inputs.val.sha256, str(inputs.val.path), "val")
        keep(inputs.tasks["choice"])
        record.artifact(ITEMS, "evaluate")
        write_metrics(paths.METRICS / "evaluate.json", results)
    show(results)


def follow(config: Config) -> None:
    """What every process but the first does: its part of each model's evaluation."""
    inputs, at = open_inputs(config), context(config)
    while (told := at.ranks.told())[0] != LEAVE:
        order, number = told
        if order == VALIDATE:
            evaluated([*MODELS][number], config, inputs, at)
        elif number != inputs.number:
            raise ConfigError("it has other settings, code, tokens, items or models than the first")


def open_inputs(config: Config) -> Inputs:
    """Open and check all that is read; raises one error with every problem."""
    tokens = (partial(token_files.open_tokens, paths.TOKENS, s) for s in token_files.SPLITS)
    models = (partial(check_model, folder) for folder in MODELS.values())
    train, val, given, *made = together(*tokens, partial(hellaswag, config), *models)
    file = tree_digest(Path(config.evaluate.hellaswag))
    identity = run_folder.identity("evaluate", config, {"of": [val.sha256, file, *made]})
    return Inputs(train, val, materials(config, val) | given, int(digest_of(identity)[:15], 16))


def context(config: Config) -> tasks.Context:
    device = runtime.choose_device(config.device)
    precision = choose_precision(config.evaluate.precision, device)
    return tasks.Context(
        precision, config.evaluate.batch_size, config.train.sequence_length, here()
    )


def evaluated(group: str, config: Config, inputs: Inputs, at: tasks.Context) -> dict[str, float]:
    """One model's results; how long they take is said by the first process."""
    shape = config.model
    model = load_model(
        MODELS[group],
        vocab_rows=shape.vocab_rows,
        attention=shape.attention,
        device=at.precision.device,
    )
    watched = at if at.ranks.rank else replace(at, progress=Progress(MODELS[group].name))
    return tasks.evaluate(model, inputs.tasks, watched)


class Progress:
    """Lines that say how long a task takes, from its first seconds on."""

    def __init__(self, model: str):
        self.model, self.task = model, ""
        self.ended = time.monotonic()

    def __call__(self, task: str, share: float) -> None:
        now = time.monotonic()
        if task != self.task:
            self.task, self.began, self.due = task, self.ended, self.ended + FIRST_SECONDS
        self.ended = now
        if now >= self.due and share < 1:
            left = forecast.duration((now - self.began) * (1 - share) / share)
            print(
                f"evaluate: {self.model}, {task}: {share:.1%} in "
                f"{forecast.duration(now - self.began)}, {left} left",
                flush=True,
            )
            self.due = now + EVERY_SECONDS


def materials(config: Config, val: token_files.Tokens) -> dict[str, Any]:
    """What each task works on."""
    items = multiple_choice.choice_items(val, config.evaluate.choice_items, config.evaluate.seed)
    return {"validation": val, "choice": items}


def keep(items: list[multiple_choice.Choice]) -> None:
    """Write the items that were made, in HellaSwag's own file format."""
    ITEMS.parent.mkdir(parents=True, exist_ok=True)
    ITEMS.unlink(missing_ok=True)  # DVC may have linked it to its cache
    multiple_choice.write_hellaswag(items, ITEMS)


def hellaswag(config: Config) -> dict[str, Any]:
    """The user's own items by both methods, checked; none where no file is given."""
    given = config.evaluate.hellaswag
    if given == UNSET_PATH:
        return {}
    git.check_whole("evaluate.hellaswag", given, git.files)
    plain = multiple_choice.hellaswag_items(given)
    edited = multiple_choice.hellaswag_items(given, edited=True)
    multiple_choice.check_endings([*plain, *edited], config.train.sequence_length)
    both = {"hellaswag_nanogpt": plain, "hellaswag_harness": edited}
    return {task: items for task, items in both.items() if items}


def metric_name(group: str, key: str) -> str:
    """ "validation/loss" -> "val/loss", "choice/acc" -> "val/choice_acc"."""
    task, _, name = key.partition("/")
    return f"{group}/{name}" if task == "validation" else f"{group}/{task}_{name}"


def show(results: dict[str, float]) -> None:
    """Before and after, side by side."""
    width = max(32, *map(len, results))
    print(f"{'':<{width}}{'initial':>12}{'trained':>12}")
    for key in (key for key in results if key.startswith("val/")):
        before = results.get(f"init_{key}")
        shown = f"{before:>12.4g}" if before is not None else " " * 12
        print(f"{key.removeprefix('val/'):<{width}}{shown}{results[key]:>12.4g}")


if __name__ == "__main__":
    run(main, "evaluate", follow)
