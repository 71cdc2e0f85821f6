"""`diverge` names the step, the place and the cause of a difference that was made on purpose."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import __main__ as cli
from pipeline import config as configuration
from pipeline import paths
from pipeline.compute.runtime import generator
from pipeline.diagnostics import replay, trace
from pipeline.errors import InputError
from pipeline.experiments import divergence
from pipeline.experiments.record_comparison import circumstances
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model
from pipeline.records import record_file
from pipeline.records.run_data import Log
from pipeline.resume import fork
from pipeline.storage import folders
from pipeline.training import training_step
from stages import train
from tests.conftest import params, recipe
from tests.distributed.test_start import Workspace
from tests.resume.test_checkpoints import prepared, settings, workspace  # noqa: F401

OWN = {
    "model__dropout": 0.0,
    "train__fingerprint_every": 5,
    "train__val_every": 12,
    "checkpoint__keep_every": 4,
}
Train = Callable[..., fork.Kept]


def kept_here(name: str) -> fork.Kept:
    """The training that has just ended here, with the states that it kept."""
    place = Path.cwd() / "kept" / name
    shutil.copytree(paths.CHECKPOINTS, place, symlinks=False)
    steps = json.loads((paths.CHECKPOINTS / "kept.json").read_text())
    return fork.Kept(name, record_file.read(paths.record("train")), tuple(steps), place)


@pytest.fixture
def trained(workspace: Path, settings) -> Train:  # noqa: F811
    """trained("a", train__seed=5) -> the training, under a name."""
    Path("params.yaml").write_text(recipe(), "utf-8")

    def made(name: str, **changes: Any) -> fork.Kept:
        train.main(settings(**OWN | changes))
        return kept_here(name)

    return made


def told(a: fork.Kept, b: fork.Kept) -> list[str]:
    said: list[str] = []
    divergence.diverge(a, b, said.append)
    print("\n\n".join(said))
    return said


def epsilons(text: str) -> float:
    (found,) = re.findall(r"and ([\d.e+,]+) epsilons of", text)
    return float(found.replace(",", ""))


# --- pairs whose cause is known


def test_another_kernel_of_attention_is_found_in_the_first_block(trained: Train) -> None:
    about, by_record, replayed, found = told(trained("a"), trained("b", model__attention="naive"))
    assert about == "a and b differ in\n  model.attention: sdpa in a, naive in b"
    assert "step 0 is the last that is equal, and step 5 is the first that differs, in weights" in (
        by_record
    )
    assert replayed.count("equal to its record") == 2
    assert "step 0, going forward: the input of transformer.h.0.attn.c_proj" in found
    assert "Layer: transformer.h.0.attn\n" in found
    assert re.search(r"Operations in a: _scaled_dot_product\w+\n", found)
    assert re.search(r"Operations in b: bmm, div, .*_softmax", found)
    assert "the output of transformer.h.0.attn.c_attn" in found.splitlines()[-1]
    assert ": rounding." in found and epsilons(found) < 4


def test_another_seed_of_the_data_shows_in_the_batch_first(trained: Train) -> None:
    _, by_record, found = told(trained("a"), trained("b", train__seed=5))
    assert by_record.startswith("By fingerprints, which both records have, step 0 is the first")
    assert "that differs, in batch." in by_record
    assert found.startswith("First difference: the batch of step 0.\n  a: 4 sequences, tokens ")
    assert "sequences are in both." in found


def test_a_coarser_format_is_found_in_the_first_product_within_its_rounding(
    trained: Train,
) -> None:
    *_, found = told(trained("a"), trained("b", precision="bf16"))
    assert "step 0, going forward: the output of transformer.h.0.attn.c_attn" in found
    assert "epsilons of bf16 (0.00781): rounding." in found and epsilons(found) < 2
    assert "Operations in a: addmm" in found


def test_another_dropout_is_found_where_it_is_drawn(trained: Train) -> None:
    *_, found = told(trained("a", model__dropout=0.1), trained("b", model__dropout=0.3))
    assert "step 0, going forward: the output of transformer.drop" in found
    assert "more than rounding, another computation." in found
    *_, found = told(trained("c"), trained("d", model__dropout=0.2))
    assert "step 0, going forward: the output of transformer.drop" in found


def test_other_weights_at_the_beginning_are_named(trained: Train) -> None:
    a = begun_with(trained, "a")
    b = begun_with(trained, "b", init__scheme="zero_projections")
    about, by_record, replayed, found = told(a, b)  # those of `a` are drawn once more
    assert "init.scheme: gpt2 in a, zero_projections in b" in about
    assert by_record.startswith("By fingerprints, which both records have, step 0 is the first")
    assert "that differs, in weights." in by_record and replayed.count("equal to its record") == 2
    assert "step 0, before the step: the weight transformer.h.0.attn.c_proj.weight" in found
    assert "another computation" in found


def begun_with(trained: Train, name: str, **changes: Any) -> fork.Kept:
    init = configuration.from_dict(params(**changes)).init
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    initialize(model, init, generator(init.seed, "init"))
    folders.remove(paths.INIT)
    save_model(model, paths.INIT)
    return trained(name, **changes)


def test_another_update_of_the_same_gradients_is_named(trained: Train) -> None:
    *_, found = told(trained("a"), trained("b", train__weight_decay=0.7))
    assert "step 0, the update: the updated weight transformer.wte.weight" in found


def test_a_difference_that_comes_late_is_found_from_the_newest_state_before_it(
    trained: Train,
) -> None:
    """Schedules of other lengths part in the second step after the warm-up."""
    own = {"train__fingerprint_every": 1, "checkpoint__keep_every": 2}
    a, b = trained("a", **own), trained("b", **own, train__steps=13)
    *_, by_record, replayed, found = told(a, replace(b, steps=()))
    assert "step 3 is the last that is equal, and step 4 is the first" in by_record
    assert "a, from the state after 2 steps up to step 4: equal to its record" in replayed
    assert "b, from its first weights up to step 4: equal to its record" in replayed
    assert "step 3, the update: the learning rate" in found


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_two_processes_beside_one_differ_in_a_sum_or_in_what_each_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    made = Workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    own = OWN | {"model__dropout": dropout, "train__batch_size": 2, "train__accumulate": 1}
    both = []
    for processes in (1, 2):
        code, said = made.ended(made.start(processes, **own, checkpoint__resume="never"))
        assert code == 0, said
        both.append(kept_here("two" if processes == 2 else "one"))
        folders.remove(tmp_path / ".runs")
    about, *_, replayed, found = told(*both)
    assert "distributed.processes: 1 in one, 2 in two" in about
    assert replayed.count("equal to its record") == 2 and "NOT" not in replayed
    if dropout:
        assert found.startswith("First difference: the random state of step 0, which changes ")
        assert "going forward: the output of transformer.drop" in found
    else:
        assert re.search(r"step \d, (the loss|the gradients|going backward)", found)
        assert ": rounding." in found and epsilons(found) < 4
    assert "1 times 2 sequences in one and 2 times 1 sequences in two, so its sums" in found


# --- what else it says


def test_equal_runs_are_said_to_be_equal_until_which_step(trained: Train) -> None:
    a, b = trained("a"), trained("b", train__checkpoint_activations=True)
    assert told(a, b)[1:] == [
        "By fingerprints, which both records have, they do not differ: compared were steps up to "
        "10. By loss and gradient norm to six digits, which both records have, they do not differ: "
        "compared were steps up to 11."
    ]
    shorter = Log([event for event in b.record if event.get("step", 0) < 11])
    said = told(a, replace(b, record=shorter))[1]
    assert said.endswith("up to 10. The record of a ends with step 11, that of b with 10.")


def test_losses_are_compared_where_fingerprints_show_nothing_or_show_it_later(
    trained: Train,
) -> None:
    a = trained("a", train__fingerprint_every=12)
    *_, by_record, replayed, found = told(
        a, trained("b", train__fingerprint_every=12, train__lr=0.003)
    )
    assert "they do not differ: compared were steps up to 0. By loss and gradient" in by_record
    assert "step 0 is the last that is equal, and step 1 is the first that differs" in by_record
    assert "b, from its first weights up to step 1: equal to its record" in replayed
    assert "step 0, the update: the learning rate" in found
    *_, by_record, replayed, _ = told(trained("c"), trained("d", train__lr=0.003))
    assert "step 5 is the first that differs, in weights. By loss and" in by_record
    assert "up to step 1: equal to its record" in replayed


def test_a_fork_is_replayed_from_no_state_later_than_the_difference(trained: Train) -> None:
    own = {"checkpoint__keep_every": 1}
    a = trained("a", **own)
    place = fork.export(a, 6)
    b = trained("b", **own, train__fork=place.as_posix(), train__lr=0.02)
    *_, replayed, found = told(a, b)
    assert "a, from the state after 5 steps up to step 7: equal to its record" in replayed
    assert "b, from the state after 6 steps up to step 7: equal to its record" in replayed
    assert "step 6, the update: the learning rate" in found
    wanted = (
        "Not replayed: b: step {} was made by the training that it is a fork of, before its own"
    )
    assert told(trained("c", train__lr=0.003), b)[-1].startswith(wanted.format(1))
    assert told(begun_with(trained, "d", init__scheme="zero_projections"), b)[-1].startswith(
        wanted.format(0)
    )


def test_weights_that_differ_where_replays_begin_are_not_taken_for_the_first_difference(
    trained: Train,
) -> None:
    """Of a fork of another training there may be no state from before the difference."""
    a, other = trained("a"), trained("c", train__lr=0.003)
    place = fork.export(other, 4)
    b = trained("b", train__fork=place.as_posix())
    events = [event for event in b.record if event.get("step", 4) >= 4]
    assert told(a, replace(b, record=Log(events)))[-1].startswith(
        "The weights differ where the replays begin, in step 4: the first difference lies before"
    )


def test_states_that_only_six_digits_called_equal_give_way_to_the_first_weights(
    trained: Train,
) -> None:
    a = trained("a", train__fingerprint_every=0)
    b = trained("b", train__fingerprint_every=0, train__lr=0.003)
    curves = {e["step"]: e for e in a.record if "train/loss" in e.get("values", {})}
    alike = [curves[e["step"]] if e.get("step", 9) < 6 else e for e in b.record]
    *_, by_record, replayed, found = told(a, replace(b, record=Log(alike)))
    assert "step 5 is the last that is equal" in by_record
    assert "a, from its first weights up to step 6" in replayed
    assert "step 0, the update: the learning rate" in found


def test_a_plan_by_the_clock_is_not_replayed(trained: Train) -> None:
    a = trained("a", train__time_budget=60.0, train__fingerprint_every=12)
    own = {"train__time_budget": 60.0, "train__fingerprint_every": 12, "train__lr": 0.003}
    *_, by_record, last = told(a, trained("b", **own))
    assert "By loss, gradient norm and learning rate to six digits" in by_record
    assert "step 0 is the first that differs, in learning rate." in by_record
    assert last == divergence.CLOCK
    with (
        replay.opened(a, 8) as again,
        pytest.raises(InputError, match="a: step 8 is not one of its 8 steps"),
    ):
        trace.traced(replace(again, planned=8), 8)


def test_steps_that_were_not_bit_equal_after_a_resume_are_told(trained: Train) -> None:
    a = trained("a")
    tag = {"kind": "tags", "values": {"resume.not_bit_equal_at": "7"}}
    about = circumstances((a, replace(a, name="b", record=Log([*a.record, tag]))))
    assert "  resume.not_bit_equal_at: not known in a, 7 in b" in about


def test_two_replays_that_break_alike_are_told_with_their_errors(trained: Train) -> None:
    a = trained("a")
    with replay.opened(a, 0) as again:
        report = next(again.steps(1))
    walks = [divergence.Walk(replace(a, name=n), 0, {0: report}, "", f"of {n}") for n in "ab"]
    assert divergence._no_difference(*walks) == (
        "The replays do not differ, up to step 0, and then both broke. a: of a. b: of b."
    )


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_another_dropout_is_no_rounding_in_a_coarse_format(trained: Train, precision: str) -> None:
    own = {"precision": precision}
    a, b = trained("a", **own, model__dropout=0.1), trained("b", **own, model__dropout=0.3)
    found = told(a, b)[-1]
    assert "epsilons of fp32" in found and "more than rounding, another computation." in found


def test_without_fingerprints_losses_are_compared(trained: Train) -> None:
    a, b = trained("a", train__fingerprint_every=0), trained("b", train__lr=0.003)
    *_, by_record, _, found = told(a, b)
    assert by_record == (
        "By loss and gradient norm to six digits, which both records have, step 0 is the last that "
        "is equal, and step 1 is the first that differs, in loss and gradient norm."
    )
    assert "step 0, the update: the learning rate" in found


def test_a_replay_that_is_not_its_record_is_said_and_the_records_are_compared_all_the_same(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = trained("a", model__dropout=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda seed, own=torch.manual_seed: own(seed ^ 1))
        b = trained("b", model__dropout=0.1, train__val_every=6)
    *_, by_record, replayed, found = told(a, b)
    assert "step 0 is the first that differs, in random state." in by_record
    assert "a, from its first weights up to step 0: equal to its record." in replayed
    assert "b, from its first weights up to step 0: NOT equal to its record: " in replayed
    assert found.startswith("The replays do not differ, up to step 0")


def test_where_layers_are_not_seen_loss_gradients_and_update_are_compared(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training_step, "compiled_loss", lambda model, precision, eager: lambda *x: eager(*x)
    )
    a = trained("a", train__compile=True)
    *_, found = told(a, trained("b", model__attention="naive"))
    assert "a is compiled, so its layers are not seen: the loss, the gradient of" in found
    assert re.search(r"step 0, the (loss|gradients): the ", found)
    assert "going" not in found.splitlines()[0]


def test_other_tokens_here_leave_the_records_alone(trained: Train) -> None:
    a, b = trained("a"), trained("b", train__seed=5)
    for path in paths.TOKENS.glob("*"):
        path.unlink()
    said = told(a, b)
    assert "that differs, in batch." in said[1]
    assert said[2].startswith("Not replayed: ") and "tokenize first" in said[2]


def test_what_cannot_be_compared_is_one_clear_error(trained: Train, caplog) -> None:
    a = trained("a")
    with pytest.raises(InputError, match="a, a: these are the same training; name two"):
        told(a, a)
    moved = [{**e, "step": e["step"] + 100} if "step" in e else dict(e) for e in a.record]
    moved[0]["id"] = "0" * 32
    with pytest.raises(InputError, match=r"no step in common: the first has steps 0 to 11, the "):
        told(a, fork.Kept("b", Log(moved), (), None))
    with pytest.raises(SystemExit) as ended:
        cli.main(["diverge", "nobody", "else"])
    assert ended.value.code == InputError.exit_code
    assert "error: nobody: no training of that name; there are: " in caplog.text
