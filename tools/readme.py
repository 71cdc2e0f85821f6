"""Fills the marked blocks of the README and of docs/: what real runs printed, wrote and drew.

    python tools/readme.py            settings and tree, in a second
    python tools/readme.py --run      the commands as well, in a fresh clone of the last commit
    python tools/readme.py --run README.md    those of one page only
    python tools/readme.py --faults   runs the tests that inject faults, for the fault table

A block stands between `<!-- KIND ARGUMENT -->` and `<!-- end -->`. Kinds: `run` (a command whose
output is shown), `do` (one whose output is not), `page` (a Markdown file that a command before it
wrote, without its title), `figure` (a PNG likewise, copied below docs/figures; its alternative
text follows a bar), `settings`, `tree`, `faults` (from the results of the last `--faults`) and
`speed` (from benchmarks/results/).
"""

from __future__ import annotations

import ast
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

PAGES = [ROOT / "README.md", ROOT / "docs" / "notes.md"]  # the second builds on what the first ran
FIGURES = ROOT / "docs" / "figures"
BLOCK = re.compile(
    r"(<!-- (run|do|page|figure|settings|tree|faults|speed)(?: ([^\n]+))? -->\n)"
    r"(.*?)(<!-- end -->)",
    re.DOTALL,
)
LONGEST = 100  # lines of output shown; the middle of a longer one is left out
BAR = re.compile(r"\w+: [^]\n]*\[\d+:\d\d[^]\n]*\]")  # one redrawing of a progress bar
TENSOR = re.compile(r"transformer\.h\.[1-9]")  # the parameter table after its first block

OTHER_FILES = {
    "params.yaml": "every setting",
    "dvc.yaml": "the six stages: what they need, read and make",
    ".dvc/plots/": "the page of `dvc plots` and its two kinds of charts",
    "recipes/": "complete params files: the default, GPT-2 124M to XL, continued training",
    "docs/notes.md": "the notes behind this project, answered with figures from a run",
    "tests/": "the same folders, and end_to_end/: the claims seen from outside",
    "tests/NUMERICS.md": "details that reimplementations get wrong, and the test of each",
    "benchmarks/": "measurements anyone can repeat, and their results",
    "tools/readme.py": "fills the marked blocks of this page and of docs/",
    "tools/fault_table.py": "the table of faults on this page, from the results of their tests",
    "tools/soak*.py": "random faults against a small real pipeline, and whether anything was lost",
    "constraints.txt": "every version, for every platform",
    "*.lock": "their hashes, made by tools/lock.py; PyTorch has its own",
    "Makefile": "repro, test, faults, ui, report, lint, clean",
}


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

    rows = [("stages/", phrase(ROOT / "stages/__init__.py"))]
    rows += [*lines(MAKES), *lines(LOOKS), *OTHER_FILES.items()]
    width = max(len(name) for name, _ in rows) + 2
    return "```text\n" + "\n".join(f"{name:<{width}}{text}" for name, text in rows) + "\n```"


def faults() -> str:
    from tools import fault_table

    return fault_table.page(*fault_table.results())


def speed() -> str:
    from benchmarks import summary

    return summary.summary().strip()


def run_faults() -> bool:
    from tools import fault_table

    return fault_table.run()


def phrase(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return doc.splitlines()[0].rstrip(".")


def run(command: str, clone: Path) -> str:
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
    lines = [line for line, last in zip(lines, ["", *lines], strict=False) if line or last]
    tensors = [line for line in lines if TENSOR.match(line)]
    if tensors:
        at = lines.index(tensors[0])
        lines = [line for line in lines if line not in tensors]
        lines.insert(at, f"[... {len(tensors)} more tensors ...]")
    if len(lines) > LONGEST:
        left_out = len(lines) - LONGEST
        half = LONGEST // 2
        lines = [*lines[:half], f"[... {left_out} more lines ...]", *lines[-half:]]
    shown = "\n".join(lines).strip("\n")
    return f"```console\n$ {command}\n{shown}\n```\n\nIt took {seconds:.0f} s."


def do(command: str, clone: Path) -> str:
    """The command alone, and how long it took; its parts stand on lines of their own."""
    took = run(command, clone).rpartition("\n\n")[2]
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


FROM_A_RUN = {"run": run, "do": do, "page": page, "figure": figure}
FROM_THE_CODE = {"settings": settings, "tree": tree, "faults": faults, "speed": speed}


def main() -> None:
    from pipeline import terminal

    terminal.guard()
    commands = "--run" in sys.argv
    passed = "--faults" not in sys.argv or run_faults()
    clone = Path()
    if commands:
        clone = Path(tempfile.mkdtemp()) / "gpt2"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        print(f"the clone stays at {clone}", file=sys.stderr)

    asked = set(sys.argv[1:]) - {"--run", "--faults"}
    if commands and asked and "README.md" not in asked:
        run("dvc repro", clone)  # which README.md has among its own commands
    for path in PAGES:
        if asked and path.name not in asked:
            continue
        text = path.read_text("utf-8")
        at = 0
        while match := BLOCK.search(text, at):
            kind, argument, new = match[2], match[3], match[4].strip("\n")
            if kind in FROM_A_RUN and commands:
                new = FROM_A_RUN[kind](argument, clone)
            elif kind not in FROM_A_RUN:
                new = FROM_THE_CODE[kind]()
            filled = f"{match[1]}{new}\n{match[5]}"
            text = text[: match.start()] + filled + text[match.end() :]
            at = match.start() + len(filled)
            # At once: what has been measured is not lost to a command that fails later.
            path.write_text(text, "utf-8", newline="\n")
    if not passed:
        sys.exit("a test failed: the fault table says which row is not held")


if __name__ == "__main__":
    main()
