"""DVC's views: curves that overlay, figures as images, a page without a network, few metrics."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline import tables
from pipeline.drawing import dvc_plots
from pipeline.training.history import step_metrics
from pipeline.training.loop import StepReport
from stages import common
from tests.conftest import ROOT, Checkout

DVC_YAML = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))
CHARTS = [plot for plot in DVC_YAML["plots"] if isinstance(plot, dict)]
IMAGES = [plot for plot in DVC_YAML["plots"] if isinstance(plot, str)]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
NEEDS = '<p class="missing">'
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("vl_convert") is None, reason=f"{dvc_plots.WHEEL} is not installed"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def curves() -> list[str]:
    """The columns of plots/train.csv, as train writes them."""
    report = StepReport(**{field.name: 1.0 for field in dataclasses.fields(StepReport)})
    return ["step", *(name.rpartition("/")[2] for name in step_metrics(report))]


def test_every_plot_is_drawn_once_from_what_a_stage_makes() -> None:
    outs = {out for stage in DVC_YAML["stages"].values() for out in stage["outs"]}
    assert not [name for name, stage in DVC_YAML["stages"].items() if "plots" in stage]
    sources = [file for chart in CHARTS for plot in chart.values() for file in plot["y"]]
    for file in [*sources, *IMAGES]:
        assert file in outs or any(file.startswith(f"{out}/") for out in outs), file


def test_every_curve_is_a_column_and_has_a_title_and_labels() -> None:
    columns = {"plots/train.csv": curves(), "plots/validation.csv": ["step", "loss"]}
    drawn = set()
    for chart in CHARTS:
        ((title, plot),) = chart.items()
        assert title and plot["y_label"] and plot["x"] == "step"
        assert (ROOT / ".dvc/plots" / plot["template"]).with_suffix(".json").is_file()
        for file, column in plot["y"].items():
            assert column in columns[file], (file, column)
            drawn.add(column)
    asked = {"loss", "learning_rate", "grad_norm", "step_tokens_per_second", "loss_scale"}
    assert asked <= drawn


def test_the_first_columns_are_evaluates_metrics() -> None:
    assert DVC_YAML["metrics"] == ["metrics/evaluate.json", "metrics/train.json"]
    outs = {out for stage in DVC_YAML["stages"].values() for out in stage["outs"]}
    assert set(DVC_YAML["metrics"]) <= outs
    # Those of a stage would come first.
    assert not [name for name, stage in DVC_YAML["stages"].items() if "metrics" in stage]


def test_the_two_kinds_of_charts_differ_in_their_scale_alone() -> None:
    linear, log2 = (
        json.loads((ROOT / f".dvc/plots/{name}.json").read_text("utf-8"))
        for name in ("curve", "curve_log2")
    )
    linear["layer"][0]["encoding"]["y"]["scale"] = {"type": "log", "base": 2}
    assert linear == log2


def test_metrics_for_dvc_are_few_and_counts_have_no_fraction(tmp_path: Path) -> None:
    found = {
        "train/final_loss": 5.4210004,
        "train/skipped_steps": 3.0,
        "train/steps": 200.0,
        "model/parameters": 7e6,
        "val/loss": 5.9,
        "val/choice_acc_norm": 0.25,
        "val/choice_acc_norm_stderr": 0.03,
        "val/choice_acc": 0.25,
        "val/choice_acc_per_token": 0.25,
        "val/choice_count": 200.0,
        "val/unigram_loss": 6.6,
        "init_val/loss": 10.7,
    }
    common.write_metrics(tmp_path / "metrics.json", found)
    text = (tmp_path / "metrics.json").read_text("utf-8")
    assert json.loads(text) == {
        "train": {"final_loss": 5.421, "skipped_steps": 3},
        "val": {"loss": 5.9, "choice_acc_norm": 0.25},
    }
    assert '"skipped_steps": 3\n' in text


def test_a_long_curve_is_thinned_for_the_page_and_keeps_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    tables.write_curve(path, ["step"], [[step] for step in range(19073)])
    steps = [int(line) for line in path.read_text("utf-8").split()[1:]]
    assert len(steps) <= tables.CURVE_POINTS + 1
    assert steps[:3] == [0, 10, 20] and steps[-1] == 19072
    tables.write_curve(path, ["step"], [[step] for step in range(200)])
    assert len(path.read_text("utf-8").split()) == 201


@pytest.fixture
def main_root(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


@needs_wheel
def test_the_script_is_written_once_and_again_for_another_version(main_root, monkeypatch) -> None:
    bundles = iter(["one", "two"])
    monkeypatch.setattr(dvc_plots, "_bundle", lambda: next(bundles))
    dvc_plots.keep_script()
    dvc_plots.keep_script()
    script = main_root / ".dvc/tmp/vega.js"
    assert script.read_text("utf-8").splitlines()[1:] == ["one"]
    monkeypatch.setattr(dvc_plots, "version", lambda wheel: "9.9")
    dvc_plots.keep_script()
    assert script.read_text("utf-8").splitlines()[1:] == ["two"]
    assert [path.name for path in script.parent.iterdir()] == ["vega.js"]


@needs_wheel
def test_a_queued_experiment_keeps_the_script_at_the_main_root(main_root, monkeypatch) -> None:
    monkeypatch.setattr(dvc_plots, "_bundle", lambda: "one")
    aside = main_root / ".dvc/tmp/exps/standalone/tmpabc"
    (aside / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(aside)
    monkeypatch.delenv("DVC_ROOT")
    dvc_plots.keep_script()
    assert (main_root / ".dvc/tmp/vega.js").exists() and not (aside / ".dvc/tmp").exists()


@needs_wheel
def test_a_script_that_cannot_be_had_is_one_warning(main_root, monkeypatch, caplog) -> None:
    def fail() -> str:
        raise ValueError("no bundle")

    monkeypatch.setattr(dvc_plots, "_bundle", fail)
    dvc_plots.keep_script()
    (warning,) = caplog.messages
    assert "DVC's plots will need a network: ValueError: no bundle" in warning
    assert not dvc_plots.script().exists()


def test_a_stage_keeps_the_script_when_its_work_is_done(
    main_root, monkeypatch, make_config
) -> None:
    order: list[str] = []
    monkeypatch.setattr(common.configuration, "load", make_config)
    monkeypatch.setattr(dvc_plots, "keep_script", lambda: order.append("script"))
    common.run(lambda config: order.append("work"))
    assert order == ["work", "script"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dvc plots diff` of two commits, with this repository's plots, templates and settings."""
    repo = Checkout(tmp_path_factory.mktemp("plots"))
    folder = repo.folder
    repo.run("git", "init", "--quiet", "--initial-branch=main")
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
    for name in ("config", ".gitignore"):
        shutil.copyfile(ROOT / ".dvc" / name, folder / ".dvc" / name)
    OmegaConf.save(OmegaConf.create({"plots": DVC_YAML["plots"]}), folder / "dvc.yaml")
    for name, rate in (("alpha", 1), ("beta", 2)):
        write_curves(folder, rate)
        repo.run("git", "add", "--all")
        repo.run("git", "commit", "--quiet", "--message", name)
        repo.run("git", "tag", name)
    said = repo.dvc("plots", "diff", "alpha", "beta")
    assert "ERROR" not in said and "WARNING" not in said, said
    return folder / "dvc_plots/index.html"


