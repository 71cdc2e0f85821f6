"""fp32 | tf32 | bf16 | fp16 | fp8: what was asked, what is effective on this device, and why.

| precision | exponent, mantissa bits | operands of products | results, and all the rest |
|-----------|-------------------------|----------------------|---------------------------|
| fp32      | 8, 23                   | as they are          | fp32                      |
| tf32      | 8, 10                   | rounded to tf32      | fp32                      |
| bf16      | 8, 7                    | rounded to bf16      | bf16 by autocast's table  |
| fp16      | 5, 10                   | rounded to fp16      | fp16 by autocast's table  |
| fp8       | 4, 3; gradients 5, 2    | scaled, then rounded | bf16 by autocast's table  |

fp8 is for the products of linear layers, by far the most, which `Precision.prepare` marks;
attention and the head are as in bf16.

Products accumulate in fp32 in every mode, on CUDA because torch is told so: by default it lets
cuBLAS add up parts of a low product in that low format. Parameters, their gradients and the loss
are fp32.

tf32 has two interfaces in torch, and once both have spoken torch's getters raise or lie. Only
`torch.set_float32_matmul_precision` is used here, "high" for tf32 and "highest" for the rest: it
is the one that readers know and that torch.compile asks. The newer
`torch.backends.cuda.matmul.fp32_precision` calls the same two "tf32" and "ieee".

A CPU without instructions for a format computes it in torch's reference kernels, some 20 times
slower than fp32. There the mode is emulated: see `emulation.py`, and for fp8 `fp8.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.compute import fp8
from pipeline.compute.emulation import EmulatedProducts
from pipeline.compute.runtime import device_name
from pipeline.errors import ConfigError

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # of what is not multiplied in fp8
}

# Instructions that multiply the format, as torch.cpu.get_capabilities() names them.
CPU_INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"),
    "tf32": (),
    "fp8": (),  # torch has no kernel that uses any
}
AMPERE = (8, 0)  # the first compute capability whose tensor cores take tf32 and bf16
VOLTA = (7, 0)  # the first that has tensor cores; they take fp16
ADA = (8, 9)  # the first whose tensor cores take fp8
FP8_EMULATED = (
    "this CPU has no fp8 instructions: operands of linear layers are scaled and rounded to fp8, "
    "products accumulate in fp32 (emulated); attention and the head are bf16"
)
# Settings of torch.backends.cuda.matmul; each is set with its `_split_k`, which stays as it is.
LOW_SUMS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@dataclass(frozen=True)
class Precision:
    """How products are computed. `reason` is empty where asked and effective need no word."""

    asked: str
    effective: str
    reason: str
    emulated: bool
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Around the forward pass and the loss, never around the backward pass."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def prepare(self, model: nn.Module) -> None:
        """Have the model's linear layers multiply in this precision, in place.

        Call it once, before the model is used: fp8 is a property of layers, all other formats are
        those of `autocast` and `products`.
        """
        fp8.mark(model, fp8=self.effective == "fp8", emulated=self.emulated)

    def products(self) -> AbstractContextManager[object]:
        """Around the forward and the backward pass; leaves torch's settings as they were."""
        if self.effective == "fp8":
            return self.of_the_rest().products()
        if self.emulated:
            return EmulatedProducts(self.effective)
        if self.device.type == "cuda":
            return _cuda_products("high" if self.effective == "tf32" else "highest")
        return nullcontext()

    def of_the_rest(self) -> Precision:
        """The precision of products that are no linear layer's: with fp8 these are bf16."""
        return choose_precision("bf16", self.device) if self.effective == "fp8" else self

    @property
    def device_name(self) -> str:
        return device_name(self.device)

    @property
    def operand_bytes(self) -> int:
        """Bytes per operand element, as a kernel reads it; emulated formats are held in fp32."""
        if self.emulated:
            return 4
        return 1 if self.effective == "fp8" else self.dtype.itemsize

    @property
    def result_bytes(self) -> int:
        """Bytes per element of a product, as a kernel writes it."""
        return 4 if self.emulated else self.dtype.itemsize

    def multiplication(self, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
        """A call that makes a @ b, both fp32 matrices, as this precision's linear layers do.

        The operands are put into the format here, so the call is the product alone.
        """
        if self.effective == "fp8":
            # Transposed, since the tensor cores want the second operand column by column.
            x, y = (fp8.scaled(m, fp8.FORWARD, self.emulated) for m in (a, b.t().contiguous()))
            return lambda: fp8.product(x, y.t())
        low, other = a.to(self.dtype), b.to(self.dtype)

        def call() -> Tensor:
            with self.products():
                return low @ other

        return call

    def make_scaler(self) -> torch.amp.GradScaler:
        """A loss scaler, working in fp16 only: bf16 has fp32's exponents."""
        return torch.amp.GradScaler(self.device.type, enabled=self.effective == "fp16")


def choose_precision(name: str, device: torch.device) -> Precision:
    """What `name` comes to on `device`. Raises ConfigError for an unknown name."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision={name}: expected one of {', '.join(PRECISIONS)}")
    effective, reason, emulated = DEVICES.get(device.type, _elsewhere)(name, device)
    return Precision(name, effective, reason, emulated, device, PRECISIONS[effective])


def of_a_card(name: str) -> Precision:
    """`name` on a GPU that multiplies it, wherever that may be: for forecasts."""
    return Precision(name, name, "", False, torch.device("cuda"), PRECISIONS[name])


def _on_cpu(name: str, device: torch.device) -> tuple[str, str, bool]:
    known = _cpu_capabilities()
    if name == "fp32" or any(known.get(needed) for needed in CPU_INSTRUCTIONS[name]):
        return name, "", False
    if name == "fp8":
        rest = ", emulated as well" if _on_cpu("bf16", device)[2] else ""
        return name, f"{FP8_EMULATED}{rest}", True
    result = "are fp32" if name == "tf32" else f"are rounded to {name}"
    reason = (
        f"this CPU has no {name} instructions: operands are rounded to {name}, "
        f"products accumulate in fp32, results {result} (emulated)"
    )
    return name, reason, True


def _cpu_capabilities() -> dict[str, bool]:
    """Instruction sets of this CPU by name; torch 2.11 knows fewer of them, and privately."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    known = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_fp16": "_is_amx_fp16_supported"}
    return {name: getattr(torch.cpu, test, bool)() for name, test in known.items()}


