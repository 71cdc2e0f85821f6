"""The report: what a person sees of a run, of part of one, and of several."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configuration
from pipeline import paths, terminal
from pipeline.__main__ import main as command
from pipeline.diagnostics.doctor import examine
from pipeline.errors import InputError
from pipeline.experiments.comparison import run_of
from pipeline.records.dvc_history import of_workspace
from pipeline.records.record_file import Event
from pipeline.records.run_data import Experiment
from pipeline.records.stage_graph import stages as stages_in_order
from pipeline.reports import curves, report, run_page
from pipeline.storage import digests
from tests.conftest import params, recipe

EVIL = "<script>alert('1')</script><img src=http://example.org/x>"
VOID = {"meta", "img", "line", "br", "input"}
SETTINGS = {
    name: value
    for name, value in configuration.flatten(configuration.from_dict(params())).items()
    if not name.startswith(("tracking.", "checkpoint."))
}
SAME = "1" * 32  # the MD5 of whatever a dvc.lock lists
PIXEL = b"\x89PNG\r\n\x1a\n"  # as much of a PNG as the page looks at


class Seen(HTMLParser):
    """A page as a browser reads it: tags, attributes, text; tags must be closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text, self._open = "", []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.text += data


def head(stage: str, at: int, settings: dict[str, Any]) -> Event:
    return {
        **{"kind": "start", "id": f"{stage}-{at}", "stage": stage, "time": 1_700_000_000_000 + at},
        **{"key": "k", "code": "c0de", "invocation": "1-1", "name": "", "params": settings},
        "git": {"commit": "0123456789abcdef", "branch": "main", "dirty": "true"},
        "environment": {"python": "3.11.7", "host": "lathe", "cores": "2"},
    }


def metrics(step: int, **values: float) -> Event:
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return {"kind": "metrics", "time": 1, "step": step, "values": named}


def tags(**values: str) -> Event:
    return {"kind": "tags", "values": {k.replace("__", "."): v for k, v in values.items()}}


def training(steps: int = 60, shift: float = 0.0, grows: bool = False) -> list[Event]:
    found = [tags(digest__train="abc", precision__effective="fp32", env__torch="2.13.0")]
    for step in range(steps):
        norm = 1.0 if not grows or step < steps - 10 else 500.0
        values = {"train/loss": 10 - step / 20 + shift, "train/grad_norm": norm}
        values |= {"train/learning_rate": 1e-3, "train/loss_scale": 1.0, "train/skipped": 0.0}
        found.append(
            metrics(
                step, **values, perf__step_tokens_per_second=900.0 + step, perf__step_seconds=1.0
            )
        )
    found.append(metrics(steps - 1, train__val_loss=8.0 + shift))
    summary = {"train/steps": float(steps), "train/skipped_steps": 0.0}
    speed = {"perf/tokens_per_second": 950.0, "perf/peak_memory_mib": 512.0}
    return [*found, metrics(steps, **summary, **speed)]


def evaluation(shift: float = 0.0) -> list[Event]:
    values = {"val/unigram_loss": 6.606, "init_val/loss": 10.77, "val/loss": 5.92 + shift}
    values |= {"init_val/bits_per_byte": 4.439, "val/bits_per_byte": 2.44, "val/perplexity": 372.6}
    values |= {"val/choice_count": 200.0, "init_val/choice_acc_norm": 0.24}
    values |= {"val/choice_acc_norm": 0.25, "val/choice_acc_norm_stderr": 0.03062}
    return [metrics(60, **values)]


def tokenized() -> list[Event]:
    named = {"kind": "dataset", "name": "tokens", "source": "python-docs"}
    return [
        {**named, "digest": "d1" * 32, "context": "train"},
        metrics(0, data__train_tokens=671837.0, data__train_documents=613.0),
    ]


