"""A training in several processes: how they start, fail, stop, and go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from omegaconf import OmegaConf

from pipeline import config as configuration
from pipeline import paths
from pipeline.compute.ranks import Ranks
from pipeline.compute.runtime import generator
from pipeline.data import token_writer
from pipeline.data.documents import Document
from pipeline.distributed import start, team
from pipeline.errors import ConfigError, PeerError
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.init import initialize
from pipeline.model.model_dir import save_model
from pipeline.records import record_file
from pipeline.storage import folders
from tests.conftest import ROOT, params, wait_for

SMALL: dict[str, Any] = {
    "model__n_layer": 1,
    "model__n_head": 1,
    "model__n_embd": 8,
    "model__block_size": 16,
    "model__dropout": 0.0,
    "train__steps": 14,
    "train__batch_size": 1,
    "train__sequence_length": 16,
    "train__accumulate": 4,
    "train__warmup_steps": 2,
    "train__val_every": 4,
    "train__val_tokens": 40,
    "checkpoint__every_steps": 3,
    "sample__while_training": False,
    "distributed__timeout": 2.0,
}
slow = pytest.mark.slow


class Workspace:
    """Tokens, initial weights and settings; trains in processes of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / ".dvc").mkdir(parents=True)
        words = np.random.default_rng(0).choice(["on", "in", "up", "off", "to"], 80)
        texts = {"train": " ".join(words), "val": " ".join(words[:50])}
        documents = [Document(split, split, text, True) for split, text in texts.items()]
        token_writer.write_tokens(iter(documents), folder / paths.TOKENS, workers=1)
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
        initialize(model, configuration.from_dict(params()).init, generator(0, "init"))
        save_model(model, folder / paths.INIT)

    def evaluate(self, processes: int, fault: str = "", **changes: Any) -> tuple[int, str]:
        """The stage `evaluate` of the initial model and another one; see `train`."""
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
        initialize(model, configuration.from_dict(params()).init, generator(1, "init"))
        save_model(model, self.folder / paths.MODEL)
        items = [
            {
                "ctx": "on off",
                "ctx_a": "on",
                "ctx_b": "off",
                "activity_label": "walk",
                "label": n % 4,
            }
            | {"endings": [f"{'up ' * (k + n % 3)}in" for k in range(4)]}
            for n in range(9)
        ]
        text = "".join(json.dumps(item) + "\n" for item in items)
        (self.folder / "items.jsonl").write_text(text)
        given = {"evaluate__batch_size": 1, "evaluate__hellaswag": "items.jsonl"}
        return self.end(self.start(processes, fault, "evaluate", **given, **changes))

    def results(self) -> dict[str, float]:
        """What `evaluate` has put on record, to the bit."""
        record = record_file.read(self.folder / paths.record("evaluate"))
        points = {k: v for point in record.of_kind("metrics") for k, v in point["values"].items()}
        return {name: value for name, value in points.items() if "val/" in name}

    def configure(self, processes: int | str, **changes: Any) -> None:
        """Changed settings as in `params`."""
        changes = SMALL | changes | {"distributed__processes": processes}
        OmegaConf.save(OmegaConf.create(params(**changes)), self.folder / "params.yaml")

    def environment(self, fault: str = "") -> dict[str, str]:
        """`fault` as in tests/helpers/rank_job.py."""
        env = {k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "NAIVE")}
        env |= {"PYTHONPATH": str(ROOT), "FAULT": fault.replace("naive", "")}
        return env | ({"NAIVE": "1"} if "naive" in fault else {})

    def start(
        self, processes: int | str, fault: str = "", *stage: str, **changes: Any
    ) -> subprocess.Popen:
        self.configure(processes, **changes)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.rank_job", *stage],
            cwd=self.folder,
            env=self.environment(fault),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, processes: int | str, fault: str = "", **changes: Any) -> tuple[int, str]:
        """(exit code, what was said); no process is left."""
        return self.end(self.start(processes, fault, **changes))

    def end(self, process: subprocess.Popen) -> tuple[int, str]:
        code, said = self.ended(process)
        assert not self.at_work(), said
        return code, said

    def ended(self, process: subprocess.Popen) -> tuple[int, str]:
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def at_work(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.cwd() == str(self.folder.resolve()):
                    found.append(process)
        return found

    def losses(self) -> dict[int, float]:
        """By step; one that was done again came out the same, but for the number of processes."""
        lines = (self.folder / "losses.txt").read_text().splitlines()
        return {int(line.split()[0]): float(line.split()[1]) for line in lines}

    def forget(self) -> None:
        folders.remove(self.folder / ".runs")
        (self.folder / "losses.txt").unlink()

    def status(self) -> dict[str, Any]:
        (found,) = self.folder.glob(".runs/*/run_status.json")
        return json.loads(found.read_text())

    def saved(self) -> list[int]:
        found = sorted(self.folder.glob(".runs/*/checkpoints/step-*"))
        for path in found:
            folders.check(path)
        return [int(path.name.removeprefix("step-")) for path in found]

    def last_event(self) -> dict[str, Any]:
        path = record_file.part(self.folder / paths.record("train"))
        return record_file.read(path)[-1]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("several") / "workspace")


