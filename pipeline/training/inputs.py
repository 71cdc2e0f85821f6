"""What a training reads: tokens of both splits, and the model that it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import paths
from pipeline.config import UNSET_PATH
from pipeline.data.batches import check_length
from pipeline.data.token_files import Tokens, open_tokens
from pipeline.errors import InputError, together
from pipeline.model.model_dir import check_model
from pipeline.storage.digests import tree_digest
from pipeline.storage.folders import SUMS

if TYPE_CHECKING:
    from pipeline.config import TrainConfig


@dataclass(frozen=True)
class Inputs:
    """The tokens of both splits; SHA-256 of the initial model, and of a fork's state."""

    train: Tokens
    val: Tokens
    init: str
    fork: str = ""

    def digests(self) -> dict[str, str]:
        forked = {"fork": self.fork} if self.fork else {}
        return {"train": self.train.sha256, "val": self.val.sha256, "init": self.init} | forked


def open_inputs(config: TrainConfig) -> Inputs:
    """Open and check every input; raises one error with every problem.

    The training split must hold at least one sequence. A fork's state is checked when it is read.
    """
    inputs = Inputs(
        *together(
            partial(open_tokens, paths.TOKENS, "train"),
            partial(open_tokens, paths.TOKENS, "val"),
            partial(check_model, paths.INIT),
            *([partial(_digest_of_state, Path(config.fork))] if config.fork != UNSET_PATH else []),
        )
    )
    check_length(inputs.train, config.sequence_length)
    return inputs


def _digest_of_state(folder: Path) -> str:
    if not (folder / SUMS).exists():
        raise InputError(
            f"train.fork={folder}: no state is there: `python -m pipeline fork` makes it"
        )
    return tree_digest(folder / SUMS)
