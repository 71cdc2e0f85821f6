"""dvc.yaml says what the code says: deps are the imports, params are the sections read."""

from __future__ import annotations

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline.experiments import READS
from pipeline.records import NO_RESULTS, UPSTREAM
from tests.imports import ROOT, closure, config_sections

STAGES: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))["stages"]
EXEMPT = frozenset(f"pipeline.{name}" for name in NO_RESULTS)
SECTIONS = {f.name for f in configuration.fields(configuration.Config)} - set(configuration.ASIDE)


def stage_file(stage: str) -> str:
    match = re.fullmatch(r"python -m stages\.(\w+)", STAGES[stage]["cmd"])
    assert match, "a cmd is fixed text: a param in it would reach the shell"
    return f"stages/{match[1]}.py"


def test_the_stages_are_the_chain_in_order() -> None:
    assert list(STAGES) == list(UPSTREAM)


@pytest.mark.parametrize("stage", STAGES)
def test_deps_name_every_imported_module_that_can_change_a_result(stage: str) -> None:
    path = stage_file(stage)
    expected = {f"{name.replace('.', '/')}.py" for name in closure(ROOT / path, EXEMPT)} | {path}
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert listed == expected


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_that_the_stage_reads(stage: str) -> None:
    listed = {name.partition(".")[0] for name in STAGES[stage]["params"]}
    assert listed == config_sections(ROOT / stage_file(stage)) & SECTIONS


@pytest.mark.parametrize("stage", STAGES)
def test_every_record_upstream_is_made_by_a_stage_that_this_one_depends_on(stage: str) -> None:
    made = {out: name for name, s in STAGES.items() for out in s["outs"]}
    reached: set[str] = set()
    todo = [stage]
    while todo:
        parents = {made[dep] for dep in STAGES[todo.pop()]["deps"] if dep in made}
        todo += parents - reached
        reached |= parents
    assert reached == set(UPSTREAM[stage])


@pytest.mark.parametrize("stage", READS)
def test_a_record_is_known_by_the_settings_that_its_stage_reads(stage: str) -> None:
    assert list(READS[stage]) == STAGES[stage]["params"]


def test_every_stage_that_others_build_on_is_known_by_its_settings() -> None:
    assert set(READS) == {stage for before in UPSTREAM.values() for stage in before}


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
    assert deps == {"${corpus.path}", "${init.hf_watch}", "${evaluate.hellaswag}"}


def test_every_out_is_ignored_by_git_ahead_of_the_first_run() -> None:
    ignored = (ROOT / ".gitignore").read_text("utf-8").split()
    for stage in STAGES.values():
        plots = [next(iter(plot)) for plot in stage.get("plots", [])]
        for out in [*stage["outs"], *stage.get("metrics", []), *plots]:
            assert any(f"/{out}".startswith(line) for line in ignored if line[0] == "/"), out
