"""The GPU benchmarks, all of them, on a CPU and tiny: what they say, what they refuse to say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import build_nanogpt, gpu, kept, memory, modded_nanogpt, sample_gpu
from benchmarks.outcomes import OURS
from benchmarks.peers import HF, Task
from pipeline.compute import precision as precision_module
from pipeline.errors import ConfigError, InputError
from pipeline.training import compiling

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--batch", "2"]

# Stands for a checkout: its names and their arguments, and a script that must not run.
CHECKOUT = """
from dataclasses import dataclass
import torch
from hellaswag import nothing

@dataclass
class GPTConfig:
    vocab_size: int = 0
    n_layer: int = 0
    n_head: int = 0
    n_embd: int = 0
    block_size: int = 0

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        from pipeline.model import gpt as model
        made = model.GPT(model.GPTConfig(
            config.n_layer, config.n_head, config.n_embd, config.block_size,
            config.vocab_size, config.vocab_size))
        self.transformer, self.hidden, self.logits = made.transformer, made.hidden, made.logits

    def configure_optimizers(self, decay, rate, device):
        return torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=decay)

    def forward(self, x, y):
        logits = self.logits(self.hidden(x))
        return logits, torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())

raise SystemExit("this is the training, which nobody asked for")
"""


MODDED = """
import torch
import torch.distributed as dist

class GPT(torch.nn.Module):
    def __init__(self, vocab_size, num_layers, model_dim):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, model_dim)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Linear(model_dim, model_dim) for _ in range(num_layers))
        self.proj = torch.nn.Linear(model_dim, vocab_size)

    def forward(self, inputs, targets):
        x = self.embed(inputs)
        for block in self.blocks:
            x = block(x)
        return torch.nn.functional.cross_entropy(
            self.proj(x).flatten(0, 1), targets.flatten(), reduction="sum")

class Muon(torch.optim.SGD):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=1e-3)

    def step(self):
        assert dist.get_world_size() == 1 and dist.get_rank() == 0
        dist.all_gather([None], None)
        return super().step()

