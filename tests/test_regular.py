"""Whatever lies where a file is expected: one error with its name, at once, of bounded length."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configuration
from pipeline import errors, published, regular, yaml_text
from pipeline.data import token_files
from pipeline.data.corpus import check
from pipeline.data.sources.parquet import rows
from pipeline.errors import InputError, UserError
from pipeline.experiments import trainings
from pipeline.inference import multiple_choice
from pipeline.model.model_dir import load_model, save_model
from pipeline.resume import run_folder, snapshot
from pipeline.storage import folders
from stages import import_hf_weights
from tests.conftest import params

ROOT = Path(__file__).resolve().parent.parent
needs_unix = pytest.mark.skipif(os.name == "nt", reason="no pipes and devices in folders here")
DEEP = "[" * 200_000 + "]" * 200_000


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Callable[[Path], Any]] = {
    "device": endless,
    "pipe": lambda path: os.mkfifo(path),
    "folder": Path.mkdir,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "a terabyte": sparse,
    "deep": lambda path: path.write_text(DEEP),
    "huge number": lambda path: path.write_text('{"n_layer": ' + "9" * 5000 + "}"),
    "long number": lambda path: path.write_text('{"n_layer": ' + "9" * 4000 + "}"),
    "long text": lambda path: path.write_text(json.dumps({"model_type": "x" * 900_000})),
    "list": lambda path: path.write_text(json.dumps(["x" * 900_000])),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 999),
    "nothing": Path.touch,
}
JSON_FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config.json": ("config.json", load_model),
    "sha256.json": ("sha256.json", load_model),
    "weights": ("model.safetensors", load_model),
    "index": ("model.safetensors.index.json", load_model),
    "meta.json": ("meta.json", lambda folder: token_files.open_tokens(folder, "train")),
    "snapshot.json": ("snapshot.json", snapshot.read_facts),
    "params": ("params.yaml", lambda folder: configuration.load(folder / "params.yaml")),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = params(model__n_layer=1, model__n_head=1, model__n_embd=8, model__block_size=16)
    small["train"]["sequence_length"] = 16
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(import_hf_weights.build(configuration.from_dict(small)), folder)
    return folder


@needs_unix
@pytest.mark.fault(72)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", JSON_FILES)
def test_one_bounded_error_names_the_file(
    place: str, kind: str, model: Path, tmp_path: Path
) -> None:
    name, read = JSON_FILES[place]
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for gone in {name, "sha256.json", *(["model.safetensors"] if place == "index" else [])}:
        (tmp_path / gone).unlink(missing_ok=True)
    KINDS[kind](tmp_path / name)
    if (place, kind) in HARMLESS:
        return
    with pytest.raises(UserError) as said:
        read(tmp_path)
    assert str(tmp_path) in str(said.value)
    assert len(str(said.value)) < 2500


# No sums at all, as the folder of another program has none.
HARMLESS = {
    ("sha256.json", "link to nothing"),
    *(("snapshot.json", kind) for kind in ("long number", "long text")),
}


@needs_unix
@pytest.mark.fault(72, control=True)
def test_a_plain_read_waits_for_ever_at_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    code = "from pathlib import Path; import sys; Path(sys.argv[1]).read_text()"
    words = [sys.executable, "-c", code, str(tmp_path / "config.json")]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(words, timeout=3, check=False)


@pytest.mark.fault(72, control=True)
def test_json_that_is_too_deep_is_no_value_error() -> None:
    with pytest.raises(RecursionError):
        json.loads(DEEP)


@needs_unix
@pytest.mark.fault(72)
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_streams_are_read_from_regular_files_alone(
    kind: str, tmp_path: Path, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "odd.jsonl"
    KINDS[kind](odd)
    corpus = {"source": "jsonl", "path": str(odd), "pattern": "**/*"}
    config = make_config(**{f"corpus__{key}": value for key, value in corpus.items()})
    readers: list[Callable[[], Any]] = [
        lambda: multiple_choice.hellaswag_items(odd),
        lambda: list(rows(odd, "text")),
        lambda: check(config.corpus),
        lambda: yaml_text.read(odd),
    ]
    for read in readers:
        with pytest.raises(UserError, match=r"odd\.jsonl"):
            read()


@needs_unix
@pytest.mark.fault(72)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_of_anything_is_listed_and_passed_over(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder.paths, "runs", lambda: tmp_path)
    (tmp_path / "r").mkdir()
    for name in (run_folder.IDENTITY, run_folder.STATUS, run_folder.RESULT):
        KINDS[kind](tmp_path / "r" / name)
    assert [one.row()[-1] for one in trainings.kept()] in (["r"], [])  # none: a link to nothing


def test_sizes_of_an_odd_model_folder_are_not_known_rather_than_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(DEEP)
    assert published.sizes_of(str(tmp_path)) == {}


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 10)
    assert regular.read(tmp_path / "f", 10) == b"x" * 10
    with pytest.raises(InputError, match=r"f: 10 bytes; expected at most 9"):
        regular.read(tmp_path / "f", 9)
    with pytest.raises(FileNotFoundError):
        regular.read(tmp_path / "g", 9)


# --- messages


@pytest.mark.fault(72)
def test_long_names_of_tensors_are_cut(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "sha256.json").unlink()
    names = ["n" * 1_000_000 + str(n) for n in range(8)]
    header = {n: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in names}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(InputError, match="not a tensor of this GPT-2|missing") as said:
        load_model(tmp_path)
    assert len(str(said.value)) < errors.MESSAGE + 100


@pytest.mark.fault(72)
def test_a_long_list_of_sums_is_one_bounded_error(tmp_path: Path) -> None:
    sums = {"n" * 300 + str(n): {"bytes": 10**300, "sha256": "x" * 300} for n in range(1000)}
    (tmp_path / "sha256.json").write_text(json.dumps(sums))
    with pytest.raises(InputError) as said:
        folders.check(tmp_path)
    assert len(str(said.value)) < errors.MESSAGE + 100


@pytest.mark.fault(72)
@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"k{n}: 1" for n in range(2_000)),
        "train: {lr: 0x" + "f" * 5000 + "}",
        "train: {steps: " + "9" * 4000 + "}",
        "0x" + "f" * 5000 + ": 1",
        "device: " + "x" * 900_000,
        "sample: " + "{a: " * 300 + "1" + "}" * 300,
        "sample: " + "{a: " * 5000 + "1" + "}" * 5000,
    ],
    ids=["many keys", "huge hex", "huge", "huge key", "long", "nested", "deep"],
)
def test_settings_of_any_kind_are_one_bounded_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(errors.ConfigError) as said:
        configuration.load(tmp_path / "params.yaml")
    assert len(str(said.value)) < errors.MESSAGE + 100


def test_values_and_lists_are_cut() -> None:
    assert errors.quoted("a") == "'a'" and errors.quoted([1, None]) == "[1, None]"
    assert len(errors.quoted("x" * 10**6)) < 240 and "and 999,802 more" in errors.quoted(
        "x" * 10**6
    )
    assert "too large to show" in errors.quoted(1 << 100_000)
    assert errors.some("abc") == "a, b, c"
    assert errors.some(map(str, range(1239))) == "0, 1, 2, 3, 4, and 1,234 more"
    assert len(str(InputError("x" * 10**6))) < errors.MESSAGE + 100
