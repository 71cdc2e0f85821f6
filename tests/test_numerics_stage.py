"""The numerics stage: what it leaves for people, for DVC and for the row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import paths, records, roofline
from stages import numerics
from tests.test_stages import SMALL, _NoShipper


@pytest.fixture
def ran(make_config, tmp_path: Path, monkeypatch, capsys) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(numerics.tracking, "Shipper", _NoShipper)
    monkeypatch.setattr(roofline, "SQUARE", {"cpu": 64})
    monkeypatch.setattr(roofline, "STREAM_BYTES", {"cpu": 1 << 16})
    numerics.main(make_config(**SMALL, train__batch_size=1))
    return capsys.readouterr().out


def test_every_table_stands_beside_its_figure_and_all_go_to_the_row(ran: str) -> None:
    names = {p.name for p in paths.NUMERICS.iterdir()}
    for name in ("formats", "sensitivity", "products", "operations"):
        assert {f"{name}.csv", f"{name}.md"} <= names
    assert {"formats.png", "error_and_speed.png", "roofline.png"} <= names
    events = records.read(paths.record("numerics"))
    (artifact,) = [e for e in events if e["kind"] == "artifact"]
    assert (artifact["path"], artifact["folder"]) == ("artifacts/numerics", "numerics")
    assert artifact["sha256"] == records.tree_digest(paths.NUMERICS)


def test_metrics_compare_every_mode(ran: str) -> None:
    found = json.loads((paths.METRICS / "numerics.json").read_text("utf-8"))["numerics"]
    for mode in ("fp32", "tf32", "bf16", "fp16"):
        assert {f"{mode}_gflops", f"{mode}_speed", f"{mode}_error"} <= found.keys()
        assert f"\n{mode} " in ran
    assert found["fp32_speed"] == 1 and found["fp32_error"] < found["bf16_error"]
    assert "bandwidth_gb_per_second" in found


def test_a_second_run_replaces_the_folder(ran: str, make_config) -> None:
    stale = paths.NUMERICS / "stale.txt"
    stale.write_text("of an earlier run")
    stale.chmod(0o444)
    numerics.main(make_config(**SMALL, train__batch_size=1))
    assert not stale.exists()
