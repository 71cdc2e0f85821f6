"""Which kernel attention takes here, and why it is not the preferred or the fastest one."""

from __future__ import annotations

import logging
import re
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.backends import cuda

from pipeline.model.gpt import ATTENTION

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.config import ModelConfig, TrainConfig
    from pipeline.records.record_file import Record

WIDTH = 64  # of a head that every kernel takes, as it does fp16 without dropout
TESTS = {"cudnn": cuda.can_use_cudnn_attention, "flash": cuda.can_use_flash_attention}

log = logging.getLogger(__name__)


def tell(model: ModelConfig, precision: Precision, train: TrainConfig, record: Record) -> None:
    """Put on record what a training pass really runs; warn where another kernel was to be had.

    Names are naive, math (torch's own formula, which stores the scores), flash, efficient and
    cudnn. Draws from the device's generator where there is dropout.
    """
    name, length, device = model.attention, train.sequence_length, precision.device

    def query(width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros((1, 1, length, width), dtype=dtype, device=device, requires_grad=True)

    mask = None
    if train.mask_documents:  # as for a sequence without a border
        mask = torch.ones((1, 1, length, length), dtype=torch.bool, device=device).tril()
    own = query(model.n_embd // model.n_head, precision.dtype)
    ran = _ran(name, own, model.dropout, mask)
    record.tags({"attention.ran": ran})
    fixed = name in TESTS or name == "naive"
    best = name if fixed else _ran(name, query(WIDTH, torch.float16), 0.0, mask)
    if ran != best:
        why = _why_not(best, own, model.dropout, mask)
        log.warning("model.attention=%s runs as %s, not as %s: %s", name, ran, best, why)
    elif ran == "cudnn" and 16 * model.dropout % 1:  # torch refuses it from some version on
        log.warning("cuDNN's attention rounds model.dropout=%g to sixteenths", model.dropout)


def _ran(name: str, query: Tensor, dropout: float, mask: Tensor | None) -> str:
    """The kernel, by the name of its gradient."""
    made = ATTENTION[name](query, query, query, dropout, mask).grad_fn
    known = re.match(r"ScaledDotProduct(\w+?)Attention", made.name() if made else "")
    return known[1].lower() if known else "naive" if name == "naive" else "math"


def _why_not(kernel: str, query: Tensor, dropout: float, mask: Tensor | None) -> str:
    """What torch says of it."""
    if query.device.type != "cuda":
        with_it = f" with model.dropout={dropout:g}" if dropout else ""
        return f"torch has no such kernel on {query.device.type} devices{with_it}"
    asked = cuda.SDPAParams(query, query, query, mask, dropout, mask is None, False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        TESTS.get(kernel, cuda.can_use_efficient_attention)(asked, True)
    reasons = [re.sub(r"\s*\(Triggered internally.*", "", str(w.message)) for w in said]
    return "; ".join(reasons) or "torch gives no reason"
