"""dvc.yaml says what the code says: deps are the imports, params are the sections read."""

from __future__ import annotations

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline.records import provenance, stage_graph
from tests.helpers.imports import ROOT, closure, config_sections

STAGES: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))["stages"]
# Sections that change no result: no stage runs again for them.
ASIDE = {"checkpoint", "distributed", "tracking"}
SECTIONS = {f.name for f in configuration.fields(configuration.Config)} - ASIDE


def stage_file(stage: str) -> str:
    match = re.fullmatch(r"python -m stages\.(\w+)", STAGES[stage]["cmd"])
    assert match, "a cmd is fixed text: a param in it would reach the shell"
    return f"stages/{match[1]}.py"


def test_the_graph_is_read_from_dvc_yaml() -> None:
    chain = ["tokenize", "import_hf_weights", "train", "evaluate", "numerics", "sample"]
    assert list(stage_graph.stages()) == chain
    before = {stage: list(stage_graph.upstream(stage)) for stage in chain}
    assert before == {
        "tokenize": [],
        "import_hf_weights": [],
        "train": chain[:2],
        "evaluate": chain[:3],
        "numerics": [],
        "sample": chain[:5],
    }


def test_the_settings_aside_decide_nothing_and_all_others_something() -> None:
    names = [name for name, *_ in configuration.describe()]
    decisive = stage_graph.decisive(dict.fromkeys(names))
    assert {name.partition(".")[0] for name in set(names) - set(decisive)} == ASIDE
    assert stage_graph.changes_training("init.std") and stage_graph.changes_training("corpus.path")
    aside = ("checkpoint.keep_every", "evaluate.seed", "sample.seed", "tracking.experiment")
    for name in (*aside, "debug.interact_at_step"):
        assert not stage_graph.changes_training(name)


@pytest.mark.parametrize("stage", STAGES)
def test_the_deps_are_code_and_inputs_and_each_is_one_of_both(stage: str) -> None:
    settings = {"corpus.path": "C", "init.hf_watch": "H", "evaluate.hellaswag": "W"}
    settings["train.fork"] = "F"
    deps = [re.sub(r"\$\{(.*)\}", lambda m: settings[m[1]], d) for d in STAGES[stage]["deps"]]
    both = [*stage_graph.sources(stage), *stage_graph.inputs(stage, settings)]
    assert sorted(both) == sorted(deps)
    assert all((ROOT / name).is_file() for name in stage_graph.sources(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_read_all_of_its_code_before_it_works(stage: str) -> None:
    """So that an edit while it works reaches no part of what it does."""
    import subprocess
    import sys

    module = stage_file(stage).removesuffix(".py").replace("/", ".")
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    code_files = [name for name in provenance.code_of(stage) if name.endswith(".py")]
    names = {name.removesuffix(".py").replace("/", ".") for name in code_files}
    assert names <= set(done.stdout.split())


@pytest.mark.parametrize("stage", STAGES)
def test_deps_name_every_imported_module_that_can_change_a_result(stage: str) -> None:
    path = stage_file(stage)
    expected = [path, *sorted(f"{name.replace('.', '/')}.py" for name in closure(ROOT / path))]
    listed = [dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")]
    block = "\n".join(f"      - {name}" for name in expected)
    assert listed == expected, f"put this into dvc.yaml, below {stage}'s deps:\n{block}"


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_that_the_stage_reads(stage: str) -> None:
    aside = {"checkpoint.keep_every", "distributed.ordered"}  # an out, and the order of sums
    params = {*STAGES[stage].get("params", [])} - aside
    listed = {name.partition(".")[0] for name in params}
    assert listed == config_sections(ROOT / stage_file(stage)) & SECTIONS


def test_numerics_runs_again_for_new_pins_another_device_and_other_shapes_alone() -> None:
    source = (ROOT / "stages/numerics.py").read_text("utf-8")
    read = set(re.findall(r"config\.([a-z_.]+)", source)) - {"config"}
    read = {name for name in read if name.partition(".")[0] in SECTIONS}
    assert set(STAGES["numerics"]["params"]) == read
    assert read == {
        "device",
        *(f"model.{name}" for name in ("n_embd", "n_head", "vocab_rows")),
        *(f"train.{name}" for name in ("batch_size", "sequence_length")),
    }
    assert "constraints.txt" in STAGES["numerics"]["deps"]


def test_the_users_paths_are_templated_deps() -> None:
    deps = {dep for stage in STAGES.values() for dep in stage["deps"] if dep.startswith("$")}
    known = ("corpus.path", "init.hf_watch", "train.fork", "evaluate.hellaswag")
    assert deps == {f"${{{name}}}" for name in known}


def test_every_out_is_ignored_by_git_ahead_of_the_first_run() -> None:
    ignored = (ROOT / ".gitignore").read_text("utf-8").split()
    for stage in STAGES.values():
        plots = [next(iter(plot)) for plot in stage.get("plots", [])]
        for out in [*stage["outs"], *stage.get("metrics", []), *plots]:
            assert any(f"/{out}".startswith(line) for line in ignored if line[0] == "/"), out
