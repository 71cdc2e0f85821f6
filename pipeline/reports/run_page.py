"""What the report says of one run: every section as plain values, ready for the page."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from pipeline import paths
from pipeline.diagnostics.doctor import Finding, examine, headline
from pipeline.records import stage_graph
from pipeline.records.dvc_history import read_file
from pipeline.records.run_data import Experiment, samples
from pipeline.reports.curves import ALONE, charts
from pipeline.tables import cell
from pipeline.tracking.mlflow_run import from_workspace

Read = Callable[[Path], bytes | None]  # a file that the run's own record vouches for

# Of the stage that writes the page with its last work: still true when somebody reads it.
WRITING = "wrote this page"
ENDED = {"FAILED": "failed", "KILLED": "was stopped"}
STUDIES = (
    (
        "Initialisation",
        paths.INIT_STUDY,
        {"init_study.png": "Random adds, residual stream and gradient norms by block"},
        ("init_study.md",),
    ),
    (
        "Numerics of this machine",
        paths.NUMERICS,
        {
            "formats.png": "Sign, exponent and mantissa bits of the number formats",
            "error_and_speed.png": "Error against speed of the model's products in every mode",
            "roofline.png": "FLOP/s against arithmetic intensity under the measured roofs",
            "loss_scale.png": "The loss scale by step when fp16 gradients overflow",
        },
        ("formats.md", "sensitivity.md", "products.md", "operations.md", "loss_scale.md"),
    ),
)


@dataclass(frozen=True)
class Study:
    title: str
    note: str  # why there is nothing to show, if so
    pictures: list[tuple[str, str]]  # (what it shows, a PNG in base 64)
    pages: list[Markup]


class RunPage:
    """One run as the page shows it; a section that was not recorded is empty."""

    def __init__(
        self,
        run: Experiment,
        workspace: Path,
        recipe: dict[str, Any],
        at_work: str = "",
        draw: bool = True,
        tree: Sequence[str] = (),
    ):
        """Without its curves where they are not to `draw`; `tree` has the lines of its forks.

        `recipe` holds the settings that others are marked against, and `at_work` is the stage that
        writes this very page: its record is not closed yet.
        """
        read, trained = reader(run, workspace), bool(run.values("train/loss"))
        statuses = {
            stage: record[-1]["status"] if record[-1]["kind"] == "end" else "unfinished"
            for stage, record in run.records.items()
        }
        statuses |= {at_work: WRITING} if at_work else {}
        self.name, self.lead = run.name, lead(run)
        self.findings = examine(run) if trained else []
        self.verdict, self.mood = verdict(self.findings, statuses, trained)
        self.numbers = key_numbers(run)
        self.curves = charts([(run, ALONE)]) if draw else []
        self.samples = samples_of(read)
        self.texts = [(step, line) for step, line in run.texts.items()]
        self.tree = tree
        self.notes = list(missing(run, statuses, bool(self.samples)))
        self.studies = list(studies(run, read))
        self.settings = settings(run.params)
        self.changed = [
            (setting, setting_text(value), setting_text(recipe.get(setting)))
            for setting, value in run.params.items()
            if recipe and recipe.get(setting) != value
        ]
        self.data = data_sets(run)
        self.stages = [_stage(stage, run, status) for stage, status in statuses.items()]
        self.environment = environment(run)
        self.metrics = [(key, *points[-1]) for key, points in sorted(run.curves.items())]


def reader(run: Experiment, workspace: Path) -> Read:
    """Reads files that a record of the run names as its artifacts, and that are still the same."""
    kept = {e["path"]: e["sha256"] for e in run.events("artifact")}

    def read(path: Path) -> bytes | None:
        place = next((p.as_posix() for p in (path, *path.parents) if p.as_posix() in kept), None)
        if place is None:
            return None
        if not run.rev and not from_workspace(str(workspace / place), kept[place]):
            return None
        return read_file(run, path, workspace)

    return read


def lead(run: Experiment) -> str:
    """What came out and what it took, in one sentence."""
    losses = run.values("train/loss")
    if not losses:
        return "Nothing trained yet: `make repro` trains."
    facts = (
        ("val/loss", "Validation loss {:.2f}"),
        ("val/unigram_loss", " (guessing by word frequency: {:.2f})"),
        ("train/loss", f", {len(losses):,} steps"),
        ("train/tokens", ", {:,.0f} tokens"),
    )
    said = "" if "val/loss" in run.curves else f"Training loss {losses[-1]:.2f}"
    said += "".join(words.format(run.last(key)) for key, words in facts if key in run.curves)
    seconds, device = run.last("time/train_seconds"), run.tags.get("device.name")
    took = "" if seconds is None else f", {clock(seconds)}"
    return f"{said}{took} on {device}." if device else f"{said}{took}."


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 0:03:14."""
    return str(timedelta(seconds=round(seconds))) if abs(seconds) < 1e9 else f"{seconds} s"


def verdict(findings: list[Finding], statuses: dict[str, str], trained: bool) -> tuple[str, str]:
    """Words, and their mood: good, warn, bad or none."""
    ended = [f"{stage} {status.lower()}" for stage, status in statuses.items() if status in ENDED]
    if ended:
        return ", ".join([*ended, *(finding.rule for finding in findings)]), "bad"
    if not trained:
        return "nothing trained yet", "none"
    return headline(findings), "warn" if findings else "good"


