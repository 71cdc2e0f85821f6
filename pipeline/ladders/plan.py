"""The trainings of a ladder: sizes by horizons, seeds for the noise, and the next size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from pipeline import paths
from pipeline.config import UNSET_PATH, Config, flatten, load
from pipeline.errors import ConfigError
from pipeline.experiments import sweep
from pipeline.ladders.registered import SEEDED
from pipeline.model.gpt import GPT, GPTConfig
from pipeline.published import SIZES, sizes_of
from pipeline.records import git, stage_graph
from pipeline.resume.fork import STEP_TOKENS

FORK = "train.fork"
LARGEST = {"124m": "gpt2", "355m": "gpt2-medium", "774m": "gpt2-large", "1558m": "gpt2-xl"}
FEWEST = 3  # sizes, and horizons: of two alone no law bends, and five terms take more than five
FEW = "a law of size and length takes three different ones or more"
MOST_STATES = 64  # of a long run, to fork from
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Rung:
    """One training of a ladder."""

    name: str  # of its experiment, if it is to be run
    size: str  # as it was asked for: 3x64
    config: Config
    parent: Rung | None = None  # whose state it goes on from

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def begins(self) -> int:
        """The steps that it has from its parent."""
        return stable_steps(self.config, self.steps) if self.parent else 0

    @property
    def tokens(self) -> int:
        """Trained on, its parent's included."""
        return self.steps * tokens_per_step(self.config)

    @cached_property
    def parameters(self) -> int:
        return parameters(self.config)

    @property
    def settings(self) -> dict[str, Any]:
        """Those by which the same training is known again.

        Not where its inputs lie: the corpus is known by its content, a fork's state by its parent.
        """
        flat, places = flatten(self.config), stage_graph.places()
        return {
            n: v for n, v in flat.items() if stage_graph.changes_training(n) and n not in places
        }


@dataclass(frozen=True)
class Ladder:
    """What is to be trained, in this order: each size's long run, its cool-downs, then seeds."""

    rungs: tuple[Rung, ...]
    seeds: tuple[Rung, ...]  # of the smallest rung, which is their first
    next: Rung
    changes: tuple[str, ...] = field(default=())  # of every training, as "train.lr=0.004"

    def __iter__(self) -> Iterator[Rung]:
        yield from self.rungs
        yield from self.seeds[1:]


def plan(
    sizes: Sequence[str],
    horizons: Sequence[int],
    beyond: str = "",
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
) -> Ladder:
    """A ladder over params.yaml with the `changes`; raises one ConfigError with every problem.

    Of each size there is one run as long as the last horizon. It keeps its states, and from each
    of the other horizons' a fork cools down: by `wsd` that is what a run of that length would be.
    """
    horizons = sorted(set(horizons))
    problems = [f"{word}: the ladder sets it itself" for word in changes if _sets(word)]
    changes = [word for word in changes if not _sets(word)]
    if len(horizons) < FEWEST:
        problems.append(f"--horizons {listed(horizons)}: {FEW}")
    ahead, _, steps = beyond.partition(":")
    if steps and not (steps.isascii() and steps.isdigit()):
        problems.append(f"--next {beyond}: expected SIZE or SIZE:STEPS, as 4x128:400")
        steps = ""
    base = base_of(changes, problems)
    problems += not_fresh(base, "a ladder")
    problems += filter(None, (not_another(seed, base) for seed in seeds))
    different = _different(sizes, base, problems)
    known = not ahead or bool(_shape_of("--next", ahead, base, problems))
    last = int(steps or max(horizons, default=0))
    unusable = list(_unusable(base, horizons, last)) if horizons else []
    problems += unusable
    rungs: list[Rung] = []
    if horizons and different and known and not unusable:
        for size in different:
            with sweep.noting(problems):
                rungs += _of_size(size, base, horizons, changes)
        with sweep.noting(problems):
            beyond = ahead or one_up(sized(base, different[-1]))
            own = _rung(beyond, base, last, changes, 0, "next")
            if any(one.settings == own.settings for one in rungs):
                problems.append(f"--next {beyond}:{last}: a rung already, so nothing to forecast")
    raise_if(problems)
    small = min(rungs, key=lambda one: (one.parameters, one.steps))
    others = tuple(_seeded(small, seed, changes) for seed in dict.fromkeys(seeds))
    return Ladder(tuple(rungs), (small, *others), own, tuple(changes))


def base_of(changes: Sequence[str], problems: list[str]) -> Config:
    """params.yaml with the `changes`; raises ConfigError with the `problems` known so far, too."""
    with sweep.noting(problems):
        return load(paths.root() / paths.PARAMS, changes)
    raise ConfigError("\n".join(problems))


