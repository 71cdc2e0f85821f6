"""What a benchmark found, kept beside it: JSON, a Markdown table and a figure in `results/`.

A benchmark has cases (a size, a batch) that may be run apart; each keeps its own machine, date,
versions and command, and running one again replaces that one alone.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.side_by_side import Result
from pipeline.drawing.figures import OTHERS, sheet, svg
from pipeline.tables import markdown

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "this pipeline"
LIBRARIES = ("torch", "transformers", "tokenizers", "tiktoken", "datasets", "numpy")
COLUMNS = ("contestant", "version", "rate", "median s", "least s", "most s", "speed", "least")
COLUMNS += ("most", "MiB", "memory", "remark")


@dataclass(frozen=True)
class Case:
    """One comparison: results of contestants that did the same work."""

    name: str
    work: float  # of one turn, in `unit`
    unit: str  # such as tokens: the table's rate is in unit/s
    baseline: str  # the contestant whose speed and memory are 1
    results: list[Result]
    about: str = ""  # what was done, in a line

    @property
    def base(self) -> Result:
        """The baseline; the first with a time where it has none."""
        timed = [r for r in self.results if r.seconds]
        return next((r for r in timed if r.name == self.baseline), (timed or self.results)[0])


def table(case: Case) -> str:
    """The case in Markdown: speed and memory are ratios, `least` and `most` of single rounds."""
    return markdown(COLUMNS, [_row(case, result) for result in case.results])


def _row(case: Case, result: Result) -> tuple[object, ...]:
    if not result.seconds:
        return result.name, result.version, *[None] * 9, f"no time counts: {result.refused}"
    memory, base = result.memory_mib, case.base.memory_mib
    return (
        result.name,
        result.version,
        case.work / result.median,
        result.median,
        min(result.seconds),
        max(result.seconds),
        *result.speed(case.base),
        memory,
        memory / base if memory and base else None,
        result.remark,
    )


def publish(benchmark: str, case: Case, folder: Path | None = None) -> str:
    """Write the case into `benchmark`'s three files in `folder`; returns its table."""
    folder = folder or RESULTS  # looked up here, so that a test can point it elsewhere
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.json"
    kept = read(path) if path.is_file() else {}
    kept[case.name] = (case, circumstances())
    entries = {name: {**asdict(c), "run": run} for name, (c, run) in kept.items()}
    _write(path, json.dumps(entries, indent=1) + "\n")
    _write(path.with_suffix(".md"), _page(benchmark, kept))
    path.with_suffix(".svg").write_bytes(_figure([case for case, _ in kept.values()]))
    return table(case)


def read(path: Path) -> dict[str, tuple[Case, dict[str, Any]]]:
    """{case's name: (case, circumstances)} from a results file."""
    found = {}
    for name, entry in json.loads(path.read_text("utf-8")).items():
        run = entry.pop("run")
        results = [Result(**result) for result in entry.pop("results")]
        found[name] = (Case(**entry, results=results), run)
    return found


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


# --- the circumstances


def circumstances() -> dict[str, str]:
    """Machine, versions, date, commit and command of the measurement at hand."""
    versions = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return {
        "machine": machine(),
        "versions": ", ".join(versions),
        "date": datetime.date.today().isoformat(),
        "commit": commit_of(Path(__file__).parent),
        "command": command(sys.argv),
    }


def machine() -> str:
    """Processor, usable cores and memory in words; nothing that names this very machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


def command(words: list[str]) -> str:
    """The command line as anyone may repeat it: a checkout's place is left open."""
    script, *words = words
    shown = [f"benchmarks/{Path(script).name}"]
    for before, word in zip(["", *words], words, strict=False):
        name, sign, _ = word.partition("=")
        if before in ("--nanogpt", "--build-nanogpt"):
            shown.append("CHECKOUT")
        elif sign and name in ("--nanogpt", "--build-nanogpt"):
            shown.append(f"{name}=CHECKOUT")
        else:
            shown.append(shlex.quote(word))
    return " ".join(["python", *shown])


def commit_of(folder: Path) -> str:
    """The short name of the commit that is checked out; "" where git does not tell."""
    asked = ("git", "-C", str(folder), "rev-parse", "--short=7", "HEAD")
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


# --- what people read


def _page(benchmark: str, kept: dict[str, tuple[Case, dict[str, str]]]) -> str:
    parts = [f"# {benchmark}\n", f"![speed by contestant]({benchmark}.svg)\n"]
    for case, run in kept.values():
        heading = f"## {case.name}\n"
        said = (
            f"{case.about} Rates are in {case.unit}/s; speed and memory are those of the baseline "
            f"({case.base.name}) = 1, with the least and the most of single rounds."
        )
        where = f"`{run['command']}` on {run['date']} at {run['commit'] or 'no commit'}\n"
        place = f"{run['machine']}; {run['versions']}\n"
        parts += [heading, said.strip() + "\n", where, place, table(case)]
    return "\n".join(parts)


def _figure(cases: list[Case]) -> bytes:
    """One panel a case: speed against the baseline, with the least and the most of a round."""
    figure, axes = sheet(len(cases), width=4.6, height=3.6)
    for axis, case in zip(axes, cases, strict=True):
        timed = [result for result in case.results if result.seconds][::-1]
        speeds = [result.speed(case.base) for result in timed]
        middles = [middle for middle, _, _ in speeds]
        # A median may lie outside the range of paired rounds; the whisker then starts at it.
        spread = [
            [max(0, middle - low) for middle, low, _ in speeds],
            [max(0, high - middle) for middle, _, high in speeds],
        ]
        colours = [OTHERS[0] if r.name.startswith(OURS) else OTHERS[-1] for r in timed]
        bars = axis.barh([r.name for r in timed], middles, xerr=spread, color=colours, capsize=3)
        axis.bar_label(bars, [f"{middle:.2f}" for middle in middles], padding=4, fontsize=8)
        axis.axvline(1, color="black", lw=0.8)
        axis.margins(x=0.15)
        axis.set(title=case.name, xlabel=f"speed, {case.base.name} = 1")
    return svg(figure)
