"""Sweeps: an experiment for each value of one setting, run one after another and compared."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.config import Config, flatten, load
from pipeline.errors import ConfigError, InputError, together
from pipeline.experiments import comparison, screen, trainings
from pipeline.experiments.comparison import SEED
from pipeline.records import dvc_history, git, stage_graph

log = logging.getLogger(__name__)

# A text that Hydra takes as it stands: no number, and none of its own words.
BARE = r"(?!(true|false|null|nan|inf)$)[a-z][\w./-]*"


@dataclass(frozen=True)
class Member:
    """One experiment of a sweep, checked."""

    name: str
    changes: dict[str, Any]  # against params.yaml
    config: Config
    inputs: tuple[str, ...] = ()  # files and folders that git does not carry, for its workspace
    stage: str = ""  # the last one that is to run; "" for all

    def shown(self) -> str:
        return " ".join(f"{name}={_plain(value)}" for name, value in self.changes.items())

    def words(self) -> list[str]:
        """The changes in Hydra's grammar, as `dvc exp run -S` takes them."""
        return [f"{name}={_quoted(value)}" for name, value in self.changes.items()]

    def command(self, *where: str) -> list[str]:
        """The words of `dvc` that run it: `where` is --temp or --queue."""
        words = ["exp", "run", *where, "--name", self.name]
        words += [word for change in self.words() for word in ("-S", change)]
        words += [word for path in self.inputs for word in ("--copy-paths", path)]
        return [*words, self.stage] if self.stage else words


@dataclass(frozen=True)
class Sweep:
    """The members in the order of their values, then the base's other seeds."""

    setting: str
    base: Any
    members: list[Member]

    def page(self) -> str:
        """A line each: its name, and what it changes."""
        width = max(len(member.name) for member in self.members)
        lines = [f"  {member.name:<{width}}  {member.shown()}" for member in self.members]
        count = len(self.members)
        if inputs := list(dict.fromkeys(path for m in self.members for path in m.inputs)):
            named = ", ".join(inputs[:3]) + (f" and {len(inputs) - 3} more" if inputs[3:] else "")
            lines.append(f"each gets a copy of {named}; an absolute path in params.yaml saves that")
        head = f"{count} experiments, checked; baseline {self.setting}={_plain(self.base)}:"
        return "\n".join([head, *lines])


def plan(
    asked: Iterable[str], seeds: Iterable[int] = (), prefix: str = "", taken: Iterable[str] = ()
) -> Sweep:
    """The sweep that "SETTING=A,B" and "OTHER=VALUE" ask for; names in `taken` are not used.

    `seeds` are more seeds of the base, for the noise. Raises ConfigError naming every problem
    of every member, and InputError where a member's workspace could not get at its inputs.
    """
    texts = split(asked)
    several = [name for name, values in texts.items() if len(values) > 1]
    if len(several) != 1:
        found = ", ".join(several) or "none"
        raise ConfigError(f"expected one setting with several values, as train.lr=A,B; got {found}")
    (setting,) = several
    comparison.check_setting(setting)
    fixed = {name: found[0] for name, found in texts.items()}
    choices = [fixed | {setting: text} for text in texts[setting]]
    configs = checked(choices)
    values = [flatten(config)[setting] for config in configs]
    base, *_ = comparison.in_order(values, comparison.usual_value(setting))
    seeded = [choices[values.index(base)] | {SEED: str(seed)} for seed in seeds]
    configs += checked(seeded)
    choices += seeded
    check_different(choices, configs)
    inputs = together(*(partial(git.to_take_along, config) for config in configs))
    stem, used, members = prefix or setting.rpartition(".")[2], set(taken), []
    for choice, config, needed in zip(choices, configs, inputs, strict=True):
        changes = {name: flatten(config)[name] for name in choice}
        seed = f"-seed-{config.train.seed}" if choice in seeded else ""
        name = new_name(dvc_name(f"{stem}-{choice[setting]}{seed}"), used)
        members.append(Member(name, changes, config, tuple(needed)))
    return Sweep(setting, base, members)


def split(given: Iterable[str]) -> dict[str, list[str]]:
    """{"train.lr": ["0.1", "0.2"]} of "train.lr=0.1,0.2"; raises ConfigError."""
    asked: dict[str, list[str]] = {}
    problems = []
    for word in given:
        name, equals, text = word.partition("=")
        texts = text.split(",")
        if not equals or not all(texts):
            problems.append(f"{word}: expected SETTING=VALUE or SETTING=VALUE,VALUE")
        elif text[0] in "[{":
            problems.append(f"{word}: a list; a sweep sets plain values")
        elif name in asked:
            problems.append(f"{word}: {name} is given twice")
        asked[name] = texts
    if problems:
        raise ConfigError("\n".join(problems))
    return asked


def checked(choices: Sequence[dict[str, str]]) -> list[Config]:
    """A Config for each set of changes; raises one ConfigError with every problem."""
    configs, problems = [], []
    for choice in choices:
        with noting(problems):
            configs.append(load(paths.root() / paths.PARAMS, overrides(choice)))
            problems += machine_problems(configs[-1])
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return configs


@contextlib.contextmanager
def noting(problems: list[str]) -> Iterator[None]:
    """What a ConfigError says goes to `problems`, a line each; where params.yaml lies does not."""
    try:
        yield
    except ConfigError as error:
        where = f"{paths.root() / paths.PARAMS}: "
        problems += [line.removeprefix(where) for line in str(error).splitlines()]