def chain(
    settings: dict[str, Any] | None = None, shift: float = 0.0, grows: bool = False, at: int = 0
) -> dict[str, list[Event]]:
    """The records of a whole run, without artifacts."""
    body = {
        "tokenize": tokenized(),
        "train": training(shift=shift, grows=grows),
        "evaluate": evaluation(shift),
    }
    used = SETTINGS | (settings or {})
    return {
        stage: [
            head(stage, at + n, used),
            *body.get(stage, []),
            metrics(0, **{f"time/{stage}_seconds": 10.0 + n}),
            {"kind": "end", "status": "FINISHED", "time": 2},
        ]
        for n, stage in enumerate(stages_in_order())
    }


def artifact(path: Path) -> Event:
    kept = {"path": path.as_posix(), "sha256": digests.tree_digest(path), "bytes": 1}
    return {"kind": "artifact", "folder": "x", **kept}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/nano.yaml").write_text(recipe(), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def keep(found: dict[str, list[Event]], *parts: str) -> None:
    """As a stage leaves its record; those in `parts` unfinished."""
    paths.RECORDS.mkdir(exist_ok=True)
    for stage, events in found.items():
        suffix = ".jsonl.part" if stage in parts else ".jsonl"
        text = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
        paths.record(stage).with_suffix(suffix).write_text(text, "utf-8")


def sampled(prompt: str, before: str, after: str) -> None:
    texts = [("before", before), ("after", after)]
    lines = [{"when": w, "prompt": prompt, "text": t, "tokens": [1]} for w, t in texts]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    paths.SAMPLES_JSONL.parent.mkdir(exist_ok=True)
    paths.SAMPLES_JSONL.write_text(text, "utf-8")


def studied(text: str) -> None:
    paths.NUMERICS.mkdir(parents=True, exist_ok=True)
    for name in ("formats", "sensitivity", "products", "operations"):
        (paths.NUMERICS / f"{name}.md").write_text(text, "utf-8")
    for name in ("formats", "error_and_speed", "roofline"):
        (paths.NUMERICS / f"{name}.png").write_bytes(PIXEL)


def of(found: dict[str, list[Event]]) -> str:
    return report.of_one(Experiment("workspace", "", found), Path())


def test_the_page_of_a_run_says_how_it_went(workspace: Path) -> None:
    seen = Seen(of(chain({"train.lr": 0.005})))
    for words in (
        *(
            "repro-k",
            "Validation loss 5.92 (guessing by word frequency: 6.61), 60 steps, 0:00:12.",
            "no problems found",
            "10.770 → 5.920",
            "4.439 → 2.440",
            "372.6",
            "0.24 → 0.25 ± 0.03 over 200 items (chance 0.25)",
        ),
        *("950", "512", "0:01:15", "671,837", "d1d1d1", "lathe", "0123456789 (dirty)", "2.13.0"),
        *("1 differ from recipes/nano.yaml", "0.005", "c0de"),
    ):
        assert words in seen.text, words
    described = [value for _, name, value in seen.attributes if name == "aria-label"]
    assert len(described) == 4 and "10 at step 0" in described[0]


def test_findings_stand_with_their_evidence_and_advice(workspace: Path) -> None:
    sick = chain(grows=True)
    found = examine(Experiment("workspace", "", sick))
    assert found, "the doctor finds something here"
    seen = Seen(of(sick))
    assert "no problems found" not in seen.text
    for finding in found:
        for words in (finding.rule, finding.verdict, finding.evidence, finding.advice):
            assert words in seen.text