def raise_if(problems: Iterable[str]) -> None:
    """Raises one ConfigError with all of them, each once: several trainings may share one."""
    if said := "\n".join(dict.fromkeys(problems)):
        raise ConfigError(said)


def listed(values: Iterable[object]) -> str:
    """As an option takes them."""
    return ",".join(map(str, values)) or "none"


def _different(sizes: Sequence[str], base: Config, problems: list[str]) -> list[str]:
    """One of each shape: 124m is 12x768, whatever its heads, since the law knows parameters."""
    made = {size: _shape_of("--sizes", size, base, problems) for size in sizes}
    different: dict[tuple[int, int], str] = {}
    for size, one in made.items():
        if one:
            different.setdefault((one["n_layer"], one["n_embd"]), size)
    if all(made.values()) and len(different) < FEWEST:
        problems.append(f"--sizes {listed(different.values())}: {FEW}")
    return list(different.values())


def _shape_of(option: str, size: str, base: Config, problems: list[str]) -> dict[str, int]:
    """As `shape`; {} where it raises, and `problems` have why."""
    try:
        return shape(size, base)
    except ConfigError as error:
        problems.append(f"{option} {error}")
        return {}


def check_here(rungs: Iterable[Rung]) -> None:
    """Raises ConfigError or InputError naming all that would stop a training on this machine."""
    configs = [rung.config for rung in rungs]
    if problems := [said for config in configs for said in sweep.machine_problems(config)]:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    git.to_take_along(configs[0])


def _sets(word: str) -> bool:
    name = word.partition("=")[0]
    own = ("train.steps", "train.schedule", "train.time_budget", "train.val_every", FORK)
    return name in (*own, "checkpoint.keep_every", *(f"model.{n}" for n in SIZES[:3]))


def _unusable(base: Config, horizons: Sequence[int], last: int) -> Iterator[str]:
    shortest, train = min(*horizons, last), base.train
    first = stable_steps(base, shortest)
    if first < max(1, train.warmup_steps):
        yield (
            f"train.warmup_steps={train.warmup_steps} train.cooldown={train.cooldown:g}: the "
            f"horizon of {shortest:,} steps begins to cool down after {first:,}, too soon; "
            "give longer --horizons, or less of either"
        )
    if _states(base, horizons) > MOST_STATES:
        near = _near(base, horizons)
        example = f", such as {','.join(map(str, near))}" if near else ""
        yield (
            f"--horizons {','.join(map(str, horizons))}: the states where they begin to cool down "
            f"have only every {_every(base, horizons)} steps in common, so {horizons[-1]} steps "
            f"would keep {_states(base, horizons):,} of them; expected {MOST_STATES} at most, as "
            f"multiples of the shortest give{example}"
        )


def not_fresh(base: Config, who: str) -> Iterator[str]:
    """Problems of settings by which no training could begin with fresh weights."""
    if base.init.source != "random":
        yield f"init.source={base.init.source}: {who} trains fresh weights, random is expected"
    if base.checkpoint.resume == "require":
        yield f"checkpoint.resume=require: {who} begins trainings, auto is expected"


def _of_size(
    size: str, base: Config, horizons: Sequence[int], changes: Sequence[str]
) -> Iterator[Rung]:
    long = _rung(size, base, horizons[-1], changes, _every(base, horizons))
    yield long
    for steps in horizons[:-1]:
        short = _rung(size, base, steps, changes, 0)
        yield Rung(short.name, size, short.config, long)


def _every(base: Config, horizons: Sequence[int]) -> int:
    """Steps between the states of a long run, so that all of its cool-downs find theirs."""
    return math.gcd(*(stable_steps(base, steps) for steps in horizons[:-1]))


def _states(base: Config, horizons: Sequence[int]) -> int:
    every = _every(base, horizons)
    return (horizons[-1] - 1) // every if every else 0


