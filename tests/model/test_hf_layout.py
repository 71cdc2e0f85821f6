"""The HF layout: parity, import from every kind of folder, export, and hostile input."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.data import tokenizer
from pipeline.errors import InputError
from pipeline.model import hf_layout
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.hf_import import PARITY_BOUND, import_pretrained, parameter_table, parity
from pipeline.model.hf_layout import from_hf, gpt_config, hf_config, to_hf
from pipeline.model.model_dir import build_model, save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*no published size")

HF_SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
PROBE = torch.randint(0, 50257, (2, 64), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def closed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' tiny GPT-2 with every weight random, LayerNorm and biases included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**HF_SIZES, dtype=torch.float32)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * drawn if parameter.dim() > 1 else 0.5 * drawn + 0.5)
    return model


@pytest.fixture(scope="module")
def saved(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model that a test may spoil."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def load(folder: Path | str, **settings: Any) -> GPT:
    config, state = import_pretrained(str(folder), **settings)
    return build_model(config, state).eval()


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors = edit(tensors) or tensors
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Parity


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_logits_and_64_greedy_tokens_equal_transformers(saved: Path, attention: str) -> None:
    report = parity(load(saved, attention=attention), saved, PROBE)
    assert report["relative_logit_difference"] <= PARITY_BOUND
    assert report["greedy_equal"] and report["greedy_steps"] == 64


def test_parity_holds_at_logits_of_hundreds(folder: Path) -> None:
    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.ln_f.weight"] *= 20
        tensors["transformer.ln_f.bias"] *= 20

    edit_tensors(folder, scale)
    report = parity(load(folder), folder, PROBE)
    assert report["largest_logit"] > 59
    assert report["relative_logit_difference"] <= PARITY_BOUND
    assert report["greedy_equal"]


@pytest.mark.parametrize("module", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_each_conv1d_weight_is_transposed(reference: Any, saved: Path, module: str) -> None:
    ours = load(saved).get_submodule(f"transformer.h.1.{module}").weight
    theirs = reference.get_submodule(f"transformer.h.1.{module}").weight
    assert torch.equal(ours, theirs.T)
    if module == "attn.c_proj":  # square: no shape check could have told
        assert not torch.equal(ours, theirs)


def test_parity_notices_a_square_projection_left_untransposed(saved: Path) -> None:
    model = load(saved)
    weight = model.transformer.h[0].attn.c_proj.weight
    with torch.no_grad():
        weight.copy_(weight.T.clone())
    report = parity(model, saved, PROBE)
    assert report["relative_logit_difference"] > 100 * PARITY_BOUND
    assert not report["greedy_equal"]


def test_parity_leaves_the_model_in_the_mode_it_was_in(saved: Path) -> None:
    model = load(saved, dropout=0.5).train()
    assert parity(model, saved, PROBE[:1, :4])["relative_logit_difference"] <= PARITY_BOUND
    assert model.training and model.transformer.h[0].attn.training


def test_parity_says_nothing_on_the_terminal(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parity(load(saved), saved, PROBE[:1, :4])
    assert capfd.readouterr() == ("", "")


def test_the_end_of_text_id_and_vocabulary_are_the_tokenizers() -> None:
    assert hf_config(GPTConfig(1, 1, 1, 1))["eos_token_id"] == tokenizer.EOT
    assert tokenizer.VOCAB_SIZE == GPTConfig.vocab_size == hf_layout.FIXED["vocab_size"]


# Every kind of folder gives the same values


def test_import_gives_the_saved_values_and_zero_padding(reference: Any, saved: Path) -> None:
    config, state = import_pretrained(str(saved))
    assert config == GPTConfig(2, 2, 32, 64, 50257, 50304, 0.0, "sdpa")
    wte = state["transformer.wte.weight"]
    assert torch.equal(wte[:50257], reference.transformer.wte.weight)
    assert wte.shape == (50304, 32) and wte[50257:].eq(0).all()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_sharded_files_give_the_same_values(reference: Any, saved: Path, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert not (tmp_path / "model.safetensors").exists()
    assert same_state(import_pretrained(str(tmp_path))[1], import_pretrained(str(saved))[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_widened_exactly(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    narrow = load_file(folder / "model.safetensors")
    config, state = import_pretrained(str(folder))
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    back = to_hf(state, config)
    assert same_state({n: t.to(dtype) for n, t in back.items()}, narrow)
    assert same_state(back, {n: t.float() for n, t in narrow.items()})


def test_the_hubs_layout_without_prefix_and_with_mask_buffers_gives_the_same(
    saved: Path, folder: Path
) -> None:
    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        for layer in range(2):
            bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        return bare

    edit_tensors(folder, as_on_the_hub)
    assert same_state(import_pretrained(str(folder))[1], import_pretrained(str(saved))[1])


def test_old_files_with_prefix_masks_and_a_tied_head_give_the_same(
    saved: Path, folder: Path
) -> None:
    def as_once_saved(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(64, 64).bool()
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-torch.inf)

    edit_tensors(folder, as_once_saved)
    state = import_pretrained(str(folder))[1]
    assert same_state(state, import_pretrained(str(saved))[1])
    assert "transformer.h.0.attn.c_attn.bias" in state


def test_import_copies_so_that_the_file_may_change_later(folder: Path) -> None:
    state = import_pretrained(str(folder))[1]
    before = {name: tensor.clone() for name, tensor in state.items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(100_000)
        file.write(b"\xff" * 1_000_000)
    assert same_state(state, before)


# Export


def test_import_then_export_is_byte_equal(saved: Path) -> None:
    config, state = import_pretrained(str(saved))
    original, exported = load_file(saved / "model.safetensors"), to_hf(state, config)
    assert exported.keys() == original.keys()
    for name, tensor in exported.items():
        assert tensor.is_contiguous()
        assert tensor.numpy().tobytes() == original[name].numpy().tobytes(), name


@pytest.mark.parametrize("vocab_rows", [50257, 50304])
def test_export_then_import_is_byte_equal_whatever_the_padding(vocab_rows: int) -> None:
    config = GPTConfig(2, 2, 32, 64, vocab_rows=vocab_rows)
    state = GPT(config).state_dict()
    state["transformer.wte.weight"][50257:] = 0
    assert same_state(from_hf(to_hf(state, config), config), state)


def test_trained_padding_rows_never_leave() -> None:
    config = GPTConfig(1, 1, 8, 8)
    state = GPT(config).state_dict()
    state["transformer.wte.weight"][50257:] = 9
    exported = to_hf(state, config)
    assert exported["transformer.wte.weight"].shape == (50257, 8)
    assert "lm_head.weight" not in exported


def test_a_compiled_models_names_are_not_exported() -> None:
    config = GPTConfig(1, 1, 8, 8)
    state = {f"_orig_mod.{name}": t for name, t in GPT(config).state_dict().items()}
    with pytest.raises(AssertionError, match="compiled"):
        to_hf(state, config)


def test_the_config_survives_the_round_trip() -> None:
    config = GPTConfig(3, 4, 64, 96, vocab_rows=50432, dropout=0.2, attention="naive")
    again = gpt_config(hf_config(config), vocab_rows=50432, dropout=0.2, attention="naive")
    assert again == config


def test_the_written_config_is_what_transformers_itself_computes() -> None:
    from transformers import GPT2Config

    written = hf_config(GPTConfig(12, 12, 768, 1024, dropout=0.1))
    defaults = GPT2Config().to_dict()
    own = {"architectures", "dtype", "n_ctx"}
    assert {key: defaults[key] for key in written.keys() - own} == {
        key: written[key] for key in written.keys() - own
    }


# config.json of openai-community/gpt2 on the hub, but for two things that say nothing of the
# network: defaults for text-generation pipelines, and a head that summarises sequences.
PUBLISHED = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}


def test_the_written_config_has_every_key_of_the_published_one() -> None:
    written = hf_config(GPTConfig(12, 12, 768, 1024, dropout=0.1))
    assert {key: written.get(key) for key in PUBLISHED} == PUBLISHED


def test_a_model_folder_has_what_programs_without_transformers_read(tmp_path: Path) -> None:
    save_model(GPT(GPTConfig(1, 1, 8, 24)), tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["n_ctx"] == 24
    assert len(json.loads((tmp_path / "model/vocab.json").read_text("utf-8"))) == 50257
    assert len((tmp_path / "model/merges.txt").read_text("utf-8").splitlines()) == 50001


@pytest.fixture(scope="module")
def state_124m() -> dict[str, torch.Tensor]:
    """fp16 tensors of GPT-2's own size under their bare names."""
    generator = torch.Generator().manual_seed(0)
    shapes = hf_layout.hf_shapes(GPTConfig(12, 12, 768, 1024))
    return {name: torch.rand(s, generator=generator).half() for name, s in shapes.items()}


