"""What must never stand in the sources, and params that would love to reach a shell."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT, Checkout, tiny_pipeline

SOURCES = sorted(
    path
    for folder in ("pipeline", "stages", "tools", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
KEYWORDS = {"weights_only": False, "trust_remote_code": True, "shell": True}
CALLS = re.compile(
    r"(c?pickle|cloudpickle|dill|joblib|marshal|shelve)\.(loads?|open|Unpickler)"
    r"|yaml\.(load|load_all|unsafe_load|unsafe_load_all|full_load|full_load_all)"
    r"|os\.(system|popen)|subprocess\.(getoutput|getstatusoutput)|torch\.load"
)
MODULES = re.compile(r"dill|cloudpickle|joblib|marshal|shelve|torch\.distributed\.checkpoint")
# Servers of the tracking store stay on this machine, behind their own checks.
WORDS = ("--disable-security-" + "middleware", "0.0." + "0.0")
PICKLED_MODELS = re.compile(r"mlflow\.(pytorch|sklearn|pyfunc|transformers)\b")


def unsafe(code: str) -> list[str]:
    """Calls and imports that can run what a file holds; controls of faults may have them."""
    return [f"line {node.lineno}: {name}" for node, name in _unsafe(ast.parse(code))]


def _unsafe(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.FunctionDef) and any(map(_is_control, node.decorator_list)):
        return
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if CALLS.fullmatch(name):
            yield node, name
        for word in node.keywords:
            value = getattr(word.value, "value", None)
            if word.arg in KEYWORDS and value == KEYWORDS[word.arg]:
                yield node, f"{word.arg}={value}"
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    for name in names:
        if CALLS.fullmatch(name) or MODULES.fullmatch(name):
            yield node, name
    for child in ast.iter_child_nodes(node):
        yield from _unsafe(child)


def _is_control(decorator: ast.expr) -> bool:
    return "fault(" in ast.unparse(decorator) and "control=True" in ast.unparse(decorator)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_call_that_can_run_what_a_file_holds_stands_anywhere(path: Path) -> None:
    assert unsafe(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f, weights_only = False)",
        "torch.load(f)",
        "pickle.load(f)",
        "import pickle\npickle.loads(b)",
        "from pickle import load",
        "AutoModel.from_pretrained(x, trust_remote_code=(True))",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(words, shell=True)",
        "os.system(words)",
        "import torch.distributed.checkpoint",
        "from torch.distributed.checkpoint import load",
        "from torch.distributed import checkpoint",
    ],
)
def test_each_unsafe_call_would_be_found(code: str) -> None:
    assert unsafe(code)
    assert (
        unsafe(f"@pytest.mark.fault(29, control=True)\ndef test():\n    {code.splitlines()[-1]}")
        == []
    )


def test_no_server_leaves_this_machine_and_no_model_is_pickled() -> None:
    for path in [*SOURCES, ROOT / "Makefile"]:
        text = path.read_text("utf-8")
        assert not [word for word in WORDS if word in text], path.name
        assert path.parent.name == "tests" or not PICKLED_MODELS.search(text), path.name


@pytest.mark.fault(58)
def test_no_command_of_dvc_holds_a_param() -> None:
    stages = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))["stages"]
    for stage in stages.values():
        assert re.fullmatch(r"python -m stages\.\w+", stage["cmd"]), stage["cmd"]


@pytest.mark.fault(58)
@pytest.mark.skipif(os.name == "nt", reason="a file's name cannot hold these characters there")
def test_shell_metacharacters_in_params_reach_no_shell(tmp_path: Path) -> None:
    made = tiny_pipeline(tmp_path)
    hostile = "data/x; touch EXECUTED; $(touch EXECUTED) `touch EXECUTED`"
    (tmp_path / "data/text").rename(tmp_path / hostile)
    params = OmegaConf.load(tmp_path / "params.yaml")
    params.corpus.path = hostile
    params.sample.prompts = ["x; touch EXECUTED", "$(touch EXECUTED)"]
    OmegaConf.save(params, tmp_path / "params.yaml")
    made.dvc("repro", "--single-item", "tokenize")
    assert (tmp_path / "data/tokens/meta.json").exists()
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.fault(58, control=True)
@pytest.mark.skipif(os.name == "nt", reason="another shell")
def test_a_command_that_holds_the_param_executes_it(tmp_path: Path) -> None:
    made = Checkout(tmp_path)
    made.dvc("init", "--no-scm")
    (tmp_path / "params.yaml").write_text("path: x; touch EXECUTED\n", "utf-8")
    (tmp_path / "dvc.yaml").write_text("stages: {naive: {cmd: 'echo ${path}'}}\n", "utf-8")
    made.dvc("repro")
    assert (tmp_path / "EXECUTED").exists()
