"""What a replay begins with, and the sums it makes in the place of several processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pipeline import paths
from pipeline.compute.runtime import generator
from pipeline.diagnostics import replay
from pipeline.errors import InputError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model
from pipeline.records import record_file
from pipeline.records.run_data import Log
from pipeline.resume import fork
from pipeline.storage import folders
from stages import train
from tests.conftest import recipe
from tests.resume.test_checkpoints import prepared, settings, workspace  # noqa: F401

DRAWN = "its first weights drawn again, not those of its digest"


def test_losses_are_added_up_process_by_process_as_gradients_are() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    ranks, total = replay.InTurn(2), torch.zeros(())
    small = 2.0**-24
    for number, value in enumerate([1.0, small, small, small]):
        ranks.seed(0, 0)
        ranks.next_draws(number)
        parameter.grad = (parameter.grad if parameter.grad is not None else 0) + torch.tensor(
            [value]
        )
        total += value
        ranks.add_in_order(torch.tensor(value), [parameter])
    ranks.add_up(total, [parameter])
    assert parameter.grad is not None and total.item() == parameter.grad.item() == 1.0 + 2 * small


@pytest.fixture
def trained(workspace: Path, settings: Callable) -> fork.Kept:  # noqa: F811
    Path("params.yaml").write_text(recipe(), "utf-8")
    config = settings(train__steps=3, train__val_every=3)
    model = GPT(GPTConfig(**asdict(config.model)))
    initialize(model, config.init, generator(config.init.seed, "init"))
    save_model(model, paths.INIT)
    train.main(config)
    return fork.Kept("a", record_file.read(paths.record("train")), (), None)


def elsewhere(kept: fork.Kept) -> tuple[str, ...]:
    with replay.opened(kept, 0) as again:
        return again.elsewhere


def test_first_weights_are_looked_for_in_dvcs_cache_before_they_are_drawn_again(
    trained: fork.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert elsewhere(trained) == ()
    shutil.copytree(paths.INIT, "cached")
    folders.remove(paths.INIT)
    asked = []

    def copy_of(rev: str, path: str, folder: Path) -> Path:
        asked.append((rev, path))
        return Path(shutil.copytree("cached", folder / "copy"))

    monkeypatch.setattr(replay.dvc_history, "copy_of", copy_of)
    assert elsewhere(trained) == () and not asked, "drawn again they have the same digest"
    assert elsewhere(replace(trained, rev="abc")) == ()
    assert asked == [("abc", paths.INIT.as_posix())]


def test_first_weights_that_come_out_otherwise_are_said_to(trained: fork.Kept) -> None:
    tag = {"kind": "tags", "values": {"digest.init": "0" * 64}}
    assert elsewhere(replace(trained, record=Log([*trained.record, tag]))) == (DRAWN,)


def test_imported_weights_that_are_gone_are_brought_back_by_dvc_where_it_has_them(
    trained: fork.Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.remove(paths.INIT)
    config, tokens = replay.inputs(trained)
    config = replace(config, init=replace(config.init, source="hf"))
    monkeypatch.setattr(replay, "inputs", lambda *_: (config, tokens))
    with pytest.raises(InputError, match="are neither in artifacts/init nor in DVC's cache$"):
        elsewhere(trained)
    monkeypatch.setattr(replay.dvc_history, "copy_of", lambda *_: None)
    with pytest.raises(InputError, match="nor in DVC.s cache$"):
        elsewhere(replace(trained, rev="abc"))


def test_other_tokens_are_refused_with_the_line_that_brings_back_those_of_an_experiment(
    trained: fork.Kept,
) -> None:
    tag = {"kind": "tags", "values": {"digest.train": "d" * 64}}
    other = replace(trained, record=Log([*trained.record, tag]))
    with pytest.raises(InputError, match=r"trained on .*, there d{12}\.\.\.\)$"):
        elsewhere(other)
    with pytest.raises(InputError, match=r"\.\.\.\); `dvc exp apply a` brings those of a$"):
        elsewhere(replace(other, rev="abc"))
    folders.remove(paths.TOKENS)
    with pytest.raises(InputError, match="^data/tokens: no tokens .*apply a` brings those of a$"):
        elsewhere(replace(trained, rev="abc"))
    with pytest.raises(InputError, match="tokenize first: `dvc repro tokenize`$"):
        elsewhere(trained)
