"""Who may import whom; one owner for each library; nothing hidden, nothing unportable."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.imports import ROOT, imports, tree

PIPELINE = sorted((ROOT / "pipeline").glob("*.py"))
STAGES = sorted((ROOT / "stages").glob("*.py"))
OWNERS = {
    "mlflow": {"store", "rows", "logged_models"},  # the client; runs; models
    "omegaconf": {"config"},
    "yaml": {"config", "stage_graph", "yaml_text"},
    "transformers": {"parity"},
    "tiktoken": {"tokenizer"},
    "matplotlib": {"figures"},
    "dvc": {"experiments"},
    "jinja2": {"report"},
    "markdown_it": {"report_run"},
    "vl_convert": {"plots"},
}


def libraries(path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library: str) -> None:
    users = {path.stem for path in [*PIPELINE, *STAGES] if library in libraries(path)}
    assert users == OWNERS[library]


def test_the_model_imports_torch_and_the_standard_library_only() -> None:
    foreign = libraries(ROOT / "pipeline/model.py") - set(sys.stdlib_module_names)
    assert foreign == {"torch"}


def test_the_core_knows_no_stage_and_stages_know_no_other_stage() -> None:
    for path in PIPELINE:
        assert "stages" not in libraries(path), path.name
    for path in STAGES:
        others = {n for n in imports(path) if n.startswith("stages.")}
        assert not others, path.name


def test_the_schema_imports_no_component() -> None:
    ours = {name for name in imports(ROOT / "pipeline/config.py") if name.startswith("pipeline")}
    helpers = {"errors", "hints", "watched", "yaml_text"}
    assert ours == {f"pipeline.{name}" for name in helpers}
    for name in helpers | {"regular"}:  # what they import of ours are errors and reads of files
        path = ROOT / f"pipeline/{name}.py"
        assert libraries(path) <= sys.stdlib_module_names | {"pipeline", "yaml"}, name
        theirs = {found for found in imports(path) if found.startswith("pipeline")}
        assert theirs <= {"pipeline.errors", "pipeline.regular"}, name


def test_nothing_in_the_core_prints() -> None:
    import ast

    for path in PIPELINE:
        calls = [n.func for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"], path.name


@pytest.mark.parametrize("stage", ["tokenize_corpus", "train", "evaluate", "sample"])
def test_a_stage_starts_without_the_heavy_libraries_that_it_does_not_use(stage: str) -> None:
    heavy = {"mlflow", "transformers", "matplotlib", "pyarrow"}
    heavy |= {"torch"} if stage == "tokenize_corpus" else set()
    code = f"import sys, stages.{stage}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_everything_imports_without_fcntl_and_without_triton() -> None:
    modules = [f"pipeline.{path.stem}" for path in PIPELINE if path.stem != "__init__"]
    modules += [f"stages.{path.stem}" for path in STAGES if path.stem != "__init__"]
    code = (
        "import sys, importlib\n"
        "sys.modules['fcntl'] = sys.modules['triton'] = None\n"
        f"[importlib.import_module(name) for name in {modules!r}]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