def missing(run: Experiment, statuses: dict[str, str], sampled: bool) -> Iterator[str]:
    """A sentence for each part of a whole run that this one lacks."""
    for stage in stage_graph.stages():
        if stage not in statuses:
            yield f"{stage} has no record of this run."
        elif statuses[stage] not in ("FINISHED", WRITING):
            ended = ENDED.get(statuses[stage], "is at work, or was killed without a word")
            why = run.tags.get("debug.why") if stage == "train" else None
            yield f"{stage} {ended}{f' ({why})' if why else ''}; shown is what it had recorded."
    if "sample" in run.records and not sampled:
        yield "The samples are neither in this workspace nor in DVC's cache any more."


def key_numbers(run: Experiment) -> list[tuple[str, str, str]]:
    """(what, value, beside it) of the few numbers that a run is judged by."""

    def last(key: str, digits: str) -> str:
        value = run.last(key)
        return "" if value is None else f"{value:{digits}}"

    def change(key: str, shown: Callable[[float], str]) -> str:
        both = run.last(f"init_val/{key}"), run.last(f"val/{key}")
        return " → ".join(shown(value) for value in both if value is not None)

    losses = run.values("train/loss")
    seconds = [run.last(f"time/{stage}_seconds") or 0.0 for stage in run.records]
    ends = f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else ""
    rows = [
        ("Training loss", ends, "nats/token, first and last step"),
        ("Validation loss", change("loss", "{:.3f}".format), "nats/token"),
        ("Bits per byte", change("bits_per_byte", "{:.3f}".format), "of the validation text"),
        ("Perplexity", change("perplexity", cell), ""),
        ("Speed", last("perf/tokens_per_second", ",.0f"), "tokens/s"),
        ("Peak memory", last("perf/peak_memory_mib", ",.0f"), "MiB"),
        ("Duration", clock(sum(seconds)) if any(seconds) else "", "of all stages"),
    ]
    tasks = {"choice": "Choice", "hellaswag_nanogpt": "HellaSwag as build-nanogpt's"}
    for task, title in (tasks | {"hellaswag_harness": "HellaSwag as lm-eval's"}).items():
        error, items = last(f"val/{task}_acc_norm_stderr", ".2f"), last(f"val/{task}_count", ",.0f")
        beside = f"± {error} over {items} items (chance 0.25)" if error else ""
        share = change(f"{task}_acc_norm", "{:.2f}".format)
        rows.insert(4, (f"{title} accuracy", share, beside))
    return [row for row in rows if row[1]]


def samples_of(read: Read) -> dict[str, list[tuple[str, str]]]:
    """By prompt the pairs of texts before and after training, in the order of the file."""
    content = read(paths.SAMPLES_JSONL)
    return {} if content is None else samples(content)


def compact(text: str) -> Markup:
    """A sample as HTML, in which a long blank says how long it is."""
    blank = r"\n(?:[^\S\n]*\n){3,}"
    said = re.sub(blank, lambda m: f"<i>{m[0].count(chr(10)) - 1} blank lines</i>", escape(text))
    return Markup(re.sub(r"[^\S\n]{9,}", lambda m: f" <em>{len(m[0])} spaces</em> ", said))


def studies(run: Experiment, read: Read) -> Iterator[Study]:
    """Tables and figures that the stages wrote, of this run and no other."""
    written = {e["path"] for e in run.events("artifact")}
    for title, folder, pictures, pages in STUDIES:
        if folder.as_posix() not in written:
            continue
        images = [(alt, read(folder / name)) for name, alt in pictures.items()]
        texts = [read(folder / name) for name in pages]
        gone = any(content is None for content in [*texts, *(image for _, image in images)])
        yield Study(
            title,
            f"Not all of {folder.as_posix()} is kept as this run wrote it." if gone else "",
            [(alt, base64.b64encode(image).decode()) for alt, image in images if image],
            [render(text.decode("utf-8")) for text in texts if text],
        )


@functools.lru_cache(maxsize=64)  # experiments share their studies
def render(text: str) -> Markup:
    """A study's Markdown as HTML. HTML in it stays text, and nothing is linked or loaded."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.disable(["image", "link", "autolink"])
    reader.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = reader.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 3)}"  # below the section's own heading
    return Markup(reader.renderer.render(tokens, reader.options, {}))


def settings(params: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """(name, value) by section of params.yaml."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for name, value in params.items():
        section, _, rest = name.rpartition(".")
        sections.setdefault(section or "general", []).append((rest, setting_text(value)))
    return sections


def setting_text(value: Any) -> str:
    """As params.yaml would say it."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)


def data_sets(run: Experiment) -> list[tuple[Any, ...]]:
    """(name, split, source, tokens, documents, bytes, sha256) of what was tokenised."""
    rows = {}
    for event in run.events("dataset"):
        split = event["context"]
        sizes = [run.last(f"data/{split}_{what}") for what in ("tokens", "documents", "bytes")]
        row = (event["name"], split, event["source"], *sizes, event["digest"])
        rows.setdefault((split, event["digest"]), row)
    return list(rows.values())


def environment(run: Experiment) -> list[tuple[str, str]]:
    """Machine, versions, precision and code of the stage that started last."""
    head, tags = run.head, run.tags
    facts = dict(head["environment"]) | {"code": head["code"]}
    facts |= {k.removeprefix("env."): v for k, v in tags.items() if k.startswith("env.")}
    facts |= {k: v for k, v in tags.items() if k.startswith(("device.", "precision.")) and v}
    facts |= {f"git {k}": v for k, v in head["git"].items() if v}
    return list(facts.items())


def _stage(stage: str, run: Experiment, status: str) -> tuple[Any, ...]:
    start = run.records[stage][0]
    began = datetime.fromtimestamp(start["time"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    commit = start["git"]["commit"][:10] + (" (dirty)" if start["git"]["dirty"] == "true" else "")
    seconds = run.last(f"time/{stage}_seconds")
    return stage, status.lower(), began, seconds, start["environment"]["host"], commit