@slow
@pytest.mark.fault(49)
def test_a_rank_that_fails_in_any_way_ends_all_says_why_and_the_same_command_goes_on(
    workspace: Workspace,
) -> None:
    """To the bit, dropout included: its draws are those of seed, step and rank."""
    dropout = {"model__dropout": 0.3}
    assert workspace.train(2, **dropout)[0] == 0
    unbroken = workspace.losses()
    workspace.forget()
    ends = [
        ("1:4:crash", 1, "error: rank 1 of 2 (", "): KeyError: 'a bug'"),
        ("1:5:refuse", 5, "error: rank 1 of 2 (", "): no room on this rank"),
        ("1:7:leave", 1, "error: step 7: rank 1 of 2 (", ") ended without a word"),
        ("1:10:kill", 137, "error: step 10: rank 1 of 2 (", ") was ended by SIGKILL"),
        ("0:11:kill", 137, "error: rank 0 of 2 (process ", ") was ended by SIGKILL"),
    ]
    for fault, code, *words in ends:
        step = int(fault.split(":")[1])
        found, said = workspace.train(2, fault, **dropout)
        assert found == code, said
        assert all(word in said for word in words), said
        assert max(workspace.saved()) == step // 3 * 3
        if not fault.startswith("0"):
            cause = words[1] if code != 137 else "ended without a word"
            assert cause in workspace.status()["message"] and cause in workspace.last_event()["why"]
    code, said = workspace.train(2, **dropout)
    assert code == 0 and "resuming from step 9/14" in said, said
    assert workspace.losses() == unbroken and not workspace.saved()
    workspace.forget()


@slow
@pytest.mark.fault(49, control=True)
def test_without_word_from_the_rank_that_failed_only_a_broken_connection_is_known(
    workspace: Workspace,
) -> None:
    code, _ = workspace.train(2, "1:4:crash,naive")
    assert code == 1
    assert "KeyError" not in workspace.status()["message"]
    workspace.forget()


@slow
@pytest.mark.fault(50)
def test_a_rank_that_hangs_ends_all_within_the_timeout_and_is_named_with_the_step(
    workspace: Workspace,
) -> None:
    code, said = workspace.train(2, "1:4:hang", distributed__timeout=0.1)
    assert code == 1 and "error: step 4: rank 1 of 2 (" in said, said
    assert "gave no answer (within 0.1 min)" in workspace.last_event()["why"]
    assert workspace.saved() == [3]
    workspace.forget()


@slow
@pytest.mark.fault(50, control=True)
def test_within_a_longer_timeout_all_wait_for_the_rank_that_hangs(workspace: Workspace) -> None:
    process = workspace.start(2, "1:4:hang", distributed__timeout=10.0)
    wait_for(lambda: workspace.saved() == [3], 120)
    time.sleep(10)  # longer than the timeout above, which is 6 s
    assert process.poll() is None and len(workspace.losses()) == 4
    for member in workspace.at_work():
        member.kill()
    process.communicate()
    workspace.forget()


@slow
@pytest.mark.fault(51)
@pytest.mark.fault(52)
def test_a_stopped_training_goes_on_with_another_number_of_processes(workspace: Workspace) -> None:
    """Stopped by the launcher's SIGTERM, then by SIGINT to one rank of four, after one step."""
    assert workspace.train(1)[0] == 0
    alone = workspace.losses()
    workspace.forget()
    process = workspace.start(2)
    wait_for(lambda: (workspace.folder / "losses.txt").exists() and 3 in workspace.losses(), 120)
    process.send_signal(signal.SIGTERM)
    code, said = workspace.end(process)
    done = max(workspace.losses()) + 1
    assert code == 143 and f"resumes from step {done}" in said, said
    assert workspace.status()["state"] == "preempted" and workspace.saved()[-1] == done
    code, said = workspace.train(4, "3:9:SIGINT,1:10:SIGTERM")
    assert code == 130 or code == 143, said
    assert "processes: 2 then, 4 now" in said and "not bit-equal" in said
    assert max(workspace.losses()) + 1 == workspace.saved()[-1] in (10, 11)
    code, said = workspace.train(1)
    assert code == 0 and "processes: 4 then, 1 now" in said, said
    assert list(workspace.losses()) == list(range(14))
    assert [workspace.losses()[n] for n in range(14)] == pytest.approx([*alone.values()], rel=1e-5)
    tags = record_file.read(workspace.folder / paths.record("train")).of_kind("tags")
    assert {t["values"].get("distributed.processes") for t in tags} == {None, "2", "4"}
    workspace.forget()


