"""The text of a conversation: what stands before each message, and where an answer begins."""

from __future__ import annotations

from collections.abc import Iterable

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


def prompt(text: str) -> str:
    """`text` up to where the model's answer begins: a user's words, or a conversation as text.

    A conversation begins with a role, "User: What is 2 + 2?", and ends in "Assistant:", which is
    added where it is not there.
    """
    begun = text.startswith(tuple(f"{name}:" for name in ROLES.values()))
    said, answer = text if begun else f"{ROLES['user']}: {text}", f"{ROLES['assistant']}:"
    return said if begun and said.endswith(answer) else f"{said}\n{answer}"


def prompts(texts: Iterable[str], source: str) -> list[str]:
    """sample.prompts as a model trained on `source` reads them."""
    return [prompt(text) if source == "chat" else text for text in texts]