def test_texts_of_models_and_settings_stay_text(workspace: Path) -> None:
    hostile = chain({"init.hf_model": EVIL, "sample.prompts": [EVIL, "line\u2028two"]})
    hostile["train"].insert(1, tags(device__name=EVIL, env__torch=EVIL, digest__train=EVIL))
    hostile["tokenize"].insert(1, {**tokenized()[0], "source": EVIL})
    sampled(EVIL, f"{EVIL}\x00\x1b]0;title\x07 \u202e", "plain")
    studied(f"# T\n\n{EVIL}\n\n| a |\n|---|\n| {EVIL} |\n\n![i](http://example.org/i.png)\n")
    for stage, path in (("sample", paths.SAMPLES_JSONL), ("numerics", paths.NUMERICS)):
        hostile[stage].insert(1, artifact(path))
    hostile["train"][0]["name"] = hostile["sample"][0]["name"] = EVIL
    page = of(hostile)
    seen = Seen(page)
    assert seen.text.count("alert('1')") > 8
    assert page == terminal.shown(page) and r"\x00\x1b]0;title\x07 \u202e" in page
    assert_whole(page)


def assert_whole(page: str) -> None:
    """Nothing in the page is loaded from anywhere, and every link leads into it."""
    seen = Seen(page)
    assert not {"link", "iframe", "object", "base", "form"} & set(seen.tags)
    for tag, name, value in seen.attributes:
        if name in ("src", "srcset", "poster", "data", "action", "background"):
            assert value.startswith("data:"), (tag, name, value[:80])
        assert name not in ("href", "xlink:href") or value.startswith("#"), (tag, value)
        outside = "url(" in value.replace("url(#", "")
        assert not name.startswith("on") and not outside, (tag, name, value[:80])
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert seen.tags.count("script") == 1 and f"script-src 'sha256-{digest}';" in page
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert style and "url(" not in style and "@import" not in style


def test_a_page_needs_nothing_outside_itself(workspace: Path) -> None:
    assert_whole(of(chain()))
    a, b = (Experiment(n, n, chain({"train.lr": lr})) for n, lr in (("a", 0.1), ("b", 0.2)))
    assert_whole(report.of_several([a, b], [a, b], Path()))


def test_the_same_records_give_the_same_bytes(workspace: Path) -> None:
    sampled("Once", " upon", " a time")
    again = chain()
    again["sample"].insert(1, artifact(paths.SAMPLES_JSONL))
    assert of(again) == of(json.loads(json.dumps(again)))


def test_samples_stand_side_by_side_before_and_after(workspace: Path) -> None:
    sampled("Once", " noise", " a time\n\n\n \n\nlater")
    found = chain()
    found["sample"].insert(1, artifact(paths.SAMPLES_JSONL))
    text = Seen(of(found)).text
    assert text.index("Once") < text.index("before noise") < text.index("after a time")
    assert " a time4 blank lineslater" in text
    sampled("Once", " of another run", "")
    text = Seen(of(found)).text
    assert "another run" not in text and "samples are neither in this workspace nor" in text


def test_a_study_is_shown_only_as_this_run_wrote_it(workspace: Path) -> None:
    studied("# Products\n\n| a | b |\n|---|--:|\n| mine | 1 |\n")
    found = chain()
    found["numerics"].insert(1, artifact(paths.NUMERICS))
    page = of(found)
    assert page.count("<td>mine</td>") == 4 and page.count("data:image/png;base64,") == 3
    studied("# Products\n\nof another run\n")
    text = Seen(of(found)).text
    assert "another run" not in text
    assert "Not all of artifacts/numerics is kept as this run wrote it" in text


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_a_chain_that_ends_early_says_what_is_missing(workspace: Path, stages: int) -> None:
    names = list(stages_in_order())
    text = Seen(of({stage: chain()[stage] for stage in names[:stages]})).text
    for stage in names:
        assert (f"{stage} has no record of this run" in text) == (stage in names[stages:])
    assert ("nothing trained yet" in text) == (stages < 3)
    assert "671,837" in text


def test_a_training_that_failed_shows_how_far_it_came_and_no_former_evaluation(
    workspace: Path, caplog
) -> None:
    former, failed = chain(), chain(at=100)["train"][:20]
    failed.insert(1, tags(debug__why="step 18: the loss is nan"))
    failed.append({"kind": "end", "status": "FAILED", "time": 3})
    keep({**former, "train": failed}, "train")
    found = of_workspace(workspace)
    assert set(found.records) == {"tokenize", "import_hf_weights", "numerics", "train"}
    assert "records/evaluate.jsonl is of a former run; left out" in caplog.text
    text = Seen(report.of_one(found, workspace)).text
    assert "train failed (step 18: the loss is nan)" in text
    assert "5.920" not in text and "10.000 → 9.150" in text