dist.init_process_group()
"""


@pytest.fixture(autouse=True)
def without_the_compilers_time(monkeypatch):
    monkeypatch.setattr(precision_module, "_cpu_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(compiling, "why_not_compile", lambda precision: "")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(gpu.throughput.SQUARE, "cpu", 64)
    monkeypatch.setattr(gpu, "TURN", 2)


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "train_gpt2.py").write_text(CHECKOUT, "utf-8")
    script = tmp_path / modded_nanogpt.SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text(MODDED, "utf-8")
    return tmp_path


def column(page: str) -> list[str]:
    return [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]


def test_the_whole_script_runs_and_shows_every_rung(tmp_path, checkout, capsys) -> None:
    words = ["--build-nanogpt", str(checkout), "--modded-nanogpt", str(checkout)]
    gpu.main([*TINY, *words], tmp_path / "results")
    page = (tmp_path / "results/gpu.md").read_text("utf-8")
    table = column(page)
    rungs = [rung.name for rung in gpu.ladder()]
    assert rungs == ["fp32", "+ tf32", "+ bf16", "+ compile"] + [
        "+ flash attention",
        "+ padded rows",
        "+ fused AdamW",
    ]
    start = table.index("fp32", table.index("rung"))
    assert table[start : start + 10] == rungs + [
        "large micro-batch",
        "... with CUDA graphs",
        "... with autotuning",
    ]
    start = table.index("the train stage's step")
    own = ["precision=fp8", "train.compile=false", "train.deterministic=true"]
    assert table[start + 1 : start + 4] == own
    assert "--build-nanogpt CHECKOUT --modded-nanogpt CHECKOUT`" in page
    assert str(checkout) not in page and "Not measured yet" not in page
    assert table[-3:] == ["build-nanogpt", "modded-nanogpt", "ours"]
    assert "rung: _scaled_dot_product_flash_attention_for_cpu" in page
    assert "_fused_adamw_" in page
    assert (tmp_path / "results/gpu.png").stat().st_size > 1000
    assert page in capsys.readouterr().out


def test_what_was_measured_is_kept_and_the_next_call_goes_on(tmp_path, monkeypatch) -> None:
    made, now = [], 0.0
    steps = gpu.our_steps

    def slow(rung, *given):
        nonlocal now
        made.append(rung.name)
        now += 50
        if len(made) == 4:
            raise KeyboardInterrupt  # or the machine is taken away
        return steps(rung, *given)

    monkeypatch.setattr(gpu, "our_steps", slow)
    monkeypatch.setattr(kept.time, "monotonic", lambda: now)
    words = [*TINY, "--minutes", "4"]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(words, tmp_path)
    assert made == ["fp32", "+ tf32", "+ bf16", "+ compile"]
    gpu.main(words, tmp_path)
    began = made[4:]
    assert began[:2] == ["+ compile", "+ flash attention"], "three were kept"
    # 240 seconds from 200 on: the last one that is begun ends in time, by the estimate.
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert "Not measured yet, for want of time: " in page and "... with autotuning" in page
    before = len(made)
    gpu.main([*TINY, "--minutes", "0"], tmp_path)
    whole = (tmp_path / "gpu.md").read_text("utf-8")
    assert "Not measured yet" not in whole and len({*made[4:]}) == len(made[4:]) > before - 4
    first, again = ([n.split() for n in p.splitlines() if "| fp32 " in n] for p in (page, whole))
    assert first == again and len(first) == 2
    gpu.main([*TINY, "--rounds", "2", "--minutes", "0"], tmp_path)
    assert made.count("fp32") == 2, "other settings are measured anew"
    assert len(json.loads((tmp_path / "gpu.json").read_text("utf-8"))) == 2


def test_other_code_is_measured_anew(tmp_path) -> None:
    path = tmp_path / "kept.json"
    for code in ("a", "b"):
        assert kept.Kept(path, {"code": code}).get("x", 0, lambda own=code: own) == code
    assert kept.Kept(path, {"code": "a"}).get("x", 0, lambda: "anew") == "a"


def test_the_peer_with_a_head_of_zeros_begins_at_ln_v(checkout) -> None:
    x, y = gpu.batch_of("tiny", 2)
    steps = modded_nanogpt.steps(checkout, 2, 32, 128, x, y)
    assert steps(3) == pytest.approx(math.log(128), abs=1e-4)
    assert steps(1) < math.log(128) - 1e-3, "it trains"


def test_a_rung_adds_one_lever_and_keeps_the_others() -> None:
    rungs = gpu.ladder()
    for before, after in zip(rungs, rungs[1:], strict=False):
        changed = [name for name, value in vars(after).items() if value != vars(before)[name]]
        assert len(changed) == 2 and changed[0] == "name", (after.name, changed)
    assert replace(rungs[-1], name="") == gpu.Rung("", "bf16", True, None, "sdpa", True, True)


def test_every_lever_is_really_pulled() -> None:
    first, last = (gpu.state_of(gpu.ladder()[n], "tiny", CPU) for n in (0, -1))
    assert (first.precision.effective, last.precision.effective) == ("fp32", "bf16")
    assert (first.model.config.vocab_rows, last.model.config.vocab_rows) == (127, 128)
    assert (first.model.config.attention, last.model.config.attention) == ("naive", "sdpa")
    assert not first.optimizer.defaults["fused"] and last.optimizer.defaults["fused"]


def test_a_first_loss_that_disagrees_voids_the_time(checkout) -> None:
    text = (checkout / "train_gpt2.py").read_text("utf-8")
    wrong = text.replace("cross_entropy(logits", "cross_entropy(1.1 + 2 * logits")
    (checkout / "train_gpt2.py").write_text(wrong, "utf-8")
    ours, theirs = gpu.duel({gpu.BUILD_NANOGPT: checkout}, "tiny", 2, 1, CPU)
    assert not ours.refused and "first loss" in theirs.refused
    rows = gpu.rows_of([ours, theirs], "tiny", CPU, {"bf16": 1e9})
    assert rows[1][2] == "-" and "ours's is" in rows[1][0]


def test_what_does_not_fit_is_halved_in_the_first_rung_and_refused_later(monkeypatch) -> None:
    tried = []

    def full(rung, size, batch, device):
        tried.append((rung.name, batch))
        if batch > 2:
            raise torch.OutOfMemoryError("no")
        return lambda count: 1.0

    monkeypatch.setattr(gpu, "our_steps", full)
    found, _ = gpu.climb("tiny", 8, 1, CPU, kept.Kept(None, {}), lambda line: None)
    assert tried[:4] == [("fp32", 8), ("fp32", 4), ("fp32", 2), ("+ tf32", 2)]
    assert [r.refused for r in found[7:]] == ["out of memory"] * 3


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device here.*--device cpu --size tiny"):
        gpu.main([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_the_script_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="no train_gpt2.py there"):
        build_nanogpt.definitions(tmp_path)


# --- sampling

SAMPLE = ["--device", "cpu", "--size", "test", "--new", "4", "--rounds", "1", "--precision", "fp32"]


def test_sampling_is_measured_case_by_case_and_goes_on_where_it_was_left(
    tmp_path, monkeypatch
) -> None:
    measured, measure = [], sample_gpu.measure
    monkeypatch.setattr(
        sample_gpu,
        "measure",
        lambda task, batch, *more: measured.append(batch) or measure(task, batch, *more),
    )
    words = [*SAMPLE, "--batch", "1", "2", "--minutes", "0.005"]
    sample_gpu.main(words, tmp_path)
    page = (tmp_path / "sample_gpu.md").read_text("utf-8")
    assert measured == [1] and "**Not measured yet: fp32, batch 2." in page
    sample_gpu.main(words, tmp_path)
    page = (tmp_path / "sample_gpu.md").read_text("utf-8")
    assert measured == [1, 2] and "Not measured yet" not in page
    table = [line.split("|") for line in page.splitlines() if line.startswith("| fp32")]
    cells = [[cell.strip() for cell in line] for line in table]
    static, compiled = f"{HF}, static cache, compiled", f"{OURS}, compiled"
    names = [HF, static, f"{OURS}, captured", compiled, f"{compiled}, int8"]
    assert [(line[2], line[3]) for line in cells] == [(b, n) for b in "12" for n in names]
    for line in cells:
        timed = line[4] != "-"
        assert timed == (compiled not in line[3]), "what runs eagerly is not a compiled one's time"
        assert timed or "runs eagerly" in line[12]
        assert line[10] in (("-",) if "int8" in line[3] else ("1 of 1", "2 of 2"))


def test_what_a_step_reads_is_the_weights_and_the_filled_cache() -> None:
    weights = 124_475_904 - 1024 * 768  # at 50304 rows, without the positions
    found = sample_gpu.bytes_of_a_step(Task("124m"), 8, 1, 2, 2)
    assert found == 2 * weights + 2 * 12 * 768 * 8 * 32 * 2


def test_other_tokens_are_a_near_tie_or_void_the_time(monkeypatch) -> None:
    task = Task("test")
    model, idx = task.model().eval(), task.ids(0, 2, 12)
    with torch.no_grad():
        logits = model(idx[:1, :8])[0, -1]
    likely, text, other = logits.topk(2), idx.clone(), idx.clone()
    text[0, 8], other[0, 8] = likely.indices
    distance = (likely.values[0] - likely.values[1]).item()
    for dtype in (torch.float32, torch.bfloat16):
        unit = torch.finfo(dtype).eps * logits.abs().max().item()
        equal, units = sample_gpu.apart(model, text, other, dtype)
        assert equal == 1 and units == pytest.approx(distance / unit, rel=1e-3)
    assert sample_gpu.apart(model, idx, idx, torch.float32) == (2, 0.0)

    def wrong(*_, **__):
        return lambda: task.ids(0, 1, sample_gpu.PROMPT + 4)

    monkeypatch.setattr(sample_gpu, "ours", wrong)
    found = sample_gpu.measure(task, 1, precision_module.choose_precision("fp32", CPU), 4, 1)
    assert [len(r["seconds"]) for r in found] == [1, 1, 0, 0, 1]
    assert "no near tie" in found[2]["remark"]


# --- memory


def test_peaks_are_measured_once_and_what_does_not_fit_is_said(
    tmp_path, monkeypatch, capsys
) -> None:
    words, measured, asked = [*TINY[:4], "--out", str(tmp_path)], memory.measured, []

    def interrupted(case, device):
        asked.append(case)
        if len(asked) == 3:
            raise KeyboardInterrupt
        if case.card:
            raise torch.OutOfMemoryError("no")
        return measured(case, device)

    monkeypatch.setattr(memory, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.main(words)
    memory.main(words)
    assert asked[3:] == memory.cases(["tiny"])[2:], "what was measured is kept"
    page = (tmp_path / "memory_gpu.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| tiny")]
    assert len(rows) == len(asked) - 1 and page in capsys.readouterr().out
    assert "out of memory" in rows[0] and "out of memory" not in "".join(rows[1:])


def test_a_small_card_is_measured_with_what_the_forecast_proposes(monkeypatch) -> None:
    case = memory.proposed("gpt2-124m", 4)
    assert (case.batch, case.checkpointed, case.precision) == (1, False, "bf16")
    limits = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 << 30))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share)
    )
    for card in (4, 0, 96):
        memory.limit(card, torch.device("cuda"))
    assert limits == [pytest.approx(3.6 / 80), 1.0, 1.0]
