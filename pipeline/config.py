"""params.yaml as strict dataclasses: the whole schema, its checks, and nothing else."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import hints, yaml_text
from pipeline.errors import ConfigError, cut, quoted
from pipeline.published import VOCAB_SIZE

UNSET_PATH = "data/unset"  # DVC needs every dep to exist; this tracked folder means "no path given"

WITHOUT_FILES = ("shakespeare", "python-docs")  # sources that read no corpus.path
FILE_KINDS = ("text", "jsonl", "parquet")  # those that may be part of a mix
NO_MIX = "none"  # as corpus.mix

# As in MLflow's paths; no part can be `..`, nor an escape that a URI turns into it.
PLAIN_NAME = re.compile(r"/?\w[\w .,()@+=-]*(/\w[\w .,()@+=-]*)*")

LONGEST = 1000  # characters of another's message
MOST_UNKNOWN = 20  # settings named at once
LARGEST = 1 << 63  # of whole numbers: what numpy, torch and MLflow can hold
MASKED = ("sdpa", "naive")  # kinds of attention that take a mask
CHOICE_ENDING = 16  # tokens of an ending in evaluate's multiple choice


def setting(
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    plain: bool = False,
) -> Any:
    """A required field: `low`/`high` are inclusive bounds, `above` an exclusive lower one.

    `plain` text names something that the pipeline writes, so it cannot lead out of its place.
    """
    bounds = {"low": low, "above": above, "high": high}
    return field(metadata={"doc": doc, "choices": choices, "plain": plain, **bounds})


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    source: str = setting(
        "where text comes from", choices=(*WITHOUT_FILES, *FILE_KINDS, "chat", "mix")
    )
    path: str = setting("a file or folder, for text, jsonl, parquet and chat; DVC watches it")
    pattern: str = setting("which files to take when `path` is a folder, as a glob")
    field: str = setting("the field or column that holds the text, for jsonl and parquet")
    mix: str = setting(
        "for mix: shares of the tokens, as `0.7 shakespeare + 0.3 python-docs`, or of files and "
        "folders in `path`, as `0.9 parquet:web + 0.1 text:notes`"
    )
    val_fraction: float = setting("share of documents for validation", above=0, high=0.5)

    def parts(self) -> dict[str, tuple[float, CorpusConfig]]:
        """{name of a source of the mix: its share of the tokens, and the corpus that it is}.

        Raises ConfigError for anything else than shares of different sources that make 1.
        """
        parts: dict[str, tuple[float, CorpusConfig]] = {}
        for part in self.mix.split(" + "):
            share, _, name = part.strip().partition(" ")
            kind, _, place = name.partition(":")
            known = kind in (WITHOUT_FILES if not place else FILE_KINDS)
            with contextlib.suppress(ValueError):
                if known and float(share) > 0 and PLAIN_NAME.fullmatch(place or kind):
                    path = f"{self.path}/{place}" if place else self.path
                    own = replace(self, source=kind, path=path, mix=NO_MIX)
                    parts[name] = float(share), own
        whole = math.isclose(sum(share for share, _ in parts.values()), 1)
        if whole and len(parts) == len(self.mix.split(" + ")) > 1:
            return parts
        raise ConfigError(
            f"corpus.mix={cut(self.mix)}: with corpus.source=mix, shares above 0 that make 1 are "
            "expected of two or more different sources, as `0.7 shakespeare + 0.3 python-docs`, or "
            f"of files and folders in corpus.path by their kind ({', '.join(FILE_KINDS)}), as "
            "`0.9 parquet:web + 0.1 text:notes`"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    n_layer: int = setting("transformer blocks", low=1, high=512)
    n_head: int = setting("attention heads a block; divides n_embd", low=1, high=512)
    n_embd: int = setting("channels of the residual stream", low=1, high=65536)
    block_size: int = setting(
        "longest sequence: rows of the position embedding", low=1, high=1 << 20
    )
    vocab_rows: int = setting(
        f"rows of the embedding inside; 50304 is {VOCAB_SIZE} padded to a multiple of 64",
        low=VOCAB_SIZE,
        high=1 << 16,
    )
    dropout: float = setting("dropout while training", low=0, high=0.9)
    attention: str = setting(
        "torch's choice of a fused kernel, the one to prefer, or the formula",
        choices=("sdpa", "cudnn", "flash", "naive"),
    )


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    source: str = setting("fresh weights or published ones", choices=("random", "hf"))
    hf_model: str = setting("for `hf`: a hub id or a local folder")
    hf_watch: str = setting("the local folder once more, so that DVC notices an edit in it")
    scheme: str = setting(
        "of fresh weights: GPT-2's, the same with projections onto the residual stream at zero, or "
        "muP's, with its rates while training",
        choices=("gpt2", "zero_projections", "mup"),
    )
    mup_base: int = setting(
        "for mup: the channels with which it is GPT-2's; others have weights and rates by it",
        low=1,
        high=65536,
    )
    std: float = setting("standard deviation of fresh weights", above=0, high=10)
    residual_scale: bool = setting("scale both residual projections by (2 n_layer)^-0.5")
    seed: int = setting("of the fresh weights", low=0)

    def narrowing(self, n_embd: int) -> float:
        """By scheme mup how much narrower its base is than a model; 1 by the other schemes."""
        return self.mup_base / n_embd if self.scheme == "mup" else 1.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    seed: int = setting("of the data order and dropout", low=0)
    steps: int = setting("optimizer steps", low=1)
    time_budget: float = setting(
        "minutes of training, to which the schedule is fitted; 0 for none", low=0, high=1e6
    )
    batch_size: int = setting("sequences a micro-batch", low=1)
    sequence_length: int = setting("tokens a sequence, at most model.block_size", low=2)
    mask_documents: bool = setting(
        "compute each document as if it were alone, however many a sequence holds; validation "
        "while training, too; with model.attention sdpa or naive"
    )
    accumulate: int = setting("micro-batches an optimizer step", low=1)
    optimizer: str = setting(
        "AdamW; or Muon for the blocks' matrices and AdamW for the rest", choices=("adamw", "muon")
    )
    muon_lr_factor: float = setting("Muon's rate by AdamW's", above=0, high=1000)
    muon_scale: str = setting(
        "how far an orthogonal step goes: as far as AdamW's, or as first published",
        choices=("match_rms_adamw", "original"),
    )
    schedule: str = setting(
        "the learning rate after the warm-up; wsd stays and falls at the end",
        choices=("cosine", "linear", "wsd"),
    )
    cooldown: float = setting("share of the steps in which wsd falls", above=0, high=1)
    lr: float = setting("peak learning rate", above=0, high=10)
    min_lr: float = setting("learning rate of the last step", low=0, high=10)
    warmup_steps: int = setting("steps of linear warm-up", low=0)
    weight_decay: float = setting("of tensors with two or more dimensions", low=0, high=10)
    beta1: float = setting("AdamW's first-moment decay", low=0, high=0.9999)
    beta2: float = setting("AdamW's second-moment decay", low=0, high=0.999999)
    grad_clip: float = setting("largest gradient norm; 0 never clips", low=0)
    compile: bool = setting("torch.compile the training step where a compiler is at hand")
    checkpoint_activations: bool = setting(
        "keep the input of each block alone and compute its inside again in the backward pass: "
        "less memory, more time, the same numbers"
    )
    deterministic: bool = setting(
        "on a GPU, too, the same bits at every run and resume; slower there"
    )
    val_every: int = setting("steps between validations", low=1)
    val_tokens: int = setting("validation tokens used while training, always the same", low=1)
    max_skipped: int = setting("steps skipped in a row before the run stops", low=1)
    skip_spikes: float = setting(
        "skip a step whose gradient norm is this many times the recent median; 0 for never", low=0
    )
    fingerprint_every: int = setting(
        "steps between fingerprints of weights, batch and random state in the record; 0 for none",
        low=0,
    )
    fork: str = setting("a state to go on from, as `python -m pipeline fork` writes it")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = setting("steps between training checkpoints; 0 for none by steps", low=0)
    every_minutes: float = setting(
        "minutes between training checkpoints; 0 for none by time", low=0, high=1e6
    )
    keep: int = setting("newest training checkpoints kept while training goes on", low=1)
    keep_every: int = setting(
        "steps between checkpoints that stay, also afterwards, to fork from; 0 for none", low=0
    )
    resume: str = setting(
        "go on from an interrupted training's newest checkpoint: where there is one, never, or "
        "nothing else",
        choices=("auto", "never", "require"),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    precision: str = setting(
        "one for all experiments, so that only training differs",
        choices=("fp32", "tf32", "bf16", "fp16", "fp8"),
    )
    batch_size: int = setting("sequences a forward pass", low=1)
    choice_items: int = setting("multiple-choice items made from validation; 0 for none", low=0)
    hellaswag: str = setting("a HellaSwag .jsonl file, scored in two ways; DVC watches it")
    seed: int = setting("of the multiple-choice items", low=0)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    prompts: tuple[str, ...] = setting(
        "texts to continue; of a model of conversations what a user says"
    )
    samples: int = setting("continuations a prompt", low=1)
    max_new_tokens: int = setting("tokens a continuation", low=1)
    temperature: float = setting("0 is greedy", low=0, high=100)
    top_k: int = setting("keep the k likeliest tokens; 0 keeps all", low=0)
    top_p: float = setting(
        "keep the likeliest tokens of this total mass; 1 keeps all", above=0, high=1
    )
    while_training: bool = setting("a text of the first prompt at each validation")
    kv_cache: bool = setting("keep keys and values between tokens")
    weights: str = setting(
        "int8 reads a quarter of the memory, and its cost in loss is measured",
        choices=("fp32", "int8"),
    )
    compile: bool = setting(
        "compile a token's step on CUDA, which takes its time once: for many tokens"
    )
    precision: str = setting("of sampling", choices=("fp32", "tf32", "bf16", "fp16", "fp8"))
    seed: int = setting("of sampling", low=0)


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    interact_at_step: int = setting(
        "open an interpreter inside this training step, counted from 0; -1 never", low=-1
    )


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    processes: int | str = setting(
        "processes that train together on this machine; auto is one a GPU", choices=("auto",), low=1
    )
    strategy: str = setting(
        "each process has all weights and moments, or a part of them", choices=("ddp", "fsdp")
    )
    ordered: bool = setting(
        "add up sequence by sequence: slower, and the same bits for any number of processes"
    )
    timeout: float = setting(
        "minutes that processes wait for one of them before the training fails", above=0, high=1e4
    )
    launcher: str = setting(
        "who starts the processes: local, on this machine, or a command such as srun, to which the "
        "stage's own is added"
    )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    experiment: str = setting(
        "the MLflow experiment; its files lie in a folder of this name", plain=True
    )
    checkpoints: str = setting(
        "which weights go to MLflow: copies, or models that point at DVC's files",
        choices=("best", "all", "reference", "none"),
    )
    notify: str = setting(
        "whom a run's end, a failure and an urgent problem are told: the command or the webhook "
        "in PIPELINE_NOTIFY",
        choices=("none", "command", "webhook"),
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    precision: str = setting("of training", choices=("fp32", "tf32", "bf16", "fp16", "fp8"))
    device: str = setting("where to compute", choices=("auto", "cpu", "cuda", "mps"))
    corpus: CorpusConfig
    model: ModelConfig
    init: InitConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    sample: SampleConfig
    debug: DebugConfig
    checkpoint: CheckpointConfig
    distributed: DistributedConfig
    tracking: TrackingConfig


def load(
    path: str | Path = "params.yaml",
    changes: Iterable[str] = (),
    over: Mapping[str, Any] | None = None,
) -> Config:
    """Read and check a params file, with settings changed as by `-S`: "train.lr=0.001".

    Settings that `over` has by their dotted name stand instead of the file's. Raises ConfigError
    naming every problem found: setting, value and what is accepted.
    """
    text, changes = yaml_text.read(Path(path)), list(changes)
    problems = yaml_text.check(text, str(path)) + yaml_text.check_changes(changes)
    try:
        config = from_dict(_raw(text, str(path), changes, over or {}), str(path))
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def settings_of(text: str) -> dict[str, Any]:
    """The settings in a params file's text by dotted name, be it of an older schema or not.

    Raises ConfigError for text that holds no settings by name.
    """
    raw = _raw(text, "params")
    try:
        return flatten(from_dict(raw))
    except ConfigError:
        return _flat(raw)


def _raw(
    text: str, where: str, changes: Sequence[str] = (), over: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Nested plain values out of YAML; raises ConfigError."""
    try:
        raw = OmegaConf.load(io.StringIO(text))
        for name, value in (over or {}).items():
            OmegaConf.update(raw, name, value)
        for change in changes if not isinstance(raw, ListConfig) else ():
            raw = OmegaConf.merge(raw, _change(change))
        plain = OmegaConf.to_container(raw, resolve=False)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}{yaml_text.words(error, text)}") from None
    except (OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{where}: {cut(str(error), LONGEST)}") from None
    if isinstance(raw, ListConfig):
        raise ConfigError(f"{where}: settings by name are expected, not a list")
    return plain


def _change(change: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([change])
    except yaml.YAMLError as error:
        told = getattr(error, "problem", None) or error
        raise ConfigError(f"{change}: not valid YAML: {told}; put the value in quotes") from None


def from_dict(raw: dict[str, Any], where: str = "params") -> Config:
    """Build a checked Config from nested plain values; raises ConfigError as `load` does."""
    problems: list[str] = []
    config = _build(Config, raw, "", problems)
    if not problems:
        problems = _inconsistencies(config)
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def flatten(config: Config) -> dict[str, Any]:
    """{"train.lr": 0.002, ...}: every setting by its dotted name."""
    flat = _flat(asdict(config))
    return {name: list(v) if isinstance(v, tuple) else v for name, v in flat.items()}


def _flat(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def describe() -> list[tuple[str, str, str]]:
    """(dotted name, what is accepted, what it is) for every setting, in file order."""
    return [(name, _accepted(hint, known), known["doc"]) for name, hint, known in _settings()]


def kinds() -> dict[str, tuple[type, ...]]:
    """The types that a setting may have, by its dotted name; `tuple` for a list of texts."""
    return {
        name: get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
        for name, hint, _ in _settings()
    }


def _settings(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, what is accepted) of every setting."""
    types = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(types[f.name]):
            yield from _settings(types[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", types[f.name], f.metadata


def _build(kind: Any, raw: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(raw, dict):
        problems.append(
            f"{prefix.rstrip('.') or 'the file'}: settings by name are expected, got {quoted(raw)}"
        )
        return None
    names = [f.name for f in fields(kind)]
    unknown = [cut(key) if isinstance(key, str) else quoted(key) for key in raw if key not in names]
    known = [name for name, _, _ in _settings()]
    for key in unknown[:MOST_UNKNOWN]:
        meant = hints.meant(key, prefix, names, known)
        problems.append(f"{prefix}{key}: unknown setting; {meant}")
    if (more := len(unknown) - MOST_UNKNOWN) > 0:
        problems.append(f"{prefix.rstrip('.') or 'the file'}: {more:,} more unknown settings")
    values, types = {}, get_type_hints(kind)
    for f in fields(kind):
        name, hint = f"{prefix}{f.name}", types[f.name]
        if f.name not in raw:
            problems.append(f"{name}: missing")
        elif is_dataclass(hint):
            values[f.name] = _build(hint, raw[f.name], f"{name}.", problems)
        else:
            values[f.name] = _scalar(name, raw[f.name], hint, f.metadata, problems)
    return None if problems else kind(**values)


def _scalar(name: str, value: Any, hint: Any, accepted: Any, problems: list[str]) -> Any:
    """`value` as its declared type, or a problem naming setting, value and choices."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < LARGEST else value
    if hint == int | str:  # a number, or a word that stands for one
        if value in accepted["choices"]:
            return value
        good = type(value) is int and accepted["low"] <= value < LARGEST
    elif hint == tuple[str, ...]:
        good = isinstance(value, list) and bool(value) and all(map(_is_text, value))
        value = tuple(value) if good else value
    else:
        good = type(value) is hint and (hint is not str or _is_text(value))
    if good and hint in (int, float):
        good = abs(value) < (LARGEST if hint is int else math.inf) and value > accepted["above"]
        good = good and accepted["low"] <= value <= accepted["high"]
    if hint != int | str:
        good = good and (not accepted["choices"] or value in accepted["choices"])
    good = good and (not accepted["plain"] or bool(PLAIN_NAME.fullmatch(value)))
    if not good:
        plain = isinstance(value, str) and value.isprintable()
        shown = cut(value) if plain else quoted(value)
        why = hints.misread(value, hint, accepted)
        wanted = "text" if why and hint is str else _accepted(hint, accepted)
        problems.append(f"{name}={shown}: expected {wanted}{why}")
    return value


def _is_text(value: Any) -> bool:
    """Text that can be a file's name or content: not empty, no NUL, no lone surrogate."""
    surrogate = isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value)
    return isinstance(value, str) and value != "" and "\0" not in value and not surrogate


def _accepted(hint: Any, accepted: Any) -> str:
    if hint == int | str:
        number = _accepted(int, {**accepted, "choices": ()})
        return f"{number}, or {', '.join(accepted['choices'])}"
    if accepted["choices"]:
        return "one of " + ", ".join(accepted["choices"])
    if accepted["plain"]:
        return "letters, digits, spaces and .,()@+=-_ only, each part between slashes a plain name"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    bounds = [
        f"{word} {accepted[key]:g}"
        for key, word in (("low", "at least"), ("above", "above"), ("high", "at most"))
        if math.isfinite(accepted[key])
    ]
    return " ".join([words.get(hint, "a list of texts"), " and ".join(bounds)]).strip()


def _inconsistencies(config: Config) -> list[str]:
    """Problems that no single setting shows."""
    problems = []
    model, train, corpus = config.model, config.train, config.corpus
    if model.n_embd % model.n_head:
        problems.append(
            f"model.n_embd={model.n_embd}: expected a multiple of model.n_head={model.n_head}"
        )
    if train.sequence_length > model.block_size:
        problems.append(
            f"train.sequence_length={train.sequence_length}: expected at most "
            f"model.block_size={model.block_size}"
        )
    if config.evaluate.choice_items and train.sequence_length < CHOICE_ENDING:
        problems.append(
            f"train.sequence_length={train.sequence_length}: expected at least {CHOICE_ENDING}, "
            "the length of an ending, or evaluate.choice_items=0"
        )
    if train.mask_documents and model.attention not in MASKED:
        problems.append(
            f"train.mask_documents=true: expected model.attention={' or '.join(MASKED)}, got "
            f"{model.attention}, whose kernel takes no mask"
        )
    if train.mask_documents and corpus.source == "chat":
        problems.append(
            "train.mask_documents=true: expected false with corpus.source=chat, in which the "
            "token between documents ends an answer, too"
        )
    if config.init.scheme == "mup":
        problems += _not_for_mup(config)
    if train.min_lr > train.lr:
        problems.append(f"train.min_lr={train.min_lr}: expected at most train.lr={train.lr}")
    if train.warmup_steps >= train.steps:
        problems.append(
            f"train.warmup_steps={train.warmup_steps}: expected less than train.steps={train.steps}"
        )
    if config.debug.interact_at_step >= train.steps:
        problems.append(
            f"debug.interact_at_step={config.debug.interact_at_step}: expected less than "
            f"train.steps={train.steps}, or -1 for never"
        )
    kinds = [corpus.source]
    if corpus.source == "mix":
        try:
            kinds = [part.source for _, part in corpus.parts().values()]
        except ConfigError as error:
            problems.append(str(error))
    elif corpus.mix != NO_MIX:
        problems.append(f"corpus.mix={corpus.mix}: expected corpus.source=mix, or {NO_MIX}")
    if set(kinds) - {*WITHOUT_FILES, "mix"} and corpus.path == UNSET_PATH:
        problems.append(
            f"corpus.path={corpus.path}: expected a file or folder, "
            f"since corpus.source={corpus.source}"
        )
    return problems + hints.of_files(config)


def _not_for_mup(config: Config) -> Iterator[str]:
    """What has no meaning with rates that belong to fresh weights and to Adam."""
    if config.init.source != "random":
        yield (
            f"init.scheme=mup: expected init.source=random, got {config.init.source}, whose "
            "weights are not of that scheme; to go on with a model of it, fork its run"
        )
    if config.train.optimizer != "adamw":
        yield (
            f"init.scheme=mup: expected train.optimizer=adamw, got {config.train.optimizer}; "
            "the scheme's rates are those of Adam"
        )
