"""evaluate: the initial and the trained model, on the validation split and on multiple choice."""

from __future__ import annotations

from functools import partial
from typing import Any

from pipeline import paths
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.config import UNSET_PATH, Config
from pipeline.data import token_files
from pipeline.diagnostics import doctor
from pipeline.errors import together
from pipeline.inference import evaluation as tasks
from pipeline.inference import multiple_choice
from pipeline.model.model_dir import check_model, load_model
from pipeline.records import git
from pipeline.resume import run_folder
from pipeline.tracking import recording
from stages.common import announce, run, write_metrics

MODELS = {"init_val": paths.INIT, "val": paths.MODEL}  # the baseline beside the trained model
ITEMS = paths.ARTIFACTS / "choice_items.jsonl"


def main(config: Config) -> None:
    run_folder.forget_result()
    with recording.record("evaluate", config) as record:
        tokens = (partial(token_files.open_tokens, paths.TOKENS, s) for s in token_files.SPLITS)
        models = (partial(check_model, folder) for folder in MODELS.values())
        train, val, given, *_ = together(*tokens, partial(hellaswag, config), *models)
        material = materials(config, val) | given
        device = runtime.choose_device(config.device)
        precision = choose_precision(config.evaluate.precision, device)
        announce("evaluate", precision, record)
        shape, longest = config.model, config.train.sequence_length
        context = tasks.Context(precision, config.evaluate.batch_size, longest)
        print(
            f"evaluate: all {len(val):,} validation tokens (train looked at the first "
            f"{min(config.train.val_tokens, len(val)):,}), in sequences of {longest}; the model "
            f"takes {shape.block_size}"
        )
        results = {"val/unigram_loss": tasks.unigram_loss(train, val)}
        for group, folder in MODELS.items():
            model = load_model(
                folder, vocab_rows=shape.vocab_rows, attention=shape.attention, device=device
            )
            found = tasks.evaluate(model, material, context)
            results |= {metric_name(group, key): value for key, value in found.items()}
        record.metrics(results, config.train.steps)
        # Once more: whether frequencies alone do as well is known only now.
        for line in doctor.judge(record, config.train.steps)[1]:
            print(f"evaluate: {line}")
        record.dataset("tokens", val.sha256, str(val.path), "val")
        record.artifact(ITEMS, "evaluate")
        write_metrics(paths.METRICS / "evaluate.json", results)
    show(results)


def materials(config: Config, val: token_files.Tokens) -> dict[str, Any]:
    """What each task works on; the made items are kept in HellaSwag's own file format."""
    items = multiple_choice.choice_items(val, config.evaluate.choice_items, config.evaluate.seed)
    ITEMS.parent.mkdir(parents=True, exist_ok=True)
    ITEMS.unlink(missing_ok=True)  # DVC may have linked it to its cache
    multiple_choice.write_hellaswag(items, ITEMS)
    return {"validation": val, "choice": items}


def hellaswag(config: Config) -> dict[str, Any]:
    """The user's own items, checked; none where no file is given."""
    given = config.evaluate.hellaswag
    if given == UNSET_PATH:
        return {}
    git.check_whole("evaluate.hellaswag", given, git.files)
    items = multiple_choice.hellaswag_items(given)
    multiple_choice.check_endings(items, config.train.sequence_length)
    return {"hellaswag": items}


def metric_name(group: str, key: str) -> str:
    """ "validation/loss" -> "val/loss", "choice/acc" -> "val/choice_acc"."""
    task, _, name = key.partition("/")
    return f"{group}/{name}" if task == "validation" else f"{group}/{task}_{name}"


def show(results: dict[str, float]) -> None:
    """Before and after, side by side."""
    print(f"{'':<32}{'initial':>12}{'trained':>12}")
    for key in (key for key in results if key.startswith("val/")):
        before = results.get(f"init_{key}")
        shown = f"{before:>12.4g}" if before is not None else " " * 12
        print(f"{key.removeprefix('val/'):<32}{shown}{results[key]:>12.4g}")


if __name__ == "__main__":
    run(main, "evaluate")
