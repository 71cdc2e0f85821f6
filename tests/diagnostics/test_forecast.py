"""What a training needs: bytes that it really holds, words that a person understands."""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import config as configuration
from pipeline.compute import precision
from pipeline.diagnostics import forecast
from pipeline.errors import ConfigError, StorageError, to_user
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.records.run_data import Log
from pipeline.training import loop, training_step
from pipeline.training.optimizers import build_optimizer
from tests.conftest import ROOT
from tests.helpers import stand_in
from tests.helpers.memory import release

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = GPTConfig(2, 2, 32, 64, 97, 128)
WIDE = {"n_head": 2, "block_size": 64, "vocab_size": 97, "vocab_rows": 128}
HEADY = {"n_head": 2, "block_size": 32, "vocab_size": 7000, "vocab_rows": 7040}
LONG = {"n_head": 1, "block_size": 512, "vocab_size": 97, "vocab_rows": 128}
CHECKPOINTED, MASKED = "checkpoint_activations", "mask_documents"


class Held(TorchDispatchMode):
    """The most bytes that tensors held at a time while it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.alive:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(
    ("shape", "name", "batch_size", "accumulate", "also"),
    [
        (GPTConfig(n_layer=4, n_embd=64, **WIDE), "fp32", 16, 1, ""),
        (GPTConfig(n_layer=4, n_embd=64, **WIDE), "bf16", 16, 1, ""),
        (GPTConfig(n_layer=4, n_embd=64, attention="naive", **WIDE), "fp32", 16, 1, ""),
        (GPTConfig(n_layer=2, n_embd=192, **WIDE), "fp32", 2, 1, ""),
        (GPTConfig(n_layer=2, n_embd=192, **WIDE), "fp32", 2, 3, ""),
        (GPTConfig(n_layer=1, n_embd=64, **HEADY), "fp32", 8, 1, ""),
        (GPTConfig(n_layer=1, n_embd=64, **HEADY), "tf32", 8, 1, ""),
        (GPTConfig(n_layer=8, n_embd=64, **WIDE), "fp32", 16, 1, CHECKPOINTED),
        (GPTConfig(n_layer=8, n_embd=64, **WIDE), "fp32", 16, 3, CHECKPOINTED),
        (GPTConfig(n_layer=8, n_embd=64, dropout=0.1, **WIDE), "bf16", 16, 1, CHECKPOINTED),
        (GPTConfig(n_layer=4, n_embd=32, **LONG), "fp32", 2, 1, MASKED),
    ],
)
def test_the_memory_forecast_is_what_tensors_of_real_steps_hold(
    make_config, monkeypatch, shape, name: str, batch_size: int, accumulate: int, also: str
) -> None:
    monkeypatch.setattr(precision, "_cpu_capabilities", dict)  # the same CPU everywhere
    mode = precision.choose_precision(name, CPU)
    changes = {"train__warmup_steps": 0} | ({f"train__{also}": True} if also else {})
    config = make_config(train__steps=3, **changes).train
    length = shape.block_size
    needs = forecast.needs(shape, mode, length, documents_apart=also == MASKED)
    expected = needs.at(batch_size, accumulate, also == CHECKPOINTED).total
    ids = torch.randint(97, (batch_size, length + 1))
    batches = [(ids[:, :-1], ids[:, 1:])] * accumulate
    release()
    with Held() as held:
        model = GPT(shape)
        initialize(model, make_config().init, torch.Generator().manual_seed(0))
        state = training_step.start(model, config, mode, narrowing=1.0)
        list(loop.fit(state, config, lambda step: batches))
    release()
    assert held.peak == pytest.approx(expected, rel=0.1)


def test_memory_of_a_real_process_is_the_forecast_and_what_allocators_add() -> None:
    script = """
import re, torch
from pipeline import config as configuration
from pipeline.compute import throughput
from pipeline.diagnostics import forecast
from pipeline.training import training_step, loop
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.compute.precision import choose_precision
torch.set_num_threads(1)
config = configuration.load("recipes/nano.yaml")
shape, mode = GPTConfig(4, 4, 256, 128), choose_precision("fp32", torch.device("cpu"))
needed = forecast.needs(shape, mode, 128).at(8, 1).total / 2**20
# imports of its own
training_step.start(GPT(GPTConfig(1, 1, 8, 8, 97, 97)), config.train, mode, narrowing=1.0)
before = int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**10
state = training_step.start(GPT(shape), config.train, mode, narrowing=1.0)
ids = torch.randint(50257, (8, 129))
for report in loop.fit(state, config.train, lambda step: [(ids[:, :-1], ids[:, 1:])]):
    if report.step == 2:
        break
