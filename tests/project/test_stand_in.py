"""The stand-in for a GPU refuses what a GPU refuses, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from pipeline.compute import runtime
from pipeline.compute.determinism import deterministic
from tests.helpers import stand_in
from tests.helpers.stand_in import CUDA

HOST = torch.arange(6.0).view(2, 3)
ROWS = torch.tensor([1, 0])


@pytest.fixture
def there(monkeypatch) -> Iterator[torch.Tensor]:
    with stand_in.gpu(monkeypatch):
        yield HOST.to(CUDA)


REFUSED: dict[str, tuple[str, Callable[[torch.Tensor], object]]] = {
    "pinning": ("only dense CPU tensors can be pinned", lambda x: x.pin_memory()),
    "numpy": ("numpy", lambda x: x.numpy()),
    "adding": ("same device", lambda x: x + HOST),
    "multiplying": ("same device", lambda x: x @ HOST.t()),
    "embedding": ("same device", lambda x: F.embedding(ROWS, x)),
    "writing": ("same device", lambda x: torch.mm(x, x.t(), out=torch.empty(2, 2))),
    "drawing": (
        "device type for generator",
        lambda x: torch.multinomial(x + 1, 1, generator=runtime.generator(0, "x")),
    ),
    "filling": (
        "device type for generator",
        lambda x: HOST.clone().normal_(generator=runtime.generator(0, "x", CUDA)),
    ),
    "a state that is not the host's": (
        "ByteTensor",
        lambda x: torch.cuda.set_rng_state(x.byte(), CUDA),
    ),
    "a CPU's kernel": (
        "'CUDA' backend",
        lambda x: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""),
    ),
    "another device": ("a cuda device", lambda x: torch.cuda.get_device_capability("cpu")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses_what_cuda_refuses(there, what: str) -> None:
    words, call = REFUSED[what]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
        call(there)


def test_it_refuses_a_sum_without_an_order_where_one_is_asked_for(there) -> None:
    there.cumsum(0)
    with deterministic(True, torch.device("cpu")), pytest.raises(RuntimeError, match="have a det"):
        there.cumsum(0)


def test_a_graph_refuses_to_wait_and_to_copy_and_replays_what_it_holds(there) -> None:
    for waits in (
        lambda: there.sum().item(),
        lambda: there.cpu(),
        lambda: there.copy_(HOST),
        lambda: torch.multinomial(there, 1),
    ):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
            waits()
    with torch.cuda.graph(graph):
        doubled = there[:, 1:] * 2
    for number in (1.0, 5.0):
        there.fill_(number)
        graph.replay()
        assert doubled.tolist() == [[2 * number] * 2] * 2


def test_it_computes_what_the_host_computes(there) -> None:
    assert there.device.type == "cuda" and there.tolist() == HOST.tolist()
    assert (there + 1).cpu().equal(HOST + 1) and (there * torch.tensor(2.0)).cpu().equal(HOST * 2)
    view = there[:, 1]
    view += 10
    assert there.cpu().equal(torch.tensor([[0.0, 11, 2], [3, 14, 5]]))
    weight = torch.nn.Parameter(torch.ones(3, device=CUDA))
    (there * weight).sum().backward()
    assert weight.grad.device.type == "cuda" and weight.grad.tolist() == [3, 25, 7]
    drawn = torch.rand(4, generator=runtime.generator(0, "x", CUDA), device=CUDA)
    assert drawn.tolist() == torch.rand(4, generator=runtime.generator(0, "x")).tolist()


def test_outside_of_it_torch_is_as_it_was(there, monkeypatch) -> None:
    monkeypatch.undo()
    assert torch.cuda.is_available.__module__ == "torch.cuda"
    assert torch.Generator().device.type == "cpu"
