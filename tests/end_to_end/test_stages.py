"""What a person meets when running a stage: errors, tables, texts; exit codes."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import paths
from pipeline.compute.precision import Precision
from pipeline.errors import ConfigError, InputError, together
from pipeline.model import hf_import
from pipeline.model.hf_import import parameter_table
from pipeline.model.model_dir import save_model
from pipeline.records import record_file
from pipeline.studies import init_study
from pipeline.tables import write_json
from pipeline.training import history, loop
from stages import evaluate, import_hf_weights, sample
from stages.common import announce, run
from tests.conftest import ROOT, NoCourier, recipe

SMALL = {
    "model__n_layer": 1,
    "model__n_head": 1,
    "model__n_embd": 8,
    "model__block_size": 16,
    "train__sequence_length": 16,
}


def test_inputs_that_are_refused_together_are_one_error_of_the_first_kind() -> None:
    def refuse(error: Exception):
        def call() -> None:
            raise error

        return call

    one, two = InputError("a: empty"), ConfigError("b: unknown")
    with pytest.raises(InputError) as caught:
        together(lambda: 1, refuse(one), refuse(two), refuse(InputError("a: empty")))
    assert str(caught.value) == "a: empty\n  b: unknown"
    with pytest.raises(RuntimeError):
        together(refuse(one), refuse(RuntimeError("a bug")))
    assert together(lambda: 1, lambda: 2) == [1, 2]


def test_a_user_error_is_one_message_and_its_exit_code(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)

    def fail(config) -> None:
        raise InputError("data/tokens: no such folder")

    with pytest.raises(SystemExit) as ended:
        run(fail)
    assert ended.value.code == 3
    assert capsys.readouterr().err == "error: data/tokens: no such folder\n"


def test_a_crash_in_machine_code_says_where_it_was() -> None:
    crash = (
        "import faulthandler\nfrom stages.common import run\n"
        "run(lambda config: faulthandler._sigsegv())"
    )
    done = subprocess.run(
        [sys.executable, "-c", crash], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Segmentation fault" in done.stderr or "access violation" in done.stderr
    assert "in <lambda>" in done.stderr


def test_wrong_settings_end_a_stage_with_2_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("precision: fp4\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "stages.tokenize_corpus"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "SYSTEMROOT": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "precision=fp4: expected one of fp32, tf32, bf16, fp16, fp8" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["params.yaml"]


def test_sizes_that_differ_from_the_imported_ones_are_named(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    """Of a hub id whose sizes nobody knows before: others are named by the settings' check."""
    save_model(import_hf_weights.build(make_config(**SMALL)), tmp_path / "hf")
    monkeypatch.setattr(hf_import, "_download", lambda name: tmp_path / "hf")
    wrong = SMALL | {"model__n_layer": 2, "init__source": "hf", "init__hf_model": "someone/tiny"}
    with pytest.warns(UserWarning), pytest.raises(ConfigError) as caught:
        import_hf_weights.build(make_config(**wrong))
    assert str(caught.value).startswith(
        "init.hf_model=someone/tiny has other sizes than model.n_layer=2; say -S model.n_layer=1 "
    )


