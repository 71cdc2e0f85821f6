"""Records that somebody else wrote: what is not as it should be is left out, the rest is whole."""

from __future__ import annotations

import copy
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import paths
from pipeline.__main__ import main as command
from pipeline.diagnostics import doctor
from pipeline.errors import InputError
from pipeline.experiments import comparison, sync
from pipeline.records import dvc_history, record_file, record_reader
from pipeline.records.record_file import Record
from pipeline.records.record_reader import RecordError
from pipeline.records.run_data import Experiment, Log
from pipeline.reports import report, run_page
from pipeline.storage.digests import tree_digest
from pipeline.tracking import mlflow_run, mlflow_store, mlflow_ui

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Events = list[dict[str, Any]]
ESC = "\x1b]0;title\x07"
IMAGE = "![x](http://127.0.0.1:9/t.png)"
STAGES = ("tokenize", "import_hf_weights", "train", "evaluate", "numerics", "sample")
SHA = "a" * 64


@pytest.fixture
def chain(own_store: Path, make_config) -> dict[str, Events]:
    """The events of a small run's records, by stage, with every kind of event."""
    config = make_config(tracking__checkpoints="all")
    for place in ("model", "last"):
        folder = paths.ARTIFACTS / place
        folder.mkdir(parents=True)
        (folder / "file").write_text(place, "utf-8")
    for stage in STAGES:
        record = Record(stage, config)
        record.dataset("tokens", SHA, "data/tokens/train.bin", "train")
        record.tags({"device.name": "cpu", f"digest.{stage}": SHA})
        if stage == "train":
            for step in range(3):
                record.metrics({"train/loss": 3 - step / 4, "train/grad_norm": 1.0}, step)
            record.metrics({"train/skipped_steps": 0.0, "perf/peak_memory_mib": 9.0}, 2)
            record.metrics({"perf/tokens_per_second": 900.0}, 2)
            record.checkpoint("best", paths.MODEL, 3)
            record.artifact(paths.LAST, "study")
        record.close("FINISHED")
    return {
        stage: list(map(dict, record_file.read(paths.record(stage), stage))) for stage in STAGES
    }


def lines(events: Events) -> list[bytes]:
    return [json.dumps(event).encode() + b"\n" for event in events]


def mutated(
    chain: dict[str, Events], change: Callable[[str, Events], Any], name: str = ""
) -> dict[str, Any]:
    """Another run's records, of an experiment of this name: the lines by stage, changed."""
    found = {}
    own = uuid.uuid4().hex
    for stage, events in copy.deepcopy(chain).items():
        events[0] |= {"id": uuid.uuid4().hex, "key": own, "name": name}
        events[0]["invocation"] = f"{own[:5]}-1.00"
        made = change(stage, events)
        found[stage] = made if isinstance(made, list) else lines(events)
    return found


# --- the mutations: what a colleague's record may hold


def head(name: str, value: Any, only: str = "") -> Callable[[str, Events], Any]:
    """A field of the start event, set; `a/b` is a field of a field."""

    def change(stage: str, events: Events) -> None:
        *above, last = name.split("/")
        place = events[0]
        for part in above:
            place = place[part]
        if only in ("", stage):
            place[last] = value

    return change


def point(value: Any, step: Any = 1) -> Callable[[str, Events], Any]:
    def change(stage: str, events: Events) -> None:
        for event in events:
            if event["kind"] == "metrics" and "train/loss" in event["values"]:
                event["values"]["train/loss"], event["step"] = value, step

    return change


def more(kind: str, **fields: Any) -> Callable[[str, Events], Any]:
    """One more event in the training's record."""

    def change(stage: str, events: Events) -> None:
        if stage == "train":
            events.insert(-1, {"kind": kind} | fields)

    return change


def artifact(path: Any, folder: Any = "x", sha256: str = SHA) -> Callable[[str, Events], Any]:
    return more("artifact", path=path, folder=folder, sha256=sha256, bytes=1)