def write_layout(
    folder: Path, state: dict[str, torch.Tensor], *, sharded: bool, prefix: str, masks: bool
) -> None:
    written = {prefix + name: tensor for name, tensor in state.items()}
    if masks:
        mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool).tril()
        written |= {f"{prefix}h.{layer}.attn.bias": mask.clone() for layer in range(12)}
    if not sharded:
        save_file(written, folder / "model.safetensors")
        return
    places = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(written)}
    for place in set(places.values()):
        save_file({n: t for n, t in written.items() if places[n] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("dtype", "sharded", "prefix", "masks"),
    [
        (torch.float16, True, "", True),
        pytest.param(torch.float16, False, "", False, marks=pytest.mark.slow),
        pytest.param(torch.float32, False, "", True, marks=pytest.mark.slow),
        pytest.param(torch.float32, True, "transformer.", False, marks=pytest.mark.slow),
        pytest.param(torch.float32, False, "transformer.", True, marks=pytest.mark.slow),
    ],
)
def test_124m_imports_with_equal_values_and_exports_byte_equal(
    tmp_path: Path,
    state_124m: dict[str, torch.Tensor],
    dtype: torch.dtype,
    sharded: bool,
    prefix: str,
    masks: bool,
) -> None:
    config = GPTConfig(12, 12, 768, 1024)
    state = {name: tensor.to(dtype) for name, tensor in state_124m.items()}
    write_layout(tmp_path, state, sharded=sharded, prefix=prefix, masks=masks)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    imported, ours = import_pretrained(str(tmp_path))
    assert imported == config
    assert sum(tensor.numel() for tensor in ours.values()) == 124_475_904
    exported = to_hf(ours, imported)
    assert exported.keys() == {f"transformer.{name}" for name in state}
    for name, tensor in state.items():
        bits = exported[f"transformer.{name}"].view(torch.int32)
        assert torch.equal(bits, tensor.float().view(torch.int32)), name


@pytest.mark.slow
def test_124m_computes_what_transformers_computes(
    tmp_path: Path, state_124m: dict[str, torch.Tensor]
) -> None:
    state = {name: 0.1 * (tensor - 0.5) for name, tensor in state_124m.items()}
    write_layout(tmp_path, state, sharded=False, prefix="transformer.", masks=False)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(GPTConfig(12, 12, 768, 1024))))
    report = parity(load(tmp_path), tmp_path, PROBE[:1])
    assert report["relative_logit_difference"] <= PARITY_BOUND
    assert report["greedy_equal"] and report["greedy_steps"] == 64


