"""The training loss, with the output layer's product inside it: all logits never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.compute.buffers import reused, taken
from pipeline.compute.emulation import LOW, exact_products, round_to
from pipeline.published import IGNORE

if TYPE_CHECKING:
    from pipeline.compute.precision import Precision
    from pipeline.model.gpt import GPT

MAX_LOGIT_BYTES = 1 << 30  # of the logits held at once; more tokens come in row chunks
COLUMNS = 4192  # of the logits, at once in the weight's gradient: quicker than all (MKL, nano)
FAR = 60.0  # nats; a probability this small has few bits left in fp32, or is 0
Passes = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # as `softmax_passes`
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
    passes: Passes | None = None,
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
    `passes` is what a GPU does with the logits: `softmax_passes`, or `fusible_passes` compiled.
    """
    hidden, targets = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    head = _Head(precision, vocab_size, scale, passes or softmax_passes)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(head, hidden, weight, targets)
    return head(hidden, weight, targets, gradients=False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: _Head, *given: Tensor) -> Tensor:
        loss, *ctx.grads = head(*given, gradients=True)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Let go of both: of a tensor that is autograd's alone no copy is made to add to it.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("linear_cross_entropy went backward before: its gradients are gone")
        # Asking a GPU whether the factor is one would stall it for longer than multiplying.
        if grad_output.device.type != "cpu" or grad_output != 1:
            grads = [grad.mul_(grad_output) for grad in grads]
        return None, *grads, None


def softmax_passes(logits: Tensor, targets: Tensor, scale: Tensor, vocab_size: int) -> Tensor:
    """scale * sum of the losses (0-dim, fp32); logits (n, rows) become their gradient, in place.

    targets (n,). One kernel an operation: what is low moves 7 times the bytes of its logits.
    """
    logits[:, vocab_size:] = -torch.inf  # padding: probability 0, hence gradient 0
    valid = (targets != IGNORE).unsqueeze(1)
    indices = targets.unsqueeze(1).where(valid, 0)
    target = logits.gather(1, indices).float()
    top, place = logits.max(1, keepdim=True)
    low = logits.dtype is not torch.float32
    p = torch.softmax(logits, 1, dtype=torch.float32, out=None if low else logits)
    # The top probability is exp(0) over the sum of exp(logit - top).
    losses = top.float() - target - p.gather(1, place).log()
    # The gradient of softmax cross-entropy with respect to the logits is p - onehot(target).
    p.scatter_(1, indices, p.gather(1, indices) - 1)
    torch.mul(p, valid * scale, out=logits)
    return losses.where(valid, 0).sum() * scale


def fusible_passes(logits: Tensor, targets: Tensor, scale: Tensor, vocab_size: int) -> Tensor:
    """`softmax_passes` as one formula, of which a compiler makes one kernel.

    It moves 2 times the bytes of the logits, 4 where a row read again is not in the cache.
    """
    valid = (targets != IGNORE).unsqueeze(1)
    target = logits.gather(1, targets.unsqueeze(1).where(valid, 0)).float()
    column = torch.arange(logits.size(1), device=logits.device)
    x = logits.float().where(column < vocab_size, -torch.inf)
    top = x.amax(1, keepdim=True)
    total = (x - top).exp().sum(1, keepdim=True).log()
    p = (x - top - total).exp()  # made anew, so that no probability waits in memory
    hit = column == targets.unsqueeze(1)
    logits.copy_((p - hit.float()) * (valid * scale))
    return (top - target + total).where(valid, 0).sum() * scale


