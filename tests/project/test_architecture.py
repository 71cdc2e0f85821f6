"""Who may import whom; one owner for each library; nothing hidden, nothing unportable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.imports import (
    LOOKS,
    MAKES,
    ROOT,
    imports,
    makes_results,
    module_of,
    room_of,
    tree,
)

PIPELINE = sorted((ROOT / "pipeline").rglob("*.py"))
STAGES = sorted((ROOT / "stages").glob("*.py"))
CODE = [path for path in (*PIPELINE, *STAGES) if path.name != "__init__.py"]
OWNERS = {
    # The client; runs; models; the page.
    "mlflow": {"mlflow_store", "mlflow_run", "mlflow_models"},
    "omegaconf": {"config"},
    "yaml": {"config", "stage_graph", "yaml_text"},
    "transformers": {"hf_import"},
    "huggingface_hub": {"card", "hub"},  # of storage and of export
    "httpx2": {"hub"},
    "tiktoken": {"tokenizer"},
    "rich": {"screen"},
    # The table and the verbs.
    "typer": {"__main__", "experiments", "fetch", "manage", "models", "runs"},
    "matplotlib": {"figures"},
    "dvc": {"dvc_history"},
    "jinja2": {"report"},
    "markdown_it": {"run_page"},
    "scipy": {"scaling_law", "best_rate"},
    "vl_convert": {"dvc_plots"},
    "pynvml": {"system_metrics"},
}


def libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith("pipeline.")}


# --- rooms


def test_every_package_is_in_the_order_of_packages() -> None:
    packages = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert packages == {*MAKES, *LOOKS}


@pytest.mark.parametrize("room", ["", *MAKES, *LOOKS])
def test_a_package_imports_only_from_those_before_it_and_from_the_root(room: str) -> None:
    order = ["", *MAKES, *LOOKS]
    known = set(order[: order.index(room) + 1])
    for path in CODE:
        if path.is_relative_to(ROOT / "pipeline") and room_of(module_of(path)) == room:
            if path.name == "__main__.py":  # the table of commands
                continue
            beyond = {name for name in ours(path) if room_of(name) not in known}
            assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


def test_an_init_is_one_docstring() -> None:
    for path in (*PIPELINE, *STAGES):
        if path.name == "__init__.py":
            (only,) = tree(path).body
            assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), path
            assert isinstance(only.value.value, str) and "\n" not in only.value.value, path


def test_only_the_table_of_commands_and_the_stages_are_run() -> None:
    run = {path for path in CODE if '__name__ == "__main__"' in path.read_text("utf-8")}
    assert run == {ROOT / "pipeline/__main__.py", *STAGES} - {
        ROOT / "stages/__init__.py",
        ROOT / "stages/common.py",
    }


def test_no_folder_of_code_holds_more_than_twelve_files() -> None:
    for folder in {path.parent for path in CODE}:
        assert len(list(folder.glob("*.py"))) <= 12, folder


def test_no_function_is_longer_than_sixty_lines() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    for path in CODE:
        for node in ast.walk(tree(path)):
            if isinstance(node, kinds):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


# --- libraries and stages


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library: str) -> None:
    users = {path.stem for path in CODE if library in libraries(path)}
    assert users == OWNERS[library]


def test_the_model_imports_torch_and_the_standard_library_only() -> None:
    foreign = libraries(ROOT / "pipeline/model/gpt.py") - set(sys.stdlib_module_names)
    assert foreign == {"torch"}


def test_the_core_knows_no_stage_and_stages_know_no_other_stage() -> None:
    for path in PIPELINE:
        assert "stages" not in libraries(path), path.name
    for path in STAGES:
        others = {n for n in imports(path) if n.startswith("stages.")}
        assert others <= {"stages.common"}, path.name


def test_what_stages_share_makes_no_result() -> None:
    """Its file is no dep of any stage, and no closure of imports goes through it."""
    assert not {name for name in ours(ROOT / "stages/common.py") if makes_results(name)}


def test_the_schema_imports_no_component() -> None:
    helpers = {"errors", "hints", "published", "yaml_text"}
    assert ours(ROOT / "pipeline/config.py") == {f"pipeline.{name}" for name in helpers}
    for name in helpers | {"regular"}:  # what they import of ours are errors and reads of files
        path = ROOT / f"pipeline/{name}.py"
        assert libraries(path) <= sys.stdlib_module_names | {"pipeline", "yaml"}, name
        assert ours(path) <= {"pipeline.errors", "pipeline.published", "pipeline.regular"}, name


def test_nothing_in_the_core_prints() -> None:
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


def test_the_table_of_commands_starts_without_heavy_libraries() -> None:
    heavy = {"mlflow", "transformers", "matplotlib", "pyarrow", "torch", "dvc", "numpy"}
    code = f"import sys, pipeline.__main__; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_everything_imports_without_fcntl_and_without_triton() -> None:
    modules = [module_of(path) for path in CODE]
    code = (
        "import sys, importlib\n"
        "sys.modules['fcntl'] = sys.modules['triton'] = None\n"
        f"[importlib.import_module(name) for name in {modules!r}]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
