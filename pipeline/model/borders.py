"""Documents kept apart: positions, and what each token sees, where a sequence holds several."""

from __future__ import annotations

from torch import Tensor

from pipeline.model.gpt import GPT
from pipeline.published import EOT


def apart(idx: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (B, T) int64, and booleans (B, 1, T, T): does this query see this key?

    idx (B, T). Each document is computed as if it were alone: its end-of-text, which stands before
    it, sees itself only and has position 0, as a prompt's first token has. The one behind it is the
    last thing it has to predict. Of a document that the sequence cuts the first token here is 0.
    """
    document = (idx == EOT).cumsum(1)  # (B, T)
    seen = (document[:, :, None] == document[:, None, :]).tril()  # (B, T, T)
    return seen.sum(-1) - 1, seen[:, None]


def mark(model: GPT, *, documents_apart: bool) -> None:
    """Have the model keep documents apart, or not, where it has no cache; in place."""
    model.layout = apart if documents_apart else None
