"""One task for every contestant: sizes, starting weights and batches; and the peers' models."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checkouts import definitions
from pipeline import config as configuration
from pipeline.compute import runtime
from pipeline.config import Config
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.hf_layout import from_hf, hf_config, to_hf
from pipeline.model.init import initialize

HF = "transformers"
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "nano.yaml"
# Layers and heads, channels, longest sequence, sequences and tokens of a training batch.
SIZES = {
    "nano": (4, 128, 128, 8, 128),
    "mini": (6, 384, 128, 8, 128),
    "124m": (12, 768, 1024, 2, 256),
    "124m-1024": (12, 768, 1024, 16, 1024),  # for a GPU
    "test": (1, 16, 64, 2, 16),
}


@dataclass(frozen=True)
class Task:
    """What every contestant is given."""

    size: str
    precision: str = "fp32"
    device: str = "auto"

    def config(self) -> Config:
        """The nano recipe's hyperparameters at this size, with a rate that suits all sizes."""
        layers, channels, block, batch, tokens = SIZES[self.size]
        changes = {
            "model.n_layer": layers,
            "model.n_head": layers,
            "model.n_embd": channels,
            "model.block_size": block,
            "train.batch_size": batch,
            "train.sequence_length": tokens,
            "train.steps": 10_000,
            "train.warmup_steps": 10,
            "train.lr": 6e-4,
            "train.min_lr": 6e-5,
            "evaluate.choice_items": 0,
            "precision": self.precision,
            "device": self.device,
        }
        return configuration.load(RECIPE, [f"{name}={value}" for name, value in changes.items()])

    @property
    def tokens(self) -> int:
        """Of one training step."""
        return SIZES[self.size][3] * SIZES[self.size][4]

    def shape(self) -> GPTConfig:
        c = self.config().model
        return GPTConfig(
            c.n_layer, c.n_head, c.n_embd, c.block_size, vocab_rows=c.vocab_rows, dropout=c.dropout
        )

    def model(self) -> GPT:
        """Ours, with the weights that all start from, on the CPU."""
        model = GPT(self.shape())
        initialize(model, self.config().init, runtime.generator(0, "init"))
        return model

    def ids(self, step: int, rows: int, tokens: int) -> Tensor:
        """(rows, tokens) int64, as frequent as words are: log-uniform, which is Zipf's law."""
        draws = torch.rand(rows, tokens, generator=runtime.generator(step, "ids"))
        return (50257**draws).long() - 1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step, each (B, T)."""
        rows, tokens = SIZES[self.size][3:]
        ids = self.ids(step, rows, tokens + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def hf_model(task: Task) -> nn.Module:
    """transformers.GPT2LMHeadModel with our weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**hf_config(task.shape())))
    return _loaded(model, to_hf(task.model().state_dict(), task.shape()))


def nanogpt_model(task: Task, checkout: Path) -> nn.Module:
    """nanoGPT's GPT with our weights, its vocabulary padded as it is by default."""
    return _from_checkout(checkout / "model.py", task, dropout=0.0, bias=True)


def build_nanogpt_model(task: Task, checkout: Path) -> nn.Module:
    """build-nanogpt's GPT with our weights, its vocabulary padded as its script has it."""
    return _from_checkout(checkout / "train_gpt2.py", task)


def _from_checkout(path: Path, task: Task, **more: Any) -> nn.Module:
    shape = task.shape()
    theirs = definitions(path, ("master_process",))
    config = theirs.GPTConfig(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        block_size=shape.block_size,
        vocab_size=shape.vocab_rows,
        **more,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs.GPT(config)
    exported = to_hf(task.model().state_dict(), shape)
    return _loaded(model, from_hf(exported, shape))


def _loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The model with `state` in it; its head is the embedding, so it alone may be missing."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model
