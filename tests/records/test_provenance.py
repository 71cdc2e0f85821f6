"""What a stage found is what it is filed under: edits of settings, code and inputs meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import config as configuration
from pipeline import paths
from pipeline.config import Config
from pipeline.errors import ChangedError
from pipeline.experiments import trainings
from pipeline.records import provenance, stage_graph
from pipeline.resume import run_folder
from stages import common
from tests.conftest import NANO, ROOT, params

Edit = Callable[[], None]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch) -> Path:
    """The default recipe in a workspace of its own, with a copy of the code that decides."""
    root = tmp_path / "work"
    root.mkdir()
    for name in provenance.code_of(*stage_graph.stages()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((stage_graph.ROOT / name).read_bytes())
    (root / "params.yaml").write_bytes(NANO.read_bytes())
    (root / "texts").mkdir()
    (root / "texts/a.txt").write_text("a text")
    monkeypatch.chdir(root)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setattr(stage_graph, "ROOT", root)
    provenance.as_found.cache_clear()
    provenance.find_code()
    yield root
    provenance.as_found.cache_clear()


def edit(name: str, old: str, new: str) -> None:
    text = Path(name).read_text("utf-8")
    assert old in text
    Path(name).write_text(text.replace(old, new), "utf-8")


def settings() -> Config:
    return configuration.load()


def outs(stage: str) -> list[Path]:
    return [Path(out) for out in stage_graph.stages()[stage].outs]


def worked(stage: str, what: str, meanwhile: Edit = lambda: None) -> list[str]:
    """One stage as DVC starts it, its outputs deleted first; what it did itself."""
    done: list[str] = []

    def main(config: Config) -> None:
        for out in outs(stage):
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.suffix:
                out.write_text(what)
            else:
                out.mkdir()
                (out / "file").write_text(what)
        done.append(what)
        meanwhile()

    for out in outs(stage):
        run_folder.discard(out)
    common.held(main, stage, settings())
    return done


def made(stage: str) -> set[str]:
    files = (out if out.is_file() else out / "file" for out in outs(stage))
    return {file.read_text() for file in files}


STAGE_AND_EDIT = [
    ("tokenize", "val_fraction: 0.05", "val_fraction: 0.2", "corpus.val_fraction: 0.05 then, 0.2"),
    ("import_hf_weights", "std: 0.02", "std: 0.03", "init.std: 0.02 then, 0.03 now"),
    ("train", "weight_decay: 0.1", "weight_decay: 0.3", "train.weight_decay: 0.1 then, 0.3 now"),
    ("evaluate", "choice_items: 200", "choice_items: 9", "evaluate.choice_items: 200 then, 9 now"),
    ("numerics", "n_embd: 128", "n_embd: 64", "model.n_embd: 128 then, 64 now"),
    ("sample", "seed: 1234", "seed: 5", "sample.seed: 1234 then, 5 now"),
]


@pytest.mark.fault(59)
@pytest.mark.parametrize(("stage", "old", "new", "told"), STAGE_AND_EDIT)
def test_an_edited_setting_ends_the_stage_and_the_old_one_takes_its_work_over(
    workspace: Path, stage: str, old: str, new: str, told: str, capsys
) -> None:
    with pytest.raises(ChangedError, match=told) as error:
        worked(stage, "of the old", lambda: edit("params.yaml", old, new))
    assert error.value.exit_code == 8 and "finished work is kept" in str(error.value)
    assert worked(stage, "of the new") == ["of the new"]  # the kept one is not for these settings
    edit("params.yaml", new, old)
    assert worked(stage, "done again") == []
    assert made(stage) == {"of the old"}
    assert "reusing its verified result" in capsys.readouterr().out
    assert run_folder._folders() == []
    assert worked(stage, "done again") == ["done again"]


@pytest.mark.fault(60)
@pytest.mark.parametrize("stage", stage_graph.stages())
def test_edited_code_ends_the_stage_and_the_old_takes_its_work_over(
    workspace: Path, stage: str
) -> None:
    for name in stage_graph.sources(stage):
        before = Path(name).read_bytes()
        with pytest.raises(ChangedError, match=f"{name}: edited"):
            worked(stage, f"of {name}", lambda: Path(name).write_text("x = 1\n"))  # noqa: B023
        Path(name).write_bytes(before)
        assert worked(stage, "done again") == []
        assert made(stage) == {f"of {name}"}


@pytest.mark.fault(59, control=True)
@pytest.mark.parametrize(("stage", "old", "new", "told"), STAGE_AND_EDIT)
def test_settings_that_a_stage_does_not_read_are_free(
    workspace: Path, stage: str, old: str, new: str, told: str
) -> None:
    """The control: DVC would file nothing wrong, so no work may be lost for it."""
    for other, before, after, _ in STAGE_AND_EDIT:
        name = told.partition(":")[0] if other == stage else _.partition(":")[0]
        if not stage_graph.stages()[stage].reads(name):
            assert worked(stage, "x", lambda: edit("params.yaml", before, after)) == ["x"]  # noqa: B023
            edit("params.yaml", after, before)


@pytest.mark.fault(60, control=True)
def test_code_that_decides_no_result_of_a_stage_is_free(workspace: Path) -> None:
    doctor = Path("pipeline/diagnostics/doctor.py")
    doctor.parent.mkdir()
    doctor.write_text("")
    for stage in stage_graph.stages():
        others = set(provenance.code_of(*stage_graph.stages())) - set(stage_graph.sources(stage))
        others.add(str(doctor))
        for name in others:
            worked(stage, "x", lambda: Path(name).write_text("x = 2\n"))  # noqa: B023
        for name in others - {str(doctor)}:
            (workspace / name).write_bytes((ROOT / name).read_bytes())


@pytest.mark.fault(59)
def test_a_params_file_that_nobody_can_read_any_more_is_an_edit(workspace: Path) -> None:
    with pytest.raises(ChangedError, match=r"params.yaml: no such file"):
        worked("train", "x", lambda: os.remove("params.yaml"))
    (workspace / "params.yaml").write_bytes(NANO.read_bytes())
    with pytest.raises(ChangedError, match="not valid YAML"):
        worked("evaluate", "x", lambda: Path("params.yaml").write_text("train: [1\n"))


def test_a_setting_in_another_order_or_with_other_comments_is_no_edit(workspace: Path) -> None:
    text = Path("params.yaml").read_text("utf-8")
    again = "\n".join(line.partition("  #")[0] for line in text.splitlines()) + "\n# the end\n"
    assert again != text
    assert worked("train", "x", lambda: Path("params.yaml").write_text(again)) == ["x"]


@pytest.fixture
def own_text(workspace: Path) -> Iterator[Path]:
    edit("params.yaml", "source: shakespeare", "source: text")
    edit("params.yaml", "  path: data/unset", "  path: texts")
    yield workspace / "texts"


@pytest.mark.parametrize("how", ["changed", "added", "gone"])
def test_an_input_that_changes_while_it_is_read_makes_no_result(own_text: Path, how: str) -> None:
    edits = {
        "changed": lambda: (own_text / "a.txt").write_text("another text"),
        "added": lambda: (own_text / "b.txt").write_text("b"),
        "gone": lambda: (own_text / "a.txt").unlink(),
    }
    with pytest.raises(ChangedError, match=rf"texts/[ab].txt: {how}") as error:
        worked("tokenize", "x", edits[how])
    assert "kept" not in str(error.value)
    assert worked("tokenize", "of what lies there now") == ["of what lies there now"]


def test_work_that_was_kept_is_not_for_other_inputs(own_text: Path) -> None:
    with pytest.raises(ChangedError):
        worked(
            "tokenize", "x", lambda: edit("params.yaml", "val_fraction: 0.05", "val_fraction: 0.2")
        )
    edit("params.yaml", "val_fraction: 0.2", "val_fraction: 0.05")
    (own_text / "a.txt").write_text("another text")
    assert worked("tokenize", "anew") == ["anew"]


def test_kept_work_that_was_damaged_is_done_again(workspace: Path) -> None:
    with pytest.raises(ChangedError):
        worked("evaluate", "x", lambda: edit("params.yaml", "choice_items: 200", "choice_items: 9"))
    edit("params.yaml", "choice_items: 9", "choice_items: 200")
    (folder,) = run_folder._folders()
    (folder / "metrics/evaluate.json").write_text("y")
    assert worked("evaluate", "anew") == ["anew"]
    assert run_folder._folders() == []


def test_kept_work_is_listed_and_given_back(workspace: Path) -> None:
    with pytest.raises(ChangedError):
        worked("evaluate", "x", lambda: edit("params.yaml", "choice_items: 200", "choice_items: 9"))
    (left,) = trainings.kept()
    assert left.row()[:3] == ("workspace: evaluate", "finished", "-")
    run_folder.remove(left.id)
    assert run_folder._folders() == []


def test_a_stage_that_was_started_by_hand_is_told_of_the_edit_and_keeps_nothing(
    workspace: Path, monkeypatch
) -> None:
    (workspace / ".dvc").mkdir()
    monkeypatch.delenv("DVC_ROOT")
    with pytest.raises(ChangedError, match="sample.seed: 1234 then, 5 now") as error:
        worked("sample", "x", lambda: edit("params.yaml", "seed: 1234", "seed: 5"))
    assert "kept" not in str(error.value) and not paths.runs().exists()


def test_a_full_disk_where_work_is_kept_is_said_and_the_edit_is_told(
    workspace: Path, monkeypatch, caplog
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "copy", full)
    with pytest.raises(ChangedError, match="sample.seed") as error:
        worked("sample", "x", lambda: edit("params.yaml", "seed: 1234", "seed: 5"))
    assert "kept" not in str(error.value) and "No space left" in caplog.text
    edit("params.yaml", "seed: 5", "seed: 1234")
    assert worked("sample", "anew") == ["anew"]


def test_line_endings_are_no_edit(workspace: Path) -> None:
    file = Path("pipeline/model/gpt.py")
    crlf = file.read_bytes().replace(b"\n", b"\r\n")
    assert worked("train", "x", lambda: file.write_bytes(crlf)) == ["x"]


def test_the_code_digest_sees_what_changes_results_and_ignores_the_rest(workspace: Path) -> None:
    def digest() -> str:
        provenance.as_found.cache_clear()
        return provenance.code_digest()

    before = digest()
    Path("pipeline/tracking").mkdir()
    Path("pipeline/tracking/recording.py").write_text("b = 2\n")
    assert digest() == before
    Path("pipeline/model/gpt.py").write_text("a = 2\n")
    assert digest() != before


def test_an_interrupted_training_is_the_same_after_an_edit_of_the_sampling_code(
    workspace: Path,
) -> None:
    config = configuration.from_dict(params())

    def identity() -> dict:
        provenance.as_found.cache_clear()
        return run_folder.identity("train", config, {"init": "x"})

    before = identity()
    for room in ("inference", "studies"):
        for path in Path("pipeline", room).glob("[a-z]*.py"):
            if path.as_posix() not in stage_graph.sources("train"):
                edit(str(path), '"""', '"""Edited: ')
                assert identity() == before, path
    edit("pipeline/training/optimizers.py", '"""', '"""Edited: ')
    assert identity() != before
