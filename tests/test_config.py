"""Settings: strict, complete, and every problem named at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from ruamel.yaml import YAML

from pipeline import config as configuration
from pipeline import hints
from pipeline.errors import ConfigError
from tests.conftest import NANO, params


def problems(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        configuration.from_dict(params(**changes))
    return str(caught.value)


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        configuration.load(path)
    return str(caught.value)


def recipe(tmp_path: Path, old: str, new: str) -> Path:
    """The default recipe with a line changed."""
    text = NANO.read_text("utf-8")
    assert text.count(old) == 1
    path = tmp_path / "params.yaml"
    path.write_bytes(text.replace(old, new).encode("utf-8", "surrogateescape"))
    return path


def test_the_default_recipe_is_complete_and_valid() -> None:
    config = configuration.load(NANO)
    assert config.precision == "fp32"
    assert set(configuration.flatten(config)) == {name for name, _, _ in configuration.describe()}


@pytest.mark.fault(2)
@pytest.mark.fault(6)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp4"}, "precision=fp4: expected one of fp32, tf32, bf16, fp16, fp8"),
        ({"train__lr": "abc"}, "train.lr=abc: expected a number above 0 and at most 10"),
        ({"train__lr": float("nan")}, "train.lr=nan: expected a number"),
        ({"train__lr": float("inf")}, "train.lr=inf: expected a number"),
        ({"train__lr": float("-inf")}, "train.lr=-inf: expected a number"),
        ({"train__lr": -1.0}, "train.lr=-1.0: expected a number above 0 and at most 10"),
        ({"train__lr": 0.0}, "train.lr=0.0: expected a number above 0 and at most 10"),
        ({"train__steps": 0}, "train.steps=0: expected a whole number at least 1"),
        ({"train__steps": 2.5}, "train.steps=2.5: expected a whole number"),
        ({"train__steps": True}, "train.steps=True: expected a whole number"),
        ({"train__compile": "off"}, "train.compile=off: expected true or false"),
        ({"init__hf_model": ""}, "init.hf_model=: expected text"),
        ({"sample__prompts": []}, "sample.prompts=[]: expected a list of texts"),
        ({"model__n_head": 3}, "model.n_embd=128: expected a multiple of model.n_head=3"),
        ({"train__sequence_length": 129}, "train.sequence_length=129: expected at most"),
        ({"train__min_lr": 1.0}, "train.min_lr=1.0: expected at most train.lr=0.002"),
        ({"train__warmup_steps": 500}, "train.warmup_steps=500: expected less than"),
        ({"train__sequence_length": 8}, "train.sequence_length=8: expected at least 16"),
        ({"corpus__pattern": "/a/*"}, "corpus.pattern=/a/*: expected a glob inside corpus.path"),
        ({"corpus__pattern": "a/**.txt"}, "corpus.pattern=a/**.txt: expected ** alone between"),
        ({"model__n_embd": 10**9}, "model.n_embd=1000000000: expected a whole number at least 1"),
        ({"model__vocab_rows": 10**9}, "model.vocab_rows=1000000000: expected a whole number"),
        ({"corpus__source": "text"}, "corpus.path=data/unset: expected a file or folder"),
        ({"train": 3}, "train: settings by name are expected, got 3"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(changes: dict, message: str) -> None:
    assert message in problems(**changes)


def test_the_shortest_sequence_is_the_ending_that_evaluate_makes() -> None:
    from pipeline.inference.multiple_choice import ENDING_TOKENS

    assert configuration.CHOICE_ENDING == ENDING_TOKENS


@pytest.mark.fault(1)
def test_an_unknown_key_is_named_with_the_nearest_one() -> None:
    assert "train.lrr: unknown setting; did you mean train.lr?" in problems(train__lrr=1)


def test_all_problems_stand_in_one_error() -> None:
    said = problems(precision="fp4", train__lr="abc", model__dropout=2)
    assert len(said.splitlines()) == 3


def test_a_missing_setting_is_named() -> None:
    raw = params()
    del raw["train"]["lr"]
    with pytest.raises(ConfigError, match="train.lr: missing"):
        configuration.from_dict(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", ": empty; expected settings by name", marks=pytest.mark.fault(5)),
        pytest.param("# none\n", ": empty; expected", marks=pytest.mark.fault(5)),
        ("\n- a\n- b\n", ", line 2: settings by name are expected, not a list"),
        ("three\n", ", line 1: settings by name are expected, not a single value"),
        ("a:\n  b: [\n", ", line 3: not valid YAML: "),
        ("a: 1\n\tb: 2\n", ", line 2: not valid YAML: found character '\\t'"),
        ("a: 1\n---\na: 2\n", ", line 2: not valid YAML: but found another document"),
        ("a: 1\nb: \0\n", ", line 2: not valid YAML: U+0000 is no character of a text"),
        ("a: 1\nb: \udcff\n", ", line 2: not UTF-8 text"),
        ("a:\n  lr: 1\n  lr: 2\n", ", line 3: not valid YAML: found duplicate key lr"),
        ("a: 1\nb: !!python/name:os.system\n", ", line 2: not valid YAML: could not determine"),
        ("a: 1\nb: !mine 2\n", ", line 2: not valid YAML: could not determine"),
        ("a: &x [1, 2]\nb: [*x, *x]\n", ", line 2: *x: write the value itself"),
        ("a: " + "[" * 9999 + "]" * 9999, ": nested too deeply"),
        ("a: " + "9" * 5000, ": Exceeds the limit"),
        ("#" * (1 << 20) + "#", ": 1,048,577 bytes; expected at most 1,048,576"),
    ],
)
@pytest.mark.fault(4)
def test_a_broken_file_is_one_error_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refused(path).startswith(f"{path}{message}")


def test_a_params_file_that_is_none_is_refused_by_its_path(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(f"{tmp_path}: cannot be read")
    assert (
        refused(tmp_path / "gone")
        == f"{tmp_path / 'gone'}: no such file; run from the repository root"
    )


AMBIGUOUS = [
    *(("steps: 500", f"steps: {value}") for value in ("010", "1:30", "0o17")),
    *(("compile: false\n", f"compile: {value}\n") for value in ("off", "Yes", "NO", "on")),
    ("lr: 0.002\n", "lr: 1:30.5\n"),
    ("experiment: gpt2", "experiment: 010"),
    ('- "My lord,"', "- off"),
]


@pytest.mark.fault(3)
@pytest.mark.parametrize(("old", "new"), AMBIGUOUS)
def test_a_value_that_yaml_readers_take_in_two_ways_is_refused(
    tmp_path: Path, old: str, new: str
) -> None:
    path = recipe(tmp_path, old, new)
    line = NANO.read_text("utf-8").split(old)[0].count("\n") + 1
    said = refused(path).splitlines()[0]
    assert said.startswith(f"{path}, line {line}: ")
    assert new.split(" ")[-1].strip() + ": YAML readers disagree; expected a decimal" in said


@pytest.mark.fault(3, control=True)
@pytest.mark.parametrize(("old", "new"), AMBIGUOUS)
def test_two_yaml_readers_take_it_in_two_ways_without_a_word(
    tmp_path: Path, old: str, new: str
) -> None:
    text = recipe(tmp_path, old, new).read_text("utf-8")
    assert yaml.safe_load(text) != YAML(typ="safe").load(text)


@pytest.mark.fault(3)
def test_a_change_that_yaml_readers_take_in_two_ways_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.lr=010: YAML readers disagree"):
        configuration.load(NANO, ["train.lr=010"])
    assert configuration.load(NANO, ["train.lr=1e-3", "train.compile=true"]).train.lr == 0.001


def test_ambiguous_values_and_wrong_ones_stand_in_one_error(tmp_path: Path) -> None:
    path = recipe(tmp_path, "steps: 500", "steps: 010\n  lrr: 1")
    assert "train.steps=010" in refused(path) and "train.lrr: unknown" in refused(path)


@pytest.mark.parametrize(
    "row", [pytest.param(n, marks=pytest.mark.fault(n, control=True)) for n in (1, 2, 4, 5, 6)]
)
def test_a_plain_reader_takes_what_is_refused_here(row: int, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    if row == 1:
        assert OmegaConf.create("train: {lrr: 1}").train.lrr == 1
    if row == 2:
        assert OmegaConf.create("lr: -.inf").lr < OmegaConf.create("lr: 0").lr
    if row == 4:
        assert yaml.safe_load("lr: 1\nlr: 2") == {"lr": 2}
        yaml.unsafe_load(f"!!python/object/apply:os.mkdir [{json.dumps(str(mark))}]")
        assert mark.exists()
    if row == 5:
        assert OmegaConf.create(yaml.safe_load("") or {}) == {}
    if row == 6:
        from transformers import GPT2Config

        assert GPT2Config(n_embd=128, n_head=3).n_head == 3


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    "name", ["..", "a/../../x", "..\\x", "C:\\x", "a/%2e%2e/x", "a#b", "~/x", "a\0b", ".", "a\nb"]
)
def test_an_experiment_whose_files_would_lie_elsewhere_is_refused(name: str) -> None:
    assert "tracking.experiment=" in problems(tracking__experiment=name)


@pytest.mark.parametrize("name", ["gpt2", "My runs (2)", "/Users/me@example.org/gpt", "größe"])
def test_a_plain_name_of_an_experiment_is_taken(name: str) -> None:
    assert configuration.from_dict(params(tracking__experiment=name)).tracking.experiment == name


@pytest.mark.fault(8, control=True)
def test_a_folder_named_after_any_text_may_lie_elsewhere(tmp_path: Path) -> None:
    written = (tmp_path / "mlartifacts" / "a/../../../x").resolve()
    assert not written.is_relative_to(tmp_path)


@pytest.mark.fault(8)
@pytest.mark.parametrize("pattern", ["../*", "a/../../b", "/a/*", "..\\*", "C:\\*", "a\0b"])
def test_a_pattern_stays_below_the_corpus(pattern: str) -> None:
    assert "corpus.pattern=" in problems(corpus__pattern=pattern)


@pytest.mark.fault(8)
@pytest.mark.parametrize("name", ["corpus__path", "init__hf_model", "evaluate__hellaswag"])
def test_an_input_may_be_anywhere_but_is_text(name: str) -> None:
    setting = name.replace("__", ".")
    for value in ("a\0b", "a\udcff"):
        assert f"{setting}={ascii(value)}: expected text" in problems(**{name: value})
    for value in ("/data/x", "../x", "x/~y"):
        assert configuration.from_dict(params(**{name: value}))


PATHS = ["corpus__path", "init__hf_model", "init__hf_watch", "train__fork", "evaluate__hellaswag"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        ("~/x", "DVC does not know what ~ stands for; say {home}/x"),
        ("~nobody-here/x", "DVC does not know what ~ stands for; say the whole path"),
        ("data/x*.jsonl", "no such file or folder, and DVC takes no glob here; {glob}"),
    ],
)
def test_a_path_that_dvc_cannot_find_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, way_out: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    pattern = "say corpus.path=data and corpus.pattern=x*.jsonl"
    words = {
        "home": "/home/me",
        "glob": pattern if name == "corpus__path" else "name the one that is meant",
    }
    setting = name.replace("__", ".")
    assert f"{setting}={value}: {way_out.format(**words)}" in problems(**{name: value})


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("value", ["~x", "a[1]", "a*b?"])
def test_a_name_that_really_holds_such_characters_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{name.replace('__', '.')}={value}: " in problems(**{name: value})
    Path(value).mkdir()
    assert configuration.from_dict(params(**{name: value}))


@pytest.mark.parametrize("value", ["~/x", "*.txt", "a[1]"])
def test_dvc_takes_a_path_by_the_letter(tmp_path: Path, value: str) -> None:
    from dvc.fs import LocalFileSystem

    assert not LocalFileSystem().exists(str(tmp_path / value))
    (tmp_path / value).mkdir(parents=True)
    assert LocalFileSystem().exists(str(tmp_path / value))


def test_numbers_that_dvc_rewrites_are_read_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = NANO.read_text("utf-8").replace("lr: 0.002 ", "lr: 0.002")
    path.write_text(text.replace("  lr: 0.002", "  lr: 2e-03"), "utf-8")
    assert configuration.load(path).train.lr == 0.002


def test_a_local_folder_of_weights_has_to_be_watched(tmp_path: Path) -> None:
    said = problems(init__source="hf", init__hf_model=str(tmp_path))
    assert said.startswith("params: init.hf_watch=data/unset: expected " + str(tmp_path))


@pytest.mark.parametrize("model", ["gpt2", "openai-community/gpt2", "folder"])
def test_sizes_other_than_those_of_published_weights_are_named_before_any_stage(
    tmp_path: Path, model: str
) -> None:
    changes = {"model__n_layer": 12, "model__n_head": 12, "model__n_embd": 768}
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
    if model == "folder":
        (tmp_path / "config.json").write_text(json.dumps(sizes), "utf-8")
        model = changes["init__hf_watch"] = str(tmp_path)
    wanted = changes | {"init__source": "hf", "init__hf_model": model}
    said = problems(**wanted | {"model__n_layer": 11, "model__block_size": 512})
    assert said == (
        f"params: init.hf_model={model} has other sizes than model.n_layer=11, "
        "model.block_size=512; say -S model.n_layer=12 -S model.n_head=12 -S model.n_embd=768 "
        "-S model.block_size=1024"
    )
    assert configuration.from_dict(params(**wanted | {"model__block_size": 1024}))
    assert configuration.from_dict(params(**wanted | {"init__source": "random"}))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"n_layer": 1}', '{"n_layer": "x"}'])
def test_a_config_json_that_says_nothing_is_left_to_the_import(
    tmp_path: Path, content: str | None
) -> None:
    if content:
        (tmp_path / "config.json").write_text(content, "utf-8")
    places = {"init__hf_model": str(tmp_path), "init__hf_watch": str(tmp_path)}
    assert configuration.from_dict(params(init__source="hf", **places))
    assert configuration.from_dict(params(init__source="hf", init__hf_model="someone/else"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("tracking__experiment=2024", "=2024: expected text; it is read as a number, so put it in"),
        ("tracking__experiment='2024'", ""),
        ("corpus__field=1.5", "=1.5: expected text; it is read as a number, so put it in quotes"),
        ("corpus__pattern=true", "=True: expected text; it is read as true or false, so put it"),
        ("corpus__path=null", "=None: expected text; it is read as null"),
        ("train__steps='200'", "=200: expected a whole number at least 1, without quotes"),
        ("train__lr='1e-3'", "=1e-3: expected a number above 0 and at most 10, without quotes"),
        ("train__lr='nan'", "=nan: expected a number above 0 and at most 10"),
        ("train__compile='True'", "=True: expected true or false, without quotes"),
        ("precision=16", "=16: expected one of fp32, tf32, bf16, fp16, fp8"),
        ("sample__prompts=['', x]", "=['', 'x']: expected a list of texts, none of them empty"),
        ("sample__prompts=[1984, x]", ": expected a list of texts; numbers, true and false among"),
        ("sample__prompts=Hello", ": expected a list of texts, in square brackets or a line"),
    ],
)
def test_a_value_that_yaml_reads_as_another_type_is_told_how_to_be_written(
    changes: str, message: str
) -> None:
    name, _, value = changes.replace("__", ".").partition("=")
    if not message:
        assert configuration.load(NANO, [f"{name}={value}"])
        return
    with pytest.raises(ConfigError) as caught:
        configuration.load(NANO, [f"{name}={value}"])
    assert name in str(caught.value) and str(caught.value).count("\n") == 0
    assert message in str(caught.value)


def test_a_change_that_is_no_yaml_is_named_by_itself() -> None:
    with pytest.raises(ConfigError, match=r"corpus.path=\*.txt: not valid YAML: .*in quotes"):
        configuration.load(NANO, ["train.lr=0.1", "corpus.path=*.txt"])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train__learning_rate", "train.lr"),
        ("train__max_iters", "train.steps"),
        ("train__max_steps", "train.steps"),
        ("train__gradient_accumulation_steps", "train.accumulate"),
        ("train__wd", "train.weight_decay"),
        ("model__context", "model.block_size"),
        ("train__context", "model.block_size"),
        ("train__Grad-Accum", "train.accumulate"),
        ("lr", "train.lr"),
        ("train__n_layer", "model.n_layer"),
        ("train__keep", "checkpoint.keep"),
        ("train__precision", "precision or evaluate.precision or sample.precision"),
        ("seed", "init.seed or train.seed or evaluate.seed or sample.seed"),
        ("training", "train"),
        ("sample__weight_decays", "train.weight_decay"),
        ("train__min_lrr", "train.min_lr"),
    ],
)
@pytest.mark.fault(1)
def test_an_unknown_setting_names_the_one_that_is_meant(name: str, meant: str) -> None:
    said = problems(**{name: 3})
    assert said == f"params: {name.replace('__', '.')}: unknown setting; did you mean {meant}?"


def test_an_unknown_setting_like_no_other_brings_those_that_are_known() -> None:
    assert "train.foo: unknown setting; known: seed, steps, time_budget" in problems(train__foo=1)


def test_names_of_other_programs_lead_to_settings_and_are_none_themselves() -> None:
    known = {name for name, _, _ in configuration.describe()}
    assert hints.OTHERS_CALL_IT.keys() <= known
    others = [other for names in hints.OTHERS_CALL_IT.values() for other in names.split()]
    assert len(others) == len(set(others))
    assert not set(others) & {name.rpartition(".")[2] for name in known}


def test_the_environment_cannot_reach_params(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    path = tmp_path / "params.yaml"
    text = NANO.read_text("utf-8")
    path.write_text(text.replace("hf_model: gpt2", "hf_model: ${oc.env:SECRET}"), "utf-8")
    assert "42" not in configuration.load(path).init.hf_model