def test_a_record_cut_short_while_a_stage_is_at_work_is_read(workspace: Path) -> None:
    told = {"sample.prompts": ["one\u2028prompt"]}  # a line of text, none of the record
    keep({"train": chain(told, at=100)["train"][:20]}, "train")
    part = paths.record("train").with_suffix(".jsonl.part")
    part.write_text(part.read_text("utf-8") + '{"kind": "metr', "utf-8")
    found = of_workspace(workspace)
    assert len(found.values("train/loss")) == 18
    assert "at work, or was killed" in Seen(report.of_one(found, workspace)).text


def test_an_unfinished_record_of_long_ago_is_no_part_of_the_run(workspace: Path) -> None:
    newer = chain(at=100)
    del newer["sample"]
    keep({**newer, "sample": chain()["sample"][:1]}, "sample")
    assert "sample" not in of_workspace(workspace).records


@pytest.mark.parametrize(
    ("setting", "gone"),
    [
        ("train.lr", {"evaluate", "sample"}),
        ("corpus.pattern", {"train", "evaluate", "sample"}),
        ("sample.seed", set()),
        ("evaluate.batch_size", {"sample"}),
    ],
)
def test_a_record_that_was_made_under_other_settings_upstream_is_left_out(
    workspace: Path, setting: str, gone: set[str]
) -> None:
    """As after `dvc repro train` with another learning rate."""
    values = {"corpus.pattern": ("*.md", "*.txt")}.get(setting, (3, 4))
    new, old = (chain({setting: v}, at=at) for v, at in zip(values, (100, 0), strict=True))
    keep({s: old[s] if s in gone else new[s] for s in stages_in_order()})
    assert set(stages_in_order()) - set(of_workspace(workspace).records) == gone


def lock_of(workspace: Path, tokens: str) -> dict[str, Any]:
    """A dvc.lock with the records that lie there, whose `train` read these tokens."""

    def listed(md5s: dict[str, str]) -> list[dict[str, str]]:
        return [{"path": path, "md5": md5} for path, md5 in md5s.items()]

    locked = {}
    records = {paths.record(name).as_posix() for name in stages_in_order()}
    md5s = {path: digests.dvc_md5(workspace / path) for path in records}
    for name, stage in stages_in_order().items():
        deps = {dep: md5s.get(dep, SAME) for dep in stage.deps}
        if name == "train":
            deps["data/tokens"] = tokens
        outs = {out: md5s.get(out, SAME) for out in stage.outs}
        locked[name] = {"deps": listed(deps), "outs": listed(outs)}
    return {"schema": "2.0", "stages": locked}


@pytest.mark.parametrize(
    ("tokens", "touched", "gone"),
    [
        (SAME, "", set()),
        ("2" * 32, "", {"train", "evaluate", "sample"}),
        (SAME, "train", {"train", "evaluate", "sample"}),
    ],
    ids=["the same tokens", "other tokens", "a record that is not the lock's"],
)
def test_a_training_that_dvc_gave_for_the_same_tokens_counts_though_the_corpus_was_moved(
    workspace: Path, tokens: str, touched: str, gone: set[str]
) -> None:
    """Tokenized again from another folder; the record of the training names the one of before."""
    before, moved = (chain({"corpus.path": path}) for path in ("data/corpus", "/elsewhere"))
    keep({**before, "tokenize": moved["tokenize"]})
    (workspace / "dvc.lock").write_text(json.dumps(lock_of(workspace, tokens)), "utf-8")
    if touched:  # the same stage once more, by hand
        keep({touched: [*before[touched][:-1], metrics(1, more=1.0), before[touched][-1]]})
    assert set(stages_in_order()) - set(of_workspace(workspace).records) == gone


