"""The README's settings and file tree are those of the code."""

from __future__ import annotations

import importlib.util

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


def test_every_command_block_has_been_filled(tool) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    blocks = [match for match in tool.BLOCK.finditer(page) if match[2] == "run"]
    assert blocks
    for match in blocks:
        assert f"$ {match[3]}\n" in match[4], f"run `python tools/readme.py --run`: {match[3]}"
