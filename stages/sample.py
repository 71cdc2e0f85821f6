"""sample: texts of the initial and the trained model, and the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import paths, terminal
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.config import Config
from pipeline.data import batches, token_files, tokenizer
from pipeline.data.conversation import prompts
from pipeline.errors import together
from pipeline.inference.decoding import Decoder, mean_loss
from pipeline.inference.generation import generate, pad, until_eot
from pipeline.model.gpt import GPT
from pipeline.model.model_dir import check_model, load_model
from pipeline.records import record_file
from pipeline.reports import report
from pipeline.tracking import recording
from stages.common import announce, run

MODELS = {"before": paths.INIT, "after": paths.MODEL}
ROWS = 32  # texts sampled together at most, but always all of a prompt
LOSS_TOKENS = 8192  # the difference of two losses on the same tokens has little noise
LOSS_BATCH = 2  # 400 MB of logits at 1024 tokens a sequence


def main(config: Config) -> None:
    with recording.record("sample", config) as record:
        together(*(partial(check_model, folder) for folder in MODELS.values()))
        device = runtime.choose_device(config.device)
        announce("sample", choose_precision(config.sample.precision, device), record)
        samples, losses = [], {}
        for when, folder in MODELS.items():
            model = load(folder, config)
            samples += [{"when": when, **sample} for sample in continuations(model, config)]
            if when == "after" and config.sample.weights != "fp32":
                losses = cost_of_weights(model, config)
        lines = (terminal.in_json(json.dumps(s, ensure_ascii=False)) + "\n" for s in samples)
        write(paths.SAMPLES_JSONL, "".join(lines))
        write(paths.SAMPLES_MD, readable(samples, config))
        for path in (paths.SAMPLES_JSONL, paths.SAMPLES_MD):
            record.artifact(path, "samples")
        record.metrics({"sample/count": len(samples), **losses})
        # Last, as it shows all the others: the chain's records and the files that they name.
        chain = [*record_file.upstream("sample"), record.so_far()]
        write(paths.REPORT, report.of_chain(chain))
        record.artifact(paths.REPORT, "report")
    if losses:
        fp32, other = losses.values()
        print(
            f"sample: validation loss {fp32:.4f} with fp32 weights, {other:.4f} with "
            f"{config.sample.weights} weights, over the first {LOSS_TOKENS} tokens at most"
        )
    print(f"sample: the whole run on one page: {paths.REPORT}")
    prompt, *_ = prompts(config.sample.prompts, config.corpus.source)
    after = [s["text"] for s in samples if (s["when"], s["prompt"]) == ("after", prompt)]
    most = max(after, key=lambda text: len(text.split()))
    print(f"sample: {len(samples)} texts in {paths.SAMPLES_MD}, one of them after training:")
    print(f"  {prompt}{most}".replace("\n", "\n  "))


def load(folder: Path, config: Config) -> GPT:
    shape, device = config.model, runtime.choose_device(config.device)
    return load_model(folder, vocab_rows=shape.vocab_rows, attention=shape.attention, device=device)


def continuations(model: GPT, config: Config) -> Iterator[dict[str, Any]]:
    """`samples` continuations of every prompt, the same draws for every model."""
    device = next(model.parameters()).device
    numbered = list(enumerate(prompts(config.sample.prompts, config.corpus.source)))
    together = max(1, ROWS // config.sample.samples)
    for first in range(0, len(numbered), together):
        part = numbered[first : first + together]
        given = [prompt for _, prompt in part for _ in range(config.sample.samples)]
        ids = [tokenizer.gpt2().encode_ordinary(prompt) for prompt in given]
        idx, padding = pad(ids, device)  # (B, T), (B,)
        # One generator a prompt: what others stand beside it changes none of its draws.
        generators = [
            runtime.generator(config.sample.seed, f"sample {number}", device) for number, _ in part
        ]
        tokens = generate(model, idx, config.sample, generators, padding)
        for prompt, row in zip(given, tokens[:, idx.size(1) :].tolist(), strict=True):
            new = until_eot(row)
            yield {"prompt": prompt, "text": tokenizer.gpt2().decode(new), "tokens": new}


def cost_of_weights(model: GPT, config: Config) -> dict[str, float]:
    """Validation loss by the products of sampling, with fp32 weights and with those set."""
    val = token_files.open_tokens(paths.TOKENS, "val")
    precision = choose_precision(config.sample.precision, next(model.parameters()).device)
    losses, length = {}, config.train.sequence_length
    for weights in ("fp32", config.sample.weights):
        windows = batches.validation_windows(
            val, batch_size=LOSS_BATCH, sequence_length=length, limit=LOSS_TOKENS
        )
        decoder = Decoder(model, precision, weights, LOSS_BATCH * length)
        losses[f"sample/val_loss_{weights}"] = mean_loss(decoder, windows)
    return losses


def readable(samples: list[dict[str, Any]], config: Config) -> str:
    """Markdown: each prompt, what the model made of it before training, and after."""
    c = config.sample
    parts = [
        "# Samples\n\n"
        f"temperature {c.temperature:g}, top-k {c.top_k}, top-p {c.top_p:g}, seed {c.seed}\n"
    ]
    given = prompts(c.prompts, config.corpus.source)
    for prompt in dict.fromkeys(given):  # one that is there twice has all its texts together
        parts.append(f"\n## {terminal.in_markdown(prompt)}\n")
        for when in MODELS:
            parts.append(f"\n### {when} training\n")
            for sample in samples:
                if (sample["when"], sample["prompt"]) == (when, prompt):
                    parts.append("\n" + terminal.as_code(prompt + sample["text"]))
    return "".join(parts)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # DVC may have linked it to its cache
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    run(main, "sample")
