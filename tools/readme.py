"""Fill the marked blocks of README.md and docs/: what real runs printed, wrote and drew.

    python tools/readme.py            what follows from the code, in a second
    python tools/readme.py --run      the commands as well, in a fresh clone of the last commit
    python tools/readme.py --run README.md    those of one page only
    python tools/readme.py --faults   runs the tests that inject faults, for the fault table

A block stands between `<!-- KIND ARGUMENT -->` and `<!-- end -->`. These kinds come from a run:

    run      a command and its output
    brief    a command and the lines of its output that the stages print
    full     all output of the `brief` command of the same name, on any page
    do       a command without its output
    page     a Markdown file that an earlier command wrote, without its title
    figure   a PNG likewise, copied below docs/figures; its alternative text follows a bar

Their end marks carry a digest of what they show, so that a test notices an edit by hand. These
kinds follow from the code: `settings`, `tree` (the packages), `files` (the rest of the
repository), `faults` (from the results of the last `--faults`), `speed`, `numbers` and `machines`
(from benchmarks/results/). References to code are filled as tools/references.py says.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import references  # noqa: E402

# The first pages run commands, in this order: each builds on what those before it ran.
WITH_RUNS = ("README", "docs/results", "docs/diagnostics", "docs/precision", "docs/experiments")
WITHOUT_RUNS = ("install", "settings", "export", "recovery", "performance", "faults")
WITHOUT_RUNS += ("architecture", "finetuning", "distributed", "gpu", "team", "scale", "larger")
PAGES = [ROOT / f"{name}.md" for name in (*WITH_RUNS, "docs/study")]
PAGES += [ROOT / "docs" / f"{name}.md" for name in WITHOUT_RUNS]
FIGURES = ROOT / "docs" / "figures"
BLOCK = re.compile(
    r"(<!-- (run|brief|full|do|page|figure|settings|tree|files|faults|speed|numbers"
    r"|machines)"
    r"(?: ([^\n]+))? -->\n)(.*?)<!-- end ?([0-9a-f]*) -->",
    re.DOTALL,
)
LONGEST = 100  # lines of output shown; the middle of a longer one is left out
BAR = re.compile(r"\w+: [^]\n]*\[\d+:\d\d[^]\n]*\]")  # one redrawing of a progress bar
# In a brief block: what a stage says, evaluate's first figures, a sample, a comparison's table.
# Not the lines that stand for a bar, which a person at a terminal sees.
BRIEF = re.compile(
    r"(?!train: step [\d,/]+ loss)[a-z_]+: |(unigram_)?loss|perplexity|bits_per_byte| {20,}initial"
    r"|  [^\s\d]|\|"
)
# In that of a sweep: its members and their comparison, without what each member's stages say.
BRIEF_SWEEP = re.compile(r"  \S+ {2,}\S+=|\||figure: |curves: |table: ")
PRINTED: dict[str, str] = {}  # what the commands of brief blocks printed, in full

OTHER_FILES = {
    "params.yaml": "every setting",
    "dvc.yaml": "the six stages: what they need, read and make",
    ".dvc/plots/": "the page of `dvc plots` and its two kinds of charts",
    "recipes/": "complete params files: the default, GPT-2 124M to XL, continued training",
    "tests/": "the same folders, and end_to_end/: the claims seen from outside",
    "tests/NUMERICS.md": "details that reimplementations get wrong, and the test of each",
    "benchmarks/": "measurements anyone can repeat, and their results",
    "tools/readme.py": "fills the marked blocks of README.md and docs/",
    "tools/references.py": "keeps references from the pages to the code at their lines",
    "tools/fault_table.py": "the table of faults, from the results of their tests",
    "tools/soak*.py": "random faults against a small real pipeline, and whether anything was lost",
    "constraints.txt": "every version, for every platform",
    "requirements-plays.txt": "the package that carries the default corpus",
    "requirements.lock": "their hashes, made by tools/lock.py; PyTorch has its own",
    ".github/workflows/": "lint and the quick tests on three systems; weekly with new versions",
    "Makefile": "repro, test, faults, ui, report, lint, clean",
}

# README's figures of speed: benchmark, case, and beside whom.
NUMBERS = (
    ("train", "nano, fp32", "nanoGPT"),
    ("train", "124m, fp32", "nanoGPT"),
    ("sample", "124m, batch 1", "transformers"),
    ("sample", "124m, batch 8", "transformers"),
    ("tokenizing", "96 MB", "tiktoken, one process"),
)


def settings() -> str:
    from pipeline import config

    defaults = config.flatten(config.load(ROOT / "recipes/nano.yaml"))
    lines = ["| setting | default | accepted | what it is |", "|---|---|---|---|"]
    for name, accepted, doc in config.describe():
        value = defaults[name]
        shown = "; ".join(value) if isinstance(value, list) else str(value)
        shown = shown.lower() if isinstance(value, bool) else shown
        lines.append(f"| `{name}` | `{shown}` | {accepted} | {doc} |")
    return "\n".join(lines)


def tree() -> str:
    """The packages in the order in which they may import one another, a line each."""
    from tests.helpers.imports import LOOKS, MAKES

    def lines(packages: tuple[str, ...]) -> list[tuple[str, str]]:
        places = [(f"pipeline/{name}/", ROOT / "pipeline" / name) for name in packages]
        return [(name, phrase(place / "__init__.py")) for name, place in places]

    return listing([("stages/", phrase(ROOT / "stages/__init__.py")), *lines(MAKES), *lines(LOOKS)])


def files() -> str:
    return listing(list(OTHER_FILES.items()))


def listing(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "```text\n" + "\n".join(f"{name:<{width}}{text}" for name, text in rows) + "\n```"


def faults() -> str:
    from tools import fault_table

    return fault_table.page(*fault_table.results())


def speed() -> str:
    from benchmarks import summary

    return summary.summary().strip()


def numbers() -> str:
    """A few figures of `speed`, for those who want no more."""
    from benchmarks import outcomes
    from pipeline.tables import markdown

    rows = []
    for benchmark, name, beside in NUMBERS:
        case, _ = outcomes.read(outcomes.RESULTS / f"{benchmark}.json")[name]
        ours = next(r for r in case.results if r.name.startswith(outcomes.OURS))
        other = next(r for r in case.results if r.name == beside)
        rate = f"{case.work / ours.median:,.4g} {case.unit}/s"
        rows.append((f"{benchmark}: {name}", rate, f"{ours.speed(other)[0]:.2f} times {beside}"))
    return markdown(("measured", "rate", "speed"), rows).strip()


def machines() -> str:
    from benchmarks import machines

    return machines.table()


def run_faults() -> bool:
    from tools import fault_table

    return fault_table.run()


def phrase(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return doc.splitlines()[0].rstrip(".")


def console(command: str, clone: Path) -> tuple[list[str], str]:
    """The lines that a command printed, and a sentence on how long it took."""
    began = time.perf_counter()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PATH": path},
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
        stdin=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command}: exit {done.returncode}\n{done.stdout}")
    print(f"{command}: exit {done.returncode}, {seconds:.0f} s", file=sys.stderr)
    text = BAR.sub("", done.stdout.replace("\r", "\n")).replace(str(clone), ".")
    lines = [line.rstrip() for line in text.splitlines()]
    return lines, f"It took {seconds:.0f} s."


def run(command: str, clone: Path) -> str:
    lines, took = console(command, clone)
    return f"{shown(command, lines)}\n\n{took}"


def shown(command: str, lines: list[str]) -> str:
    """A command and its output: one empty line at a time, long outputs cut."""
    lines = [line for line, last in zip(lines, ["", *lines], strict=False) if line or last]
    if len(lines) > LONGEST:
        left_out = len(lines) - LONGEST
        half = LONGEST // 2
        lines = [*lines[:half], f"[... {left_out} more lines ...]", *lines[-half:]]
    text = "\n".join(lines).strip("\n")
    return f"```console\n$ {command}\n{text}\n```"


def brief(command: str, clone: Path) -> str:
    lines, took = console(command, clone)
    PRINTED[command] = shown(command, lines)
    pattern = BRIEF_SWEEP if " sweep " in command else BRIEF
    kept = [line for line in lines if pattern.match(line)]
    return f"{shown(command, kept)}\n\n{took}"


def full(command: str, clone: Path) -> str:
    if command not in PRINTED:
        brief(command, clone)
    return PRINTED[command]


def do(command: str, clone: Path) -> str:
    """The command alone, and how long it took; its parts stand on lines of their own."""
    _, took = console(command, clone)
    parts = "\n".join(f"$ {part}" for part in command.split(" && "))
    return f"```console\n{parts}\n```\n\n{took}"


def page(name: str, clone: Path) -> str:
    """A Markdown file of the clone below this page's headings."""
    text = (clone / name).read_text("utf-8").partition("\n")[2].strip("\n")
    return re.sub(r"^#", "###", text, flags=re.MULTILINE)