def test_dvc_vouches_for_no_evaluation_that_was_made_with_another_setting_of_its_own(
    workspace: Path,
) -> None:
    before, now = (chain({"device": device}) for device in ("auto", "cpu"))
    kept = {stage: before[stage] for stage in ("tokenize", "import_hf_weights", "evaluate")}
    keep({**now, **kept})
    (workspace / "dvc.lock").write_text(json.dumps(lock_of(workspace, SAME)), "utf-8")
    assert "evaluate" not in of_workspace(workspace).records


def test_several_runs_show_what_differs_best_first_and_the_noise_in_words(workspace: Path) -> None:
    runs = {
        "base": chain({"train.seed": 1}),
        "seed": chain({"train.seed": 2}, shift=0.02, at=10),
        "rate": chain({"train.seed": 1, "train.lr": 0.009}, shift=-0.5, at=20),
    }
    found = [Experiment(name, name, events) for name, events in runs.items()]
    page = report.of_several(found, found, Path())
    text = Seen(page).text
    best = "Best is rate with a validation loss of 5.42\nnats/token; the baseline is base."
    assert best in text
    outcomes = text[text.index("nats/token), best first") : text.index("Settings that differ")]
    table = outcomes[: outcomes.index("nats/token from")]
    assert table.index("rate") < table.rindex("base") < table.index("seed")
    assert "-0.5 nats/token from base, beyond two std of the noise of 2 seeds" in outcomes
    assert "first more than 1% apart at step 0" in outcomes
    assert "another seed of the same settings" in outcomes
    differ = text[text.index("Settings that differ") : text.index("Curves over one another")]
    assert "train.lr" in differ and "0.009" in differ and "train.seed" in differ
    assert "train.steps" not in differ and "precision" not in differ
    assert page.count('<details class="run">') == 3


def test_a_run_without_a_finished_training_is_named_and_the_others_compared(
    workspace: Path,
) -> None:
    broken = {stage: chain()[stage] for stage in ("tokenize", "import_hf_weights")}
    runs = {"broken": broken, "a": chain(), "b": chain({"precision": "bf16"}, shift=0.1, at=9)}
    found = [Experiment(name, name, events) for name, events in runs.items()]
    text = Seen(report.of_several(found, found, Path())).text
    assert "Without a finished training, and so not compared: broken." in text
    assert "+0.1 nats/token from a" in text
    alone = [Experiment("x", "x", broken), Experiment("y", "y", broken)]
    text = Seen(report.of_several(alone, alone, Path())).text
    assert "Outcomes" not in text and "Curves" not in text and "these runs have the same" in text


def test_other_code_and_other_data_are_said(workspace: Path) -> None:
    edited = chain()
    edited["train"][0]["code"] = "other"
    edited["train"][1] = tags(digest__train="elsewhere")
    found = [Experiment("a", "a", chain()), Experiment("b", "b", edited)]
    text = Seen(report.of_several(found, found, Path())).text
    assert "2 versions of the code" in text and "2 sets of training tokens" in text


def test_curves_of_a_run_are_those_that_it_recorded() -> None:
    usual = chain()

    def titles(found: dict[str, list[Event]]) -> list[str]:
        return [p.title for p in curves.charts([(Experiment("a", "", found), curves.ALONE)])]

    assert titles(usual) == ["Loss while training", "Gradient norm", "Learning rate", "Speed"]
    usual["train"].insert(2, tags(precision__effective="fp16"))
    assert titles(usual)[-1] == "Loss scale"
    assert titles({"tokenize": usual["tokenize"]}) == []