# The table


def test_the_table_tells_shapes_transposition_and_spread(reference: Any, saved: Path) -> None:
    model = load(saved)
    rows = {row["name"]: row for row in parameter_table(model)}
    assert rows.keys() == model.state_dict().keys()
    assert sum(row["parameters"] for row in rows.values()) == model.parameter_count()
    assert [name for name, row in rows.items() if row["transposed"]] == [
        f"transformer.h.{layer}.{module}.weight"
        for layer in range(2)
        for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    c_attn, wte = rows["transformer.h.0.attn.c_attn.weight"], rows["transformer.wte.weight"]
    assert (c_attn["hf_shape"], c_attn["our_shape"]) == ([32, 96], [96, 32])
    assert (wte["hf_shape"], wte["our_shape"]) == ([50257, 32], [50304, 32])
    true_std = reference.transformer.wte.weight.std(correction=0).item()
    assert wte["std"] == pytest.approx(true_std, rel=1e-5)
    json.dumps(list(rows.values()))


# Refusals: the config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "gelu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("vocab_size", 50258),
        ("vocab_size", 50257.0),
        ("n_inner", 64),
        ("layer_norm_epsilon", 1e-6),
        ("model_type", "gpt_neo"),
        ("n_layer", 10**9),
        ("n_layer", "2"),
        ("n_layer", True),
        ("n_embd", -32),
        ("n_positions", None),
        ("n_positions", 1 << 40),
        ("n_head", 3),
        ("auto_map", {"AutoModelForCausalLM": "evil.Model"}),
        ("quantization_config", {"bits": 4}),
        ("num_hidden_layers", 2),
    ],
)
def test_a_config_the_core_does_not_implement_is_refused_by_name(
    folder: Path, field: str, value: Any
) -> None:
    edit_config(folder, **{field: value})
    with pytest.raises(InputError, match=rf"config\.json: {field}: .*got"):
        import_pretrained(str(folder))


