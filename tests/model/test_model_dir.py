"""Model directories: what transformers makes of them, atomic replacement, strict loading."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.__main__ import main as command
from pipeline.errors import InputError, StorageError
from pipeline.model import model_dir
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import build_model, load_model, save_model
from pipeline.storage import folders
from pipeline.storage.digests import tree_digest
from pipeline.storage.folders import recover
from pipeline.studies import tiny

FILES = {
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "sha256.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


def fresh(seed: int = 0, **changes: Any) -> GPT:
    gpt = GPT(GPTConfig(**({"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32} | changes)))
    settings = replace(tiny.INIT, std=0.1)
    initialize(gpt, settings, torch.Generator().manual_seed(seed))
    return gpt.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(fresh(), folder)
    return folder


@pytest.fixture
def closed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


# What transformers makes of it


@pytest.mark.usefixtures("closed_network")
def test_from_pretrained_on_a_saved_directory_gives_our_logits(
    saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_warning()  # the parity check lets errors through alone
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, loading = GPT2LMHeadModel.from_pretrained(saved, output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight
    idx = torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = model.eval()(idx).logits, fresh()(idx)
    bound = 1e-5 * max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= bound
    assert caplog.records == []


@pytest.mark.usefixtures("closed_network")
def test_the_saved_tokenizer_is_gpt2s(
    saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging as hf_logging

    from pipeline.data import tokenizer as ours

    hf_logging.set_verbosity_warning()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    theirs = AutoTokenizer.from_pretrained(saved)
    assert theirs.is_fast and theirs.all_special_tokens == ["<|endoftext|>"]
    text = "Hello, I'm a language model,\n  naïve 🤖\tx = 1"
    assert theirs(text)["input_ids"] == ours.gpt2().encode_ordinary(text)
    assert theirs.decode(theirs(text)["input_ids"]) == text
    spelled = "one<|endoftext|>two"  # as the README has it: text here, the special token there
    assert theirs(spelled)["input_ids"] == [505, 50256, 11545]
    assert (
        theirs(spelled, split_special_tokens=True)["input_ids"]
        == ours.gpt2().encode_ordinary(spelled)
        == ours.encode(spelled).tolist()
    )
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    assert len(theirs) == 50257 and theirs.model_max_length == 32
    assert caplog.records == []


def test_saving_does_not_import_transformers(tmp_path: Path) -> None:
    import subprocess

    script = (
        "import sys; from pathlib import Path; from pipeline.model.model_dir import *\n"
        "from pipeline.model.gpt import GPTConfig\n"
        f"folder = Path({str(tmp_path / 'model')!r})\n"
        "save_model(GPT(GPTConfig(1, 1, 8, 8)), folder); load_model(folder)\n"
        "assert 'transformers' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


# Round trip


@pytest.mark.parametrize("vocab_rows", [50257, 50304])
def test_load_gives_the_saved_values_whatever_the_padding(saved: Path, vocab_rows: int) -> None:
    loaded = load_model(saved, vocab_rows=vocab_rows, dropout=0.3, attention="naive")
    assert loaded.config == GPTConfig(2, 2, 16, 32, 50257, vocab_rows, 0.3, "naive")
    expected = fresh(vocab_rows=vocab_rows).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


def test_a_loaded_model_is_tied_and_owns_its_memory(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(fresh(), folder)
    loaded = load_model(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100)
    idx = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(idx), fresh()(idx))
        loaded.transformer.wte.weight.zero_()
        assert loaded(idx).eq(0).all()


def test_loading_draws_no_random_number(saved: Path) -> None:
    before = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_weights_give_the_same_bytes_and_one_bit_more_does_not(tmp_path: Path) -> None:
    model = fresh()
    save_model(model, tmp_path / "a")
    save_model(load_model(tmp_path / "a", vocab_rows=50257), tmp_path / "deep" / "b")
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "deep" / "b")
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = 1e-30
    save_model(model, tmp_path / "c")
    assert tree_digest(tmp_path / "a") != tree_digest(tmp_path / "c")


def test_padded_rows_are_not_saved(saved: Path, tmp_path: Path) -> None:
    model = fresh()
    with torch.no_grad():
        model.transformer.wte.weight[50257:] = 7
    save_model(model, tmp_path / "model")
    assert tree_digest(tmp_path / "model") == tree_digest(saved)


def test_low_precision_parameters_are_saved_as_fp32(tmp_path: Path) -> None:
    model = fresh().to(torch.bfloat16)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model").state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.float()), name


def test_saving_leaves_model_and_optimizer_alone(tmp_path: Path) -> None:
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    wte = model.transformer.wte.weight
    moments = optimizer.state[wte]["exp_avg"].clone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "model")
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(optimizer.state[wte]["exp_avg"], moments) and moments.shape == wte.shape
    assert wte.grad is not None and len(wte.grad) == 50304


def test_build_model_takes_the_tensors_themselves() -> None:
    state = fresh().state_dict()
    model = build_model(fresh().config, state)
    assert all(t.data_ptr() == state[n].data_ptr() for n, t in model.state_dict().items())
    del state["transformer.ln_f.bias"]
    with pytest.raises(RuntimeError, match=r"ln_f\.bias"):
        build_model(model.config, state)


# Files and replacement


def test_a_directory_holds_the_eight_files_with_everyday_permissions(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    probe = saved.parent / "probe"
    probe.write_text("")
    assert modes == {stat.S_IMODE(probe.stat().st_mode)}
    probe.unlink()


def test_json_files_have_the_same_bytes_on_every_system(saved: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        raw = (saved / name).read_bytes()
        assert b"\r" not in raw and raw.endswith(b"}\n")
        assert list(json.loads(raw)) == sorted(json.loads(raw))


@pytest.mark.parametrize("links", ["read-only files", "hard links", "symbolic links"])
def test_a_directory_of_dvc_links_is_replaced_and_the_cache_is_untouched(
    tmp_path: Path, links: str
) -> None:
    target, cache = tmp_path / "model", tmp_path / "cache"
    save_model(fresh(1), cache)
    target.mkdir()
    (target / "stale.txt").write_text("gone afterwards")
    for source in cache.iterdir():
        if links == "symbolic links":
            try:
                (target / source.name).symlink_to(source)
            except OSError:
                pytest.skip("no right to make symbolic links")
        elif links == "hard links":
            os.link(source, target / source.name)
        else:
            (target / source.name).write_bytes(source.read_bytes())
        (target / source.name).chmod(0o444)
    before = tree_digest(cache)
    save_model(fresh(2), target)
    assert {path.name for path in target.iterdir()} == FILES
    assert torch.equal(load_model(target).transformer.wpe.weight, fresh(2).transformer.wpe.weight)
    assert tree_digest(cache) == before
    assert siblings(target) == ["cache", "model"]


def test_a_link_in_the_targets_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    save_model(fresh(1), elsewhere)
    before = tree_digest(elsewhere)
    try:
        (tmp_path / "model").symlink_to(elsewhere, target_is_directory=True)
    except OSError:
        pytest.skip("no right to make symbolic links")
    save_model(fresh(2), tmp_path / "model")
    assert tree_digest(elsewhere) == before != tree_digest(tmp_path / "model")
    assert not (tmp_path / "model").is_symlink()


class Killed(BaseException):
    """Stands for a SIGKILL: no handler of ours may catch it."""


@pytest.mark.parametrize("call", range(1, 30))
def test_a_save_killed_at_any_file_operation_leaves_a_whole_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path, call: int
) -> None:
    target, calls = tmp_path / "model", 0
    save_model(fresh(), target)

    def die_at(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= call:  # a dead process cleans nothing up either
                raise Killed
            return original(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(model_dir, "write_json", die_at(model_dir.write_json))
        patch.setattr(model_dir, "write_tensors", die_at(model_dir.write_tensors))
        for name in ("replace", "fsync", "open"):
            patch.setattr(folders.os, name, die_at(getattr(os, name)))
        patch.setattr(folders, "remove", die_at(folders.remove))
        try:
            save_model(fresh(1), target)
            killed = False
        except Killed:
            killed = True
    assert killed == (calls >= call)
    recover(target)
    new = fresh(1).state_dict()
    loaded = load_model(target).state_dict()
    same_as_new = all(torch.equal(loaded[n], new[n]) for n in new)
    assert same_as_new or tree_digest(target) == tree_digest(saved)
    assert same_as_new or killed
    assert siblings(target) == ["model"]


def test_recover_leaves_other_folders_alone(tmp_path: Path) -> None:
    for name in ("model", "model2", ".model2.ab.partial", ".model.ab.partial", "other.partial"):
        (tmp_path / name).mkdir()
    recover(tmp_path / "model")
    assert siblings(tmp_path / "model") == [
        ".model2.ab.partial",
        "model",
        "model2",
        "other.partial",
    ]


def test_a_full_disk_is_reported_with_bytes_and_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    target = tmp_path / "model"
    save_model(fresh(1), target)
    before = tree_digest(target)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"model: .* it needs [\d,]+ bytes, [\d,]+ are free"):
            save_model(fresh(2), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree_digest(target) == before
    assert siblings(target) == ["model"]


# Strict loading: every refusal of from_hf is tested in test_hf_weights.py


def test_a_missing_directory_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    model = fresh()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.bias[0] = value
    save_model(model, tmp_path / "model")
    with pytest.raises(InputError, match=r"h\.1\.attn\.c_attn\.bias: expected finite"):
        load_model(tmp_path / "model")


def test_a_directory_with_another_models_weights_is_refused(tmp_path: Path, saved: Path) -> None:
    save_model(fresh(n_embd=32), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "model" / "sha256.json").unlink()  # as in a folder from elsewhere
    with pytest.raises(InputError, match=r"expected shape .*16.* got .*32"):
        load_model(tmp_path / "model")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_model(fresh(), tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(InputError, match="1,000,000 bytes, expected"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "sha256.json").unlink()
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_model(tmp_path / "model")


def damaged(folder: Path) -> Path:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.mark.fault(54)
def test_a_flipped_bit_in_a_model_is_refused(tmp_path: Path) -> None:
    save_model(fresh(), tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged: SHA-256 .*, expected"):
        load_model(damaged(tmp_path / "model"))


@pytest.mark.fault(54, control=True)
def test_without_sums_a_flipped_bit_loads(tmp_path: Path) -> None:
    save_model(fresh(), tmp_path / "model")
    (damaged(tmp_path / "model") / "sha256.json").unlink()
    load_model(tmp_path / "model")


def test_a_person_is_told_what_is_whole(tmp_path: Path, capsys, caplog) -> None:
    caplog.set_level(logging.INFO)
    save_model(fresh(), tmp_path / "all" / "model")
    save_model(fresh(), tmp_path / "all" / "foreign")
    (tmp_path / "all" / "foreign" / "sha256.json").unlink()
    command(["verify", "models", str(tmp_path / "all")])
    foreign, model = caplog.messages
    assert f"{tmp_path / 'all' / 'model'}: model of" in model and "SHA-256 as written" in model
    assert "no sha256.json: its bytes cannot be checked" in foreign
    damaged(tmp_path / "all" / "model")
    with pytest.raises(SystemExit) as ended:
        command(["verify", "models", str(tmp_path / "all")])
    assert ended.value.code == 3
    assert "model.safetensors: damaged" in caplog.messages[-1]
    with pytest.raises(InputError, match="no model directory and no training checkpoint"):
        model_dir.verify(tmp_path / "nothing")
