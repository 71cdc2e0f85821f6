"""A tiny GPT and its training, the same everywhere: what the studies of a real step run on."""

from __future__ import annotations

import torch

from pipeline.compute.precision import choose_precision
from pipeline.compute.runtime import generator
from pipeline.config import UNSET_PATH, InitConfig, TrainConfig
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.training.training_step import Batch, TrainState, start

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=64, vocab_rows=64)
INIT = InitConfig(
    source="random",
    hf_model="",
    hf_watch="",
    scheme="gpt2",
    mup_base=16,
    std=0.02,
    residual_scale=True,
    seed=0,
)
TRAIN = TrainConfig(
    seed=0,
    steps=1,
    time_budget=0.0,
    batch_size=4,
    sequence_length=SHAPE.block_size,
    mask_documents=False,
    accumulate=1,
    optimizer="adamw",
    muon_lr_factor=1.0,
    muon_scale="match_rms_adamw",
    schedule="cosine",
    cooldown=0.2,
    lr=1e-3,
    min_lr=1e-3,
    warmup_steps=0,
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.95,
    grad_clip=1.0,
    compile=False,
    checkpoint_activations=False,
    deterministic=False,
    val_every=1,
    val_tokens=1,
    max_skipped=100,
    skip_spikes=0.0,
    fingerprint_every=0,
    fork=UNSET_PATH,
)


def state(precision: str, device: torch.device) -> TrainState:
    """The state before the first step; torch's own random generators stay as they are."""
    with torch.random.fork_rng(devices=[]):  # a new module draws weights that nobody uses
        model = GPT(SHAPE)
    initialize(model, INIT, generator(0, "demonstration"))
    return start(
        model.to(device), TRAIN, choose_precision(precision, device), INIT.narrowing(SHAPE.n_embd)
    )


def batches(step: int) -> list[Batch]:
    """The same tokens at every step, on the host, as those of every training are."""
    ids = torch.randint(SHAPE.vocab_size, (4, SHAPE.block_size + 1), generator=generator(0, "ids"))
    return [(ids[:, :-1], ids[:, 1:])]