def checkpoint(**fields: Any) -> Callable[[str, Events], Any]:
    whole = {"name": "best", "step": 3, "path": "artifacts/model", "sha256": SHA, "md5": "0" * 32}
    return more("checkpoint", **whole | fields)


def text(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[str, Events], Any]:
    return lambda stage, events: change(lines(events)) if stage == "train" else None


def end(**fields: Any) -> Callable[[str, Events], Any]:
    return lambda stage, events: events[-1].update(fields) if stage == "train" else None


REFUSED: dict[str, Callable[[str, Events], Any]] = {
    "metric is text": point("abc"),
    "metric is null": point(None),
    "metric is a list": point([1]),
    "metric is true": point(True),
    "metric of 400 digits": point(10**400),
    "metric is too large": point(-1e308),
    "step is text": point(1.0, "x"),
    "step is negative": point(1.0, -5),
    "step 2**70": point(1.0, 2**70),
    "step is a fraction": point(1.0, 1.5),
    "metric's name leads elsewhere": more("metrics", time=1, step=1, values={"../x": 1.0}),
    "time is text": head("time", "x"),
    "time is negative": head("time", -(10**15)),
    "time is huge": head("time", 10**30),
    "time is null": head("time", None),
    "id is a list": head("id", [1]),
    "id with a quote": head("id", "a' or '1'='1"),
    "id of 1 MB": head("id", "i" * (1 << 20)),
    "key with a quote": head("key", "x' OR tags.a = 'b"),
    "name of 1 MB": head("name", "n" * (1 << 20)),
    "name is a mapping": head("name", {}),
    "name is half a pair": head("name", "\ud800"),
    "experiment ../..": head("experiment", "../../../escape"),
    "experiment with a quote": head("experiment", "a'b"),
    "experiment empty": head("experiment", ""),
    "experiment is a number": head("experiment", 5),
    "experiment encoded": head("experiment", "x%2e%2e/..%2f"),
    "params is a list": head("params", []),
    "10,000 params": head("params", {f"k{n}": 1 for n in range(10_000)}),
    "param's name": head("params", {"a'b;<script>": 1}),
    "layers are text": head("params/model.n_layer", "x"),
    "prompts are numbers": head("params/sample.prompts", [1]),
    "no params": lambda _, events: events[0].pop("params") and None,
    "no stage": lambda _, events: events[0].pop("stage") and None,
    "another stage": head("stage", "tokenize", only="train"),
    "unknown stage": head("stage", "evil"),
    "git is text": head("git", "x"),
    "checkpoints is a list": head("checkpoints", ["all"]),
    "a schema of tomorrow": head("schema", 99),
    "parent with a quote": head("parent", {"settings": "a' or 'x", "changed": {}}),
    "parent with markdown": head("parent", {"settings": "a", "changed": {f"a` {IMAGE}": [1, 2]}}),
    "parent is text": head("parent", {"settings": "s", "changed": "x"}),
    "start is not first": text(lambda found: found[1:]),
    "two starts": text(lambda found: found[:1] + found),
    "empty": text(lambda _: []),
    "cut in a line": text(lambda found: [*found[:-1], found[-1][:10]]),
    "cut between lines": text(lambda found: found[:-1]),
    "goes on after the end": text(lambda found: [*found, found[-1]]),
    "a line is a list": text(lambda found: [*found[:-1], b"[1]\n", found[-1]]),
    "no JSON": text(lambda _: [b"{nope}\n"]),
    "no UTF-8": text(lambda found: [found[0], b'{"kind": "\xff"}\n', found[-1]]),
    "nested 100,000 deep": text(lambda found: [found[0], b"[" * 100_000 + b"\n", found[-1]]),
    "a line of 50 MB": text(lambda f: [f[0], b'{"a": "' + b"x" * (50 << 20) + b'"}\n', f[-1]]),
    "no kind": more("", x=1),
    "unknown kind": more("evil"),
    "kind is a list": text(lambda found: [*found[:-1], b'{"kind": [1]}\n', found[-1]]),
    "tags is text": more("tags", values="x"),
    "tag's name": more("tags", values={"a'`b<script>": "x"}),
    "tag's name of 1 MB": more("tags", values={"t" * (1 << 20): "x"}),
    "tag is a mapping": more("tags", values={"health.verdict": {}}),
    "200,000 tags": more("tags", values={f"t{n}": "x" for n in range(200_000)}),
    "20,000 events": text(lambda f: [f[0], *([b'{"kind": "tags", "values": {}}\n'] * 20_000)]),
    "tag of MLflow": more("tags", values={"mlflow.runName": f"{ESC}x"}),
    "tag of MLflow's note": more("tags", values={"mlflow.note.content": IMAGE}),
    "tag of another record": more("tags", values={"shipped.train": "x", "record.train": "x"}),
    "tag of a row": more("tags", values={"superseded": "x"}),
    "artifact absolute": artifact("/etc/hostname"),
    "artifact of no stage": artifact("params.yaml"),
    "artifact of another stage": artifact("artifacts/samples.md"),
    "artifact ..": artifact(".."),
    "artifact leads out": artifact("artifacts/last/../../params.yaml"),
    "artifact empty": artifact(""),
    "artifact with a NUL": artifact("artifacts/last/a\0b"),
    "artifact is a number": artifact(5),
    "artifact /dev/zero": artifact("/dev/zero"),
    "artifact's folder ../..": artifact("artifacts/last", "../../../out"),
    "artifact's folder absolute": artifact("artifacts/last", "/tmp/out"),
    "checkpoint's name ../..": checkpoint(name="../../../x"),
    "checkpoint's step is text": checkpoint(step="x'y"),
    "checkpoint's path": checkpoint(path="params.yaml"),
    "checkpoint's md5": checkpoint(md5="../../x"),
    "dataset lacks fields": more("dataset", name="x"),
    "dataset's name": more("dataset", name="x" * (1 << 20), digest="d", source="s", context="c"),
    "status": end(status="EVIL"),
    "end's time is text": end(time="x"),
}
# What is odd, and no reason to leave a record out.
READ: dict[str, Callable[[str, Events], Any]] = {
    "good": lambda *_: None,
    "metric is NaN": point(math.nan),
    "metric is infinite": point(math.inf),
    "metric is whole": point(3),
    "name with an escape": head("name", ESC),
    "param of 1 MB": head("params/sample.prompts", ["p" * (1 << 20)]),
    "unknown param": head("params/train.optimizer", "lion"),
    "params lack a setting": lambda _, e: e[0]["params"].pop("model.n_layer") and None,
    "a metric is missing": text(
        lambda found: [line for line in found if b"tokens_per_second" not in line]
    ),
    "params lack the seed": lambda _, e: e[0]["params"].pop("train.seed") and None,
    "skipped NaN steps": more("metrics", time=1, step=3, values={"train/skipped_steps": math.nan}),
    "verdict with markdown": more("tags", values={"health.verdict": IMAGE}),
    "a tag of 1 MB": more("tags", values={"health.verdict": "x" * (1 << 20)}),
    "artifact of an earlier version": artifact("artifacts/train_study/dtypes.md"),
}
# What the first version of this project did not write.
YOUNGER = ("schema", "name", "experiment", "checkpoints", "settings", "git", "environment")


