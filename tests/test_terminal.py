"""What leaves for a terminal, a page or Markdown is shown, and nothing in it is obeyed."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from pipeline import terminal
from pipeline.experiments.comparison import Comparison, Run
from pipeline.tracking import run_note
from stages import sample

ROOT = Path(__file__).resolve().parent.parent
TITLE = "\x1b]0;PWNED\x07"  # sets a terminal's title
TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
KINDS = ("\x1b", "\x00", "\x08", "\r", "\x7f", "\x9b", "\u061c", "\u202e", "\u2066", "\u2028")


def test_every_control_character_is_shown_but_tab_and_newline() -> None:
    every = [chr(n) for n in range(sys.maxunicode + 1)]
    obeyed = {c for c in every if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    obeyed |= {c for c in every if unicodedata.bidirectional(c) in TURNS} | set(
        "\u061c\u200e\u200f"
    )
    assert {c for c in every if terminal.shown(c) != c} == obeyed - {"\t", "\n"}
    assert terminal.shown("a\x1bb\x9b\u202e\udc80") == r"a\x1bb\x9b\u202e\udc80"


def test_other_texts_pass_as_they_are() -> None:
    text = "tab\tand\nlines, é, 中文, 🙂, a non-joiner \u200c and שלום\n"
    assert terminal.shown(text) == text
    assert terminal.line(text) == text.replace("\n", "\\n").replace("\t", "\\t")


@pytest.mark.fault(71)
@pytest.mark.parametrize("where", ["print", "stderr", "log", "traceback", "argparse"])
def test_no_escape_sequence_reaches_a_stream(where: str) -> None:
    assert b"\x1b" not in said_by(where, guarded=True)


@pytest.mark.fault(71, control=True)
@pytest.mark.parametrize("where", ["print", "stderr", "log", "traceback"])
def test_without_the_guard_it_does(where: str) -> None:
    assert b"\x1b" in said_by(where, guarded=False)


def said_by(where: str, guarded: bool) -> bytes:
    ways = {
        "print": f"print({TITLE!r})",
        "stderr": f"import sys; sys.stderr.writelines([{TITLE!r}])",
        "log": f"import logging; logging.basicConfig(); logging.error({TITLE!r})",
        "traceback": f"raise RuntimeError({TITLE!r})",
        "argparse": "import argparse; argparse.ArgumentParser().parse_args(['\\x1b]0;X'])",
    }
    first = "from pipeline import terminal; terminal.guard(); terminal.guard()\n" * guarded
    done = subprocess.run(
        [sys.executable, "-c", first + ways[where]], cwd=ROOT, capture_output=True, check=False
    )
    said = done.stdout + done.stderr
    assert b"PWNED" in said or b"0;X" in said
    return said


def test_a_guarded_stream_is_the_stream_in_all_else() -> None:
    plain = io.StringIO()
    stream = terminal.Guarded(plain)
    assert stream.write("\r 50%|###|") == 10 and stream.isatty() is False
    stream.write("a\rb")
    assert plain.getvalue() == "\r 50%|###|a\\x0db", "a bar's own return passes, no other"


def test_every_command_guards_its_output_first() -> None:
    unguarded = []
    for path in [ROOT / "pipeline/__main__.py", *ROOT.glob("tools/*.py")]:
        text = path.read_text("utf-8")
        if "print(" not in text and "log" not in text:  # it says nothing
            continue
        _, main, body = text.partition("\ndef main(")
        if main and "__main__" in text and "terminal.guard()" not in body.split("\n\n\n")[0]:
            unguarded.append(path.name)
    assert unguarded == []


# --- files that a person reads

IMAGE = "![x](http://example.org/x.png)"
LINKS = "<img src=//example.org/x> [a](http://example.org) <http://example.org> www.example.org"
EVIL = f"{IMAGE} {LINKS} `code` __b__ *e* | a@example.org &lt; ~~s~~ \\* https://example.org"


@pytest.mark.fault(71)
def test_text_in_markdown_is_shown_as_it_is() -> None:
    reader = MarkdownIt("gfm-like", {"linkify": False}).enable("table")
    (_, inline, _) = reader.parse(terminal.in_markdown(EVIL))
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == EVIL
    assert not re.search("https?://|www[.]", terminal.in_markdown(EVIL))  # some readers link them


@pytest.mark.fault(71, control=True)
def test_text_put_into_markdown_as_it_is_brings_its_image() -> None:
    (_, inline, _) = MarkdownIt("commonmark").parse(EVIL)
    assert {"image", "link_open", "html_inline"} <= {child.type for child in inline.children}


@pytest.mark.parametrize("text", ["a\n```\n# b\n", "````\n" + IMAGE, f"<script>{TITLE}", ""])
def test_a_block_of_text_is_one_block_whatever_is_in_it(text: str) -> None:
    (block,) = MarkdownIt("commonmark").parse(terminal.as_code(text))
    assert block.type == "fence" and block.content == terminal.shown(text) + "\n"


@pytest.mark.fault(71)
def test_no_page_obeys_what_a_record_or_a_model_says(make_config) -> None:
    hostile = TITLE + EVIL
    config = make_config(sample__prompts=[hostile])
    texts = [{"when": "after", "prompt": hostile, "text": f"{TITLE}\n```\n{IMAGE}", "tokens": []}]
    head = {"git": {"commit": hostile}, "parent": {"settings": "", "changed": {hostile: ["a", 1]}}}
    facts = run_note.Facts(hostile, {"val/loss": 1.0}, {"health.verdict": hostile})
    run = Run(hostile, "r", 0, {"train.seed": 1}, "", "", [1.0], [], 1.0, 1.0, 1.0, 0)
    other = Comparison(hostile, hostile, {hostile: [run]})
    for text in (sample.readable(texts, config), run_note.note(head, facts, facts), other.page()):
        assert text == terminal.shown(text)
        seen = MarkdownIt("commonmark").enable("table").parse(text)
        inner = {child.type for token in seen for child in token.children or ()}
        assert not inner & {"image", "link_open", "html_inline"}
        assert "html_block" not in {token.type for token in seen}


def test_json_without_hidden_characters_says_the_same() -> None:
    content = {"text": "".join(KINDS) + "é\n"}
    text = terminal.in_json(json.dumps(content, ensure_ascii=False))
    assert text == terminal.shown(text) and "é" in text
    assert json.loads(text) == content
