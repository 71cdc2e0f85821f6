"""Exported models: what other programs make of them, what is refused, what the hub gets."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import config as configuration
from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.diagnostics import doctor
from pipeline.errors import ConfigError, InputError
from pipeline.export import folder, hub
from pipeline.export.card import CARD
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import load_model, save_model
from pipeline.records.run_data import Experiment
from pipeline.storage.digests import tree_digest
from tests.conftest import params

SHAPE = GPTConfig(2, 2, 16, 32)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """The run of a workspace whose training has come to its end."""
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return trained()


def trained(std: float = 0.1, **changes: Any) -> Experiment:
    settings = configuration.from_dict(params(**changes))
    model = GPT(SHAPE)
    initialize(model, settings.init, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(std / 0.02)
    save_model(model, paths.MODEL)
    start = {
        **{"kind": "start", "id": "a", "stage": "train", "time": 1, "name": "", "code": "c0de"},
        **{"params": configuration.flatten(settings), "environment": {"host": "lathe"}},
        "git": {"commit": "0123abcd", "branch": "main", "dirty": "false"},
    }
    best = {"kind": "checkpoint", "name": "best", "step": 60, "md5": ""}
    best |= {"path": paths.MODEL.as_posix(), "sha256": tree_digest(paths.MODEL)}
    losses = {"val/loss": 5.92, "val/bits_per_byte": 2.44}
    points = [{"kind": "metrics", "time": 1, "step": 60, "values": losses}]
    return Experiment("workspace", "", {"train": [start, best, *points]})


# --- what other programs make of it


def test_an_export_has_the_weights_to_the_bit_and_draws_as_the_run_did(run: Experiment) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

    out = Path("out")
    told = folder.export(run, out, "fp32", "out")
    assert "logits off by at most" in told and "the same greedy tokens" in told
    weights = [(place / "model.safetensors").read_bytes() for place in (out, paths.MODEL)]
    assert weights[0] == weights[1]
    settings = GenerationConfig.from_pretrained(out).to_diff_dict()
    expected = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 1.0}
    expected |= {"max_new_tokens": 31, "pad_token_id": 50256, "eos_token_id": 50256}
    got = GenerationConfig.from_pretrained(out)
    assert {name: getattr(got, name) for name in expected} == expected, settings
    assert AutoTokenizer.from_pretrained(out).is_fast
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 50257
    text = pipeline("text-generation", str(out))("O", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("O")


def test_a_greedy_run_is_exported_as_greedy(run: Experiment) -> None:
    greedy = folder.generation(run.params | {"sample.temperature": 0.0}, 1024)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50256)
    assert greedy == ends | {"do_sample": False, "max_new_tokens": 48}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_the_bytes_cost_what_is_told(run: Experiment, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    out = Path(dtype)
    told = folder.export(run, out, dtype, dtype)
    sizes = [(place / "model.safetensors").stat().st_size for place in (out, paths.MODEL)]
    assert sizes[0] < 0.51 * sizes[1]
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == folder.DTYPES[dtype]
    assert 1e-7 < float(told.split("at most ")[1].split(" of")[0]) < 0.05
    rounded, ours = (load_model(place).state_dict() for place in (out, paths.MODEL))
    for name, tensor in ours.items():
        assert torch.equal(rounded[name], tensor.to(folder.DTYPES[dtype]).float()), name


def test_the_card_says_what_the_hub_and_a_reader_want_to_know(run: Experiment) -> None:
    from huggingface_hub import ModelCard

    folder.export(run, Path("out"), "fp32", "someone/plays")
    card = ModelCard.load(Path("out", CARD))
    facts = {"license": "mit", "language": "en", "library_name": "transformers"}
    assert card.data.to_dict() == facts | {"pipeline_tag": "text-generation", "tags": ["gpt2"]}
    for words in ("# someone/plays", "fresh weights for 60 steps, 30,720 tokens", "5.920", "2.44"):
        assert words in card.text
    for words in ("0123abcd", "train.lr: 0.002", 'pipeline("text-generation", "someone/plays")'):
        assert words in card.text
    assert "doctor" in card.text and "lathe" not in card.text and "{" not in card.text


def test_a_card_gives_away_no_path_and_claims_no_licence(run: Experiment) -> None:
    own = {"corpus__source": "text", "corpus__path": "/home/me/letters"}
    begun = {"init__source": "hf", "init__hf_model": "gpt2", "model__block_size": 1024}
    sizes = {"model__n_layer": 12, "model__n_head": 12, "model__n_embd": 768}
    folder.export(trained(**own, **begun, **sizes), Path("out"), "fp32", "out")
    text = Path("out", CARD).read_text("utf-8")
    assert "/home" not in text and 'corpus.path: "letters"' in text
    assert "license: unknown" in text and "language" not in text and "is not recorded" in text
    assert "base_model: openai-community/gpt2" in text


# --- what is refused


def test_a_folder_that_holds_anything_else_is_left_alone(run: Experiment) -> None:
    for place in ("mine", "kept"):
        Path(place).mkdir()
    Path("mine", "novel.txt").write_text("years of work")
    Path("file").write_text("")
    for place, said in (("mine", "a new folder"), ("file", "a new folder"), (paths.MODEL, "a new")):
        with pytest.raises(InputError, match=said):
            folder.export(run, Path(place), "fp32", "out")
    folder.export(run, Path("kept"), "fp32", "out")  # an empty one
    folder.export(run, Path("kept"), "bf16", "out")  # an earlier export
    Path("kept", "model.gguf").write_text("made of it since")
    with pytest.raises(InputError, match=r"changed since.*model\.gguf"):
        folder.export(run, Path("kept"), "fp32", "out")
    Path("kept", "model.gguf").unlink()
    Path("kept", CARD).write_text("edited")
    with pytest.raises(InputError, match=r"changed since.*README"):
        folder.export(run, Path("kept"), "fp32", "out")
    assert Path("mine", "novel.txt").read_text() == "years of work"


def test_only_the_model_that_the_run_recorded_is_exported(run: Experiment) -> None:
    unfinished = Experiment("workspace", "", {"train": run.records["train"][:1]})
    with pytest.raises(InputError, match="has not come to its end"):
        folder.export(unfinished, Path("out"), "fp32", "out")
    save_model(GPT(SHAPE), paths.MODEL)
    with pytest.raises(InputError, match="not the model that records/train.jsonl tells of"):
        folder.export(run, Path("out"), "fp32", "out")
    assert not Path("out").exists()


def test_an_experiments_model_comes_out_of_dvcs_cache(
    run: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Path(shutil.copytree(paths.MODEL, "cache/model"))
    shutil.rmtree(paths.MODEL)
    past = Experiment("past", "abc", run.records)
    monkeypatch.setattr(folder, "copy_of", lambda *_: kept)
    folder.export(past, Path("out"), "fp32", "out")
    assert load_model(Path("out"))
    monkeypatch.setattr(folder, "copy_of", lambda *_: None)
    for gone, said in ((past, "past: .* neither in DVC's cache nor"), (run, "workspace: .* nei")):
        with pytest.raises(InputError, match=said):
            folder.export(gone, Path("other"), "fp32", "out")


def test_a_weight_beyond_fp16_and_a_wrong_reading_leave_nothing(
    run: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--dtype fp16: what was written is another model: .* nan"):
        folder.export(trained(std=1e5), Path("out"), "fp16", "out")
    monkeypatch.setattr(folder, "write_files", lambda model, *_: save_wrong(model, *_))
    with pytest.raises(InputError, match="--dtype fp32: what was written is another model"):
        folder.export(trained(), Path("out"), "fp32", "out")
    assert not list(Path().glob("*out*"))


def save_wrong(model: GPT, *where: Any) -> None:
    from pipeline.model.model_dir import write_files

    off = load_model(paths.MODEL)
    with torch.no_grad():
        off.transformer.ln_f.bias += 0.1
    write_files(off, *where)


# --- the hub


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload needs, refusing what it refuses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.tokens = {"hf_writes": True, "hf_reads": False}
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub_ = self.path.partition("?")[0], self.server
        if self.command == "PUT":  # a signed address, as the hub's storage has: no token
            if hashlib.sha256(sent).hexdigest() != path.rpartition("/")[2]:
                return self.answer(400)
            hub_.objects[path.rpartition("/")[2]] = sent
            return self.answer(200)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in hub_.tokens:
            said = "Invalid credentials in Authorization header"
            return self.answer(401, {"error": said}, X_Error_Message=said)
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "someone", "type": "user"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        given = json.loads(sent) if sent and not path.endswith("/commit/main") else {}
        name = "/".join(path.removeprefix("/api/models/").lstrip("/").split("/")[:2])
        name = name.removesuffix(".git")
        if self.command == "POST" and not hub_.tokens[token]:
            return self.answer(403, X_Error_Message="you must use a write token")
        if path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}"
            hub_.repos.setdefault(name, {})
            hub_.private[name] = given.get("private") or given.get("visibility") == "private"
            return self.answer(200, {"url": f"{hub_.url}/{name}"})
        if name not in hub_.repos:
            return self.answer(404, X_Error_Code="RepoNotFound")
        self.in_repository(hub_.repos[name], name, path, given, sent)

    def in_repository(
        self, files: dict[str, bytes], name: str, path: str, given: Any, sent: bytes
    ) -> None:
        hub_ = self.server
        if path == f"/api/models/{name}":
            self.answer(200, {"id": name, "siblings": []})
        elif path == f"/api/models/{name}/tree/main":
            rows = [
                {"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()
            ]
            self.answer(200, rows)
        elif path == f"/api/models/{name}/preupload/main":
            modes = [
                {"path": f["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in given["files"]
            ]
            self.answer(200, {"files": modes})
        elif path == f"/{name}.git/info/lfs/objects/batch":
            rows = [
                o | {"actions": {"upload": {"href": f"{hub_.url}/store/{o['oid']}"}}}
                for o in given["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": rows})
        elif path == f"/api/models/{name}/commit/main":
            for line in map(json.loads, sent.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub_.objects[value["oid"]]  # a KeyError where it lacks
            hub_.commits += 1
            self.answer(200, {"commitUrl": f"{hub_.url}/{name}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer(404)

    do_GET = do_POST = do_PUT = handle_any


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:Use 'content")  # the hub's client uses its HTTP library so
def test_an_upload_is_one_commit_of_every_file_into_a_private_repository(
    run: Experiment, the_hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(doctor, "asked", lambda names: [run])
    for _ in range(2):  # the second time over an earlier export
        command(["export", "--to", "hub:someone/plays"])
        assert caplog.messages[-1].startswith(f"{the_hub.url}/someone/plays/commit/1: the model of")
    assert f"{the_hub.url}/store" not in caplog.text, "an address that lets anybody write"
    folder.export(run, Path("out"), "fp32", "someone/plays")
    there = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert the_hub.repos == {"someone/plays": there} and the_hub.private["someone/plays"]
    assert the_hub.commits == 2


@pytest.mark.parametrize(
    ("token", "error", "said"),
    [
        ("", ConfigError, "HF_TOKEN is not set"),
        ("hf_stale", InputError, "--to hub:someone/plays: HfHubHTTPError: Invalid user token"),
        ("hf_reads", InputError, "403 Forbidden: you must use a write token"),
    ],
)
def test_what_the_hub_refuses_is_said_in_its_words_without_the_token(
    the_hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str, error: Any, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=said) as caught:
        hub.opened("someone/plays")(tmp_path)
    assert not the_hub.repos and (not token or token not in str(caught.value))


def test_a_repository_with_other_files_is_refused(the_hub: Hub) -> None:
    the_hub.repos["someone/else"] = {"pytorch_model.bin": b"", ".gitattributes": b""}
    with pytest.raises(InputError, match=r"it holds pytorch_model\.bin"):
        hub.opened("someone/else")