@pytest.mark.fault(69)
@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_is_not_as_it_should_be_is_refused_in_a_short_line(chain, name: str) -> None:
    refused = 0
    for stage, text_ in mutated(chain, REFUSED[name]).items():
        try:
            record_reader.parse(text_, stage)
        except RecordError as error:
            refused += 1
            assert len(str(error)) < 400 and str(error).isprintable(), error
    assert refused


@pytest.mark.fault(69, control=True)
@pytest.mark.parametrize("name", READ)
def test_a_record_that_is_only_odd_is_read(chain, name: str) -> None:
    for stage, text_ in mutated(chain, READ[name]).items():
        read = record_reader.parse(text_, stage)
        assert read[0]["stage"] == stage and read[-1]["status"] == "FINISHED"


def test_a_record_of_an_older_version_is_read_with_what_it_lacks(chain) -> None:
    events = copy.deepcopy(chain["train"])
    for name in YOUNGER:
        events[0].pop(name)
    for event in events:
        event.pop("md5", None)
    start, *_, last = record_reader.parse(lines(events), "train")
    assert (start["schema"], start["name"], start["experiment"]) == (0, "", "gpt2")
    assert start["git"]["commit"] == start["environment"]["host"] == ""
    assert last["status"] == "FINISHED"


def test_a_setting_that_an_older_version_did_not_have_is_one_error(chain) -> None:
    events = copy.deepcopy(chain["train"])
    events[0]["params"].pop("train.lr")
    with pytest.raises(InputError, match="no setting train.lr"):
        record_reader.parse(lines(events), "train")[0]["params"]["train.lr"]


