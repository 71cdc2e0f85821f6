"""A GPU made of the host's memory: it computes on the CPU and refuses what CUDA refuses.

    with stand_in.gpu(monkeypatch):
        x = torch.zeros(2, device="cuda")  # its values are at hand, its device says cuda

A tensor on it is another one than the host's: no operation takes both (but numbers, 0-dim), none is
pinned, none becomes a NumPy array, none is drawn from the host's generators, and inside a graph
nobody waits. A copy to the host that nobody waits for holds nothing until somebody does, and
every wait is noted in `WAITS`. So code that confuses the two places fails on a machine without a
GPU as well. What it has not: autocast's casts (all is fp32 but for what asks for a format itself),
and any speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CUDA = torch.device("cuda")
_THIS = torch.device("cuda", 0)
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "multinomial")  # the host waits
UNORDERED = ("cumsum", "histc", "put_")  # on CUDA, of floats; those of its list that we might use
_graph: Graph | None = None  # the one that is being captured


class OnDevice(Tensor):
    """A tensor whose values lie in `host`, which kernels alone may read."""

    host: Tensor
    device = property(lambda self: _THIS)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",  # to autograd, which on CUDA would want threads and streams of its own
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class Generator(torch.Generator):
    """One of the device, from which the host's tensors cannot be drawn."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.place = torch.device(device)

    device = property(lambda self: self.place)


class Graph:
    """What was launched while it was captured, and is launched again, at the same addresses."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, outputs in self.launched:
            for there, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                there.copy_(new)


class Event:
    """A place in the stream: the copies that were launched before it."""

    def record(self) -> None:
        self.copies = list(LATE)

    def synchronize(self) -> None:
        _wait("event", self.copies)


def _wait(why: str, copies: list[tuple[Tensor, Tensor]] | None = None) -> None:
    """The host waits for these copies, or for all that has been launched."""
    WAITS.append(why)
    for there, values in LATE if copies is None else copies:
        there.copy_(values)
    if copies is None:
        LATE.clear()


@contextmanager
def capturing(graph: Graph) -> Iterator[None]:
    global _graph
    _graph = graph
    try:
        yield
    finally:
        _graph = None


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Words(TorchFunctionMode):
    """Gives "cuda" a number, for which a torch without CUDA would ask the driver."""

    chance = ""  # of the generator that the call draws from: the dispatcher knows torch's alone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        _Words.chance = generator.device.type if generator else ""
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        args = [_numbered(x) for x in args]
        kwargs = {name: _numbered(x) for name, x in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            where = kwargs.pop("device", None)  # these two go round the dispatcher
            return func(*args, **kwargs).to(where)
        return func(*args, **kwargs)


def _numbered(x: Any) -> Any:
    return _THIS if isinstance(x, str | torch.device) and x in ("cuda", CUDA) else x


def _each(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The arguments or the results of an operation, each changed; quicker than torch's own."""
    if isinstance(tree, list | tuple):
        return type(tree)([_each(x, change) for x in tree])
    return {k: _each(x, change) for k, x in tree.items()} if type(tree) is dict else change(tree)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(tree, lambda x: found.append(x) if isinstance(x, Tensor) else None)
    return found


def _on_host(x: Any) -> Any:
    return x.host if isinstance(x, OnDevice) else x


