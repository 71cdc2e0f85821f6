"""The sweep of fp8 against bf16, all of it, on a CPU and tiny; and the table of machines."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import fp8, machines
from pipeline.compute import precision as precision_module
from pipeline.errors import ConfigError

TINY = ["--device", "cpu", "--size", "tiny", "--batch", "2", "--steps", "10", "--layers", "1"]


def test_the_sweep_shows_both_and_goes_on_where_it_ended(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(precision_module, "_cpu_capabilities", lambda: {"avx512_bf16": True})
    made, real = [], fp8.measured

    def ends_early(width, layers, precision, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((width, precision))
        return real(width, layers, precision, *rest)

    monkeypatch.setattr(fp8, "measured", ends_early)
    with pytest.raises(KeyboardInterrupt):
        fp8.main(TINY, tmp_path)
    assert made == [(32, "bf16"), (32, "fp8"), (64, "bf16")]
    assert not (tmp_path / "fp8_gpu.md").exists()
    made.clear()
    fp8.main(TINY, tmp_path)
    assert made == [(64, "fp8")], "what was measured is kept"
    page = (tmp_path / "fp8_gpu.md").read_text("utf-8")
    assert page in capsys.readouterr().out
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[1].strip().isdigit()]
    assert [row[1].strip() for row in rows] == ["32", "64"]
    losses = [float(cell) for row in rows for cell in row[6:8]]
    assert all(4 < loss < 5 for loss in losses) and len(set(losses)) == 4
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        fp8.main([*TINY, "--layers", "2"], tmp_path)
    assert made[0] == (32, "bf16"), "other options are another measurement"


def test_a_card_without_fp8_or_memory_is_told_of(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(precision_module, "_cpu_capabilities", lambda: {"avx512_bf16": True})

    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(fp8.loop, "fit", full)
    fp8.main(TINY, tmp_path)
    page = (tmp_path / "fp8_gpu.md").read_text("utf-8")
    assert "| 32: bf16: out of memory; try a smaller --batch |" in page
    assert "Neither could be measured" in page
    with pytest.raises(ConfigError, match="--steps 3: expected 10 or more"):
        fp8.main(["--device", "cpu", "--steps", "3"], tmp_path)


@pytest.mark.parametrize(
    ("ahead", "said"),
    [
        ({768: False, 1024: False, 1280: True, 1600: True}, "the faster one from width 1,280 on"),
        ({768: True, 1024: False, 1280: False}, "the slower one at the greatest width"),
        ({768: True, 1024: True}, "the faster one from width 768 on"),
    ],
)
def test_the_verdict_is_the_width_from_which_on_fp8_wins(ahead, said) -> None:
    assert said in fp8.verdict(ahead)


def test_a_machine_fills_its_own_column_and_keeps_what_else_it_trained(tmp_path) -> None:
    file = tmp_path / "machines.json"
    facts = {"machine": "m", "versions": "v", "date": "d", "commit": "c", "command": "x"}
    entry = facts | {"bandwidth": 2e9, "rates": {"fp32": 1e9, "bf16": 3e9}}
    machines.fill("old", entry | {"tokens_per_second": {"nano": {"fp32": 10.0}}}, file)
    machines.fill("new", entry | {"tokens_per_second": {"124m": {"bf16": 20.0}}}, file)
    machines.fill("new", entry | {"tokens_per_second": {"124m compiled": {"bf16": 30.0}}}, file)
    assert list(json.loads(file.read_text("utf-8"))) == ["old", "new"]
    lines = machines.table(file).splitlines()
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert heads == ["precision", "old: GFLOP/s", "tokens/s, nano"] + [
        *("new: GFLOP/s", "tokens/s, 124m", "tokens/s, 124m compiled")
    ]
    bf16 = next(line for line in lines if line.startswith("| bf16"))
    cells = [cell.strip() for cell in bf16.strip("|").split("|")]
    assert cells == ["bf16", "3", "-", "3", "20", "30"]
    assert lines[-1].endswith("d at c: x, x")
    newer = entry | {"commit": "e", "tokens_per_second": {"124m": {"bf16": 40.0}}}
    machines.fill("new", newer, file)
    assert "| tokens/s, 124m |\n" in machines.table(file), "figures of one commit alone"
