"""A text in the middle of training: one sees the model learn to speak."""

from __future__ import annotations

from dataclasses import replace

from pipeline.compute import runtime
from pipeline.config import Config
from pipeline.data import tokenizer
from pipeline.inference.generation import stream_text
from pipeline.model.gpt import GPT

TOKENS = 24


def lines(model: GPT, config: Config) -> list[str]:
    """The `text`, where sample.while_training asks for it."""
    return [f"  {text(model, config)}"] if config.sample.while_training else []


def text(model: GPT, config: Config) -> str:
    """The first prompt and what the model makes of it as it stands, on one line.

    The draws are the same each time and take nothing from training's. Without a cache and with the
    weights as they are, so that next to no memory is needed beside the training's.
    """
    device = next(model.parameters()).device
    sampling = replace(config.sample, max_new_tokens=TOKENS, kv_cache=False)
    sampling = replace(sampling, weights="fp32", precision="fp32")
    prompt = config.sample.prompts[0]
    draws = runtime.generator(config.sample.seed, "glimpse", device)
    pieces = stream_text(model, tokenizer.gpt2(), prompt, sampling, draws)
    return " / ".join(f"{prompt}{''.join(pieces)}".split("\n"))
