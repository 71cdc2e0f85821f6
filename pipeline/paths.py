"""Every on-disk location, and the repository root."""

from __future__ import annotations

import os
from pathlib import Path

# Relative to the workspace: DVC runs stages there, and a queued experiment has its own.
ARTIFACTS = Path("artifacts")
TOKENS = Path("data/tokens")
INIT = Path("artifacts/init")
INIT_STUDY = Path("artifacts/init_study")
MODEL = Path("artifacts/model")
LAST = Path("artifacts/last")
CHECKPOINTS = Path("artifacts/checkpoints")
FORKS = Path("data/forks")
NUMERICS = Path("artifacts/numerics")
SAMPLES_JSONL = Path("artifacts/samples.jsonl")
SAMPLES_MD = Path("artifacts/samples.md")
REPORT = Path("artifacts/report.html")
METRICS = Path("metrics")
PLOTS = Path("plots")
RECORDS = Path("records")
PARAMS = Path("params.yaml")

# What to do about a model directory that is not there.
MISSING = {
    INIT: "no initial model yet: `dvc repro import_hf_weights` makes it",
    MODEL: "no trained model yet: `make repro` makes it (about 6 min with the default settings)",
}


def root() -> Path:
    """The main repository root, from a queued or temporary experiment too.

    DVC sets DVC_ROOT in every mode; without it, walk up to `.dvc` and leave DVC's temporary
    clones in `.dvc/tmp/exps`, whose git directory does not lead home.
    """
    if os.environ.get("DVC_ROOT"):
        here = Path(os.environ["DVC_ROOT"])
    else:
        cwd = Path.cwd()
        here = next((p for p in (cwd, *cwd.parents) if (p / ".dvc").is_dir()), cwd)
    return Path(here.as_posix().split("/.dvc/tmp/exps/")[0])


def record(stage: str) -> Path:
    return RECORDS / f"{stage}.jsonl"


def runs() -> Path:
    """Scratch of runs in progress, shared by every workspace of this repository."""
    return root() / ".runs"