def write_curves(folder: Path, rate: int) -> None:
    """Made-up curves, with a step that was skipped and so has no gradient norm."""
    columns = curves()
    rows = [[step, *(rate * (step + 1) for _ in columns[1:])] for step in range(6)]
    rows[2][columns.index("grad_norm")] = float("nan")
    tables.write_csv(folder / "plots/train.csv", columns, rows)
    tables.write_csv(folder / "plots/validation.csv", ["step", "loss"], [[3, rate], [6, rate]])
    for image in IMAGES:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(PIXEL + bytes([rate]))


def test_both_experiments_are_in_every_chart_and_every_image(page: Path) -> None:
    text = page.read_text("utf-8")
    specs = re.findall(r"var spec = (\{.*\});", text)
    titles = [json.loads(spec)["title"]["text"] for spec in specs]
    assert titles == [title for chart in CHARTS for title in chart]
    for spec in specs:
        assert {row["rev"] for row in json.loads(spec)["data"]["values"]} == {"alpha", "beta"}
        assert "<DVC_METRIC" not in spec
    shown = set(re.findall(r'<img src="([^"]+)"', text))
    assert len(shown) == 2 * len(IMAGES)
    assert all((page.parent / image).is_file() for image in shown)


def test_the_page_asks_for_the_local_script_before_those_of_the_network(page: Path) -> None:
    text = page.read_text("utf-8")
    local = text.index('<script src="../.dvc/tmp/vega.js">')
    assert local < text.index('<template id="online">') < text.index("cdn.jsdelivr.net")
    assert "{" + "scripts}" not in text and "{" + "plot_divs}" not in text


def dom(page: Path, profile: Path) -> str:
    """The page in Chromium without a network, charts as SVG so that their marks can be read."""
    svg = "<script>const draw = vegaEmbed; vegaEmbed = (a, b) => draw(a, b, {renderer: 'svg'})"
    copy = page.with_name("svg.html")
    text = page.read_text("utf-8").replace("<main>", f"{svg}</script><main>", 1)
    copy.write_text(text, "utf-8")
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    words += " --disable-background-networking --disable-component-update --dump-dom"
    done = subprocess.run(
        [
            *(str(CHROMIUM), *words.split(), f"--user-data-dir={profile}"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000"),
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        timeout=120,
    )
    return done.stdout


@needs_wheel
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_page_draws_offline_once_a_stage_has_run(page, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(page.parent.parent))
    dvc_plots.keep_script()
    drawn = dom(page, tmp_path)
    charts = re.findall(r'<svg [^>]*class="marks".*?</svg>', drawn, re.DOTALL)
    assert len(charts) == len(CHARTS)
    for chart, plot in zip(charts, CHARTS, strict=True):
        assert {"alpha", "beta"} <= set(re.findall(r">(\w+)</text>", chart))
        ((title, shown),) = plot.items()
        assert title in chart and shown["y_label"] in chart
        lines = re.findall(r'<path [^>]*aria-roledescription="line mark"[^>]* d="M[^"]+L', chart)
        assert len(lines) == 2 * len(shown["y"]), title
    assert NEEDS not in drawn.partition("<body>")[2]


@needs_wheel
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_a_skipped_step_is_a_gap_in_its_curve(page, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(page.parent.parent))
    dvc_plots.keep_script()
    charts = re.findall(r'<svg [^>]*class="marks".*?</svg>', dom(page, tmp_path), re.DOTALL)
    (norms,) = [chart for chart in charts if "Gradient norm" in chart]
    lines = re.findall(r'aria-roledescription="line mark"[^>]* d="([^"]+)"', norms)
    assert [line.count("M") for line in lines] == [2, 2], lines


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_without_network_and_script_every_chart_says_what_it_needs(page, tmp_path) -> None:
    script = page.parent.parent / ".dvc/tmp/vega.js"
    script.unlink(missing_ok=True)
    drawn = dom(page, tmp_path).partition("<body>")[2]
    assert drawn.count(NEEDS) == len(CHARTS)
    assert "<svg" not in drawn