def test_every_problem_of_a_config_is_named_at_once() -> None:
    hf = hf_config(GPTConfig(2, 2, 32, 64)) | {"activation_function": "relu", "n_embd": 0}
    with pytest.raises(InputError, match="(?s)activation_function.*n_embd"):
        gpt_config(hf)


@pytest.mark.parametrize("field", ["model_type", "vocab_size", "n_layer", "n_positions"])
def test_a_field_that_cannot_be_guessed_must_be_there(field: str) -> None:
    hf = hf_config(GPTConfig(2, 2, 32, 64))
    del hf[field]
    with pytest.raises(InputError, match=f"{field}: expected .*got None"):
        gpt_config(hf)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused_with_its_path(
    folder: Path, content: str
) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        import_pretrained(str(folder))


@pytest.mark.fault(26)
def test_heads_that_do_not_fit_a_published_size_are_refused(folder: Path) -> None:
    edit_config(folder, n_layer=12, n_embd=768, n_head=16)
    with pytest.raises(InputError, match="n_head: expected 12 for 12 layers of 768"):
        import_pretrained(str(folder))


@pytest.mark.fault(26)
def test_a_size_nobody_published_brings_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match="n_head=2 cannot be checked"):
        import_pretrained(str(folder))


# Refusals: the tensors


def marked(row: int, *values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.fault(row))


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors["transformer.h.1.ln_2.bias"][:1].fill_(value) and None


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        marked(
            21,
            drop("transformer.h.1.mlp.c_fc.bias"),
            r"h.1.mlp.c_fc.bias: missing, expected \(128,\)",
        ),
        marked(
            22,
            lambda t: t.update(x=torch.ones(3)),
            r"x: not a tensor of this GPT-2, got \(3,\)",
        ),
        marked(
            22,
            lambda t: t.update({"h.0.attn.c_attn.masked_bias": torch.ones(3)}),
            "c_attn.masked_bias: not a tensor",
        ),
        marked(
            23,
            replace("transformer.wte.weight", lambda w: torch.cat([w, w[:1]])),
            r"wte.weight: expected shape \(50257, 32\), got \(50258, 32\)",
        ),
        marked(
            23,
            replace("transformer.h.0.attn.c_attn.weight", lambda w: w.T.contiguous()),
            r"c_attn.weight: expected shape \(32, 96\), got \(96, 32\)",
        ),
        marked(24, fill(torch.nan), "h.1.ln_2.bias: expected finite values, got 1"),
        marked(24, fill(-torch.inf), "h.1.ln_2.bias: expected finite values, got 1"),
        marked(
            25,
            replace("transformer.ln_f.bias", torch.Tensor.int),
            "ln_f.bias: expected fp32.*int32",
        ),
        (replace("transformer.ln_f.bias", torch.Tensor.double), "ln_f.bias: expected.*float64"),
        marked(
            27,
            lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}),
            "lm_head.weight: expected wte.weight's own values",
        ),
        (
            lambda t: t.update({"wpe.weight": t["transformer.wpe.weight"].clone()}),
            "wpe.weight: given both with and without",
        ),
    ],
)
def test_spoilt_tensors_are_refused_by_name(folder: Path, edit: Callable, message: str) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(InputError, match=message) as caught:
        import_pretrained(str(folder))
    assert str(folder) in str(caught.value)


