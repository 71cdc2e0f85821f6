"""What a training reads: tokens of both splits, and the model that it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pipeline import paths
from pipeline.data.batches import check_length
from pipeline.data.token_files import Tokens, open_tokens
from pipeline.errors import together
from pipeline.model.model_dir import check_model


@dataclass(frozen=True)
class Inputs:
    """The tokens of both splits, and the initial model's SHA-256."""

    train: Tokens
    val: Tokens
    init: str

    def digests(self) -> dict[str, str]:
        return {"train": self.train.sha256, "val": self.val.sha256, "init": self.init}


def open_inputs(sequence_length: int) -> Inputs:
    """Open and check every input; raises one error with every problem.

    The training split must hold at least one sequence of `sequence_length` tokens.
    """
    inputs = Inputs(
        *together(
            partial(open_tokens, paths.TOKENS, "train"),
            partial(open_tokens, paths.TOKENS, "val"),
            partial(check_model, paths.INIT),
        )
    )
    check_length(inputs.train, sequence_length)
    return inputs