@slow
def test_evaluation_by_two_processes_has_the_bits_of_one_and_their_tag(
    workspace: Workspace,
) -> None:
    code, said = workspace.evaluate(1)
    assert code == 0, said
    alone = workspace.results()
    assert {"val/loss", "init_val/hellaswag_harness_acc", "val/hellaswag_nanogpt_acc"} <= {*alone}
    code, said = workspace.evaluate(2)
    assert code == 0 and "evaluate: by 2 processes" in said, said
    assert workspace.results() == alone
    assert said.count("hellaswag_nanogpt_acc_norm ") == 1  # the first one prints
    tags = record_file.read(workspace.folder / paths.record("evaluate")).of_kind("tags")
    assert "2" in [event["values"].get("evaluate.processes") for event in tags]


@slow
def test_a_rank_that_fails_while_it_evaluates_ends_all_and_says_why(workspace: Workspace) -> None:
    for fault, code, words in [
        ("1:1:crash", 1, "KeyError: 'a bug'"),
        ("1:1:refuse", 5, "no room on this rank"),
        ("1:1:kill", 137, "was ended by SIGKILL"),
    ]:
        found, said = workspace.evaluate(2, fault)
        assert found == code and "rank 1 of 2 (" in said and words in said, said


@slow
def test_a_signal_to_the_first_rank_ends_an_evaluation_though_the_others_wait_in_a_sum(
    workspace: Workspace,
) -> None:
    """They would wait for distributed.timeout, which is longer than `end` waits."""
    code, said = workspace.evaluate(2, "0:1:SIGTERM", distributed__timeout=10.0)
    assert code == 143 and "Traceback" not in said, said


# --- without starting any


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4, 2)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, (2, 4, 0)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0"}, (1, 8, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script, which starts no step
    ],
)
def test_a_process_finds_its_place_where_somebody_has_started_it(
    environment: dict[str, str], expected: tuple[int, int, int] | None
) -> None:
    found = start.place(environment)
    assert (found and (found.ranks.rank, found.ranks.world, found.local)) == expected


def test_auto_is_a_process_a_gpu_and_one_without(make_config, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    asked = make_config(distributed__processes="auto", device="auto")
    assert start.processes(asked) == 8
    assert start.processes(make_config(distributed__processes="auto")) == 1  # on the CPU
    assert start.processes(make_config(distributed__processes=3, device="cuda")) == 3
    with pytest.raises(ConfigError, match="a whole number at least 1, or auto"):
        make_config(distributed__processes="many")


def test_what_several_processes_cannot_do_is_one_error_before_any_starts(
    make_config, monkeypatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(start, "launch", lambda *_: pytest.fail("started"))
    given = make_config(
        distributed__processes=3,
        train__batch_size=4,
        train__accumulate=2,
        debug__interact_at_step=1,
    )
    with pytest.raises(ConfigError) as caught:
        start.run(given, lambda: pytest.fail("began"))
    said = str(caught.value)
    assert "train.batch_size=4 times train.accumulate=2: 8 sequences a step cannot be" in said
    assert "accepted are 1, 2, 4, 8 processes" in said and "debug.interact_at_step=1" in said
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="has no torch.distributed"):
        start.run(make_config(distributed__processes=2), lambda: None)
    begun: list[int] = []
    start.run(make_config(), lambda: begun.append(1))
    assert begun == [1]


def test_more_processes_than_gpus_are_refused(make_config, monkeypatch) -> None:
    monkeypatch.setattr(team, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert team.prepare(make_config(device="cuda"), 1).startswith(("cpu:gloo", "gloo"))
    with pytest.raises(ConfigError, match="process 2 of this machine: it has 2 GPUs"):
        team.prepare(make_config(device="cuda"), 2)
    assert chosen == [1] and team.prepare(make_config(), 7) == "gloo"


def failure(exitcode: int, timestamp: int = 0) -> SimpleNamespace:
    name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    given = {"exitcode": exitcode, "timestamp": timestamp, "pid": 42}
    return SimpleNamespace(**given, signal_name=lambda: name)


@pytest.mark.fault(49)
@pytest.mark.skipif(sys.platform == "win32", reason="no process ends by these signals there")
@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({0: failure(1, 5), 1: failure(-9, 5)}, (137, "rank 1 of 2 (process 42) was ended by")),
        ({0: failure(1, 5), 1: failure(-9, 35)}, (1, "")),  # a rank that hung, and was killed then
        ({0: failure(143, 5), 1: failure(-15, 4)}, (143, "")),  # the launcher ended the rest
        ({0: failure(5, 6), 1: failure(3, 5)}, (3, "")),
        ({1: failure(-15)}, (143, "rank 1 of 2 (process 42) was ended by SIGTERM")),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(
    failures: dict[int, Any], expected: tuple[int, str]
) -> None:
    code, said = start.verdict(failures, 2)
    assert code == expected[0] and said.startswith(expected[1]) and bool(said) == bool(expected[1])


def test_an_error_of_a_process_that_never_met_others_stays_its_own() -> None:
    board, error = team.Board(Ranks(1, 2), 1.0), PeerError("nobody there")
    assert board.settle(error) is error