def test_all_that_is_wrong_with_the_tensors_is_one_error_of_bounded_length(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t.int() if "bias" in n else t for n, t in tensors.items()} | {"x": torch.ones(1)}

    edit_tensors(folder, spoil)
    with pytest.raises(InputError) as caught:
        import_pretrained(str(folder))
    lines = str(caught.value).split("\n  ")
    biases = sum("bias" in name for name in load_file(folder / "model.safetensors"))
    assert len(lines) == 9 and lines[-1] == f"and {biases + 1 - 8} more"


def with_transformers(folder: Path) -> Any:
    """What its own loader makes of a folder, without a word to us."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, local_files_only=True).eval()


def naive(row: int, *values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.fault(row, control=True))


@pytest.mark.parametrize(
    "edit",
    [
        naive(21, drop("transformer.h.1.mlp.c_fc.bias")),
        naive(22, lambda t: t.update(x=torch.ones(3))),
        naive(24, fill(torch.nan)),
        naive(25, replace("transformer.ln_f.bias", torch.Tensor.int)),
        naive(27, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
    ],
)
def test_transformers_takes_the_spoilt_tensors(folder: Path, edit: Callable) -> None:
    edit_tensors(folder, edit)
    assert with_transformers(folder).config.n_layer == 2


@pytest.mark.fault(23, control=True)
def test_safetensors_alone_takes_a_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, replace("transformer.wte.weight", lambda w: torch.cat([w, w[:1]])))
    assert load_file(folder / "model.safetensors")["transformer.wte.weight"].shape[0] == 50258


@pytest.mark.fault(21, control=True)
@pytest.mark.fault(26, control=True)
def test_transformers_takes_a_config_that_lies(saved: Path, folder: Path) -> None:
    edit_config(folder, n_layer=3, n_head=1)
    with torch.no_grad():
        true, lied = (with_transformers(where)(PROBE).logits for where in (saved, folder))
    assert not torch.allclose(true, lied)


@pytest.mark.fault(21)
@pytest.mark.parametrize(("layers", "message"), [(1, "not a tensor"), (3, "missing")])
def test_a_lying_layer_count_is_refused(folder: Path, layers: int, message: str) -> None:
    edit_config(folder, n_layer=layers)
    with pytest.raises(InputError, match=message):
        import_pretrained(str(folder))


def truncate(raw: bytes) -> bytes:
    return raw[:-7]


def garbage(raw: bytes) -> bytes:
    return b"\x10" + b"\0" * 7 + b"not json at all!" + raw


def huge_header(raw: bytes) -> bytes:
    return b"\xff" * 8 + raw[8:]


def relabel(raw: bytes) -> bytes:
    size = struct.unpack("<Q", raw[:8])[0]
    return raw[:8] + raw[8 : 8 + size].replace(b'"F32"', b'"I32"', 1) + raw[8 + size :]


def duplicate(raw: bytes) -> bytes:
    size = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + size].decode().rstrip()
    entry = json.dumps(json.loads(header)["transformer.ln_f.bias"])
    header = header[:-1] + f',"transformer.ln_f.bias":{entry}' + "}"
    return struct.pack("<Q", len(header)) + header.encode() + raw[8 + size :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        marked(19, truncate, "not a whole safetensors file"),
        marked(19, garbage, "not a whole safetensors file"),
        marked(
            19,
            huge_header,
            "header of 18,446,744,073,709,551,615 bytes; expected at most 16,777,216",
        ),
        marked(19, lambda raw: b"", "not a whole safetensors file"),
        marked(19, lambda raw: raw[:5], "not a whole safetensors file"),
        marked(20, relabel, "torch.int32"),
        marked(20, duplicate, "transformer.ln_f.bias: twice in the header"),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, spoil: Callable, message: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        import_pretrained(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.fault(19, control=True)
def test_reading_to_the_end_of_a_truncated_file_gives_fewer_values(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = np.fromfile(path, np.float32)
    path.write_bytes(truncate(path.read_bytes()))
    assert 0 < len(np.fromfile(path, np.float32)) < len(whole)


@pytest.mark.fault(20, control=True)
@pytest.mark.parametrize("spoil", [relabel, duplicate])
def test_safetensors_alone_takes_a_crafted_header(folder: Path, spoil: Callable) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    assert load_file(path)


def test_a_file_too_large_to_be_json_is_not_read(folder: Path) -> None:
    with open(folder / "config.json", "r+b") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(InputError, match=r"config\.json: 1,048,577 bytes; expected at most"):
        import_pretrained(str(folder))


# Refusals: the folder


def shard(folder: Path, place: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    places["transformer.ln_f.bias"] = place
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "gone.safetensors", "..", "a\0b", 7, None]
)
def test_a_shard_index_may_name_plain_files_of_its_folder_only(folder: Path, place: Any) -> None:
    (folder.parent / "outside.safetensors").write_bytes(b"")
    shard(folder, place)
    with pytest.raises(InputError, match="expected a file of this folder, got"):
        import_pretrained(str(folder))


@pytest.mark.fault(28)
def test_every_shard_that_is_missing_is_named(folder: Path) -> None:
    shard(folder, "gone.safetensors")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"transformer.ln_f.weight": "../x"}}))
    with pytest.raises(InputError, match=r"(?s)got '../x'.*got 'gone.safetensors'"):
        import_pretrained(str(folder))


@pytest.mark.fault(28, control=True)
def test_transformers_follows_a_shard_out_of_the_folder(folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    (folder / "config.json").rename(inside / "config.json")
    places = dict.fromkeys(load_file(folder / "model.safetensors"), "../model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    assert with_transformers(inside).config.n_layer == 2


def test_a_shard_that_differs_from_its_index_is_refused(folder: Path) -> None:
    shard(folder, "model-00001-of-00001.safetensors")
    assert load(folder).config.n_layer == 2
    save_file({"y": torch.ones(1)}, folder / "second.safetensors")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"x": "second.safetensors"}}))
    with pytest.raises(InputError, match=r"second\.safetensors: differs .* in x, y"):
        import_pretrained(str(folder))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "7"])
def test_an_index_without_a_map_is_refused(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="index.json"):
        import_pretrained(str(folder))


class Hostile:
    """Unpickling one writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.fault(29, control=True)
