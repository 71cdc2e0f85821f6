"""A row in words: its model and initial weights, the changed settings and the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import terminal
from pipeline.errors import cut
from pipeline.records.run_data import Event, Log

LONGEST = 60  # characters of a setting's value
MOST = 500  # of all changes in a column: MLflow refuses a row for a tag that is too long

LONGEST_REASON = 2000  # characters of an error: MLflow takes 5000 for the whole note
FORKED = "fork.parent"  # the tag with the place of the run that a row was forked from
LOSSES = {"train/loss": "training loss", "train/val_loss": "validation loss"}
# (metric, label, format of a value, format of a difference)
RESULTS = (
    ("val/loss", "Validation loss", "{:.4f}", "{:+.4f}"),
    ("val/bits_per_byte", "bits per byte", "{:.3f}", "{:+.3f}"),
    ("val/choice_acc_norm", "multiple choice", "{:.3f}", "{:+.3f}"),
    ("perf/tokens_per_second", "tokens/s", "{:,.0f}", "{:+,.0f}"),
)


@dataclass(frozen=True)
class Facts:
    """The parts of a row that its note mentions."""

    name: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


def model_size(params: Mapping[str, Any]) -> str:
    """ "7.2M: 4 x 128" (layers by width); the count is `model/parameters`, padded rows included."""
    layers, width = params["model.n_layer"], params["model.n_embd"]
    rows = params["model.vocab_rows"] + params["model.block_size"]
    count = rows * width + layers * (12 * width**2 + 13 * width) + 2 * width
    return f"{count / 1e6:.{1 if count < 1e8 else 0}f}M: {layers} x {width}"


def initial_weights(params: Mapping[str, Any]) -> str:
    """ "std 0.02, scaled", "unscaled" or "zero" (the residual projections), or "hf gpt2".

    By muP also its base width.
    """
    if params["init.source"] == "hf":
        return f"hf {params['init.hf_model']}"
    scaled = "scaled" if params["init.residual_scale"] else "unscaled"
    if params.get("init.scheme") == "zero_projections":  # records of before have no scheme
        scaled = "zero"
    if params.get("init.scheme") == "mup":
        scaled += f", muP from {params['init.mup_base']}"
    return f"std {params['init.std']:g}, {scaled}"


def changes(head: Event) -> str:
    """ "lr 0.002 -> 0.006, steps 400 -> 100": the settings that differ from the commit's.

    Nothing where none does, or where the commit has no settings to read; of a whole recipe the
    first ones.
    """
    changed = head["parent"].get("changed", {}) if head.get("parent") else {}
    words = ", ".join(
        f"{name.rpartition('.')[2]} {'-' if theirs is None else _value(theirs)} -> "
        f"{'-' if ours is None else _value(ours)}"
        for name, (theirs, ours) in changed.items()
    )
    return words if len(words) <= MOST else f"{words[: MOST - 3]}..."


def note(head: Event, own: Facts, parent: Facts | None, ended: str = "") -> str:
    """Markdown: the settings that differ from the commit's, how it `ended`, and the results.

    `parent` is a row with exactly the commit's settings, if there is one.
    """
    said = [
        _change(head),
        _fork(own),
        ended,
        _outcome(own, parent, "" if ended else "**No results** yet."),
    ]
    return "\n\n".join(filter(None, said)) + "\n"


def ended(record: Log) -> str:
    """Why a stage did not finish, as a person was told, and how far it had come; else nothing."""
    end = record[-1] if len(record) else {}
    if end.get("status", "FINISHED") == "FINISHED":
        return ""
    head, curves = record[0], record.curves
    where, again = "", "begins it again"
    if curve := curves.get("train/loss"):
        where = f" after {curve[-1][0] + 1:,} of {head['params']['train.steps']:,} steps"
        where += _losses({name: curves[name][-1][1] for name in LOSSES if name in curves})
        again = "resumes"
    if end["status"] == "KILLED":
        return f"**Interrupted** in `{head['stage']}`{where}: the same command {again}."
    why = f":\n\n{terminal.as_code(cut(end['why'], LONGEST_REASON))}" if end.get("why") else "."
    return f"**Failed** in `{head['stage']}`{where}{why}".rstrip()


DIED = "**Its process is gone** without a word"


def died(note: str, metrics: Mapping[str, float]) -> str:
    """The note of a row whose stage was killed, or whose machine went down."""
    before = note.partition(DIED)[0].strip()
    told = f"{DIED}{_losses(metrics)}: the same command goes on."
    return f"{before}\n\n{told}".strip() + "\n"


def _losses(values: Mapping[str, float]) -> str:
    found = [f"{words} {values[name]:.4f}" for name, words in LOSSES.items() if name in values]
    return f" ({', '.join(found)})" if found else ""


def _fork(own: Facts) -> str:
    if not (of := own.tags.get("fork")):
        return ""
    name = terminal.in_markdown(of)
    return f"**Forked** from {f'[{name}]({where})' if (where := own.tags.get(FORKED)) else name}."


def _change(head: Event) -> str:
    commit = _value(head["git"]["commit"])[:7]
    if not head.get("parent"):
        where = f"commit `{commit}` has no settings to read" if commit else "there is no commit"
        return f"**What changed** is unknown: {where}."
    changed = head["parent"]["changed"]
    if not changed:
        return f"**Nothing changed** against the settings of commit `{commit}`."
    words = "; ".join(_changed(name, *pair) for name, pair in changed.items())
    return f"**Changed** against commit `{commit}`: {words}."


def _changed(name: str, theirs: Any, ours: Any) -> str:
    if theirs is None:
        return f"`{_value(name)}` = `{_value(ours)}` (new)"
    if ours is None:
        return f"`{_value(name)}` removed (was `{_value(theirs)}`)"
    return f"`{_value(name)}` from `{_value(theirs)}` to `{_value(ours)}`"


def _value(value: Any) -> str:
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    shown = terminal.shown(shown.replace("`", "'").replace("\n", " "))
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."


def _outcome(own: Facts, parent: Facts | None, without: str) -> str:
    parts = []
    for key, words, shown, difference in RESULTS:
        if (value := own.metrics.get(key)) is not None:
            parts.append(f"{words} {shown.format(value)}")
            if parent and key in parent.metrics:
                parts[-1] += f" ({difference.format(value - parent.metrics[key])})"
    results = f"**Results:** {'; '.join(parts)}." if parts else without
    if parts and parent:
        name = terminal.in_markdown(parent.name)
        results += f" In brackets: the difference from {name}, which has that commit's settings."
    verdict = own.tags.get("health.verdict")
    return f"{results}\n\n**Health:** {terminal.in_markdown(verdict)}" if verdict else results
