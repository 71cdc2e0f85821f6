"""The command that fetches what the recipes need: FineWeb-Edu, HellaSwag, GPT-2's weights."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shlex
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from pipeline.errors import InputError, StorageError
from pipeline.storage import hub

log = logging.getLogger(__name__)

What = Literal["fineweb-edu", "hellaswag", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
SAMPLES = {"10BT": 10**10, "100BT": 10**11, "350BT": 35 * 10**10}  # of FineWeb-Edu: GPT-2 tokens
HELLASWAG, ITEMS = "hellaswag_val.jsonl", 10_042
SPARE_BYTES = 10**9  # of the disk, which stay free
EVERY_SECONDS = 10.0  # a line while it comes, and fewer as hours go by


def fetch(
    what: Annotated[What, Argument(help="What to fetch")],
    tokens: Annotated[
        str, Option(metavar="N", help="Of fineweb-edu, in whole files: 500M, 100B; default: 10B")
    ] = "",
    to: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where to; default: a folder below data")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would come, no more")] = False,
) -> None:
    """Fetch data or weights for the recipes from the Hugging Face hub.

    python -m pipeline fetch fineweb-edu --tokens 10B
    python -m pipeline fetch hellaswag
    python -m pipeline fetch gpt2-medium --dry-run

    Where it broke off, the same command goes on; a whole folder it checks.
    Behind a mirror set HF_ENDPOINT.
    """
    if tokens and what != "fineweb-edu":
        raise BadParameter(f"{what} comes as a whole", param_hint="--tokens")
    count = _count(tokens or "10B")
    repository, pattern, folder, by_hand = _wanted(what, count)
    folder = to or folder
    try:
        kind = "model" if what.startswith("gpt2") else "dataset"
        listed = hub.listed(repository, kind, folder)
        files = sorted(file for file in listed if re.fullmatch(pattern, file.path, re.A))
        if not any(file.name.endswith((".parquet", ".safetensors")) for file in files):
            raise hub.HubError(f"{hub.endpoint()}: {repository} has no {pattern}")
        if what == "fineweb-edu":  # the share of the sample: its files are alike
            share = count / SAMPLES[files[0].path.split("/")[1]]
            needed = share * sum(file.bytes for file in files)
            before = itertools.accumulate((file.bytes for file in files), initial=0)
            files = [f for f, reached in zip(files, before, strict=False) if reached < needed]
        lacking = hub.lacking(files, folder)
        size = _announce(files, lacking, folder)
        if not dry_run:
            hub.fetch(lacking, folder, Progress(size))
    except hub.HubError as error:
        raise hub.HubError(f"{error}\n  by hand: {by_hand}") from None
    if not dry_run:
        log.info("%s", _next(what, folder))


class Progress:
    """Whole lines, which make sense in a log as well."""

    def __init__(self, total: int):
        self.total, self.came = total, 0
        self.start = time.monotonic()
        self.due = EVERY_SECONDS

    def update(self, count: int) -> None:
        self.came += count
        took = time.monotonic() - self.start
        if took >= self.due:
            rate = max(self.came / took, 1)
            left = max(self.total - self.came, 0) / rate / 60
            said = (amount(self.came), amount(self.total), amount(rate), left)
            log.info("  %s of %s, %s/s, %.1f min left", *said)
            self.due = took + max(EVERY_SECONDS, took / 30)


def amount(count: float) -> str:
    """Bytes as the makers of disks count them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _count(text: str) -> int:
    """ "10B", "1.5b", "500M" or a plain number -> tokens."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.replace("_", ""), re.I | re.A)
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
    count = round(float(found[1]) * scale[found[2].lower()]) if found else 0
    if not 0 < count <= max(SAMPLES.values()):
        raise BadParameter(f"{text}: expected a number up to 350B, as 500M", param_hint="--tokens")
    return count


def _wanted(what: What, count: int) -> tuple[str, str, Path, str]:
    """Repository, pattern of the files' paths, folder here, and the way by hand."""
    page = "https://huggingface.co"
    if what == "fineweb-edu":
        sample = next(name for name, size in SAMPLES.items() if count <= size)
        name, pattern = f"HuggingFaceFW/{what}", rf"sample/{sample}/[\w-]+\.parquet"
        folder = Path("data/corpus", f"{what}-{sample}")
        source = f"{page}/datasets/{name}/tree/main/sample/{sample}"
        return name, pattern, folder, f"put files of {source} into {folder}"
    if what == "hellaswag":
        pattern, folder = r"data/validation-\d+-of-\d+\.parquet", Path("data/hellaswag")
        by_hand = f"name a copy of the published {HELLASWAG} in evaluate.hellaswag"
        return "Rowan/hellaswag", pattern, folder, by_hand
    name, folder = f"openai-community/{what}", Path("data/hf", what)
    pattern = r"((generation_|tokenizer_)?config|tokenizer|vocab)\.json|merges\.txt"
    pattern += r"|model[\w-]*\.safetensors(\.index\.json)?"  # no pickle
    by_hand = f"put config.json and model.safetensors of {page}/{name}/tree/main into {folder}"
    return name, pattern, folder, f"{by_hand}, for init.hf_model and init.hf_watch"