def test_points_that_lie_in_arrays_come_back_as_they_were_written(chain) -> None:
    for stage, events in chain.items():
        read = record_reader.parse(lines(events), stage)
        assert read == events and read[-1] == events[-1] and read[1:3] == events[1:3]
    read = record_reader.parse(lines(chain["train"]), "train")
    assert read.curves["train/loss"] == [(0, 3.0), (1, 2.75), (2, 2.5)]
    assert read.curves["train/loss"][-1] == (2, 2.5)
    assert Log.of(read) is read and Log.of(list(read)) == read
    assert [event["step"] for event in read.of_kind("metrics")] == [0, 1, 2, 2, 2, 0]


def test_a_stage_at_work_has_not_ended_and_may_be_writing_a_line(chain) -> None:
    found = lines(chain["train"])[:4]
    with pytest.raises(RecordError, match="cut short"):
        record_reader.parse(found, "train")
    assert len(record_reader.parse([*found, b'{"kind": "me'], "train", whole=False)) == 4
    with pytest.raises(RecordError, match="line 3"):
        record_reader.parse([*found[:2], b"{\n", *found[2:]], "train", whole=False)


# --- through the commands


@pytest.fixture
def long(chain, monkeypatch) -> list[bytes]:
    """The training's record in the workspace, with so many steps that its ends are few of them."""
    found = lines(chain["train"])
    at = next(n for n, event in enumerate(chain["train"]) if event["kind"] == "metrics")
    steps = [chain["train"][at] | {"step": step} for step in range(500)]
    found[at : at + 3] = lines(steps)
    paths.record("train").unlink()
    paths.record("train").write_bytes(b"".join(found))
    monkeypatch.setattr(record_reader, "ENDS", 5000)
    return found


def shipped_stages() -> set[str]:
    client = mlflow_store.connect()
    (row,) = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    return set(mlflow_run.ids(row.data.tags, mlflow_run.SHIPPED))


def test_every_point_is_read_where_the_store_lacks_it_and_none_else(long, monkeypatch) -> None:
    problems: list[str] = []
    sync.sync(problems)
    client = mlflow_store.connect()
    (row,) = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    curve = client.get_metric_history(row.info.run_id, "train/loss")
    assert [point.step for point in curve] == list(range(500)) and not problems
    assert shipped_stages() == {*STAGES}
    monkeypatch.setattr(record_reader, "read", lambda *_: pytest.fail("read whole"))
    assert sync.sync() == []


def test_a_damaged_point_between_the_ends_is_told_and_the_record_left_out(long, caplog) -> None:
    paths.record("train").write_bytes(b"".join([*long[:250], b"{\n", *long[250:]]))
    problems: list[str] = []
    sync.sync(problems)
    assert [problem.partition("jsonl: ")[2][:18] for problem in problems] == ["line 251: not JSON"]
    assert caplog.text.count("line 251: not JSON") == 1
    assert "train" not in shipped_stages() and "tokenize" in shipped_stages()


