"""The sample stage: prompts of unequal length in one batch, and what int8 weights cost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pipeline import paths
from pipeline.compute import runtime
from pipeline.compute.precision import choose_precision
from pipeline.data import token_writer, tokenizer
from pipeline.data.batches import validation_windows
from pipeline.data.documents import Document
from pipeline.data.token_files import open_tokens
from pipeline.diagnostics import glimpse
from pipeline.inference.generation import generate
from pipeline.model import loss
from stages import import_hf_weights, sample

SMALL = {"model__n_layer": 1, "model__n_head": 1, "model__n_embd": 8, "model__block_size": 16}
SMALL |= {"train__sequence_length": 16, "sample__samples": 2, "sample__max_new_tokens": 12}


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_a_prompt_has_the_texts_that_it_has_alone(make_config, monkeypatch, rows: int) -> None:
    monkeypatch.setattr(sample, "ROWS", rows)
    config = make_config(**SMALL, init__std=0.5)
    model = import_hf_weights.build(config)
    texts = list(sample.continuations(model, config))
    lengths = set()
    for number, prompt in enumerate(config.sample.prompts):
        ids = tokenizer.gpt2().encode_ordinary(prompt)
        generator = runtime.generator(config.sample.seed, f"sample {number}")
        idx = torch.tensor([ids] * 2)
        alone = generate(model, idx, config.sample, generator)[:, len(ids) :]
        ours = [text["tokens"] for text in texts if text["prompt"] == prompt]
        assert ours == alone.tolist()
        lengths.add(len(ids))
    assert len(lengths) > 1, "prompts of one length would prove little"


def test_a_prompt_given_twice_has_every_text_shown_once(make_config) -> None:
    config = make_config(**SMALL, init__std=0.5, sample__prompts=["A", "B", "A"])
    model = import_hf_weights.build(config)
    found = [
        {"when": when, **s} for when in sample.MODELS for s in sample.continuations(model, config)
    ]
    shown = sample.readable(found, config)
    assert len(found) == shown.count("\n```text\n") == 12
    assert [line for line in shown.splitlines() if line.startswith("## ")] == ["## A", "## B"]


def test_prompts_of_a_model_of_conversations_end_where_an_answer_begins(make_config) -> None:
    """A user's words, a conversation as text, and one that has its end already."""
    words = ["What is 2 + 2?", "System: Be brief.\nUser: Hi!", "User: Hi!\nAssistant:"]
    asked = ["User: What is 2 + 2?", "System: Be brief.\nUser: Hi!", "User: Hi!"]
    expected = [f"{text}\nAssistant:" for text in asked]
    files = {"corpus__source": "chat", "corpus__path": "talks.jsonl"}
    config = make_config(**SMALL, **files, sample__prompts=words)
    found = list(sample.continuations(import_hf_weights.build(config), config))
    assert [text["prompt"] for text in found[::2]] == expected
    assert sample.readable([{"when": "after", **text} for text in found], config).count("## ") >= 3
    assert glimpse.text(import_hf_weights.build(config), config).startswith(
        "User: What is 2 + 2? / Assistant:"
    )
    plain = make_config(**SMALL, sample__prompts=words)
    found = list(sample.continuations(import_hf_weights.build(plain), plain))
    assert [text["prompt"] for text in found[::2]] == words


def test_the_cost_of_int8_weights_is_two_validation_losses(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    documents = [Document(name, name, "some text of words " * 40) for name in ("train", "val")]
    token_writer.write_tokens(documents, paths.TOKENS)
    config = make_config(**SMALL, init__std=0.5, sample__weights="int8")
    model = import_hf_weights.build(config)
    losses = sample.cost_of_weights(model, config)
    assert list(losses) == ["sample/val_loss_fp32", "sample/val_loss_int8"]
    windows = validation_windows(open_tokens(paths.TOKENS, "val"), batch_size=4, sequence_length=16)
    cpu = torch.device("cpu")
    expected = loss.mean_loss(model, windows, choose_precision("fp32", cpu), cpu)
    fp32, int8 = losses.values()
    assert fp32 == pytest.approx(expected, rel=1e-5)
    assert int8 != fp32 and math.isclose(int8, fp32, rel_tol=0.02)