def figure(argument: str, clone: Path) -> str:
    name, _, words = (part.strip() for part in argument.partition("|"))
    copy = FIGURES.joinpath(*Path(name).parts[1:])
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(clone / name, copy)
    return f"![{words}]({copy.relative_to(FIGURES.parent).as_posix()})"


def digest(kind: str, argument: str, text: str) -> str:
    """Identifies what a block shows, a figure's file included."""
    parts = f"{kind} {argument}\n{text.strip()}\n".encode()
    for name in re.findall(r"\]\((figures/[^)]+)\)", text) if kind == "figure" else ():
        parts += (FIGURES.parent / name).read_bytes()
    return hashlib.sha256(parts).hexdigest()[:12]


FROM_A_RUN = {"run": run, "brief": brief, "full": full, "do": do, "page": page, "figure": figure}
FROM_THE_CODE = {
    **{"settings": settings, "tree": tree, "files": files},
    **{"faults": faults, "speed": speed, "numbers": numbers, "machines": machines},
}


def fill(path: Path, clone: Path | None) -> None:
    """The page's blocks and references; those that come from a run only with a clone to run in."""
    text = references.follow(path.read_text("utf-8"))
    at = 0
    while match := BLOCK.search(text, at):
        kind, argument, new, mark = match[2], match[3] or "", match[4].strip("\n"), match[5]
        if kind in FROM_THE_CODE:
            new, mark = FROM_THE_CODE[kind](), ""
        elif clone:
            new = FROM_A_RUN[kind](argument, clone)
            mark = digest(kind, argument, new)
        filled = f"{match[1]}{new}\n<!-- {f'end {mark}'.strip()} -->"
        text = text[: match.start()] + filled + text[match.end() :]
        at = match.start() + len(filled)
        # At once: what has been measured is not lost to a command that fails later.
        path.write_text(text, "utf-8", newline="\n")
    path.write_text(text, "utf-8", newline="\n")


def main() -> None:
    from pipeline import terminal

    terminal.guard()
    commands = "--run" in sys.argv
    passed = "--faults" not in sys.argv or run_faults()
    if commands:
        clone = Path(tempfile.mkdtemp()) / "gpt2"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        print(f"the clone stays at {clone}", file=sys.stderr)

    asked = set(sys.argv[1:]) - {"--run", "--faults"}
    if commands and asked and "README.md" not in asked:
        brief("dvc repro", clone)  # which README.md has among its own commands
    for path in PAGES:
        if not asked or path.name in asked:
            fill(path, clone if commands else None)
    if not passed:
        sys.exit("a test failed: the fault table says which row is not held")


if __name__ == "__main__":
    main()