def as_experiment(name: str, texts: dict[str, list[bytes]], folder: Path) -> Experiment:
    """As DVC's cache would have it."""
    for stage, text_ in texts.items():
        (folder / name / "records").mkdir(parents=True, exist_ok=True)
        (folder / name / paths.record(stage)).write_bytes(b"".join(text_))
    found = dvc_history.of_workspace(folder / name)
    return Experiment(name, "HEAD", found.records, found.unreadable)


@pytest.fixture
def hostile(chain, tmp_path: Path, monkeypatch) -> list[str]:
    """A good experiment in the middle of every other; the names of those that are refused."""
    odd = {name: change for name, change in READ.items() if name != "good"}
    bad = list(REFUSED)
    made = []
    for name in [*odd, *bad[::2], "good", *bad[1::2]]:
        texts = mutated(chain, (READ | REFUSED)[name], name)
        if name != "good":  # a row takes MLflow a while
            texts = {"train": texts["train"]}
        made.append(as_experiment(name, texts, tmp_path / "others"))
    for place in (dvc_history, report, doctor):
        monkeypatch.setattr(place, "experiments", lambda *_, **__: iter(made))
    monkeypatch.setattr(report, "whole", lambda found: found)
    monkeypatch.setattr(dvc_history, "reader", lambda _: lambda found, stage: found.records[stage])
    monkeypatch.setattr(dvc_history, "commits", lambda **_: iter(()))
    monkeypatch.setattr(dvc_history, "copy_of", lambda *_: None)
    monkeypatch.setattr(run_page, "read_file", lambda *_: None)
    return bad


def everything(folder: Path) -> dict[str, str]:
    return {str(p): tree_digest(p) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.fault(69)
def test_the_good_one_is_whole_and_nothing_leaves_the_repository(
    hostile: list[str], tmp_path: Path
) -> None:
    outside = everything(tmp_path.parent)
    problems: list[str] = []
    sync.sync(problems)
    client = mlflow_store.connect()
    found = client.search_runs([client.get_experiment_by_name("gpt2").experiment_id])
    rows = {run.info.run_name: run for run in found}
    good = rows.pop("good")
    assert mlflow_run.ids(good.data.tags, mlflow_run.SHIPPED).keys() == {*STAGES}
    assert [p.step for p in client.get_metric_history(good.info.run_id, "train/loss")] == [0, 1, 2]
    assert not rows.keys() & set(hostile) and len(rows) == len(READ) - 2  # one lacks n_layer
    assert {run.info.status for run in found} == {"FINISHED"}
    assert {problem.partition(": ")[0] for problem in problems} == {
        *hostile,
        "params lack a setting",
    }
    assert all("records/train.jsonl: " in problem and len(problem) < 500 for problem in problems)
    own = tuple(str(tmp_path / name) for name in ("mlartifacts", "mlflow.db", ".runs"))
    new = everything(tmp_path.parent).keys() - outside.keys()
    assert new and all(path.startswith(own) for path in new)
    assert outside.items() - everything(tmp_path.parent).items() <= {
        item for item in outside.items() if item[0].startswith(own)
    }


def code_of(words: list[str]) -> int:
    try:
        command(words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.fault(69)
def test_ui_opens_and_the_exit_code_tells(hostile: list[str], monkeypatch, caplog) -> None:
    shown = []
    monkeypatch.setattr(mlflow_ui, "show", lambda port: shown.append(port) or 0)
    for words, code in ((["sync"], 3), (["ui", "5001"], 0)):
        assert code_of(words) == code
    assert shown == [5001]
    assert f"error: {len(hostile) + 1} records were left out" in caplog.text


def test_pages_of_everything_show_the_good_one_beside_the_odd(hostile: list[str], caplog) -> None:
    page = report.report([], True)
    assert "good" in page and hostile[0] not in page
    assert "good" in {run.name for run in comparison.runs_of(dvc_history.experiments())}
    for name in READ:
        (found,) = doctor.asked([name])
        doctor.examine(found)
    with pytest.raises(InputError):
        report.report([hostile[0]], False)