def test_unpickling_the_hostile_file_executes_it(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.fault(29)
def test_a_folder_of_pickles_is_refused_and_nothing_is_executed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    mark = folder / "executed"
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(InputError, match="safetensors only"):
        import_pretrained(str(folder))
    assert not mark.exists()


@pytest.mark.fault(30, control=True)
def test_trusting_custom_code_executes_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, dynamic_module_utils

    mark = folder / "executed"
    (folder / "evil.py").write_text(
        "from transformers import GPT2Config\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class C(GPT2Config): pass\n"
    )
    edit_config(folder, auto_map={"AutoConfig": "evil.C"})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists()


@pytest.mark.fault(30)
def test_custom_code_is_neither_executed_nor_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = folder / "executed"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    edit_config(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(InputError, match="auto_map"):
        import_pretrained(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./gone", "a/b/c", "~/gone", "..", "a\\b", ""])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    if name in ("..", ""):  # folders that exist but hold no model
        with pytest.raises(InputError, match=r"config\.json"):
            import_pretrained(name)
    else:
        with pytest.raises(InputError, match="no such folder, and not a hub id"):
            import_pretrained(name)


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_names_the_mirror_and_the_local_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = "(?s)init.hf_model=no-one/gpt2.*HF_ENDPOINT.*pipeline fetch gpt2.*folder"
    with pytest.raises(InputError, match=said):
        import_pretrained("no-one/gpt2")


def test_the_hub_is_asked_for_config_and_safetensors_only(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert import_pretrained("openai-community/gpt2")[0].n_layer == 2
    assert asked["name"] == "openai-community/gpt2"
    assert all(
        p.endswith(("config.json", "safetensors", "index.json")) for p in asked["allow_patterns"]
    )


def test_a_secret_in_the_mirrors_address_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise OSError("cannot reach https://me:s3cret@mirror.example/api")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(InputError, match="mirror.example") as caught:
        import_pretrained("gpt2-of-nobody")
    assert "s3cret" not in str(caught.value)
