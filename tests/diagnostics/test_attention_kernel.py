"""The kernel of attention: what really ran is on record, and why it is not another."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.backends import cuda

from pipeline.compute.precision import choose_precision
from pipeline.diagnostics import attention_kernel
from tests.helpers import stand_in

CPU = torch.device("cpu")


def told(
    make_config,
    caplog,
    attention: str,
    dropout: float,
    mode: Any = None,
    apart: bool = False,
    **shape: int,
) -> tuple[str, str]:
    """(what is on record, the warning or "")."""
    kept: dict[str, str] = {}
    record: Any = SimpleNamespace(tags=kept.update)
    model = replace(make_config().model, n_head=4, attention=attention, dropout=dropout, **shape)
    train = replace(make_config().train, sequence_length=16, mask_documents=apart)
    attention_kernel.tell(model, mode or choose_precision("fp32", CPU), train, record)
    return kept["attention.ran"], "\n".join(caplog.messages)


@pytest.mark.parametrize(
    ("attention", "dropout", "ran", "warned"),
    [
        ("sdpa", 0.0, "flash", ""),
        ("flash", 0.0, "flash", ""),
        ("naive", 0.1, "naive", ""),
        (
            "cudnn",
            0.0,
            "flash",
            "runs as flash, not as cudnn: torch has no such kernel on cpu",
        ),
        ("sdpa", 0.1, "math", "sdpa runs as math, not as flash"),
        ("flash", 0.1, "math", "flash runs as math, not as flash"),
    ],
)
def test_a_cpu_has_flash_without_dropout_and_the_formula_with_it(
    make_config, caplog, attention: str, dropout: float, ran: str, warned: str
) -> None:
    found, said = told(make_config, caplog, attention, dropout)
    assert found == ran and warned in said and bool(said) == bool(warned)
    assert "model.dropout=0.1" in said or not (warned and dropout)


@pytest.mark.parametrize(("attention", "ran"), [("sdpa", "flash"), ("naive", "naive")])
def test_with_documents_apart_the_kernel_is_one_that_takes_the_mask(
    make_config, caplog, monkeypatch, attention: str, ran: str
) -> None:
    masks = []
    real = attention_kernel.ATTENTION[attention]

    def spy(*given):
        masks.append(given[-1])
        return real(*given)

    monkeypatch.setitem(attention_kernel.ATTENTION, attention, spy)
    assert told(make_config, caplog, attention, 0.0, apart=True) == (ran, "")
    assert all(mask.shape == (1, 1, 16, 16) and not mask[0, 0, 0, 1] for mask in masks)


@pytest.mark.parametrize(
    ("width", "dropout", "warned"),
    [
        (64, 0.0, ""),
        (64, 0.125, ""),
        (64, 0.1, "sdpa runs as flash, not as cudnn: only sixteenths; and no more"),
        (160, 0.0, "sdpa runs as flash, not as cudnn: only sixteenths; and no more"),
    ],
)
def test_what_turns_the_fastest_kernel_off_is_said_in_torchs_words(
    make_config, caplog, monkeypatch, width: int, dropout: float, warned: str
) -> None:
    """On a stand-in, whose torch is made to choose and to speak as one with cuDNN does."""

    def refuse(params: Any, debug: bool) -> bool:
        assert debug and params[4:] == (dropout, True, False)
        warnings.warn("only sixteenths (Triggered internally at sdp_utils.cpp:1.)", stacklevel=1)
        warnings.warn("and no more", stacklevel=1)
        return False

    def ran(name: str, query: torch.Tensor, p: float, mask: Any) -> str:
        assert mask is None
        assert query.device.type == "cuda" and query.requires_grad
        return "cudnn" if query.size(-1) <= 128 and 16 * p % 1 == 0 else "flash"

    monkeypatch.setitem(attention_kernel.TESTS, "cudnn", refuse)
    monkeypatch.setattr(cuda, "SDPAParams", lambda *given: given)
    monkeypatch.setattr(attention_kernel, "_ran", ran)
    with stand_in.gpu(monkeypatch):
        mode = choose_precision("bf16", torch.device("cuda"))
        found, said = told(make_config, caplog, "sdpa", dropout, mode, n_embd=4 * width)
    assert found == ("flash" if warned else "cudnn") and said.endswith(warned)
    assert bool(said) == bool(warned)


def test_a_cudnn_that_would_round_the_dropout_is_said(make_config, caplog, monkeypatch) -> None:
    monkeypatch.setattr(attention_kernel, "_ran", lambda *_: "cudnn")
    assert told(make_config, caplog, "sdpa", 0.125) == ("cudnn", "")
    assert "rounds model.dropout=0.1 to sixteenths" in told(make_config, caplog, "sdpa", 0.1)[1]
