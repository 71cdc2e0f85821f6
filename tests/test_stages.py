"""What a person meets when running a stage: errors, tables, texts; exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import paths
from pipeline.checkpoint import save_model
from pipeline.errors import ConfigError, InputError
from pipeline.hf_weights import parameter_table
from pipeline.precision import Precision
from stages import announce, evaluate, import_hf_weights, run, sample, write_json
from tests.conftest import ROOT

SMALL = {
    "model__n_layer": 1,
    "model__n_head": 1,
    "model__n_embd": 8,
    "model__block_size": 16,
    "train__sequence_length": 16,
}


def test_a_user_error_is_one_message_and_its_exit_code(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)

    def fail(config) -> None:
        raise InputError("data/tokens: no such folder")

    with pytest.raises(SystemExit) as ended:
        run(fail)
    assert ended.value.code == 3
    assert capsys.readouterr().err == "error: data/tokens: no such folder\n"


def test_wrong_settings_end_a_stage_with_2_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("precision: fp8\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "stages.tokenize_corpus"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "SYSTEMROOT": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "precision=fp8: expected one of fp32, tf32, bf16, fp16" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["params.yaml"]


def test_sizes_that_differ_from_the_imported_ones_are_named(make_config, tmp_path: Path) -> None:
    save_model(import_hf_weights.build(make_config(**SMALL)), tmp_path / "hf")
    wrong = SMALL | {"model__n_layer": 2, "init__source": "hf"}
    places = {"init__hf_model": str(tmp_path / "hf"), "init__hf_watch": str(tmp_path / "hf")}
    with pytest.warns(UserWarning), pytest.raises(ConfigError) as caught:
        import_hf_weights.build(make_config(**wrong, **places))
    assert str(caught.value) == f"model.n_layer=2: expected 1, as {tmp_path / 'hf'} has"


def test_an_import_that_transformers_computes_differently_fails(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(import_hf_weights.tracking, "Shipper", _NoShipper)
    monkeypatch.setattr(
        import_hf_weights,
        "parity",
        lambda *_: {"relative_logit_difference": 2e-5, "greedy_equal": True},
    )
    with pytest.raises(InputError, match="relative logit difference 2.0e-05, accepted 1e-05"):
        import_hf_weights.main(make_config(**SMALL))
    assert not paths.record("import_hf_weights").exists()


class _NoShipper:
    def __init__(self, *_: object) -> None: ...

    def __call__(self, event: object) -> None: ...

    def close(self) -> None: ...


def test_the_parameter_table_shows_every_tensor_and_the_total(make_config, capsys) -> None:
    model = import_hf_weights.build(make_config(**SMALL))
    import_hf_weights.show(parameter_table(model), model)
    shown = capsys.readouterr().out
    assert shown.count("\n") == 2 + len(model.state_dict())
    assert f"{model.parameter_count():,} parameters" in shown
    assert "8x24            24x8         yes" in shown


def test_samples_are_readable_and_the_same_for_the_same_seed(make_config) -> None:
    config = make_config(**SMALL, sample__samples=2, sample__max_new_tokens=4)
    model = import_hf_weights.build(config)
    torch.manual_seed(1)
    texts = [{"when": "before", **s} for s in sample.continuations(model, config)]
    torch.manual_seed(2)
    again = [{"when": "before", **s} for s in sample.continuations(model, config)]
    assert texts == again
    assert len(texts) == 2 * len(config.sample.prompts)
    page = sample.readable(texts, config)
    for prompt in config.sample.prompts:
        assert f"## {prompt}" in page
    assert "### before training" in page and "### after training" in page


def test_one_prompt_streams_to_the_terminal(make_config, tmp_path: Path, capsys) -> None:
    config = make_config(**SMALL)
    save_model(import_hf_weights.build(config), tmp_path / "model")
    words = ["--prompt", "Hello", "--model", str(tmp_path / "model"), "--tokens", "5"]
    sample.to_terminal(words, config)
    first = capsys.readouterr().out
    assert first.startswith("Hello") and len(first) > 10
    sample.to_terminal([*words, "--seed", "1234"], config)
    assert capsys.readouterr().out == first
    sample.to_terminal([*words, "--seed", "5"], config)
    assert capsys.readouterr().out != first


@pytest.mark.parametrize("effective", ["tf32", "fp32"])
def test_a_precision_that_is_not_in_effect_is_one_warning_and_in_the_row(
    capsys, caplog, effective: str
) -> None:
    tags: dict[str, object] = {}
    record = SimpleNamespace(tags=tags.update)
    reason = "tf32 needs compute capability 8.0, this GPU has 7.5: fp32 instead"
    given = Precision("tf32", effective, reason, False, torch.device("cpu"), torch.float32)
    announce("train", given, record)
    assert f"precision {effective} ({reason})" in capsys.readouterr().out
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    less = effective != "tf32"
    assert warned == [f"train: precision=tf32 is not in effect: {reason}"] * less
    assert (tags["precision.asked"], tags["precision.effective"]) == ("tf32", effective)
    assert tags["precision.reason"] == reason
    announce("evaluate", given, record)
    assert tags["evaluate.precision.effective"] == effective


@pytest.mark.parametrize(
    ("group", "key", "name"),
    [
        ("val", "validation/loss", "val/loss"),
        ("init_val", "choice/acc_norm", "init_val/choice_acc_norm"),
        ("val", "hellaswag/acc", "val/hellaswag_acc"),
    ],
)
def test_metrics_are_named_by_model_and_task(group: str, key: str, name: str) -> None:
    assert evaluate.metric_name(group, key) == name


def test_a_written_metric_file_never_writes_into_a_linked_one(tmp_path: Path) -> None:
    cache, target = tmp_path / "cache", tmp_path / "metrics.json"
    cache.write_text("kept")
    target.hardlink_to(cache)
    write_json(target, {"train/loss": 1 / 3})
    assert cache.read_text() == "kept"
    assert '"loss": 0.333333' in target.read_text()


def test_a_hellaswag_file_becomes_a_task_beside_the_made_items(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    from pipeline import data, evaluation
    from pipeline.corpus import Document

    monkeypatch.chdir(tmp_path)
    words = " ".join(f"word{n}" for n in range(400))
    documents = [Document(f"d{n}", split, words) for n, split in enumerate(["train", "val", "val"])]
    data.write_tokens(documents, paths.TOKENS)
    val = data.open_tokens(paths.TOKENS, "val")
    items = evaluation.choice_items(val, 3, seed=0)
    evaluation.write_hellaswag(items, "hellaswag.jsonl")
    given = make_config(evaluate__choice_items=2, evaluate__hellaswag="hellaswag.jsonl")
    found = evaluate.materials(given, val)
    assert list(found) == ["validation", "choice", "hellaswag"]
    assert found["hellaswag"] == items and len(found["choice"]) == 2
    assert len(paths.ARTIFACTS.joinpath("choice_items.jsonl").read_text().splitlines()) == 2
    assert list(evaluate.materials(make_config(), val)) == ["validation", "choice"]