def _wrapped(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) else x


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.overloadpacket.__name__
    given = _tensors((args, kwargs))
    here = any(isinstance(x, OnDevice) for x in given)
    hosts = any(not isinstance(x, OnDevice) and x.dim() for x in given)
    where = kwargs.get("device")
    place = where.type if where is not None else "cuda" if here else "cpu"
    made_here = place in ("cuda", "meta")  # torch's own code sees the latter: see OnDevice
    if _Words.chance not in ("", "cuda" if made_here else "cpu"):
        raise RuntimeError(f"Expected another device type for generator but found {_Words.chance}")
    if name == "is_pinned":
        return any(args[0] is x for x in PINNED)
    if not here and not made_here:
        return _pinned(args[0]) if name == "_pin_memory" else func(*args, **kwargs)
    _refuse(func, name, here and hosts, made_here)
    kwargs = kwargs | ({"device": torch.device("cpu")} if where is not None else {})
    inner_args, inner_kwargs = _each((args, kwargs), _on_host)
    result = func(*inner_args, **inner_kwargs)
    if name == "_to_copy" and not made_here and kwargs.get("non_blocking"):
        nothing = torch.nan if result.is_floating_point() else -1
        LATE.append((torch.full_like(result, nothing), result.clone()))
        return LATE[-1][0]
    if name in _READS or not made_here:
        _wait(name)
    if name in _READS[:3] or not made_here:
        return result
    if name == "_to_copy":
        result = result.clone()
    if _graph is not None:
        _graph.launched.append((func, inner_args, inner_kwargs, _tensors(result)))
    if name == "copy_":
        return args[0]
    if not here:
        return _each(result, _wrapped)
    with torch.inference_mode(False):  # a view of what it left alone could not be one of its own
        wrapped = _each(result, _wrapped)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _refuse(func: Any, name: str, mixed: bool, made_here: bool) -> None:
    """Raise what torch raises of CUDA, in its words."""
    if name == "_pin_memory":
        raise RuntimeError(
            "cannot pin 'torch.cuda.LongTensor' only dense CPU tensors can be pinned"
        )
    if mixed and name not in ("copy_", "_to_copy"):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({name})"
        )
    if name in UNORDERED and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            f"{name}_cuda_kernel does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism"
        )
    if func.namespace != "aten":
        raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend.")
    if _graph is not None and (mixed or name in _READS or not made_here):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def _pinned(x: Tensor) -> Tensor:
    """A CPU's torch pins nothing: a copy that remembers."""
    made = x.clone()
    PINNED.append(made)
    return made


PINNED: list[Tensor] = []  # since the stand-in was entered
WAITS: list[str] = []  # what the host waited for since then, by the operation
LATE: list[tuple[Tensor, Tensor]] = []  # on their way to the host: where to, and what


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """A GPU of this compute capability is seen, which knows CUDA devices alone."""

    def of_cuda(answer: Any) -> Callable[..., Any]:
        def ask(device: Any = CUDA, *_: Any) -> Any:
            if torch.device(device).type != "cuda":  # as torch.cuda says it
                raise ValueError(f"Expected a cuda device, but got: {device}")
            return answer

        return ask

    answers = {
        "get_device_capability": capability,
        "get_device_name": "stand-in",
        "mem_get_info": (8 << 30, 16 << 30),
        "memory_allocated": 1 << 30,
        "memory_reserved": 3 << 30,
        "max_memory_allocated": 2 << 30,
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, of_cuda(answer))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, torch has a CUDA device."""
    pretend(monkeypatch)
    state = torch.zeros(16, dtype=torch.uint8)

    def set_state(new: Tensor, device: torch.device = CUDA) -> None:
        assert torch.device(device).type == "cuda"
        if type(new) is not Tensor or new.dtype is not torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")  # which lies on the host
        state.copy_(new)

    own = {"wait_stream": lambda *_: None, "is_capturing": lambda _: _graph is not None}
    stream = type("Stream", (), own)
    for name, instead in {
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: _graph is not None,
        "get_rng_state": lambda device=CUDA: state.clone(),
        "set_rng_state": set_state,
        "Stream": stream,
        "current_stream": stream,
        "stream": lambda _: nullcontext(),
        "Event": Event,
        "synchronize": lambda device=CUDA: _wait("synchronize"),
        "CUDAGraph": Graph,
        "graph": capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(torch, "Generator", Generator)
    # Optimizers ask there; a CUDA build of torch would look for a driver.
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: stream())
    for noted in (PINNED, WAITS, LATE):
        noted.clear()
    with _Words(), _Dispatch():
        yield
