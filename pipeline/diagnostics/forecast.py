"""Forecast of a training: memory by micro-batch and precision, tokens, time."""

from __future__ import annotations

import bisect
import contextlib
import logging
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from pipeline.compute.precision import PRECISIONS, Precision
from pipeline.compute.ranks import Ranks, here
from pipeline.compute.throughput import WARM_UP_STEPS
from pipeline.config import Config, TrainConfig
from pipeline.diagnostics import attention_kernel
from pipeline.distributed.start import check, processes
from pipeline.errors import StorageError, out_of_memory
from pipeline.model import borders
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.model.loss import MAX_LOGIT_BYTES
from pipeline.records.record_file import Record
from pipeline.records.run_data import RunData
from pipeline.resume import fork
from pipeline.resume.checkpoints import staying
from pipeline.tables import markdown
from pipeline.training.time_budget import validation_seconds

log = logging.getLogger(__name__)

MEASURED_AT = 8  # steps done when the time is forecast: 5 of them measured
MARGIN = 0.8  # share of the free memory that a proposal uses; the rest is for surprises
CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's limits, on Linux
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
# Where fp8 loses against bf16, by arithmetic from one H100 (benchmarks/results/fp8_expectation.md).
FP8_PAYS_FROM = 1280  # channels
# Blocks that FSDP has whole at a time: at work, gathered, on the way, and a gradient.
BLOCKS_AT_ONCE = 4
CHECKPOINT = "train.checkpoint_activations"
TOO_LARGE = "not even one sequence fits; try a smaller model or train.sequence_length"
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at its peak, by what holds them."""

    weights: int
    moments: int  # AdamW's two, Muon's one
    gradients: int  # at the end of the backward pass, the embedding's in all its parts
    activations: int  # at the end of the forward pass: what is kept for the backward pass
    head: int  # logits and operands of the output layer

    @property
    def total(self) -> int:
        """`activations` are gone when the last `gradients` come, so the larger counts."""
        return self.weights + self.moments + self.head + max(self.activations, self.gradients)


@dataclass(frozen=True)
class Needs:
    """What decides a training's memory, apart from its micro-batch."""

    shape: GPTConfig
    precision: Precision
    length: int  # tokens a sequence
    weights: int  # bytes
    moments: int  # bytes
    kept: int  # for the backward pass, whatever the micro-batch (weights in a low format, say)
    kept_per_sequence: int
    checkpointed_per_sequence: int  # with train.checkpoint_activations
    parts: int = 1  # processes that share weights, gradients and moments
    in_order: int = 0  # bytes of gradients beside: a process's in one piece, another's, their sum

    def at(self, batch_size: int, accumulate: int, checkpointed: bool = False) -> Memory:
        """Memory of an eager step, without what libraries and allocators add; compiled, less."""
        embedding = 4 * self.shape.vocab_rows * self.shape.n_embd
        weights, at_once = self.weights // self.parts, 0
        if self.parts > 1:  # whole beside the shares: the embedding, and blocks on their way
            block = (self.weights - embedding) // self.shape.n_layer
            at_once = embedding + BLOCKS_AT_ONCE * block
        earlier = weights if accumulate > 1 else 0  # gradients of the micro-batches before
        each = self.checkpointed_per_sequence if checkpointed else self.kept_per_sequence
        activations = self.kept + batch_size * each + embedding
        # On a GPU the look-up's part of the tied gradient is a matrix, and so is the sum of both.
        pieces = 0 if self.precision.device.type == "cpu" and self.parts == 1 else 2
        pieces += 2 * (self.parts > 1)  # what is sent, and what has come of it
        if self.precision.emulated:  # an operand and a result of the MLP in fp32, for a moment
            activations += 2 * 4 * batch_size * self.length * 4 * self.shape.n_embd
        return Memory(
            weights=weights + at_once,
            moments=self.moments // self.parts,
            gradients=weights + self.in_order + (pieces + bool(earlier)) * embedding,
            activations=activations + earlier,
            head=self._head(batch_size * self.length),
        )

    def largest(self, accumulate: int, free: int, checkpointed: bool = False) -> int:
        """The largest micro-batch whose step stays within `free` bytes; 0 where none does."""

        def total(batch_size: int) -> int:
            return self.at(batch_size, accumulate, checkpointed).total

        return bisect.bisect_right(range(1, 1 << 20), free, key=total)

    def _head(self, rows: int) -> int:
        """Bytes of `loss.linear_cross_entropy`: logits by chunk, operands, gradient."""
        c = self.shape
        emulated = self.precision.emulated
        low = 0 if emulated else self.precision.dtype.itemsize % 4  # 2 where products are low
        at_once = min(rows, max(1, MAX_LOGIT_BYTES // (4 * c.vocab_rows)))
        operands = (rows + c.vocab_rows) * c.n_embd * (4 if emulated else low)
        return at_once * c.vocab_rows * (4 + low) + operands + 4 * rows * c.n_embd


def needs(
    shape: GPTConfig,
    precision: Precision,
    length: int,
    optimizer: str = "adamw",
    documents_apart: bool = False,
    parts: int = 1,
) -> Needs:
    """Memory needs, measured by the model's own forward pass on tensors without contents.

    Two models of one block and of two tell what every block adds. Autocast keeps low weights until
    the forward pass ends, so these are kept with activation checkpointing, too.
    """
    kept, for_each = [], []
    for blocks in (1, 2):
        few = replace(shape, n_layer=blocks)
        one, two = (_kept_by_forward(few, precision, n, length, documents_apart) for n in (1, 2))
        kept.append(2 * one - two)
        for_each.append(two - one)
    with torch.device("meta"):
        model = GPT(shape)
    weights = sum(p.nbytes for p in model.parameters())
    matrices = sum(p.nbytes for p in model.transformer.h.parameters() if p.dim() == 2)
    more = shape.n_layer - 1
    return Needs(
        shape=shape,
        precision=precision,
        length=length,
        weights=weights,
        moments=2 * weights - (matrices if optimizer == "muon" else 0),
        kept=kept[0] + more * (kept[1] - kept[0]),
        kept_per_sequence=for_each[0] + more * (for_each[1] - for_each[0]),
        # One block is made again at a time; of the others the input is kept, which is fp32.
        checkpointed_per_sequence=for_each[0] + more * 4 * length * shape.n_embd,
        parts=parts,
    )


def _kept_by_forward(
    shape: GPTConfig, precision: Precision, batch_size: int, length: int, documents_apart: bool
) -> int:
    """Bytes that autograd keeps for the backward pass, without parameters and the head."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, torch.UntypedStorage] = {}  # held, since an address may come again

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    if precision.device.type == "cuda" and not torch.cuda.is_available():  # a card elsewhere
        precision = replace(precision, device=torch.device("cpu"))
    with FakeTensorMode(), torch.device(precision.device):
        model = GPT(shape)
        borders.mark(model, documents_apart=documents_apart)
        idx = torch.zeros(batch_size, length, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, precision.autocast():
            model.hidden(idx)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the GPU, else on the host or its container."""
    if device.type == "cuda":  # what its allocator keeps at hand counts as used with the driver
        at_hand = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + at_hand
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container without limit: "max", or no file
        limit = int((CONTROL_GROUP / "memory.max").read_text("ascii"))
        used = int((CONTROL_GROUP / "memory.current").read_text("ascii"))
        facts = (CONTROL_GROUP / "memory.stat").read_text("ascii").split()
        # Cached files count as used and go when memory is asked for.
        free = min(free, limit - used + int(facts[facts.index("inactive_file") + 1]))
    return free


@dataclass(frozen=True)
class Forecast:
    """What is known of a training before its first step."""

    config: TrainConfig
    needs: Needs
    free: int  # bytes
    corpus_tokens: int | None  # where known
    staying: int = 0  # checkpoints of checkpoint.keep_every
    ranks: Ranks = field(default_factory=Ranks)  # this process among all
    before: int = 0  # steps that a fork has from its parent

    @property
    def share(self) -> tuple[int, int]:
        """Of each process: (sequences a micro-batch, micro-batches a step)."""
        return self.ranks.share(self.config.batch_size, self.config.accumulate)

    @property
    def needed(self) -> Memory:
        return self.needs.at(*self.share, self.config.checkpoint_activations)

    def fits(self, checkpointed: bool) -> int:
        """The largest micro-batch within the free memory; 0: not even one sequence."""
        free = int(MARGIN * self.free)
        return self.needs.largest(2, free, checkpointed)  # a smaller one means accumulation

    def lines(self) -> list[str]:
        """Lines for the terminal: what is to be trained, its memory, and what stays on the disk."""
        c, n, checkpointed = self.config, self.needed, self.config.checkpoint_activations
        own = c.steps - self.before
        tokens = own * c.accumulate * c.batch_size * c.sequence_length
        what = f"{own:,} steps" + (f" from step {self.before:,} on" if self.before else "")
        epochs = f", {tokens / self.corpus_tokens:,.2f} epochs" if self.corpus_tokens else ""
        each = f" in each of {self.ranks.world} processes" if self.ranks.world > 1 else ""
        each += ", which share weights and moments" if self.needs.parts > 1 else ""
        return [
            f"{self.needs.weights // 4:,} parameters; {what} are {tokens:,} tokens{epochs}",
            f"memory for micro-batches of {self.share[0]}{each}: {size(n.total)} (weights and "
            f"moments {size(n.weights + n.moments)}, activations {size(n.activations)}, output "
            f"layer {size(n.head)}); free: {size(self.free)}, enough for "
            f"{self.fits(checkpointed):,}, with {CHECKPOINT}={str(not checkpointed).lower()} for "
            f"{self.fits(not checkpointed):,}",
            *([self._stays()] if self.staying else []),
        ]

    def _stays(self) -> str:
        each = self.needs.weights + self.needs.moments
        what = f"{self.staying:,} checkpoints stay" if self.staying > 1 else "1 checkpoint stays"
        return f"{what} to fork from: {size(self.staying * each)}"

    def proposal(self, most: int) -> tuple[str, int]:
        """Settings that fit, tokens/step the same, and the bytes then needed; "" where none do.

        Micro-batches are the largest that fit, at most `most`; checkpointed only where they must.
        """
        c, sequences = self.config, self.config.batch_size * self.config.accumulate
        most = 1 if self.ranks.ordered else most
        for checkpointed in (c.checkpoint_activations, True):
            if fits := min(self.fits(checkpointed), most):
                micro = max(n for n in range(1, fits + 1) if sequences % n == 0)
                more = sequences // micro
                words = f"train.batch_size={micro} train.accumulate={more}"
                words += f" {CHECKPOINT}=true" * (checkpointed != c.checkpoint_activations)
                return words, self.needs.at(micro, more, checkpointed).total
        return "", 0

    def advice(self) -> str:
        """What makes it fit, to copy behind `dvc exp run`."""
        settings, total = self.proposal(self.config.batch_size)
        changes = " -S ".join(["", *settings.split()])
        return f"fits, tokens/step the same:{changes} ({size(total)})" if settings else TOO_LARGE

    def problem(self, ran_out: bool = False) -> str:
        """What to set instead where it does not fit, or memory `ran_out`; "" where it does."""
        c, mode, needed = self.config, self.needs.precision, self.needed.total
        if needed <= self.free and not ran_out:
            return ""
        again = c.batch_size, c.accumulate, True
        ways = [
            self.proposal(c.batch_size // 2),
            (f"{CHECKPOINT}=true", self.needs.at(*again).total),
        ]
        told = [f"{words} ({size(n)})" for words, n in ways if words and n < min(needed, self.free)]
        if told and (mode.device.type, mode.dtype) == ("cuda", torch.float32):
            told.append("precision=bf16")
        return (
            f"train.batch_size={c.batch_size} needs about {size(needed)}, {size(self.free)} "
            f"{'were' if ran_out else 'are'} free: "
            f"{', or '.join(told) + '; tokens/step stay the same' if told else TOO_LARGE}"
        )


def forecast(
    config: Config,
    precision: Precision,
    corpus_tokens: int | None = None,
    free: int = 0,
    ranks: Ranks | None = None,
) -> Forecast:
    """What a process of a training needs, beside the bytes that are `free` for it: 0 for those of
    this machine now. `ranks` are those at work, None those that the settings ask for.

    Raises ConfigError where so many cannot train so, and what `fork.start` does.
    """
    own = ranks or Ranks(0, processes(config), ordered=config.distributed.ordered)
    if own.world > 1:
        check(config, own.world)
    free = free or free_for_each(precision.device, own)
    before = fork.start(config).get("step", 0)
    kept = staying(config.checkpoint, config.train, before)
    need = _needs(config, precision, own.world)
    return Forecast(config.train, need, free, corpus_tokens, kept, own, before)


def free_for_each(device: torch.device, ranks: Ranks) -> int:
    """Bytes that a process can still allocate: a GPU is its own, the host all share alike."""
    return free_memory(device) // (1 if device.type == "cuda" else ranks.beside)


def _needs(config: Config, precision: Precision, world: int) -> Needs:
    shape, train = GPTConfig(**asdict(config.model)), config.train
    parts = world if config.distributed.strategy == "fsdp" else 1
    given = train.sequence_length, train.optimizer, train.mask_documents
    found = needs(shape, precision, *given, parts)
    return replace(found, in_order=3 * found.weights * config.distributed.ordered)


def before_training(
    config: Config, precision: Precision, record: Record, corpus_tokens: int
) -> list[str]:
    """Lines to print before the first step; memory and attention's kernel are put on record.

    Logs a warning where memory is short, or cannot be forecast, and where fp8 is slow: that must
    stop no training.
    """
    attention_kernel.tell(config.model, precision, config.train, record)
    if slow := slow_fp8(config, precision):
        log.warning("%s", slow)
    try:
        expected = forecast(config, precision, corpus_tokens, ranks=here())
    except RuntimeError as error:  # an operation for which this device has no formula of sizes
        log.warning("no memory forecast on %s: %s", precision.device.type, error)
        return []
    record.metrics({"perf/forecast_memory_mib": expected.needed.total / 2**20})
    if problem := expected.problem():
        log.warning("%s", problem)
    return expected.lines()


def slow_fp8(config: Config, precision: Precision) -> str:
    """Why bf16 is likely to be faster than fp8 on this GPU, which is a card's to say; or ""."""
    if precision.effective != "fp8" or precision.emulated:
        return ""
    if not config.train.compile:
        return (
            "precision=fp8 train.compile=false: on its own, each pass that scales and rounds costs "
            "more than a product in 8 bits saves; bf16 was twice as fast on an H100. Set "
            "train.compile=true, or precision=bf16"
        )
    if config.model.n_embd < FP8_PAYS_FROM:
        return (
            f"precision=fp8 model.n_embd={config.model.n_embd}: scaling and rounding are expected "
            f"to cost more than products in 8 bits save below a width of {FP8_PAYS_FROM:,}; "
            "precision=bf16 is likely to be faster. `python benchmarks/fp8.py` measures both here"
        )
    return ""


@contextlib.contextmanager
def explaining(config: Config, precision: Precision) -> Iterator[None]:
    """Where memory runs out inside, a StorageError names what to change, with forecasts."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        device, rss = precision.device, psutil.Process().memory_info().rss
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else rss
        with contextlib.suppress(RuntimeError, MemoryError):  # of the forecast: see before_training
            own = here()
            free = free_for_each(device, own) + held
            found = forecast(config, precision, free=free, ranks=own)
            first = str(error).partition(". ")[0] or "MemoryError"
            raise StorageError(f"out of memory ({first}); {found.problem(True)}") from error
        raise


def at_peak(record: Record, summary: Mapping[str, float], precision: Precision) -> list[str]:
    """A line on what was taken beside the forecast; none where the peak has libraries in it."""
    expected = RunData({"train": record.so_far()}).last("perf/forecast_memory_mib")
    if precision.device.type != "cuda" or not expected:
        return []
    peak = summary["perf/peak_memory_mib"]
    return [f"peak memory {peak:,.0f} MiB, {peak / expected:.2f} times the forecast"]


def after_first_steps(
    step_seconds: list[float], config: TrainConfig, record: Record, before: int = 0
) -> str:
    """The line to print after MEASURED_AT steps: when this training ends, put on record as well.

    A fork has made none of the steps `before`.
    """
    record.metrics({"time/forecast_seconds": run_seconds(step_seconds, config, before)})
    return time_words(step_seconds, config, before)


def table(config: Config, precisions: Iterable[Precision]) -> str:
    """A Markdown table of peak memory by micro-batch and precision."""
    train, world = config.train, processes(config)
    modes = [_needs(config, p, world) for p in precisions]
    own = train.accumulate, train.checkpoint_activations
    rows = [(n, *(size(m.at(n, *own).total) for m in modes)) for n in MICRO_BATCHES]
    return markdown(("micro-batch", *PRECISIONS), rows)


def run_seconds(step_seconds: list[float], config: TrainConfig, before: int = 0) -> float:
    """Seconds of the whole training, validations included, at most train.time_budget.

    The steps `before` are a fork's parent's.
    """
    whole, budget = _seconds_of_all(step_seconds, config, before), 60 * config.time_budget
    return min(whole, budget) if budget else whole


def _seconds_of_all(step_seconds: list[float], config: TrainConfig, before: int) -> float:
    """Seconds of all steps and validations of its own, whatever the time budget."""
    step = statistics.median(step_seconds[WARM_UP_STEPS:] or step_seconds)
    validations = -(-config.steps // config.val_every) - before // config.val_every
    return (config.steps - before) * step + validations * validation_seconds(step, config)


def time_words(step_seconds: list[float], config: TrainConfig, before: int = 0) -> str:
    """ "5,000 steps need 9 h 10 min; in 1 h you reach step 545": how far a training gets."""
    own = config.steps - before
    whole, budget = _seconds_of_all(step_seconds, config, before), 60 * config.time_budget
    if budget and budget < whole:
        reached, minutes = int(own * budget / whole), config.time_budget
        return f"about {reached:,} of {own:,} steps fit into train.time_budget={minutes:g} minutes"
    words = f"{own:,} steps need {duration(whole)}"
    for seconds in (86400, 3600, 600, 60):
        if seconds < whole:
            reached = before + int(own * seconds / whole)
            return f"{words}; in {duration(seconds)} you reach step {reached:,}"
    return words


def duration(seconds: float) -> str:
    """Seconds in two units, as in 9 h 10 min."""
    total = round(seconds)
    for (unit, name), (part, small) in pairwise(UNITS):
        if total >= unit:
            rest = total % unit // part
            return f"{total // unit:,} {name}" + (f" {rest} {small}" if rest else "")
    return f"{total} s"


def size(count: float) -> str:
    """A count of bytes in MiB or GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
