"""Every recipe is complete, builds the model it promises, and trains."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline.compute.precision import choose_precision
from pipeline.config import Config
from pipeline.data import conversation
from pipeline.data.sources import chat
from pipeline.data.text_files import Line
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.hf_layout import outline
from pipeline.model.model_dir import save_model
from pipeline.tracking import recording
from pipeline.training import loop, training_step
from stages import import_hf_weights, sample, tokenize_corpus
from stages.import_hf_weights import build
from tests.conftest import ROOT, NoCourier

PARAMETERS = {  # with 50304 rows
    "nano": 7_248_640,
    "gpt2-124m": 124_475_904,
    "gpt2-medium": 354_871_296,
    "gpt2-large": 774_090_240,
    "gpt2-xl": 1_557_686_400,
    "gpt2-124m-continue": 124_475_904,
    "gpt2-124m-finetune": 124_475_904,
    "gpt2-124m-fast": 124_475_904,
    "gpt2-xl-fsdp": 1_557_686_400,
}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore:train.compile=true runs eagerly:UserWarning")


def recipe(name: str) -> Config:
    return configuration.load(ROOT / "recipes" / f"{name}.yaml")


def shape(config: Config) -> GPTConfig:
    c = config.model
    return GPTConfig(c.n_layer, c.n_head, c.n_embd, c.block_size, vocab_rows=c.vocab_rows)


def steps(config: Config, model: GPT, count: int) -> list[loop.StepReport]:
    """Real optimizer steps on one short random sequence."""
    train = replace(
        config.train, batch_size=1, sequence_length=32, accumulate=1, steps=count, warmup_steps=0
    )
    state = training_step.start(
        model,
        train,
        choose_precision(config.precision, torch.device("cpu")),
        config.init.narrowing(config.model.n_embd),
    )
    ids = torch.randint(50257, (1, 33), generator=torch.Generator().manual_seed(0))
    return list(loop.fit(state, train, lambda step: [(ids[:, :-1], ids[:, 1:])]))


def test_every_recipe_is_in_the_table() -> None:
    assert set(RECIPES) == set(PARAMETERS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_exact_parameter_count(name: str) -> None:
    assert outline(shape(recipe(name))).parameter_count() == PARAMETERS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_two_steps_at_full_width_and_depth_one(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    init = config.init
    if init.source == "hf":  # a folder of the recipe's width stands in for the hub
        published = replace(init, source="random")
        save_model(build(shallow(replace(config, init=published))), tmp_path / "published")
        init = replace(init, hf_model=str(tmp_path / "published"))
    with (
        pytest.warns() if init.source == "hf" else contextlib.nullcontext()
    ):  # a depth that nobody published
        model = build(shallow(replace(config, init=init)))
    first, second = steps(config, model, 2)
    assert first.loss == pytest.approx(math.log(50257), abs=1.0)
    assert second.loss < first.loss


def shallow(config: Config) -> Config:
    return replace(config, model=replace(config.model, n_layer=1, dropout=0.0))


def test_124m_takes_one_full_step() -> None:
    config = recipe("gpt2-124m")
    model = build(config)
    (report,) = steps(config, model, 1)
    assert model.parameter_count() == PARAMETERS["gpt2-124m"]
    assert report.loss == pytest.approx(math.log(50257), abs=1.0)
    assert math.isfinite(report.grad_norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes"),
    [("gpt2-124m-fast", 1), ("gpt2-124m-finetune", 1), ("gpt2-xl-fsdp", 2)],
)
def test_every_stage_runs_with_a_recipes_settings_on_a_tiny_model(
    name: str, processes: int, tmp_path: Path, monkeypatch
) -> None:
    """Optimizer, schedule, precision, sources and tasks are its own; sizes and steps are not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recording, "Courier", NoCourier)
    Path(".dvc").mkdir()
    raw: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes" / f"{name}.yaml"))
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64}
    raw["model"] |= sizes
    raw["train"] |= {"steps": 6, "warmup_steps": 1, "batch_size": 2, "sequence_length": 64}
    raw["train"] |= {"accumulate": 2, "val_every": 3, "val_tokens": 300}
    raw["evaluate"] |= {"batch_size": 2, "choice_items": min(raw["evaluate"]["choice_items"], 5)}
    raw["sample"] |= {"samples": 1, "max_new_tokens": 4}
    raw["device"], raw["distributed"]["processes"] = "cpu", processes
    raw["corpus"] |= {"val_fraction": 0.3}
    corpus = Path(raw["corpus"]["path"])
    corpus.mkdir(parents=True)
    words = [f"word{n} and then another{n % 7}" for n in range(60)]
    if raw["corpus"]["source"] == "chat":
        turns = [
            {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": "Yes."},
        ]
        (corpus / "talk.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
        raw["init"]["source"] = "random"  # a folder of these sizes stands in for the hub
        save_model(build(configuration.from_dict(raw)), tmp_path / "published")
        folder = str(tmp_path / "published")
        raw["init"] |= {"source": "hf", "hf_model": folder, "hf_watch": folder}
    else:
        texts = [" ".join(words[n:] + words[:n]) for n in range(60)]
        pq.write_table(pa.table({raw["corpus"]["field"]: texts}), corpus / "000_00000.parquet")
        items = Path(raw["evaluate"]["hellaswag"])
        items.parent.mkdir(parents=True)
        row = {"ctx": "He", "ctx_a": "He", "ctx_b": "", "activity_label": "A", "label": 0}
        items.write_text((json.dumps(row | {"endings": ["a b", "c", "d", "e"]}) + "\n") * 3)
    OmegaConf.save(OmegaConf.create(raw), "params.yaml")
    config = configuration.load("params.yaml")
    tokenize_corpus.main(config)
    with pytest.warns() if config.init.source == "hf" else contextlib.nullcontext():
        import_hf_weights.main(config)  # of sizes that nobody published
    for stage in ("train", "evaluate"):
        words = [sys.executable, "-m", "tests.helpers.rank_job", *([stage] * (stage != "train"))]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        assert f"{processes} processes" in done.stdout or processes == 1, done.stdout
    assert json.loads(Path("metrics/train.json").read_text())["train"]["best_val_loss"] < 11
    given = "hellaswag_harness_acc_norm" if config.evaluate.choice_items else "loss"
    assert given in json.loads(Path("metrics/evaluate.json").read_text())["val"]
    models = [sample.load(folder, config) for folder in sample.MODELS.values()]
    texts = [text for model in models for text in sample.continuations(model, config)]
    assert len(texts) == 2 * len(config.sample.prompts)


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_a_step_is_half_a_million_tokens_as_published(name: str) -> None:
    train = recipe(name).train
    assert train.batch_size * train.accumulate * train.sequence_length == 524_288
    assert (train.steps, train.warmup_steps) == (19_073, 715)


def test_prompts_of_fine_tuning_end_where_an_answer_of_its_text_begins() -> None:
    config = recipe("gpt2-124m-finetune")
    assert config.corpus.source == "chat"
    for prompt in conversation.prompts(config.sample.prompts, config.corpus.source):
        assert prompt.endswith("\nAssistant:")
        turns = [line.split(": ") for line in prompt.removesuffix("\nAssistant:").split("\n")]
        messages = [{"role": role.lower(), "content": content} for role, content in turns]
        messages.append({"role": "assistant", "content": "Yes."})
        line = Line("line 1", 1, 0, json.dumps({"messages": messages}).encode())
        assert chat.parts(line) == [(prompt, False), (" Yes.", True)]
