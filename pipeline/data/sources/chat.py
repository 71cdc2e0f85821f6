"""Conversations: one a line of JSON, of which the assistant's words alone are to be learned.

A line is `{"messages": [{"role": "user", "content": "..."}, ...]}`. As text, a conversation is

    System: You are brief.
    User: What is 2 + 2?
    Assistant: 4<|endoftext|>
    User: And 3 + 3?
    Assistant: 6<|endoftext|>

with end-of-text before it, as before every document. GPT-2 has no tokens for roles, so these are
plain words, which any program can write: a prompt is such a text that ends in "Assistant:". An
answer reaches from the space after that to its end-of-text, a token that no user can write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.data.conversation import ROLES
from pipeline.data.documents import PART_CHARACTERS, Document, document, share
from pipeline.data.listing import files, packed
from pipeline.data.text_files import Line, checked, json_object, lines, plain_object
from pipeline.errors import InputError, Refuse, quoted, refusing

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

SUFFIXES = packed(".jsonl")
TEMPLATE = "System: ...\nUser: ...\nAssistant: ...<|endoftext|>\nUser: ..."
# Keys that say that words are not to be learned, or are none: not heeded, so not passed over.
UNHEEDED = ("weight", "tool_calls", "function_call")


def documents(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    for name, path in files(config, SUFFIXES).items():
        with refusing(refuse, path):
            line = None
            for line in lines(path):
                with refusing(refuse, path):
                    [empty] = document(f"{name}:{line.number}", share(config), [])
                    for number, (text, answer) in enumerate(parts(line)):
                        yield empty._replace(text=text, starts=number == 0, answer=answer)
            if line is None:
                raise InputError(f"{path}: no conversation in it")


def parts(line: Line) -> list[tuple[str, bool]]:
    """The text of a conversation, each answer apart from what is before it, and which it is.

    Raises InputError naming line and message for what is no message, and where there is no answer.
    """
    messages = json_object(line).get("messages")
    if not isinstance(messages, list):
        got = type(messages).__name__
        raise InputError(f"{line.where}: messages: a list of them is expected, got {got}")
    found, text = [], ""
    for number, message in enumerate(messages, 1):
        role, content = _message(message, f"{line.where}: message {number}")
        text += "\n" * (number > 1) + f"{ROLES[role]}:"
        if role == "assistant":
            found += [(text, False), (f" {content}", True)]
            text = ""
        else:
            text += f" {content}"
    if not found:
        raise InputError(f"{line.where}: no answer: a message with role=assistant is expected")
    found += [(text, False)] * bool(text)
    if max(len(part) for part, _ in found) > PART_CHARACTERS:
        raise InputError(
            f"{line.where}: over {PART_CHARACTERS:,} characters in or before an answer"
        )
    return found


def _message(message: Any, where: str) -> tuple[str, str]:
    """Its role and its content; raises InputError for anything else than these in words."""
    fields = plain_object(message, where)
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: role={quoted(role)}: expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{where}: content: text is expected, got {type(content).__name__}")
    if role == "assistant" and not content.strip():
        raise InputError(f"{where}: an answer without words")
    for key in UNHEEDED:
        if fields.get(key) not in (None, 1):
            raise InputError(f"{where}: {key}={quoted(fields[key])}: only words are learned from")
    return role, checked(content, where)