def _near(base: Config, horizons: Sequence[int]) -> list[int]:
    """Horizons near these, multiples of the shortest, whose states are not too many; or none."""
    short = horizons[0]
    for first in sorted(range(short // 2 + 1, 2 * short), key=lambda steps: abs(steps - short)):
        near = sorted({first * max(1, round(steps / first)) for steps in horizons})
        soon = stable_steps(base, first) < max(1, base.train.warmup_steps)
        if not soon and len(near) == len(horizons) and _states(base, near) <= MOST_STATES:
            return near
    return []


def _rung(
    size: str, base: Config, steps: int, changes: Sequence[str], keep: int, word: str = "rung"
) -> Rung:
    """A training of one size; `changes` hold but for what makes it a rung."""
    own = [
        *(f"model.{name}={value}" for name, value in shape(size, base).items()),
        *("train.schedule=wsd", f"train.steps={steps}", f"train.val_every={steps}"),
        *rates(base, size),
        *("train.time_budget=0", f"{FORK}={UNSET_PATH}", f"checkpoint.keep_every={keep}"),
    ]
    config = load(paths.root() / paths.PARAMS, [*changes, *own])
    return Rung(sweep.dvc_name(f"{word}-{size}-{steps}"), size, config)


def _seeded(rung: Rung, seed: int, changes: Sequence[str]) -> Rung:
    words = [f"{name}={seed}" for name in SEEDED]
    own = _rung(rung.size, rung.config, rung.steps, [*changes, *words], 0)
    return Rung(f"{own.name}-seed-{seed}", rung.size, own.config)


def not_another(seed: int, base: Config) -> str:
    """Why a seed is none beside those of the settings; "" where it is one."""
    flat = flatten(base)
    same = [f"{name}={flat[name]}" for name in SEEDED if flat[name] == seed]
    if not same:
        return ""
    return (
        f"--seeds {seed}: {same[0]} is the base's own, and would pass for no noise; expected "
        "another number"
    )


def rates(base: Config, size: str) -> list[str]:
    """Learning rates that go with 1 / width, as "train.lr=0.004".

    Those of `base` are for its own width. With Adam the best rate of hidden and output matrices
    falls so (Yang et al. 2022, Tensor Programs V, table 3): one rate for all would leave the small
    sizes behind for another reason than their size. init.scheme=mup does that by itself.
    """
    by_width = base.init.scheme != "mup"
    narrower = base.model.n_embd / shape(size, base)["n_embd"] if by_width else 1.0
    return [f"train.{name}={getattr(base.train, name) * narrower:.6g}" for name in ("lr", "min_lr")]


def sized(base: Config, size: str) -> Config:
    """The settings with a model of another size; see `shape`."""
    return replace(base, model=replace(base.model, **shape(size, base)))  # type: ignore[arg-type]


def shape(size: str, base: Config) -> dict[str, int]:
    """The sizes of a model by the names of `model`'s settings; raises ConfigError.

    "3x64" has 3 blocks of 64 channels, and heads as wide as `base` has them, or as near as their
    number allows. A published size has its own blocks, heads and channels. The longest sequence
    stays that of `base`.
    """
    name = LARGEST.get(size.lower(), size)
    if known := sizes_of(name) if not _SIZE.fullmatch(size) else {}:
        return {key: known[key] for key in SIZES[:3]}
    found = _SIZE.fullmatch(size)
    layers, width = map(int, found.groups()) if found else (0, 0)
    if not (1 <= layers <= 512 and 1 <= width <= 65536):
        known_words = ", ".join(LARGEST)
        raise ConfigError(
            f"{size}: expected a size as BLOCKSxCHANNELS, such as 3x64, or one of {known_words}"
        )
    most = max(1, width // (base.model.n_embd // base.model.n_head))
    heads = max(count for count in range(1, most + 1) if width % count == 0)
    return dict(zip(SIZES[:3], (layers, heads, width), strict=True))


def one_up(config: Config) -> str:
    """The size after the last one: one block more, and twice the channels."""
    return f"{config.model.n_layer + 1}x{2 * config.model.n_embd}"


def stable_steps(config: Config, steps: int) -> int:
    """Steps of a `wsd` run before it falls, as `optimizers.learning_rate` has them."""
    return steps - max(1, round(config.train.cooldown * steps))


def tokens_per_step(config: Config) -> int:
    return math.prod(getattr(config.train, name) for name in STEP_TOKENS)


def parameters(config: Config) -> int:
    """Every parameter, the tied embedding once, padded rows included.

    Embeddings count: in a small GPT-2 most of the work is that of the output layer, which is the
    embedding, and without them the law bends at small sizes (Pearce and Song 2024).
    """
    return _on_paper(config).parameter_count()


def flops_per_token(config: Config) -> int:
    """Of training, for sequences as long as the settings have them."""
    return _on_paper(config).flops_per_token(config.train.sequence_length)


def _on_paper(config: Config) -> GPT:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return GPT(GPTConfig(**asdict(config.model)))


def same_training(settings: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    """Whether a record's `params` are of a training with these settings."""
    return all(params.get(name) == value for name, value in settings.items())