class _Head:
    """The output layer and its loss.

    `rounding` names an emulated format: tensors stay fp32 and are rounded in place. `low` is a
    dtype that the device multiplies itself. At most one of them is set; neither in plain fp32.
    """

    def __init__(
        self, precision: Precision, vocab_size: int, scale: float | Tensor, passes: Passes
    ) -> None:
        own = precision.of_the_rest()  # the output layer is not one of those that fp8 is for
        low = None if own.dtype is torch.float32 else own.dtype
        self.rounding, self.low = (own.effective, None) if own.emulated else (None, low)
        self.vocab_size, self.given_scale, self.passes = vocab_size, scale, passes

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, *, gradients: bool) -> Any:
        """(loss, 0-dim and fp32, then the gradients of `hidden` and `weight` where asked for)."""
        device = hidden.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False), exact_products():
            self.scale = torch.as_tensor(self.given_scale, dtype=torch.float32, device=device)
            run = self.in_one_buffer if device.type == "cpu" else self.by_chunks
            return run(hidden, weight, targets, gradients)

    def by_chunks(self, hidden: Tensor, weight: Tensor, targets: Tensor, gradients: bool) -> Any:
        """For a GPU, which waits for its memory: low logits are never held in fp32 as well.

        Every chunk's part of the weight's gradient is rounded to a low format; their sum is fp32.
        """
        h, w = (x.detach().to(self.low or torch.float32) for x in (hidden, weight))
        # One kernel an operation, and probabilities are held in fp32 for a moment.
        each = 4 if self.passes is softmax_passes else h.itemsize
        chunks = -(-len(h) * len(w) * each // MAX_LOGIT_BYTES)
        size = -(-len(h) // chunks)  # all alike, since a compiler makes each size anew
        buffer = torch.empty((size, len(w)), dtype=h.dtype, device=h.device)
        total, grad_hidden, grad_weight = (
            torch.zeros((), device=h.device),
            torch.empty_like(h),
            None,
        )
        for part, y, out in zip(*(x.split(size) for x in (h, targets, grad_hidden)), strict=True):
            logits = torch.mm(part, w.t(), out=buffer[: len(part)])
            total += self.passes(logits, y, self.scale, self.vocab_size)
            if gradients:  # in whose place the logits were
                torch.mm(logits, w, out=out)
                more = logits.t() @ part
                grad_weight = more.float() if grad_weight is None else grad_weight.add_(more)
        if grad_weight is None:
            return (total,)
        return total, grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)

    def in_one_buffer(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, gradients: bool
    ) -> Any:
        """For a CPU, where fresh memory is dear: fp32 logits, in the same place at every call."""
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
        total.mul_(self.scale)
        if not gradients:
            return (total,)
        if self.rounding in LOW:
            round_to(grad_hidden, self.rounding, out=grad_hidden)
            round_to(grad_weight, self.rounding, out=grad_weight)
        elif not self.low:
            grad_hidden.mul_(self.scale)
            grad_weight.mul_(self.scale)
        return total, grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)

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
        # -log p(target): two passes over all logits fewer (1.03x at nano size). Where p is too
        # small for fp32 the loss is computed from the logits, which takes a look at the values.
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
        for part, out in zip(logits.split(COLUMNS, 1), grad_weight.split(COLUMNS), strict=True):
            # out = beta * out + part^T h; with beta 0 what `out` held is not read.
            torch.addmm(out, part.t(), h, beta=min(start, 1), out=out)
        return (logits @ w).mul_(factor)


def look_up(wte: nn.Embedding, idx: Tensor) -> Tensor | None:
    """`wte(idx)` (B, T, C), whose gradient `backward()` adds to rows of the weight's `.grad`.

    For a weight that is tied to the output layer, which gives every row a gradient anyhow. torch's
    own look-up makes a second matrix of that size, zeroed, filled and added (1.08x at 124M). On a
    GPU that is quick: None, for the model to look up by itself.
    """
    if wte.weight.device.type != "cpu" or not torch.is_grad_enabled():
        return None

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
    sums: Callable[[Sequence[float]], list[float]] = list,
) -> float:
    """Mean loss in nats/target over all batches of inputs and targets (B, T), for validation.

    Sums are added in double precision on the host, so that the batch size leaves no trace beyond
    fp32's rounding. No gradient, no dropout, no random numbers. NaN where there is no target.
    `look` is shown the hidden states (B, T, C) and targets of every batch; `sums` adds up the
    total and the number of targets where other processes have other batches.
    """

    def nats(x: Tensor, y: Tensor) -> Tensor:
        with precision.autocast():
            hidden, weight = model.hidden(x), model.transformer.wte.weight
            if look:
                look(hidden, y)
            vocabulary = model.config.vocab_size
            return linear_cross_entropy(hidden, weight, y, precision, vocab_size=vocabulary)

    with evaluating(model), precision.products():
        return mean_of(nats, batches, device, sums)


def mean_of(
    nats: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    sums: Callable[[Sequence[float]], list[float]] = list,
) -> float:
    """Mean in nats/target over all batches, of which `nats(inputs, targets)` gives a 0-dim sum.

    Targets that are IGNORE do not count. NaN where there is no target.
    """
    total, count = 0.0, 0
    for x, y in batches:
        count += int((y != IGNORE).sum())
        total += nats(x.to(device), y.to(device)).item()
    total, targets = sums((total, float(count)))
    return total / targets if targets else float("nan")


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