print(needed, throughput.peak_memory_mib(torch.device("cpu")) - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("the resident set is read from Linux's /proc")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    needed, grown = map(float, done.stdout.split())
    assert 0.85 < grown / needed < 1.5, done.stdout


def test_the_published_model_needs_what_its_parameters_say() -> None:
    mode = precision.choose_precision("fp32", CPU)
    found = forecast.needs(GPTConfig(12, 12, 768, 1024), mode, 1024)
    assert found.weights == 4 * 124_475_904
    one, nine = found.at(1, 1), found.at(9, 1)
    assert one.moments == 2 * found.weights
    assert (nine.activations - one.activations) // 8 == found.kept_per_sequence
    # A block keeps some 34 numbers a token and channel, attention's statistics aside.
    assert found.kept_per_sequence / (4 * 1024 * 768 * 12) == pytest.approx(15, abs=3)


def test_low_precision_keeps_less_for_each_sequence() -> None:
    kept = {
        name: forecast.needs(
            GPTConfig(12, 12, 768, 1024), precision.choose_precision(name, CPU), 1024
        ).kept_per_sequence
        for name in ("fp32", "tf32", "bf16", "fp16")
    }
    assert kept["fp32"] == kept["tf32"] > 1.5 * kept["bf16"] == 1.5 * kept["fp16"]


def foreseen(make_config, monkeypatch, free: int, **changes: Any) -> forecast.Forecast:
    monkeypatch.setattr(forecast, "free_memory", lambda device: free)
    config = make_config(train__batch_size=16, train__steps=200, **changes)
    mode = precision.choose_precision("fp32", CPU)
    return forecast.forecast(config, mode, corpus_tokens=819_200)


def test_a_micro_batch_that_does_not_fit_is_named_with_the_one_that_does(
    make_config, monkeypatch
) -> None:
    enough = foreseen(make_config, monkeypatch, 4 << 30)
    assert enough.problem() == ""
    assert "200 steps are 409,600 tokens, 0.50 epochs" in enough.lines()[0]
    tight = foreseen(make_config, monkeypatch, 450 << 20)
    problem = replace(tight, config=replace(tight.config, accumulate=2)).problem()
    assert "train.batch_size=16 needs about" in problem and "450 MiB are free" in problem
    micro, accumulate = map(
        int, re.search(r"train.batch_size=(\d+) train.accumulate=(\d+) \(", problem).groups()
    )
    assert micro * accumulate == 32 and 1 <= micro <= tight.fits(False) < 16
    assert tight.fits(False) == int(re.search(r"enough for (\d+)", tight.lines()[1])[1])
    none = foreseen(make_config, monkeypatch, 50 << 20)
    assert none.fits(True) == 0 and "not even one sequence fits" in none.problem()


def test_the_largest_micro_batch_is_the_last_that_stays_within_the_limit() -> None:
    mode = precision.choose_precision("fp32", CPU)
    found = forecast.needs(GPTConfig(4, 4, 128, 128), mode, 128)
    largest = found.largest(2, 1 << 30)
    assert found.at(largest, 2).total <= 1 << 30 < found.at(largest + 1, 2).total


@pytest.mark.parametrize(("sequences", "fits", "micro"), [(32, 7, 4), (12, 7, 6), (13, 12, 1)])
def test_a_proposal_keeps_the_sequences_of_a_step(
    make_config, monkeypatch, sequences: int, fits: int, micro: int
) -> None:
    found = foreseen(make_config, monkeypatch, 4 << 30)
    found = replace(found, config=replace(found.config, batch_size=sequences, accumulate=1))
    expected = f"train.batch_size={micro} train.accumulate={sequences // micro}"
    assert found.proposal(fits)[0] == expected


def on_a_card(name: str, gigabytes: float, **changes: Any) -> forecast.Forecast:
    """GPT-2 124M's recipe, on a card that is not here."""
    config = configuration.load(ROOT / f"recipes/{name}.yaml")
    config = replace(config, train=replace(config.train, **changes))
    mode = precision.of_a_card(config.precision)
    return forecast.forecast(config, mode, free=int(gigabytes * 2**30))


@pytest.mark.parametrize(
    ("recipe", "gigabytes", "settings"),
    [
        ("gpt2-124m", 4, "train.batch_size=1 train.accumulate=512"),
        ("gpt2-124m", 8, "train.batch_size=8 train.accumulate=64"),
        ("gpt2-124m", 24, "train.batch_size=16 train.accumulate=32"),
        ("gpt2-large", 18.5, "train.batch_size=2 train.accumulate=256 " + forecast.CHECKPOINT),
        ("gpt2-xl", 80, "train.batch_size=4 train.accumulate=128"),
        ("gpt2-xl", 24, ""),
    ],
)
def test_a_card_gets_settings_that_fit_and_keep_the_tokens_of_a_step(
    recipe: str, gigabytes: float, settings: str
) -> None:
    found = on_a_card(recipe, gigabytes)
    words, total = found.proposal(found.config.batch_size)
    assert words.removesuffix("=true") == settings
    assert total <= forecast.MARGIN * found.free
    told = "not even one sequence fits" if not settings else f"-S {' -S '.join(words.split())} ("
    assert told in found.advice()


def test_processes_share_weights_and_the_memory_of_one_machine(make_config, monkeypatch) -> None:
    """GPT-2 XL: what 2 and 8 processes hold of its 6.2 GB of weights, twice that of moments."""

    def of(processes: int, **changes: Any) -> forecast.Forecast:
        config = configuration.load(ROOT / "recipes/gpt2-xl.yaml", ["device=cpu"])
        several = replace(config.distributed, processes=processes, **changes)
        mode = precision.choose_precision("fp32", CPU)
        return forecast.forecast(replace(config, distributed=several), mode)

    monkeypatch.setattr(forecast, "free_memory", lambda _: 80 << 30)
    one, two, eight = of(1), of(2, strategy="fsdp"), of(8, strategy="fsdp")
    assert (one.free, two.free, eight.free) == (80 << 30, 40 << 30, 10 << 30)
    weights = 4 * 1_557_686_400
    for found, parts in ((two, 2), (eight, 8)):
        assert found.needed.moments == 2 * weights // parts
        whole = found.needed.weights - weights // parts  # the embedding, and a few blocks
        assert whole < 0.15 * weights
        assert found.needed.gradients < weights // parts + 0.3 * weights
    assert " in each of 8 processes, which share weights and moments: " in eight.lines()[1]
    alike = of(8)
    assert alike.needed == one.needed and " in each of 8 processes: " in alike.lines()[1]
    assert of(1, ordered=True).share == (1, 512)
    with pytest.raises(ConfigError, match="cannot be dealt out to 3 processes"):
        of(3)


def test_the_forecast_of_a_card_is_that_of_the_card_it_was_measured_on() -> None:
    """GPT-2 124M, bf16, in micro-batches of 16: 8,660 MiB were forecast on an H100."""
    found = on_a_card("gpt2-124m", 80, accumulate=1)
    assert found.needed.total / 2**20 == pytest.approx(8660, rel=0.001)


def test_memory_that_runs_out_in_a_kernel_is_one_error_with_settings_and_numbers(
    make_config, monkeypatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    config = make_config(train__batch_size=8, train__accumulate=3, train__warmup_steps=0)
    mode = precision.choose_precision("fp32", CPU)
    known = forecast.needs(SHAPE, precision.of_a_card("fp32"), 64)
    monkeypatch.setattr(forecast, "needs", lambda *_: known)
    ids = torch.randint(97, (8, 65))
    with stand_in.gpu(monkeypatch), pytest.raises(StorageError) as told:
        mode = replace(mode, device=CUDA)
        state = training_step.start(GPT(SHAPE).to(CUDA), config.train, mode, narrowing=1.0)
        monkeypatch.setattr(torch.nn.functional, "gelu", full)
        with forecast.explaining(config, mode):
            list(loop.fit(state, config.train, lambda step: [(ids[:, :-1], ids[:, 1:])]))
    said = to_user(told.value)
    assert said.startswith("error: out of memory (CUDA out of memory); train.batch_size=8 needs")
    now, half, less = (known.at(*at).total for at in ((8, 3), (4, 6), (8, 3, True)))
    assert f"about {forecast.size(now)}, 11.0 GiB were free: " in said  # the stand-in's 8, 2 and 1
    assert f"train.batch_size=4 train.accumulate=6 ({forecast.size(half)})" in said
    assert f"or {forecast.CHECKPOINT}=true ({forecast.size(less)})" in said
    assert said.endswith("or precision=bf16; tokens/step stay the same")


def test_an_error_that_is_none_of_memory_stays_as_it_is(make_config) -> None:
    mode = precision.choose_precision("fp32", CPU)
    with pytest.raises(RuntimeError, match="another"), forecast.explaining(make_config(), mode):
        raise RuntimeError("another error")


def test_what_was_taken_stands_beside_the_forecast_on_a_card_alone() -> None:
    values = {"perf/forecast_memory_mib": 100.0}
    log = Log([{"kind": "metrics", "step": 0, "time": 0, "values": values}])
    record, summary = SimpleNamespace(so_far=lambda: log), {"perf/peak_memory_mib": 113.0}
    (line,) = forecast.at_peak(record, summary, precision.of_a_card("bf16"))
    assert line == "peak memory 113 MiB, 1.13 times the forecast"
    on_cpu = precision.choose_precision("fp32", CPU)
    assert forecast.at_peak(record, summary, on_cpu) == []


def test_a_containers_limit_counts_and_its_cached_files_do_not(monkeypatch, tmp_path) -> None:
    for name, text in {
        "memory.max": "1000000",
        "memory.current": "700000",
        "memory.stat": "anon 5\nfile 400000\ninactive_file 300000\n",
    }.items():
        (tmp_path / name).write_text(text, "ascii")
    monkeypatch.setattr(forecast, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(
        forecast.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12)
    )
    assert forecast.free_memory(CPU) == 600_000
    (tmp_path / "memory.max").write_text("max\n", "ascii")
    assert forecast.free_memory(CPU) == 10**12


def test_what_the_gpus_allocator_keeps_at_hand_is_free(monkeypatch) -> None:
    stand_in.pretend(monkeypatch)
    expected = torch.cuda.mem_get_info(CUDA)[0] + (2 << 30)
    assert torch.cuda.memory_reserved(CUDA) - torch.cuda.memory_allocated(CUDA) == 2 << 30
    assert forecast.free_memory(CUDA) == expected


def test_the_time_is_told_as_people_tell_it(make_config) -> None:
    config = make_config(train__steps=5000, train__val_every=6000, train__val_tokens=1).train
    words = forecast.time_words([60.0, 60.0, 60.0, 6.6, 6.6, 6.6, 6.6, 7.0], config)
    assert words == "5,000 steps need 9 h 10 min; in 1 h you reach step 545"
    assert forecast.duration(59.6) == "1 min"
    assert forecast.duration(172_800 + 3700) == "2 d 1 h"
    assert forecast.duration(75) == "1 min 15 s"


def test_a_time_budget_bounds_what_is_foretold(make_config) -> None:
    steps = {"train__steps": 10_000, "train__val_every": 10_000, "train__val_tokens": 1}
    config = make_config(**steps, train__time_budget=3.0).train
    words = forecast.time_words([1.0] * 8, config)
    assert words == "about 179 of 10,000 steps fit into train.time_budget=3 minutes"
    assert forecast.run_seconds([1.0] * 8, config) == 180
    long = make_config(**steps, train__time_budget=600.0).train
    assert forecast.time_words([1.0] * 8, long).startswith("10,000 steps need 2 h 46 min; in 1 h ")


def test_validations_are_part_of_the_time(make_config) -> None:
    config = make_config(train__steps=100, train__val_every=10, train__val_tokens=1536).train
    # 10 validations of three steps' tokens, forward alone: as long as 10 steps.
    assert forecast.run_seconds([1.0] * 8, config) == pytest.approx(110)


class Kept:
    """The newest value of each metric, and the tags, instead of a record."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.kept: dict[str, str] = {}
        self.tags = self.kept.update

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        self.values |= values


# A forecast without a problem, where it is not looked at.
SHORT = SimpleNamespace(
    needed=SimpleNamespace(total=1), problem=lambda: "", lines=lambda: ["nothing"]
)


def test_the_forecast_comes_before_the_first_step_and_stops_no_training(
    make_config, monkeypatch, caplog
) -> None:
    record, mode = Kept(), precision.choose_precision("fp32", CPU)
    config = make_config(train__steps=200, train__batch_size=8)
    said = forecast.before_training(config, mode, record, 671_837)
    assert said[0] == "7,248,640 parameters; 200 steps are 204,800 tokens, 0.30 epochs"
    assert 300 < record.values["perf/forecast_memory_mib"] < 420
    assert record.kept == {"attention.ran": "flash"}
    monkeypatch.setattr(forecast, "free_memory", lambda device: 300 << 20)
    assert len(forecast.before_training(config, mode, record, 671_837)) == 2
    assert "train.batch_size=8 needs about" in caplog.messages[-1]

    def unknown(*_: object) -> None:
        raise NotImplementedError("aten::attention has no sizes on this device")

    monkeypatch.setattr(forecast, "needs", unknown)
    assert forecast.before_training(config, mode, record, 671_837) == []
    assert caplog.messages[-1].startswith("no memory forecast on cpu: aten::attention")


@pytest.mark.parametrize(
    ("name", "width", "compiled", "said"),
    [
        ("fp8", 768, True, "model.n_embd=768.*below a width of 1,280.*precision=bf16"),
        ("fp8", 1600, False, "train.compile=false.*Set train.compile=true"),
        ("fp8", 1280, True, ""),
        ("bf16", 768, True, ""),
    ],
)
def test_a_run_says_where_fp8_is_slow(
    make_config, monkeypatch, caplog, name: str, width: int, compiled: bool, said: str
) -> None:
    stand_in.pretend(monkeypatch)
    mode = precision.choose_precision(name, CUDA)
    config = make_config(model__n_embd=width, train__compile=compiled)
    monkeypatch.setattr(forecast, "forecast", lambda *_, **__: SHORT)
    monkeypatch.setattr(forecast.attention_kernel, "tell", lambda *_: None)
    forecast.before_training(config, mode, Kept(), 671_837)
    assert bool(caplog.messages) is bool(said)
    assert re.search(said, " ".join(caplog.messages))


def test_where_fp8_is_emulated_speed_is_no_matter(make_config) -> None:
    mode = precision.choose_precision("fp8", CPU)
    assert mode.emulated and forecast.slow_fp8(make_config(), mode) == ""


def test_the_time_is_foretold_once_some_steps_are_measured(make_config) -> None:
    record, config = Kept(), make_config(train__val_tokens=1, train__steps=200).train
    said = forecast.after_first_steps([9.0] * 3 + [6.0] * 5, config, record)
    assert record.values["time/forecast_seconds"] == pytest.approx(1200, rel=0.01)
    assert said == "200 steps need 20 min; in 10 min you reach step 99"


def test_a_fork_is_foretold_its_own_steps_and_counts_from_its_parents(make_config) -> None:
    settings = {"train__steps": 500, "train__val_every": 100, "train__val_tokens": 153_600}
    record, config = Kept(), make_config(**settings).train
    # 150 steps of a second, and validations after 400 and 500: as long as 100 steps each.
    said = forecast.after_first_steps([1.0] * 8, config, record, before=350)
    assert record.values["time/forecast_seconds"] == pytest.approx(350)
    assert said == "150 steps need 5 min 50 s; in 1 min you reach step 375"
    short = replace(config, time_budget=2)
    assert "about 51 of 150 steps" in forecast.time_words([1.0] * 8, short, 350)


def test_the_command_shows_every_precision_and_trains_nothing(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "forecast"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| micro-batch | fp32" in done.stdout
    assert len(re.findall(r"^\| +\d+ \|", done.stdout, re.MULTILINE)) == len(forecast.MICRO_BATCHES)


def test_moments_are_those_that_the_optimizer_holds(make_config) -> None:
    for name in ("adamw", "muon"):
        config = make_config(train__optimizer=name).train
        model = GPT(SHAPE)
        optimizer = build_optimizer(model, config)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        tensors = (t for state in optimizer.state.values() for t in state.values())
        held = sum(t.nbytes for t in tensors if t.dim() > 0)
        assert forecast.needs(SHAPE, precision.of_a_card("fp32"), 64, name).moments == held