def _on_cuda(name: str, device: torch.device) -> tuple[str, str, bool]:
    capability = torch.cuda.get_device_capability(device)
    this = f"this GPU has {capability[0]}.{capability[1]}"
    if name in ("tf32", "bf16", "fp8") and capability < AMPERE:
        least = "8.9" if name == "fp8" else "8.0"
        return "fp32", f"{name} needs compute capability {least}, {this}: fp32 instead", False
    if name == "fp8" and capability < ADA:
        return "bf16", f"fp8 needs compute capability 8.9, {this}: bf16 instead", False
    if name == "fp16" and capability < VOLTA:
        return name, f"tensor cores need compute capability 7.0, {this}: fp16 goes without", False
    return name, "", False


def _elsewhere(name: str, device: torch.device) -> tuple[str, str, bool]:
    if name == "tf32":
        return "fp32", f"{device.type} devices have no tf32: fp32 instead", False
    if name == "fp8":
        return "bf16", f"no products in fp8 on {device.type} devices: bf16 instead", False
    return name, "", False


DEVICES = {"cpu": _on_cpu, "cuda": _on_cuda}


@contextmanager
def _cuda_products(precision: str) -> Iterator[None]:
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    sums = {n: (getattr(matmul, n), getattr(matmul, f"{n}_split_k")) for n in LOW_SUMS}
    torch.set_float32_matmul_precision(precision)
    for name, (_, split_k) in sums.items():
        setattr(matmul, name, (False, split_k))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for name, both in sums.items():
            setattr(matmul, name, both)
