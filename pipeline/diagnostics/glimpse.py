"""A text in the middle of training: one sees the model learn to speak."""

from __future__ import annotations

from dataclasses import replace

from pipeline.compute import runtime
from pipeline.config import Config
from pipeline.data import tokenizer
from pipeline.data.conversation import prompts
from pipeline.inference.generation import stream_text
from pipeline.model.gpt import GPT
from pipeline.records.record_file import Record
from pipeline.resume.gathering import model_of
from pipeline.training.training_step import TrainState

TOKENS = 24
LONGEST = 4096  # characters, of a prompt that is a page


def lines(state: TrainState, config: Config, record: Record) -> list[str]:
    """The `text`, put on record as well, where sample.while_training asks for it."""
    if not config.sample.while_training:
        return []
    said = text(model_of(state), config)
    record.text(state.step, said[:LONGEST])
    return [f"  {said}"]


def text(model: GPT, config: Config) -> str:
    """The first prompt and what the model makes of it as it stands, on one line.

    The draws are the same each time and take nothing from training's. Without a cache and with the
    weights as they are, so that next to no memory is needed beside the training's.
    """
    device = next(model.parameters()).device
    sampling = replace(config.sample, max_new_tokens=TOKENS, kv_cache=False)
    sampling = replace(sampling, weights="fp32", precision="fp32")
    prompt, *_ = prompts(config.sample.prompts, config.corpus.source)
    draws = runtime.generator(config.sample.seed, "glimpse", device)
    pieces = stream_text(model, tokenizer.gpt2(), prompt, sampling, draws)
    return " / ".join(f"{prompt}{''.join(pieces)}".split("\n"))
