"""import_hf_weights: fresh or published weights in, a checked model directory out."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch

from pipeline import paths
from pipeline.compute import runtime
from pipeline.config import Config
from pipeline.drawing import figures
from pipeline.errors import ConfigError, InputError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.hf_import import PARITY_BOUND, import_pretrained, parameter_table, parity
from pipeline.model.init import initialize
from pipeline.model.model_dir import build_model, save_model
from pipeline.published import SIZES, differing
from pipeline.records import git
from pipeline.records.record_file import Record
from pipeline.storage.folders import recover, remove
from pipeline.studies import init_study
from pipeline.tables import write_csv
from pipeline.tracking import recording
from stages.common import run

PARAMETERS = paths.INIT / "parameters.json"
PROBE_SHAPE = (2, 32)  # sequences and tokens, for the parity check


def main(config: Config) -> None:
    init = config.init
    with recording.record("import_hf_weights", config) as record:
        model = build(config)
        recover(paths.INIT)
        save_model(model, paths.INIT)
        table = parameter_table(model)
        show(table, model)
        shape = (PROBE_SHAPE[0], min(PROBE_SHAPE[1], model.config.block_size))
        chance = runtime.generator(init.seed, "parity")
        probe = torch.randint(model.config.vocab_size, shape, generator=chance)
        found = parity(model, paths.INIT, probe)
        print(f"import_hf_weights: {told(found)}")
        for report, content in ((PARAMETERS, table), (paths.INIT / "parity.json", found)):
            report.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
            record.artifact(report, "init")
        record.metrics({"init/parity_difference": found["relative_logit_difference"]})
        fresh = f"random, seed {init.seed}, std {init.std}"
        origin = init.hf_model if init.source == "hf" else fresh
        record.tags({"parameters": f"{model.parameter_count():,}", "init.from": origin})
        # Written so that NaN is refused.
        if not (found["relative_logit_difference"] <= PARITY_BOUND and found["greedy_equal"]):
            raise InputError(
                f"{paths.INIT}: not the function that transformers computes: {told(found)}; "
                f"accepted are a difference of {PARITY_BOUND:.0e} and equal tokens"
            )
        began = time.perf_counter()
        write_study(init_study.study(model, init), record)
        record.metrics({"time/init_study_seconds": time.perf_counter() - began})


def told(found: dict[str, Any]) -> str:
    """What `parity` found, in words."""
    compared, count = found["greedy_decided"], found["greedy_steps"] * PROBE_SHAPE[0]
    few = "" if compared == count else f" ({compared} of {count} are more than rounding apart)"
    return (
        "against transformers.GPT2LMHeadModel the logits differ by "
        f"{found['relative_logit_difference']:.1e} in float64, greedy tokens "
        f"{'equal' if found['greedy_equal'] else 'DIFFER'}{few}"
    )


def write_study(found: init_study.InitStudy, record: Record) -> None:
    """Tables, figure and metrics of the initialisation study, apart from the model.

    `train` depends on the model's folder, and must not start anew because a figure has changed.
    """
    folder = paths.INIT_STUDY
    remove(folder)
    adds = zip(found.adds.plain, found.adds.scaled, strict=True)
    write_csv(
        folder / "random_adds.csv",
        ["adds", "std", "std_scaled"],
        [(k, *both) for k, both in enumerate(adds, 1)],
    )
    columns = ["model", "block", "residual_std", "grad_norm"]
    write_csv(folder / "blocks.csv", columns, init_study.stream_rows(found))
    (folder / "init_study.md").write_text(init_study.page(found), "utf-8")
    figures.save(figures.init_study(found), folder / "init_study.png")
    record.artifact(folder, "init_study")
    own = found.as_is
    record.metrics(
        {
            "init/residual_std_first": own.stream_std[1],
            "init/residual_std_last": own.stream_std[-1],
            "init/grad_norm_first": own.grad_norm[1],
            "init/grad_norm_last": own.grad_norm[-1],
        }
    )
    print(
        f"import_hf_weights: residual stream std {own.stream_std[1]:.4f} after block 1, "
        f"{own.stream_std[-1]:.4f} after block {own.n_layer}; twins of other depths in {folder}"
    )


def build(config: Config) -> GPT:
    """The initial model on the CPU in fp32."""
    c, init = config.model, config.init
    shape = GPTConfig(**asdict(c))
    if init.source == "random":
        model = GPT(shape)
        initialize(model, init, runtime.generator(init.seed, "init"))
        return model
    git.check_whole("init.hf_model", init.hf_model, git.files)
    found, state = import_pretrained(
        init.hf_model, vocab_rows=c.vocab_rows, dropout=c.dropout, attention=c.attention
    )
    if said := differing(c, init.hf_model, {name: getattr(found, name) for name in SIZES}):
        raise ConfigError(said)
    return build_model(found, state)


def show(table: list[dict[str, Any]], model: GPT) -> None:
    """The parameter table for a person, one block of it; the file has all rows and columns."""
    print(f"{'name':<36}{'HF shape':>16}{'our shape':>16}  transposed      std")
    for row in table:
        if ".h." in row["name"] and ".h.0." not in row["name"]:
            continue
        shapes = ["x".join(map(str, row[key])) for key in ("hf_shape", "our_shape")]
        flipped = "yes" if row["transposed"] else "-"
        print(f"{row['name']:<36}{shapes[0]:>16}{shapes[1]:>16}{flipped:>12}{row['std']:>9.4f}")
    padding = (model.config.vocab_rows - model.config.vocab_size) * model.config.n_embd
    total = model.parameter_count()
    print(
        f"{total:,} parameters, {total - padding:,} without the padded vocabulary rows; each of "
        f"the {model.config.n_layer} blocks has these shapes ({PARAMETERS} lists all)"
    )


if __name__ == "__main__":
    run(main, "import_hf_weights")
