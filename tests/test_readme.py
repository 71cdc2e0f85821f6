"""The pages' settings, file tree and blocks are those of the code and of a real run."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", ["settings", "tree"])
def test_the_readme_shows_what_the_code_says(tool, block: str) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    assert getattr(tool, block)() in page, "run `python tools/readme.py`"


@pytest.mark.parametrize("name", ["README.md", "docs/notes.md"])
def test_every_block_has_been_filled_by_a_run(tool, name: str) -> None:
    assert ROOT / name in tool.PAGES
    blocks = list(tool.BLOCK.finditer((ROOT / name).read_text("utf-8")))
    assert blocks
    for match in blocks:
        kind, argument, filled = match[2], match[3], match[4]
        assert filled.strip(), f"run `python tools/readme.py --run`: {argument}"
        if kind == "run":
            assert f"$ {argument}\n" in filled, f"run `python tools/readme.py --run`: {argument}"


def test_every_figure_of_a_page_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "notes.md"):
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text("utf-8")):
            assert (page.parent / name).is_file(), name