def _announce(files: list[hub.File], lacking: list[hub.File], folder: Path) -> int:
    """Say what will come; the bytes of it. Raises StorageError where the disk is too small."""
    size, free = hub.room(lacking, folder)
    total, first = sum(file.bytes for file in files), files[0]
    what = f"{first.repository} at {first.commit[:12]}: {len(files)} of its files, {amount(total)}"
    log.info("%s: %s", hub.endpoint(), what)
    come = f"to come: {amount(size)} into {folder}; free there: {amount(free)}"
    log.info("%s", come if lacking else f"all of them are whole in {folder}")
    if lacking and size + SPARE_BYTES > free:
        raise StorageError(
            f"{folder}: {amount(size)} are to come and {amount(SPARE_BYTES)} should stay free, "
            f"but {amount(free)} are free there; --to FOLDER takes another disk"
        )
    return size


def _next(what: What, folder: Path) -> str:
    """What lies where now, and what to say next; of HellaSwag the file is made first."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    tables = sorted(folder.glob("*.parquet"))
    place = shlex.quote(folder.as_posix())
    if what == "hellaswag":
        write_hellaswag([row for path in tables for row in pq.read_table(path).to_pylist()], folder)
        settings = f"-S evaluate.hellaswag={place}/{HELLASWAG}"
        return f"{place}/{HELLASWAG}: {ITEMS:,} items\nnext: dvc exp run {settings}"
    if what == "fineweb-edu":
        counts = (pq.read_table(path, columns=["token_count"])["token_count"] for path in tables)
        found = (
            f"{len(tables)} files, {sum(pc.sum(count).as_py() for count in counts):,} GPT-2 tokens"
        )
        settings = f"-S corpus.source=parquet -S corpus.path={place}"
        recipe = "gpt2-124m-fast"
    else:
        found = "whole"
        settings = f"-S init.source=hf -S init.hf_model={place} -S init.hf_watch={place}"
        recipe = "gpt2-124m-continue" if what == "gpt2" else what
    start = f"cp recipes/{recipe}.yaml params.yaml && dvc exp run"
    return f"{place}: {found}\nnext: {start} {settings}"


def write_hellaswag(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the items of the hub's table as published, and check that `evaluate` takes them."""
    from pipeline.inference.multiple_choice import hellaswag_items

    part = folder / f"{HELLASWAG}.part"
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row | {"label": int(row["label"])}, ensure_ascii=False) + "\n")
    if (found := len(hellaswag_items(part))) != ITEMS:
        raise InputError(f"{part}: {found:,} items; expected {ITEMS:,}")
    os.replace(part, folder / HELLASWAG)
