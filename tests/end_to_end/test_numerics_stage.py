"""The numerics stage: what it leaves for people, for DVC and for the row."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator

import pytest

from pipeline import config as configuration
from pipeline import paths
from pipeline.records import record_file
from pipeline.storage import digests
from pipeline.studies import roofline
from stages import numerics
from tests.conftest import NoCourier, params
from tests.end_to_end.test_stages import SMALL


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What the stage says; inside, the working directory is the one that it ran in."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("numerics")
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        patch.setattr(numerics.recording, "Courier", NoCourier)
        patch.setattr(roofline, "SQUARE", {"cpu": 64})
        patch.setattr(roofline, "STREAM_BYTES", {"cpu": 1 << 16})
        (folder / paths.NUMERICS).mkdir(parents=True)
        stale = folder / paths.NUMERICS / "stale.txt"
        stale.write_text("of an earlier run")
        stale.chmod(0o444)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            config = configuration.from_dict(params(**SMALL, train__batch_size=1))
            numerics.main(config)
        yield said.getvalue()


def test_every_table_stands_beside_its_figure_and_all_go_to_the_row(ran: str) -> None:
    names = {p.name for p in paths.NUMERICS.iterdir()}
    for name in ("formats", "sensitivity", "products", "operations"):
        assert {f"{name}.csv", f"{name}.md"} <= names
    assert {"formats.png", "error_and_speed.png", "roofline.png"} <= names
    events = record_file.read(paths.record("numerics"))
    (artifact,) = [e for e in events if e["kind"] == "artifact"]
    assert (artifact["path"], artifact["folder"]) == ("artifacts/numerics", "numerics")
    assert artifact["sha256"] == digests.tree_digest(paths.NUMERICS)


def test_metrics_compare_every_mode(ran: str) -> None:
    found = json.loads((paths.NUMERICS / "numerics.json").read_text("utf-8"))["numerics"]
    for mode in ("fp32", "tf32", "bf16", "fp16"):
        assert {f"{mode}_gflops", f"{mode}_speed", f"{mode}_error"} <= found.keys()
        assert f"\n{mode} " in ran
    assert found["fp32_speed"] == 1 and found["fp32_error"] < found["bf16_error"]
    assert "bandwidth_gb_per_second" in found


def test_what_an_earlier_run_left_is_gone(ran: str) -> None:
    assert not (paths.NUMERICS / "stale.txt").exists()
