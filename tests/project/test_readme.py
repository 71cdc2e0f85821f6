"""The pages say what the code says, show what a run printed, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import config as configuration
from pipeline import errors
from pipeline.__main__ import VERBS
from pipeline.diagnostics import doctor
from pipeline.records import stage_graph
from tests.conftest import NANO, ROOT
from tests.helpers.faults import COLLECTED
from tools import fault_table, readme, references

WRITTEN = [*readme.PAGES, ROOT / "CONTRIBUTING.md"]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in WRITTEN}
ALL = "\n".join(PAGES.values())
README, ARCHITECTURE = PAGES["README.md"], PAGES["docs/architecture.md"]
# Words that stand for a name in a usage line.
STAND_INS = {"VERB", "NAME", "stages/NAME.py"}


def blocks(text: str) -> list[re.Match[str]]:
    return list(readme.BLOCK.finditer(text))


# --- blocks


def test_every_page_is_filled_by_the_tool() -> None:
    pages = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}
    assert pages == set(readme.PAGES) and len(readme.PAGES) == len(pages)
    for name, text in PAGES.items():
        assert text.count("\n<!-- ") - text.count("\n<!-- end") == len(blocks(text)), name


@pytest.mark.parametrize("kind", readme.FROM_THE_CODE)
def test_a_block_from_the_code_shows_what_the_code_says(kind: str) -> None:
    shown = [match[4].strip() for match in blocks(ALL) if match[2] == kind]
    assert shown, kind
    assert set(shown) == {readme.FROM_THE_CODE[kind]().strip()}, "run `python tools/readme.py`"


@pytest.mark.parametrize("name", PAGES)
def test_a_block_from_a_run_is_as_the_run_left_it(name: str) -> None:
    for match in blocks(PAGES[name]):
        kind, argument, text, mark = match[2], match[3], match[4], match[5]
        if kind in readme.FROM_A_RUN:
            again = f"run `python tools/readme.py --run`: {argument}"
            assert text.strip(), again
            assert mark == readme.digest(kind, argument, text), again
            if kind in ("run", "brief", "full"):
                assert text.startswith(f"```console\n$ {argument}\n"), again


def test_a_digest_notices_a_letter_a_command_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert readme.digest("run", "ls", "a\nb\n") == readme.digest("run", "ls", "\na\nb")
    assert readme.digest("run", "ls", "a\nb") != readme.digest("run", "ls", "a\nB")
    assert readme.digest("run", "ls", "a\nb") != readme.digest("run", "ls -l", "a\nb")
    monkeypatch.setattr(readme, "FIGURES", tmp_path / "figures")
    (tmp_path / "figures").mkdir()
    picture = tmp_path / "figures" / "x.png"
    picture.write_bytes(b"1")
    before = readme.digest("figure", "x.png | words", "![words](figures/x.png)")
    picture.write_bytes(b"2")
    assert readme.digest("figure", "x.png | words", "![words](figures/x.png)") != before


def test_a_run_fills_its_block_and_a_brief_one_keeps_the_stages_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "PRINTED", {})
    command = "printf 'train: loss 5\\n> noise\\nloss  5.1\\n'"
    page = tmp_path / "page.md"
    marks = [f"<!-- {kind} {command} -->\nstale\n<!-- end -->\n" for kind in ("brief", "full")]
    page.write_text("".join(marks), "utf-8")
    readme.fill(page, tmp_path)
    brief, full = blocks(page.read_text("utf-8"))
    said = f"```console\n$ {command}\ntrain: loss 5\nloss  5.1\n```\n\nIt took 0 s.\n"
    assert brief[4] == said and brief[5] == readme.digest("brief", command, said)
    assert "> noise" in full[4] and "stale" not in full[4]


# --- quoted output against the code


def test_the_number_of_the_doctors_checks_is_the_codes_everywhere() -> None:
    quoted = re.findall(r"(\d+) (?:checks|rules)\b", ALL)
    assert quoted and set(quoted) == {str(len(doctor.RULES))}, "run `python tools/readme.py --run`"


def test_stages_that_quoted_output_names_are_dvc_yamls() -> None:
    known = set(stage_graph.stages())
    quoted = re.findall(r"^(?:Running stage|Stage) '(\w+)'", ALL, re.MULTILINE)
    shown = [match[4] for match in blocks(ALL) if match[2] in ("brief", "full")]
    spoke = re.findall(r"^([a-z_]+): ", "\n".join(shown), re.MULTILINE)
    assert set(quoted) == known
    assert set(spoke) - {"figure", "curves", "table"} == known


def test_commands_of_the_pages_exist() -> None:
    verbs = set(re.findall(r"python -m\s+pipeline (\w+)", ALL)) - STAND_INS
    assert verbs == VERBS.keys()
    for module in set(re.findall(r"python -m stages\.(\w+)", ALL)):
        assert (ROOT / "stages" / f"{module}.py").is_file(), module
    for script in set(re.findall(r"python ((?:tools|benchmarks)/\w+\.py)", ALL)):
        assert (ROOT / script).is_file(), script
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"(?:^\$|`)\s*make ([\w-]+)", ALL, re.MULTILINE))
    assert targets and all(f"\n{target}:" in makefile for target in targets), targets


def test_settings_that_the_pages_change_exist() -> None:
    known = set(configuration.flatten(configuration.load(NANO)))
    changed = re.findall(r"(?:-S |pipeline sweep |&& )([\w.]+)=", ALL)
    changed += re.findall(r"pipeline compare ([a-z][\w.]+)", ALL)
    assert len(changed) > 10 and set(changed) - STAND_INS <= known


def test_the_exit_codes_are_the_codes() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.UserError)}
    rows = re.findall(r"^\| (\d) \| ", PAGES["docs/recovery.md"], re.MULTILINE)
    assert {int(row) for row in rows} == codes


def test_files_that_the_pages_name_exist() -> None:
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
        for path in re.findall(r"`((?:pipeline|stages|tests|tools|recipes|docs)/[\w./]*)`", text):
            assert (ROOT / path).exists() or path in STAND_INS, f"{name}: {path}"


# --- references


def test_every_reference_is_at_its_symbols_line() -> None:
    assert len(references.files(ARCHITECTURE)) > 8
    for name, text in PAGES.items():
        assert references.follow(text) == text, f"{name}: run `python tools/readme.py`"


def test_one_training_step_passes_through_at_most_eight_files() -> None:
    section = ARCHITECTURE.partition("## One training step")[2].partition("\n## ")[0]
    assert 4 <= len(references.files(section)) <= 8


def test_a_reference_follows_its_symbol_to_another_line_and_another_file() -> None:
    stale = '[`x`](../pipeline/model/gpt.py#L1 "GPT.forward")'
    name, line = "pipeline/model/gpt.py", references.symbols(ROOT / "pipeline/model/gpt.py")
    here = f'[`{name}:{line["GPT.forward"]}`](../{name}#L{line["GPT.forward"]} "GPT.forward")'
    assert references.follow(stale) == here
    assert "def forward" in (ROOT / name).read_text("utf-8").splitlines()[line["GPT.forward"] - 1]
    assert references.follow(here.replace("model/gpt.py", "gone.py")) == here
    with pytest.raises(LookupError, match="no_such_name: not in pipeline/gone.py"):
        references.follow('[`x`](pipeline/gone.py "no_such_name")')
    with pytest.raises(LookupError, match="main: not in .*; defined in .*stages/train.py"):
        references.follow('[`x`](pipeline/gone.py "main")')


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


# --- the fault table


def test_every_row_of_the_fault_table_is_held_by_a_test_and_a_control() -> None:
    assert fault_table.gaps(fault_table.results()[1]) == [], "run `make faults`"


def test_the_fault_tables_results_are_of_the_tests_that_are_there(request) -> None:
    outcomes = fault_table.results()[1]
    known = {(line["row"], line["control"], line["test"]) for line in outcomes}
    assert request.config.stash[COLLECTED] <= known, "run `make faults`"
    for line in outcomes:
        path, _, name = line["test"].partition("::")
        assert f"def {name.rpartition('::')[2]}(" in (ROOT / path).read_text("utf-8"), line["test"]


def outcome(row: int, control: bool = False, slow: bool = False, **ends: int) -> fault_table.Line:
    return {"row": row, "control": control, "test": "test_x.py::test_x", "slow": slow} | ends


def test_a_row_that_is_not_held_says_so_in_the_table() -> None:
    known = fault_table.table()
    held = [outcome(row, control, passed=2) for row in known for control in (False, True)]
    run = {"selected": "fault", "seconds": 9, "machine": "m", "python": "3", "torch": "2"}
    runs = [run | {"date": "2026-01-01"}]
    assert fault_table.gaps(held) == []
    assert fault_table.page(runs, held).count("| 2     | 2        |") == len(known)

    assert (known[7]["where"], known[53]["where"]) == ("cheap", "documented")
    spoilt = [line for line in held if line["row"] not in (5, 6, 7, 8, 9, 53)]
    spoilt += [outcome(5, passed=1, failed=1), outcome(5, control=True, passed=1)]
    spoilt += [outcome(6, passed=1), outcome(6, control=True, skipped=1)]
    spoilt += [outcome(8, slow=True, passed=1), outcome(8, control=True, passed=1)]
    spoilt += [outcome(9, passed=1)]
    expected = ["a test failed: 5", "no control that passed: 6, 7, 9"]
    expected += ["no test that passed: 7", "only slow tests: 8"]
    assert fault_table.gaps(spoilt) == expected
    page = fault_table.page(runs, spoilt)
    assert f"**Not held: {'; '.join(expected)}.**" in page
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[3:] for line in page.splitlines()}
    assert [text.strip(" |") for text in cells["5"]] == ["cheap", "1, **1 failed**", "1"]
    assert [text.strip(" |") for text in cells["6"]] == ["cheap", "1", "1 skipped"]
    assert [text.strip(" |") for text in cells["7"]] == ["cheap", "**none**", "**none**"]
    assert [text.strip(" |") for text in cells["8"]] == ["slow", "1", "1"]
    assert [text.strip(" |") for text in cells["53"]] == ["documented", "-", "-"]