def machine_problems(config: Config) -> list[str]:
    """What is asked for and would not be in effect here, or what stops any experiment in a copy."""
    from pipeline.compute import precision, runtime
    from pipeline.training import compiling  # torch, only once the settings are right

    try:
        device = runtime.choose_device(config.device)
    except ConfigError as error:
        return [str(error)]
    chosen = precision.choose_precision(config.precision, device)
    problems = []
    if chosen.effective != chosen.asked:
        problems.append(f"precision={chosen.asked}: not in effect here, {chosen.reason}")
    if config.train.compile and (reason := compiling.why_not_compile(chosen)):
        problems.append(f"train.compile=true: not in effect here, {reason}")
    return problems + list(filter(None, [no_copies()]))


def no_copies() -> str:
    """Why DVC cannot make temporary workspaces here; "" where it can."""
    cache = dvc_history.cache_folder().parents[1]
    if str(cache).isascii():
        return ""
    return (
        f"{cache}: DVC makes no temporary workspace where the path of its cache has letters beyond "
        "ASCII. Move the repository, or the cache alone: say `dvc cache dir --local FOLDER`, and "
        "move what is in the old one there"
    )


def check_different(choices: Sequence[dict[str, str]], configs: Sequence[Config]) -> None:
    """Raises ConfigError where two members would be one experiment."""
    first: dict[Config, str] = {}
    for choice, config in zip(choices, configs, strict=True):
        shown = " ".join(overrides(choice))
        if config in first:
            raise ConfigError(f"{first[config]} and {shown} are the same experiment")
        first[config] = shown


def overrides(choice: dict[str, str]) -> list[str]:
    return [f"{name}={text}" for name, text in choice.items()]


def new_name(wanted: str, taken: set[str]) -> str:
    """`wanted`, with a number where git or DVC knows one of that name; joins `taken`."""
    numbered = (f"{wanted}-{number}" for number in itertools.count(2))
    free = (n for n in itertools.chain([wanted], numbered) if n not in taken and not git.taken(n))
    name = next(free)
    taken.add(name)
    return name


def dvc_name(text: str) -> str:
    """Only what DVC takes: git's rules for branches, and no slash. Points stay in numbers."""
    return re.sub(r"[^\w.-]+|\.(?!\d)|(?<!\d)\.", "-", text, flags=re.ASCII).strip("-")


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_quoted, value))}]"
    if not isinstance(value, str) or re.fullmatch(BARE, value, re.ASCII | re.IGNORECASE):
        return _plain(value)
    # In quotes of Hydra's, a backslash is one of two only before a quote.
    doubled = re.sub(r"\\+(?='|$)", lambda found: found[0] * 2, value)
    return "'" + doubled.replace("'", "\\'") + "'"


def run(member: Member) -> int:
    """The exit code of `dvc exp run` for a member, in a temporary workspace.

    Its output is shown, on a terminal above a line that says how far its training is. Ctrl-C
    reaches DVC and the training, too, as they share the terminal. The training then saves a
    checkpoint, which takes its time: KeyboardInterrupt is raised once they have ended.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    above = screen.has_terminal()
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", *member.command("--temp")],
            cwd=paths.root(),
            env=os.environ | {"PATH": path},  # where the stages find their python
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if above else None,
            stderr=subprocess.STDOUT if above else None,
            encoding="utf-8",
            errors="replace",
        )

        def more(seconds: float) -> bool:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            return process.returncode is None

        screen.show(partial(_how_far, member.name), more, process.stdout)
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode


def _how_far(name: str) -> str:
    found = [one for one in trainings.kept() if one.at_work and one.name == name]
    return found[0].line() if found else ""  # before its training, or after it


def run_all(sweep: Sweep) -> dict[str, str]:
    """{name: why it has no result, or ""} of the members, run one after another.

    DVC copies the workspace when a member starts, so an edit in between would give the later
    members other code or settings than the earlier ones: they are not run.
    """
    began, outcomes = _copied_files(), {}
    for number, member in enumerate(sweep.members, 1):
        now = _copied_files()
        if edited := [name for name in began if now[name] != began[name]]:
            outcomes[member.name] = f"not run, since {edited[0]} was edited during the sweep"
            continue
        log.info("\n%d/%d %s: %s", number, len(sweep.members), member.name, member.shown())
        try:
            code = run(member)
        except KeyboardInterrupt:
            log.info(STOPPED, member.name, number, len(sweep.members), sweep.setting)
            raise
        outcomes[member.name] = f"failed (exit code {code}), see its output above" if code else ""
    return outcomes


def _copied_files() -> dict[str, str]:
    """SHA-256 by name of the settings and of the code that DVC copies for each member."""
    code = {name for stage in stage_graph.stages() for name in stage_graph.sources(stage)}
    files = {name: paths.root() / name for name in [str(paths.PARAMS), "dvc.yaml", *sorted(code)]}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
        for name, file in files.items()
    }


def conclude(sweep: Sweep, outcomes: dict[str, str]) -> None:
    """Compare the members that ran. Raises InputError naming every member that did not."""
    problems = [f"{name}: {problem}" for name, problem in outcomes.items() if problem]
    try:
        comparison.conclude(sweep.setting, like=flatten(sweep.members[0].config))
    except InputError as error:
        problems.append(str(error))
    if done := " ".join(name for name, problem in outcomes.items() if not problem):
        log.info("curves:  dvc plots diff %s\ntable:   python -m pipeline show", done)
    if problems:
        raise InputError("\n".join(problems))


STOPPED = """
Stopped in %s, %d/%d. The same command goes on: DVC restores what is finished from its run cache,
under new names, and the stopped training resumes from its checkpoint.
To compare what is finished: python -m pipeline compare %s"""