def test_long_curves_keep_their_extremes_and_keep_the_page_light(workspace: Path) -> None:
    points = [(float(step), float(step % 2)) for step in range(100_000)]
    odd = {41_111: 9.0, 52_222: -9.0, 63_333: math.nan, 74_444: math.inf}
    for step, value in odd.items():
        points[step] = (float(step), value)
    thinned = curves.thin(points)
    assert 400 <= len(thinned) <= 402 and thinned == sorted(thinned)
    assert {step for step, _ in thinned} > set(odd), "neither a spike nor a NaN is thinned away"
    assert curves.thin(points[:400]) == points[:400]
    long = chain()
    long["train"][1:-2] = training(steps=20_000)
    assert len(of(long)) < 400_000


@pytest.mark.parametrize(
    ("title", "key", "is_log"),
    [("Loss while training", "train/loss", False), ("Gradient norm", "train/grad_norm", True)],
)
def test_the_script_can_read_a_curves_values_off_its_picture(
    title: str, key: str, is_log: bool
) -> None:
    """As report.js does: a corner of the path, the limits of the axes, the step and the value."""
    run = Experiment("a", "", chain(grows=True))
    (drawn,) = (p for p in curves.charts([(run, curves.ALONE)]) if p.title == title)
    plot = json.loads(drawn.plot)
    assert plot["names"]["curve0"] == "smoothed"
    (path,) = re.findall(r'class="raw0">\s*<path d="([^"]+)"', drawn.image)
    left, bottom, right, top, first, last, low, high, said = plot["limits"]
    assert said == is_log
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn.image)[0])
    read = []
    for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path):
        across = (float(x) / width - left) / (right - left)
        up = (1 - float(y) / height - bottom) / (top - bottom)
        value = low * (high / low) ** up if is_log else low + (high - low) * up
        read.append((first + across * (last - first), value))
    assert len(read) == 60
    for (step, value), (at, true) in zip(read, run.curves[key], strict=True):
        assert (step, value) == pytest.approx((at, true), rel=1e-4, abs=1e-3)


def test_a_smoothed_curve_has_the_means_and_leaves_out_what_is_not_finite() -> None:
    points = [(step, float(step)) for step in range(400)]
    straight = dict(curves.smooth(points))
    assert len(straight) == 200 and straight == pytest.approx(dict(points[::2]), abs=5)
    assert straight[0] == 0 and straight[200] == 200, "neither a lag nor a lower start"
    points[100] = (100, math.nan)
    assert dict(curves.smooth(points))[100] == 100
    assert curves.smooth(points[:39]) == points[:39]


def test_of_many_runs_the_curves_are_drawn_together_alone(workspace: Path) -> None:
    several = [Experiment(f"e{n}", f"e{n}", chain({"train.lr": n / 100})) for n in range(1, 18)]
    few, many = (report.of_several(found, found, Path()) for found in (several[:2], several))
    assert few.count(">Gradient norm") == 3 and "draws those of one" not in few
    assert many.count(">Gradient norm") == 1 and "draws those of one" in many


def test_every_run_has_a_look_of_its_own_the_later_the_thinner() -> None:
    looks = curves.styles(28)
    assert len({(look.colour, look.dashes) for look in looks}) == 28
    widths = [look.width for look in looks]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 28


def test_an_unknown_name_is_one_error_that_lists_the_known_ones() -> None:
    found = [Experiment("a", "x", chain()), Experiment("lost", "y", {})]
    with pytest.raises(InputError, match=r"^b, lost: no run of that name; there are: a$"):
        report.choose(found, ["a", "b", "lost"])


def test_of_two_experiments_of_one_name_the_newest_is_meant() -> None:
    old, new = Experiment("a", "x", chain()), Experiment("a", "y", chain(at=9))
    assert report.choose([new, old], ["a", "a"]) == [new]


def test_all_is_the_workspace_first_and_not_twice() -> None:
    a, b = Experiment("a", "x", chain(at=50)), Experiment("b", "y", chain(at=9))
    lost = Experiment("lost", "z", {})
    assert report.all_of([a, lost, b, Experiment("workspace", "", chain())]) == [
        *("workspace", "b", "a"),
    ]
    assert report.all_of([a, b, Experiment("workspace", "", chain(at=50))]) == ["a", "b"]
    assert report.all_of([lost, b, Experiment("workspace", "", {})]) == ["b"]