@pytest.mark.parametrize(
    ("difference", "equal", "told"),
    [
        (2e-5, True, "differ by 2.0e-05 in float64, greedy tokens equal .*; accepted are .* 1e-07"),
        (float("nan"), True, "differ by nan in float64"),
        (1e-15, False, r"greedy tokens DIFFER \(100 of 128 are more than rounding apart\)"),
    ],
)
def test_an_import_that_transformers_computes_differently_fails(
    make_config, tmp_path: Path, monkeypatch, difference: float, equal: bool, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(import_hf_weights.recording, "Courier", NoCourier)
    found = {"relative_logit_difference": difference, "greedy_equal": equal}
    found |= {"greedy_steps": 64, "greedy_decided": 100}
    monkeypatch.setattr(import_hf_weights, "parity", lambda *_: found)
    with pytest.raises(InputError, match=told):
        import_hf_weights.main(make_config(**SMALL))
    assert not paths.record("import_hf_weights").exists()


def test_the_time_of_the_init_study_is_in_its_record(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(import_hf_weights.recording, "Courier", NoCourier)
    import_hf_weights.main(make_config(**SMALL))
    found: dict[str, float] = {}
    for event in record_file.read(paths.record("import_hf_weights")):
        found |= event["values"] if event["kind"] == "metrics" else {}
    assert 0 < found["time/init_study_seconds"] < found["time/import_hf_weights_seconds"]


class _Kept:
    """A record that keeps its metrics."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        self.values |= values

    def artifact(self, *_: object) -> None: ...


def test_the_rows_metrics_of_the_init_study_are_those_of_the_runs_own_model(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    own = init_study.Measured("as it is", 3, None, [0.1, 0.2, 0.3, 0.4], [9.0, 8.0, 7.0, 6.0])
    twin = init_study.Measured("3 layers", 3, True, [1.1, 1.2, 1.3, 1.4], [5.0, 4.0, 3.0, 2.0])
    record = _Kept()
    adds = init_study.RandomAdds([1.0, 1.5], [0.7, 1.0])
    import_hf_weights.write_study(init_study.InitStudy(adds, own, [twin]), record)
    assert record.values == {
        "init/residual_std_first": 0.2,
        "init/residual_std_last": 0.4,
        "init/grad_norm_first": 8.0,
        "init/grad_norm_last": 6.0,
    }
    assert "0.2000 after block 1, 0.4000 after block 3" in capsys.readouterr().out
    assert "as it is,3,0.4,6\n" in (paths.INIT_STUDY / "blocks.csv").read_text("utf-8")


def step_report(**changes: object) -> loop.StepReport:
    values = {"step": 0, "loss": 2.5, "grad_norm": 1.25, "learning_rate": 0.01, "seconds": 0.5}
    values |= {"loss_scale": 65536.0, "skipped": False, "data_seconds": 0.1, "tokens": 64}
    return loop.StepReport(**values | {"steps": 3} | changes)


def test_a_skipped_step_shows_in_the_curves_as_one_and_leaves_a_gap_in_the_norm() -> None:
    good = history.step_metrics(step_report())
    skipped = history.step_metrics(
        step_report(grad_norm=math.inf, skipped=True, loss_scale=32768.0)
    )
    names = ("train/loss_scale", "train/found_inf", "train/skipped")
    assert [good[name] for name in names] == [65536.0, 0.0, 0.0]
    assert [skipped[name] for name in names] == [32768.0, 1.0, 1.0]
    assert good["train/grad_norm"] == 1.25 and "train/grad_norm" not in skipped
    nan = history.step_metrics(step_report(grad_norm=math.nan))
    assert nan["train/found_inf"] == 1.0 and "train/grad_norm" not in nan
    assert (good["train/loss"], good["train/learning_rate"]) == (2.5, 0.01)
    assert good["perf/step_tokens_per_second"] == 128


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
        assert f"## {prompt}".replace("\n", " ") in page
    assert "### before training" in page and "### after training" in page


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
        ("val", "hellaswag_harness/acc", "val/hellaswag_harness_acc"),
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
    from pipeline.data import token_files, token_writer
    from pipeline.data.documents import Document
    from pipeline.inference import multiple_choice

    monkeypatch.chdir(tmp_path)
    words = " ".join(f"word{n}" for n in range(400))
    documents = [Document(f"d{n}", split, words) for n, split in enumerate(["train", "val", "val"])]
    token_writer.write_tokens(documents, paths.TOKENS)
    val = token_files.open_tokens(paths.TOKENS, "val")
    items = multiple_choice.choice_items(val, 3, seed=0)
    multiple_choice.write_hellaswag(items, "hellaswag.jsonl")
    given = make_config(evaluate__choice_items=2, evaluate__hellaswag="hellaswag.jsonl")
    found = evaluate.materials(given, val) | evaluate.hellaswag(given)
    assert list(found) == ["validation", "choice", "hellaswag_nanogpt"]
    assert found["hellaswag_nanogpt"] == items and len(found["choice"]) == 2
    evaluate.keep(found["choice"])
    assert len(paths.ARTIFACTS.joinpath("choice_items.jsonl").read_text().splitlines()) == 2
    assert list(evaluate.materials(make_config(), val)) == ["validation", "choice"]
    assert evaluate.hellaswag(make_config()) == {}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch) -> Path:
    """An empty workspace of its own, and no store."""
    from pipeline.tracking import recording

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(recording, "Courier", NoCourier)
    return tmp_path


@pytest.mark.fault(14)
def test_evaluate_names_all_that_is_wrong_with_its_inputs_before_it_computes(
    make_config, workspace: Path, monkeypatch
) -> None:
    from pipeline.data import token_writer
    from pipeline.data.documents import Document

    documents = [Document(split, split, "some text") for split in ("train", "val")]
    token_writer.write_tokens(documents, paths.TOKENS)
    content = (paths.TOKENS / "val.bin").read_bytes()
    (paths.TOKENS / "val.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (workspace / "h.jsonl").write_text("{\n[]\n", "utf-8")
    monkeypatch.setattr(evaluate, "materials", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(InputError) as caught:
        evaluate.main(make_config(evaluate__hellaswag="h.jsonl"))
    lines = str(caught.value).split("\n  ")
    starts = [paths.TOKENS / "val.bin", "h.jsonl: line 1", "h.jsonl: line 2"]
    starts += [paths.INIT, paths.MODEL]
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"{start}: ")


def test_a_hellaswag_file_that_is_not_there_ends_the_first_stage_not_the_last(
    workspace: Path, capsys
) -> None:
    text = recipe().replace("hellaswag: data/unset ", "hellaswag: data/hs/val.jsonl ")
    Path("params.yaml").write_text(text, "utf-8")
    for tracked in (False, True):
        begun: list[Any] = []
        with contextlib.suppress(SystemExit):
            run(begun.append)
        assert bool(begun) == tracked
        Path("data").mkdir(exist_ok=True)
        Path("data/hs.dvc").touch()  # DVC brings it when it comes to it
    assert "fetch hellaswag" in capsys.readouterr().err


def test_sample_looks_at_both_models_before_it_writes_a_text(make_config, workspace: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)init: no initial model .*model: no trained model "):
        sample.main(make_config())


@pytest.mark.fault(16)
@pytest.mark.fault(18)
def test_a_corpus_is_looked_at_as_a_whole_before_any_of_it_is_tokenized(
    make_config, workspace: Path, monkeypatch
) -> None:
    from stages import tokenize_corpus

    text = workspace / "text"
    text.mkdir()
    given = make_config(corpus__source="text", corpus__path=str(text), corpus__val_fraction=0.1)
    monkeypatch.setattr(
        tokenize_corpus.token_writer, "write_tokens", lambda *_, **__: pytest.fail()
    )
    (text / "a.txt").write_text("one short text, so one document", "utf-8")
    with pytest.raises(InputError, match="split is empty: documents: .* in train, . in val"):
        tokenize_corpus.main(given)
    for name in "bc":
        (text / f"{name}.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="(?s)b.txt: invalid UTF-8 at byte 0.*c.txt: invalid"):
        tokenize_corpus.main(given)


@pytest.fixture
def large_corpus(make_config, workspace: Path, monkeypatch):
    """Settings of a corpus that is taken for a large one; its tokens are kept after each batch."""
    from pipeline.data import token_writer
    from stages import tokenize_corpus

    monkeypatch.setattr(tokenize_corpus, "KEPT_FROM", 1)
    monkeypatch.setattr(token_writer, "KEPT_EVERY", 1)
    monkeypatch.setattr(token_writer, "BATCH_BYTES", 100)
    Path("text").mkdir()
    for number in range(40):
        Path("text", f"{number}.txt").write_text(f"some text {number} " * 20, "utf-8")
    return make_config(corpus__source="text", corpus__path="text", corpus__val_fraction=0.2)


def stopped(config, monkeypatch, after: int) -> None:
    """Tokenize until somebody says stop, after so many batches."""
    from pipeline.data import token_writer
    from stages import tokenize_corpus

    add, left = token_writer._Growing.add, [after]

    def stopping(*words) -> None:
        add(*words)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_writer._Growing, "add", stopping)
        tokenize_corpus.main(config)


def test_tokenizing_a_large_corpus_goes_on_where_it_was_stopped(
    large_corpus, monkeypatch, capsys
) -> None:
    from pipeline.data import corpus
    from pipeline.experiments import trainings
    from stages import tokenize_corpus

    stopped(large_corpus, monkeypatch, 25)
    assert not any(paths.TOKENS.glob("*.bin"))
    (left,) = trainings.kept()
    assert (left.name, left.state) == ("workspace: tokenize", "interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "check", lambda *_: pytest.fail("all of it was checked before"))
        tokenize_corpus.main(large_corpus)
    assert "tokenize: goes on after" in capsys.readouterr().out
    assert not trainings.kept() and not any(p.is_dir() for p in paths.runs().iterdir())
    found = {path.name: path.read_bytes() for path in paths.TOKENS.iterdir()}
    monkeypatch.setattr(tokenize_corpus, "KEPT_FROM", 1 << 28)
    tokenize_corpus.main(large_corpus)
    assert "goes on" not in capsys.readouterr().out
    assert found == {path.name: path.read_bytes() for path in paths.TOKENS.iterdir()}


@pytest.mark.parametrize("change", ["file", "setting"])
def test_tokenizing_starts_anew_for_another_corpus(
    large_corpus, make_config, monkeypatch, capsys, change: str
) -> None:
    from stages import tokenize_corpus

    stopped(large_corpus, monkeypatch, 25)
    given = large_corpus
    if change == "file":
        Path("text/0.txt").write_text("another text", "utf-8")
    else:
        given = make_config(corpus__source="text", corpus__path="text", corpus__val_fraction=0.3)
    tokenize_corpus.main(given)
    assert "goes on" not in capsys.readouterr().out
    assert "another" in decoded() or change == "setting"


def decoded() -> str:
    from pipeline.data import token_files, tokenizer

    splits = (token_files.open_tokens(paths.TOKENS, split) for split in token_files.SPLITS)
    return "".join(tokenizer.gpt2().decode(split.ids.tolist()) for split in splits)


def test_a_large_corpus_that_is_refused_leaves_no_folder(large_corpus) -> None:
    from pipeline.experiments import trainings
    from stages import tokenize_corpus

    Path("text/0.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="invalid UTF-8"):
        tokenize_corpus.main(large_corpus)
    assert not trainings.kept()


@pytest.mark.fault(65)
def test_what_a_corpus_passes_over_is_said_on_the_terminal(
    make_config, workspace: Path, capsys
) -> None:
    from stages import tokenize_corpus

    for name in ("a.txt", "b.txt", "c.csv", "._a.txt", ".git/d.txt"):
        (workspace / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / "text" / name).write_text(f"some text in {name}", "utf-8")
    (workspace / "text" / "empty.txt").touch()
    given = make_config(corpus__source="text", corpus__path="text", corpus__val_fraction=0.5)
    tokenize_corpus.main(given)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "tokenize: left out 2 hidden (._a.txt, .git/), 1 .csv (c.csv); corpus.source=text takes "
        ".txt and .md, also as .gz or .zst",
        "tokenize: left out 1 document without any text",
    ]
    for name in ("c.csv", "._a.txt", "empty.txt", ".git/d.txt"):
        (workspace / "text" / name).unlink()
    (workspace / "text" / ".git").rmdir()
    tokenize_corpus.main(given)
    assert "left out" not in capsys.readouterr().out
