"""The training loss, with the output layer's product inside it: one buffer, one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.compute.buffers import reused, taken
from pipeline.compute.emulation import LOW, exact_products, round_to

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.model.gpt import GPT

IGNORE = -100  # a target that counts for nothing, as in torch.nn.functional.cross_entropy
MAX_LOGIT_BYTES = 1 << 30  # of the fp32 logits held at once; more tokens come in row chunks
COLUMNS = 4192  # of the logits, at once in the weight's gradient: quicker than all (MKL, nano)
FAR = 60.0  # nats; a probability this small has few bits left in fp32, or is 0
BLOCK = 32  # rows of logits, 6 MB, computed again at once for targets of such a probability


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], nats, in fp32: logits (..., V), targets (...) -> (...).

    Targets that are IGNORE have a loss of 0. This is the formula that `linear_cross_entropy` fuses
    with the output layer.
    """
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view(targets.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    precision: Precision,
    *,
    vocab_size: int,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """scale * sum of -log softmax(hidden @ weight.T)[target], nats: a 0-dim fp32 tensor.

    hidden (B, T, C) or (N, C), weight (rows, C), targets (B, T) or (N,) with IGNORE where nothing
    is to be predicted. Rows of `weight` from `vocab_size` on are padding: outside the softmax,
    gradient zero. `scale` (a number or 0-dim tensor) multiplies the fp32 gradient of the logits
    before it is rounded to a low precision, so put fp16's loss scale and 1 / tokens here.

    The gradients are made in the forward pass, in the buffer of the logits, so that these are
    never held twice and never mapped afresh; the backward pass only hands them out, once. Without a
    need for gradients only the loss is computed. In a low `precision` the products, the logits and
    their gradient are low, as `F.linear` has them under autocast; softmax and loss are fp32.
    """
    hidden, targets = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    given = (hidden, weight, targets, precision, vocab_size, scale)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(*given)
    return _Head(*given, gradients=False).loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        head = _Head(*given, gradients=True)
        ctx.grads = [head.grad_hidden, head.grad_weight]
        return head.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Let go of both: of a tensor that is autograd's alone no copy is made to add to it.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("linear_cross_entropy went backward before: its gradients are gone")
        # Asking a GPU whether the factor is one would stall it for longer than multiplying.
        if grad_output.device.type != "cpu" or grad_output != 1:
            grads = [grad * grad_output for grad in grads]
        return *grads, None, None, None, None


class _Head:
    """The loss of one call and its gradients.

    `rounding` names an emulated format: tensors stay fp32 and are rounded in place. `low` is a
    dtype that the device multiplies itself. At most one of them is set; neither in plain fp32.
    """

    loss: Tensor  # 0-dim, fp32
    grad_hidden: Tensor  # (N, C), hidden's dtype
    grad_weight: Tensor  # (rows, C), weight's dtype

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        precision: Precision,
        vocab_size: int,
        scale: float | Tensor,
        *,
        gradients: bool,
    ) -> None:
        own = precision.of_the_rest()  # the output layer is not one of those that fp8 is for
        low = None if own.dtype is torch.float32 else own.dtype
        self.rounding, self.low = (own.effective, None) if own.emulated else (None, low)
        self.vocab_size = vocab_size
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), exact_products():
            self.scale = torch.as_tensor(scale, dtype=torch.float32, device=hidden.device)
            self._run(hidden, weight, targets, gradients)

    def _run(self, hidden: Tensor, weight: Tensor, targets: Tensor, gradients: bool) -> None:
        h, w = self._operand("hidden", hidden), self._operand("weight", weight)
        total = torch.zeros((), device=hidden.device)
        if gradients:
            grad_hidden = torch.empty_like(h)
            grad_weight = taken("grad_weight", weight.shape, torch.float32, weight.device)
        step = max(1, MAX_LOGIT_BYTES // (4 * weight.size(0)))
        for start in range(0, len(h), step):
            rows = slice(start, start + step)
            logits = self._logits(h[rows], w, "logits")  # (n, rows)
            valid = targets[rows] != IGNORE
            indices = targets[rows].where(valid, 0).unsqueeze(1)  # (n, 1)
            total += self._losses(logits, indices, h[rows], w).where(valid, 0).sum()
            if gradients:
                # `logits` holds probabilities by now. The gradient of softmax cross-entropy with
                # respect to the logits is p - onehot(target): 1 less at the target.
                p = logits.gather(1, indices)
                logits.scatter_(1, indices, p - 1)
                grad_hidden[rows] = self._gradients(logits, valid, h[rows], w, grad_weight, start)
        self.loss = total.mul_(self.scale)
        if not gradients:
            return
        if self.rounding in LOW:
            round_to(grad_hidden, self.rounding, out=grad_hidden)
            round_to(grad_weight, self.rounding, out=grad_weight)
        elif not self.low:
            grad_hidden.mul_(self.scale)
            grad_weight.mul_(self.scale)
        self.grad_hidden = grad_hidden.to(hidden.dtype)
        self.grad_weight = grad_weight.to(weight.dtype)

    def _operand(self, name: str, x: Tensor) -> Tensor:
        if self.rounding:
            kept = reused(name, tuple(x.shape), torch.float32, x.device)
            return round_to(x.detach().float(), self.rounding, out=kept)
        return x.detach().to(self.low or torch.float32)

    def _logits(self, h: Tensor, w: Tensor, name: str) -> Tensor:
        """Logits (n, rows) as fp32 numbers of the format, in the reused buffer `name`."""
        logits = reused(name, (len(h), len(w)), torch.float32, h.device)
        if self.low:
            logits.copy_(h @ w.t())
        else:
            torch.mm(h, w.t(), out=logits)
        if self.rounding in LOW:  # in tf32 a product's result stays fp32
            round_to(logits, self.rounding, out=logits)
        logits[:, self.vocab_size :] = -torch.inf  # padding: probability 0, hence gradient 0
        return logits

    def _losses(self, logits: Tensor, indices: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Losses (n,); turns the logits into probabilities."""
        if logits.device.type != "cpu" or torch.compiler.is_compiling():
            target, top = logits.gather(1, indices).squeeze(1), logits.amax(1)
            torch.softmax(logits, 1, out=logits)
            # loss = log(sum of exp(logit - top)) + top - target, and the top probability is
            # exp(0) over that sum: minus its logarithm is the first term.
            return top - target - logits.amax(1).log()
        # -log p(target): two passes over all logits fewer (1.03x at nano size). Where p is too
        # small for fp32 the loss is computed from the logits, which takes a look at the values,
        # for which a GPU would have to be waited for.
        torch.softmax(logits, 1, out=logits)
        losses = logits.gather(1, indices).squeeze(1).log_().neg_()
        for rows in (losses > FAR).nonzero().squeeze(1).split(BLOCK):
            losses[rows] = token_losses(self._logits(h[rows], w, "far"), indices[rows].squeeze(1))
        return losses

    def _gradients(
        self, logits: Tensor, valid: Tensor, h: Tensor, w: Tensor, grad_weight: Tensor, start: int
    ) -> Tensor:
        """Adds these rows' part to grad_weight (overwrites it at start 0); returns grad_hidden.

        `logits` (n, rows) holds the gradient of the logits, before the scale and before rows of
        ignored targets are set to zero. With logits = h w^T: grad_weight = logits^T h, and
        grad_hidden = logits w.
        """
        factor = valid.unsqueeze(1).float()  # (n, 1): 0 where the target is ignored
        if self.rounding in LOW or self.low:
            logits.mul_(factor * self.scale)  # before the rounding: see `scale` of the function
        else:
            # Zeros go into the operand that is far smaller; `_run` multiplies by the scale.
            h = h * factor
        if self.rounding:
            round_to(logits, self.rounding, out=logits)
        if self.low:
            low = logits.to(self.low)
            part = low.t() @ h
            grad_weight.add_(part) if start else grad_weight.copy_(part)
            return low @ w
        size = COLUMNS if logits.device.type == "cpu" else logits.size(1)
        for part, out in zip(logits.split(size, 1), grad_weight.split(size), strict=True):
            # out = beta * out + part^T h; with beta 0 what `out` held is not read.
            torch.addmm(out, part.t(), h, beta=min(start, 1), out=out)
        return (logits @ w).mul_(factor)


def look_up(wte: nn.Embedding, idx: Tensor) -> Tensor:
    """`wte(idx)` (B, T, C), whose gradient `backward()` adds to rows of the weight's `.grad`.

    For a weight that is tied to the output layer, which gives every row a gradient anyhow. torch's
    own look-up makes a second matrix of that size, zeroed, filled and added (1.08x at 124M). On a
    GPU that is quick and in a fixed order, which scattered additions lack there.
    """
    if wte.weight.device.type != "cpu" or not torch.is_grad_enabled():
        return wte(idx)

    def add_rows(rows: Tensor) -> None:
        if wte.weight.grad is None:  # no head gave one, or not yet
            wte.weight.grad = torch.zeros_like(wte.weight)
        wte.weight.grad.index_add_(0, idx.flatten(), rows.grad.flatten(0, 1))

    with torch.no_grad():
        rows = wte(idx)
    if wte.weight.requires_grad:
        rows.requires_grad_().register_post_accumulate_grad_hook(add_rows)
    return rows


def mean_loss(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    device: torch.device,
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> float:
    """Mean loss in nats/target over all batches of inputs and targets (B, T), for validation.

    Sums are added in double precision on the host, so that the batch size leaves no trace beyond
    fp32's rounding. No gradient, no dropout, no random numbers. NaN where there is no target.
    `look` is shown the hidden states (B, T, C) and targets of every batch.
    """

    def nats(x: Tensor, y: Tensor) -> Tensor:
        with precision.autocast():
            hidden, weight = model.hidden(x), model.transformer.wte.weight
            if look:
                look(hidden, y)
            vocabulary = model.config.vocab_size
            return linear_cross_entropy(hidden, weight, y, precision, vocab_size=vocabulary)

    with evaluating(model), precision.products():
        return mean_of(nats, batches, device)


def mean_of(
    nats: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> float:
    """Mean in nats/target over all batches, of which `nats(inputs, targets)` gives a 0-dim sum.

    Targets that are IGNORE do not count. NaN where there is no target.
    """
    total, count = 0.0, 0
    for x, y in batches:
        count += int((y != IGNORE).sum())
        total += nats(x.to(device), y.to(device)).item()
    return total / count if count else float("nan")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, no gradients and no dropout; the training flag is as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