def test_all_begins_with_the_newest_run_of_its_commits_settings() -> None:
    runs = [Experiment(name, name, chain(at=at)) for at, name in enumerate("abc")]
    for run, changed in zip(runs, ({}, {}, {"train.lr": [1, 2]}), strict=True):
        for record in run.records.values():
            record[0]["parent"] = {"settings": "s", "changed": changed}
    assert report.all_of(runs) == ["b", "a", "c"]


def test_beside_others_the_workspaces_run_has_its_rows_name(workspace: Path) -> None:
    found = [Experiment("a", "x", chain()), Experiment("workspace", "", chain(shift=0.1, at=9))]
    text = Seen(report.of_several(found, found, Path())).text
    assert "repro-k (workspace): +0.1 nats/token from a" in text


def test_the_command_writes_the_workspaces_page(workspace: Path, caplog) -> None:
    caplog.set_level("INFO")
    keep(chain())
    command(["report"])
    assert Seen((workspace / "report.html").read_text("utf-8")).text.count("no problems found") == 1
    assert f"report: {workspace / 'report.html'}" in caplog.text
    command(["report", "--out", str(workspace / "new/page.html")])
    assert (workspace / "new/page.html").read_bytes() == (workspace / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 3, "nothing trained yet: `dvc repro` or `make repro` trains"),
        (["--all", "x"], 2, ""),
    ],
)
def test_what_cannot_be_shown_ends_in_one_message(
    workspace: Path, caplog, words: list[str], code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(["report", *words])
    assert ended.value.code == code and message in caplog.text


def test_a_page_that_cannot_be_written_is_one_message(workspace: Path, caplog) -> None:
    keep(chain())
    with pytest.raises(SystemExit) as ended:
        command(["report", "--out", str(workspace)])
    assert ended.value.code == 5 and f"error: --out {workspace}: " in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, 1e299, None])
def test_no_value_of_a_metric_stops_a_page_or_a_comparison(value: float | None) -> None:
    keys = {key for record in chain().values() for e in record for key in e.get("values", {})}
    for key in keys:
        found = chain()
        for event in (e for record in found.values() for e in record if e["kind"] == "metrics"):
            if key in event["values"]:
                event["values"] |= {key: value}
                if value is None:
                    del event["values"][key]
        one = Experiment("odd", "x", found)
        assert run_page.RunPage(one, Path(), {}, draw=False).name == "odd"
        run_of(one)


def test_the_smoothed_curves_of_a_fork_and_its_parent_coincide_where_the_steps_are_shared() -> None:
    def trained(name: str, own: str, steps: int, *lineage: dict[str, Any]) -> Experiment:
        head = {"kind": "start", "stage": "train", "id": own * 32, "time": 1, "params": {}}
        tags = {"kind": "tags", "values": {"fork.lineage": json.dumps(lineage)}}
        losses = [
            {"kind": "metrics", "step": n, "values": {"train/loss": math.sin(n)}}
            for n in range(steps)
        ]
        return Experiment(name, "", {"train": [head, tags, *losses]})

    long, alone = trained("long", "a", 600), trained("alone", "c", 90)
    fork = trained("h125", "b", 125, {"name": "long", "step": 100, "record": "a" * 32})
    assert curves.relatives_steps([fork, long, alone]) == [600, 600, 90]
    whole = dict(curves.smooth(long.curves["train/loss"]))
    part = dict(curves.smooth(fork.curves["train/loss"], 600))
    shared = [step for step in part if step in whole and step < 100]
    assert len(shared) > 20 and all(part[step] == whole[step] for step in shared)
    assert dict(curves.smooth(fork.curves["train/loss"]))[60] != whole[60]
