"""What git says of this repository: its state, names it takes for its own, files it leaves out."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from pipeline import paths
from pipeline.config import UNSET_PATH, WITHOUT_FILES, Config
from pipeline.errors import InputError, UserError

log = logging.getLogger(__name__)

# What every experiment changes: DVC writes `-S` and the digests of outputs there. The settings
# are in the record, with what the commit's were.
_NOT_DIRT = (":(exclude)params.yaml", ":(exclude)dvc.lock")


def _git(
    *words: str, at: Path | None = None, given: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """A git command, by default at the main repository root; it fails where there is no git."""
    command = ["git", "-C", str(at or paths.root()), *words]
    try:
        return subprocess.run(command, input=given.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, b"", b"")


def said(*words: str) -> str:
    """What git says of this workspace, or nothing where it fails."""
    done = _git(*words, at=Path.cwd())
    return "" if done.returncode else done.stdout.decode(errors="replace").strip()


def state() -> dict[str, str]:
    """Commit and branch of this workspace, and whether its files are others than the commit's."""
    commit = said("rev-parse", "HEAD")
    status = said("status", "--porcelain", "--untracked-files=no", "--", ".", *_NOT_DIRT)
    dirty = str(bool(status)).lower() if commit else ""
    return {"commit": commit, "branch": said("rev-parse", "--abbrev-ref", "HEAD"), "dirty": dirty}


def contents(path: str, revs: Sequence[str]) -> dict[str, bytes]:
    """What a file, by its path in the repository, holds in each revision that has it."""
    done = _git("cat-file", "--batch", given="".join(f"{rev}:./{path}\n" for rev in revs))
    answers, found = io.BytesIO(done.stdout), {}
    for rev in revs:
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
    # Git takes four hex digits or more for the beginning of an object's name.
    if re.fullmatch(r"[0-9a-f]{4,64}", name, re.IGNORECASE):
        return True
    return _git("rev-parse", "--verify", "--quiet", "--end-of-options", name).returncode == 0


def refused() -> str:
    """What to do where git refuses the repository of another owner, else nothing."""
    lines = os.fsdecode(_git("rev-parse", "--git-dir").stderr).splitlines()
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
    given["train.fork"] = config.train.fork
    return {name: path for name, path in given.items() if path != UNSET_PATH}


def to_take_along(config: Config) -> list[str]:
    """What `dvc exp run` needs behind `-C` for these settings in a temporary workspace.

    Raises InputError naming every setting whose path that option cannot bring there.
    """
    found: dict[str, None] = {}
    problems = []
    for setting, path in local_inputs(config).items():
        if Path(path).is_absolute():
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


def check_hellaswag(path: Path) -> None:
    """Before any stage: DVC looks for it when it comes to `evaluate`, after the training."""
    tracked = (Path(f"{place}.dvc") for place in (path, *path.parents))  # brought by DVC itself
    if path != Path(UNSET_PATH) and not path.exists() and not any(map(Path.exists, tracked)):
        raise InputError(
            f"evaluate.hellaswag={path}: no such file; `python -m pipeline fetch hellaswag` brings "
            "it, and in a temporary workspace an absolute path finds it"
        )


def check_whole(setting: str, path: str, names: Callable[[str], Iterable[str]]) -> None:
    """Raise InputError where a temporary workspace lacks some of what lies at `path`.

    Git, and DVC with it, brings only committed files there: a run on the rest would be filed
    under the name of the whole. `names` lists what the stage reads at a path, relative to it.
    """
    root = paths.root()
    if Path(path).is_absolute() or not root.is_dir() or root.samefile(Path.cwd()):
        return
    missing = _names(names, str(root / path)) - _names(names, path)
    place, left_out = PurePosixPath(Path(path).as_posix()), map(PurePosixPath, _left_out(path))
    below = {f.name if f == place else f.relative_to(place).as_posix() for f in left_out}
    if lost := sorted(missing & below):
        words = " ".join(f"-C {shlex.quote(entry)}" for entry in _entries(path))
        if len(words) > 200:
            words = f"{words[:200].rpartition(' -C ')[0]} ..."
        raise InputError(
            f"{setting}={path}: git does not carry {len(lost)} of its files, such as {lost[0]}, so "
            "they are not in this temporary workspace. Two ways out: the absolute path, -S "
            f"{setting}={root / path}, or have DVC copy them: {words}"
        )


def files(path: str) -> list[str]:
    """A file's own name, or the names of the files in a folder, as `check_whole` asks for them."""
    place = Path(path)
    if place.is_file():
        return [place.name]
    return [file.name for file in place.glob("[!.]*") if file.is_file()]


def _entries(path: str) -> list[str]:
    """What DVC's `-C` can bring: it copies a folder where there is none, and a file where one is.

    So of a folder that git knows in part each entry, of one that it does not know the whole.
    """
    left = [PurePosixPath(entry) for entry in _left_out(path, "--directory")]
    folders = {folder for entry in left for folder in entry.parents}
    known = {f for f in folders if _git("ls-files", "--", f":(literal){f}").stdout}
    outermost = (next((f for f in reversed(e.parents) if f not in known), e) for e in left)
    return list(dict.fromkeys(entry.as_posix() for entry in outermost))


def _left_out(path: str, *options: str) -> list[str]:
    """Files at a path of the main workspace that git does not carry, relative to its root.

    With --directory a folder without any other file stands for its files. What DVC keeps itself
    (`dvc add`) reaches every workspace.
    """
    place = PurePosixPath(Path(path).as_posix())
    if any((paths.root() / f"{p}.dvc").exists() for p in (place, *place.parents)):
        return []
    listed = _git("ls-files", "--others", "-z", *options, "--", f":(literal){place}").stdout
    return [os.fsdecode(name).rstrip("/") for name in listed.split(b"\0")[:-1]]


def _names(names: Callable[[str], Iterable[str]], path: str) -> set[str]:
    try:
        return set(names(path))
    except UserError:  # nothing there that the stage would read
        return set()
