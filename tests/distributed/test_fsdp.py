"""A training whose weights lie in parts over processes: how it ends, fails, and goes on."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline import paths
from pipeline.distributed import start
from pipeline.errors import ConfigError
from tests.distributed.test_start import Workspace

FSDP = {"distributed__strategy": "fsdp"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("fsdp") / "workspace")


@pytest.mark.slow
@pytest.mark.fault(49)
@pytest.mark.fault(51)
def test_a_rank_is_killed_and_the_training_goes_on_with_any_strategy_and_number(
    workspace: Workspace,
) -> None:
    """Each part of the training is made otherwise; its losses are those of one process."""
    assert workspace.train(1, sample__while_training=True)[0] == 0
    alone, best = (
        workspace.losses(),
        load_file(workspace.folder / paths.MODEL / "model.safetensors"),
    )
    workspace.forget()
    code, said = workspace.train(2, "1:7:kill", **FSDP)
    assert code == 137 and "rank 1 of 2 (" in said and "was ended by SIGKILL" in said, said
    assert "ended without a word" in workspace.status()["message"]
    assert workspace.saved()[-1] == 6
    code, said = workspace.train(2, "0:10:leave")
    assert code == 1 and "processes: 2 (fsdp) then, 2 now" in said, said
    code, said = workspace.train(4, **FSDP, sample__while_training=True)
    assert code == 0 and "processes: 2 then, 4 (fsdp) now" in said, said
    assert [workspace.losses()[n] for n in range(14)] == pytest.approx([*alone.values()], rel=1e-5)
    found = load_file(workspace.folder / paths.MODEL / "model.safetensors")
    assert found.keys() == best.keys()
    for name, tensor in best.items():
        assert found[name].shape == tensor.shape
        assert (found[name] - tensor).abs().max() < 1e-5, name
    workspace.forget()


@pytest.mark.slow
@pytest.mark.fault(50)
def test_a_rank_that_hangs_ends_all_within_the_timeout(workspace: Workspace) -> None:
    code, said = workspace.train(2, "1:4:hang", distributed__timeout=0.1, **FSDP)
    assert code == 1 and "error: step 4: rank 1 of 2 (" in said, said
    assert "gave no answer (within 0.1 min)" in workspace.last_event()["why"]
    workspace.forget()


@pytest.mark.slow
def test_resuming_with_the_same_number_is_equal_to_the_bit_and_a_bad_step_is_kept_whole(
    workspace: Workspace,
) -> None:
    dropout = {"model__dropout": 0.3}
    assert workspace.train(2, **FSDP, **dropout)[0] == 0
    unbroken = workspace.losses()
    workspace.forget()
    code, said = workspace.train(2, "1:7:spoil", **FSDP, **dropout)
    assert code == 4 and "step 7: the gradient norm is nan" in said, said
    (bundle,) = workspace.folder.glob(".runs/debug/*-step-7")
    assert len(load_file(bundle / "exp_avg.safetensors")) == len(
        load_file(bundle / "model.safetensors")
    )
    assert workspace.train(2, **FSDP, **dropout)[0] == 0
    assert workspace.losses() == unbroken
    workspace.forget()


def test_muon_which_needs_whole_matrices_is_refused(make_config, monkeypatch) -> None:
    monkeypatch.setattr(start, "launch", lambda *_: pytest.fail("started"))
    changes: dict[str, Any] = {"train__optimizer": "muon", "train__accumulate": 2}
    given = make_config(distributed__processes=2, **FSDP, **changes)
    with pytest.raises(ConfigError, match="train.optimizer=muon distributed.strategy=fsdp: Muon"):
        start.run(given, lambda: pytest.fail("began"))
