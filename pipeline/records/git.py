"""What git says of this repository: names that it takes for its own, files that it leaves out."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from pipeline import paths
from pipeline.config import UNSET_PATH, WITHOUT_FILES, Config
from pipeline.errors import InputError, UserError

log = logging.getLogger(__name__)

# Git takes four hex digits or more for the beginning of an object's name.
_HEX = re.compile(r"[0-9a-f]{4,64}", re.IGNORECASE)


def _git(*words: str, given: str = "") -> subprocess.CompletedProcess[bytes] | None:
    """A git command at the main repository root, `given` some input; None where there is no git."""
    command = ["git", "-C", str(paths.root()), *words]
    try:
        return subprocess.run(command, input=given.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        return None


def contents(path: str, revs: Iterable[str]) -> dict[str, bytes]:
    """What a file holds in each of these revisions, as far as they have it.

    `path` starts at git's own root.
    """
    asked = list(revs)
    done = _git("cat-file", "--batch", given="".join(f"{rev}:{path}\n" for rev in asked))
    answers, found = io.BytesIO(done.stdout if done else b""), {}
    for rev in asked:
        name, _, size = answers.readline().rpartition(b" ")
        if size.strip().isdigit():  # else it says that it is missing
            content = answers.read(int(size))
            answers.read(1)
            if name.endswith(b" blob"):
                found[rev] = content
    return found


def taken(name: str) -> bool:
    """Whether git takes an experiment's name for a branch, a tag or an object, or may do so soon.

    DVC asks git first: such a name shows another commit, or none, and `dvc exp apply` of it
    fails with the workspace's changes already gone.
    """
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", name)
    return bool(_HEX.fullmatch(name)) or (done is not None and done.returncode == 0)


def refused() -> str:
    """What to do where git refuses the repository of another owner, else nothing."""
    done = _git("rev-parse", "--git-dir")
    lines = os.fsdecode(done.stderr).splitlines() if done else []
    way_out = next((line.strip() for line in lines if "safe.directory" in line), "")
    return way_out and (
        "git refuses this folder, since another user owns it, and DVC does, too. Work as its "
        f"owner, or say that you trust it: {way_out}"
    )


def warn() -> None:
    """Before a stage's work: what git will make of this experiment, where that is no good."""
    if problem := refused():
        log.warning("%s (until then no record holds its commit)", problem)
    name = os.environ.get("DVC_EXP_NAME", "")
    if name and taken(name):
        log.warning(
            "git takes %s for a name of its own, so that `dvc plots diff`, `dvc metrics diff` and "
            "`dvc exp apply` would fail, the last one with your uncommitted changes lost. When "
            "this run is over, say `dvc exp rename %s OTHER`",
            name,
            name,
        )


# --- inputs that temporary workspaces go without


def local_inputs(config: Config) -> dict[str, str]:
    """{setting: path} of the files and folders that the stages read beside the repository."""
    given = {"evaluate.hellaswag": config.evaluate.hellaswag}
    if config.corpus.source not in WITHOUT_FILES:
        given["corpus.path"] = config.corpus.path
    if config.init.source == "hf" and (paths.root() / config.init.hf_watch).exists():
        given["init.hf_watch"] = config.init.hf_watch
    return {name: path for name, path in given.items() if path != UNSET_PATH}


def to_take_along(config: Config) -> list[str]:
    """What `dvc exp run` needs behind `-C` for these settings in a temporary workspace.

    Raises InputError naming every setting whose path that option cannot bring there.
    """
    found: dict[str, None] = {}
    problems = []
    for setting, path in local_inputs(config).items():
        if _is_absolute(path):
            continue
        if ".." in PurePosixPath(path).parts:
            problems.append(
                f"{setting}={path}: leads out of the repository, and a temporary workspace lies "
                f"elsewhere; give the absolute path: {(paths.root() / path).resolve()}"
            )
        found |= dict.fromkeys(_entries(path))
    if problems:
        raise InputError("\n".join(problems))
    return list(found)


def check_whole(setting: str, path: str, names: Callable[[str], Iterable[str]]) -> None:
    """Raise InputError where a temporary workspace lacks some of what lies at `path`.

    Git, and DVC with it, brings only committed files there: a run on the rest would be filed
    under the name of the whole. `names` lists what the stage reads at a path, relative to it.
    """
    root = paths.root()
    if _is_absolute(path) or not root.is_dir() or root.samefile(Path.cwd()):
        return
    missing = _names(names, str(root / path)) - _names(names, path)
    if lost := sorted(missing.intersection(_below(path, _left_out(path)))):
        words = " ".join(f"-C {shlex.quote(entry)}" for entry in _entries(path))
        raise InputError(
            f"{setting}={path}: git does not carry {len(lost)} of its files, such as {lost[0]}, so "
            "they are not in this temporary workspace. Two ways out: the absolute path, -S "
            f"{setting}={root / path}, or have DVC copy them: {_shortened(words)}"
        )


def files(path: str) -> list[str]:
    """A file's own name, or the names of the files in a folder, as `check_whole` asks for them."""
    place = Path(path)
    if place.is_file():
        return [place.name]
    return [file.name for file in place.glob("[!.]*") if file.is_file()]


def _is_absolute(path: str) -> bool:
    return Path(path).is_absolute()


def _entries(path: str) -> list[str]:
    """What DVC's `-C` can bring: it copies a folder where there is none, and a file where one is.

    So of a folder that git knows in part each entry, of one that it does not know the whole.
    """
    left = [PurePosixPath(entry) for entry in _left_out(path, "--directory")]
    known = {folder: _is_known(folder) for folder in {f for entry in left for f in entry.parents}}
    outermost = (next((f for f in reversed(e.parents) if not known[f]), e) for e in left)
    return list(dict.fromkeys(entry.as_posix() for entry in outermost))


def _is_known(folder: PurePosixPath) -> bool:
    done = _git("ls-files", "--", f":(literal){folder}")
    return done is not None and bool(done.stdout)


def _left_out(path: str, *options: str) -> list[str]:
    """Files at a path of the main workspace that git does not carry, relative to its root.

    With --directory a folder without any other file stands for its files. What DVC keeps itself
    (`dvc add`) reaches every workspace.
    """
    place = PurePosixPath(Path(path).as_posix())
    if any((paths.root() / f"{p}.dvc").exists() for p in (place, *place.parents)):
        return []
    done = _git("ls-files", "--others", "-z", *options, "--", f":(literal){place}")
    listed = done.stdout.split(b"\0")[:-1] if done else []
    return [os.fsdecode(name).rstrip("/") for name in listed]


def _below(path: str, files: Iterable[str]) -> Iterator[str]:
    """Names relative to `path`, of a file at `path` itself its own name."""
    place = PurePosixPath(Path(path).as_posix())
    for file in map(PurePosixPath, files):
        yield file.name if file == place else file.relative_to(place).as_posix()


def _names(names: Callable[[str], Iterable[str]], path: str) -> set[str]:
    try:
        return set(names(path))
    except UserError:  # nothing there that the stage would read
        return set()


def _shortened(words: str) -> str:
    return words if len(words) <= 200 else f"{words[:200].rpartition(' -C ')[0]} ..."
