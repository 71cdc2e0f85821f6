"""Random faults against a small real pipeline, for a given time, and whether anything was lost.

    python tools/soak.py --minutes 20
    python tools/soak.py --minutes 5 --only dvc --seed 7    faults with that word, chosen as before

A round is one training by `dvc repro train` in a fresh workspace, disturbed up to three times and
then run to its end. Its weights, its record and its row in MLflow are held against those of a
training that nothing disturbed, bit by bit and step by step. The exit code is 1 where anything
was lost; the workspace of such a round stays. For Linux and macOS: Windows has no such signals.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from omegaconf import OmegaConf  # noqa: E402

from pipeline import terminal  # noqa: E402
from pipeline.tables import markdown  # noqa: E402
from tests.conftest import Checkout, tiny_pipeline  # noqa: E402
from tools.soak_check import Outcome, differences, outcome  # noqa: E402
from tools.soak_round import Round, until  # noqa: E402

RECIPE = {  # some ten seconds of steps, with twenty saves
    "model.dropout": 0.1,
    "train.steps": 300,
    "train.accumulate": 2,
    "train.val_every": 60,
    "checkpoint.every_steps": 15,
    "checkpoint.keep": 3,
}
SMALL_FILES = 2 << 20  # bytes: the log and the store stay below, a checkpoint's files do not
MOST_FAULTS = 3  # a round


def kill_in_a_save(round_: Round) -> bool:
    """SIGKILL as soon as a checkpoint is seen on its way to its name."""
    attempt = round_.start()

    def saving() -> bool:
        return any(round_.folder.glob(".runs/*/checkpoints/.step-*.partial"))

    time.sleep(round_.some(0.6))
    hit = until(lambda: saving() or attempt.over(), every=0.001) and not attempt.over()
    if trainer := attempt.trainer():
        trainer.send_signal(signal.SIGKILL)
    round_.settle()
    return hit and trainer is not None


def send(name: str, *targets: str) -> Callable[[Round], bool]:
    """At a random moment of a training, a signal to `trainer`, `dvc` or both."""

    def fault(round_: Round) -> bool:
        attempt = round_.start()
        if trainer := round_.moment():
            chosen = {"trainer": trainer, "dvc": attempt.dvc}
            for target in targets:
                chosen[target].send_signal(getattr(signal, name))
        round_.settle()
        return trainer is not None

    return fault


def terminate_twice(round_: Round) -> bool:
    """The second one while the first is obeyed, as far as that takes long enough."""
    attempt = round_.start()
    again = None
    if trainer := round_.moment():
        trainer.terminate()
        time.sleep(round_.dice.uniform(0, 0.2))
        if again := attempt.trainer():
            again.terminate()
        else:
            round_.injected.append("SIGTERM to the trainer")
    round_.settle()
    return again is not None


def flip_a_byte(round_: Round) -> bool:
    """In a file of the newest checkpoint, while there is a whole one before it."""
    whole = round_.interrupted_with(2)
    if len(whole) < 2:
        return False
    path = round_.dice.choice([p for p in sorted(whole[-1].iterdir()) if p.stat().st_size])
    content = bytearray(path.read_bytes())
    content[round_.dice.randrange(len(content))] ^= 1 << round_.dice.randrange(8)
    path.write_bytes(content)
    round_.spoilt.add(whole[-1])
    return True


def cut_a_file(round_: Round) -> bool:
    """The same with the second half of a file missing."""
    whole = round_.interrupted_with(2)
    if len(whole) < 2:
        return False
    path = round_.dice.choice(sorted(whole[-1].iterdir()))
    os.truncate(path, path.stat().st_size // 2)
    round_.spoilt.add(whole[-1])
    return True


def leave_a_temporary(round_: Round) -> bool:
    """As a kill leaves it: a checkpoint half written."""
    whole = round_.interrupted_with(1)
    if whole:
        partial = whole[-1].with_name(".step-00000300.0badc0de.partial")
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"\0" * 1000)
    return bool(whole)


def tear_the_journal(round_: Round) -> bool:
    """As a kill leaves it: a line half written."""
    whole = round_.interrupted_with(1)
    if whole:
        with open(whole[-1].parent.parent / "record.jsonl", "ab") as journal:
            journal.write(b'{"kind": "metrics", "time": 17')
    return bool(whole)


def delete_the_store(round_: Round) -> bool:
    round_.interrupted_with(1)
    round_.stale_store = True
    return round_.without_store()


def spoil_the_store(round_: Round) -> bool:
    round_.interrupted_with(1)
    round_.without_store()
    (round_.folder / "mlflow.db").write_bytes(round_.dice.randbytes(5000))
    round_.stale_store = round_.garbage_store = True
    return True


def delete_the_store_in_use(round_: Round) -> bool:
    round_.start()
    hit = bool(round_.moment()) and round_.without_store()
    round_.stale_store = True
    round_.settle()
    return hit


def refuse(round_: Round) -> bool:
    """A tracking server's port that nobody listens at, and SIGKILL meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    attempt = round_.start(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    round_.stale_store = True
    if trainer := round_.moment():
        trainer.kill()
    round_.settle()
    return attempt.began()


def fill_the_disk(round_: Round) -> bool:
    """No file may grow beyond SMALL_FILES in this attempt."""
    attempt = round_.start(largest_file=SMALL_FILES)
    round_.settle()
    return "could not be written" in attempt.said()


def train_twice(round_: Round) -> bool:
    """The same training in another workspace of this repository, while the first is at it."""
    second = round_.copy_aside()
    attempt = round_.start()
    until(lambda: attempt.began() or attempt.over())
    other = second.start(DVC_ROOT=str(round_.folder), command=("-m", "stages.train"))
    round_.settle()
    second.settle()
    round_.lost += second.lost
    if not second.done:
        round_.lost.append(f"the second trainer failed: {other.last_words()}")
    elif round_.done and second.models() != round_.models():
        round_.lost.append("the second trainer has other weights")
    return "waiting for its result" in other.said()


FAULTS: dict[str, Callable[[Round], bool]] = {
    "SIGKILL to the trainer": send("SIGKILL", "trainer"),
    "SIGKILL in the middle of a save": kill_in_a_save,
    "SIGTERM to the trainer": send("SIGTERM", "trainer"),
    "SIGTERM twice": terminate_twice,
    "SIGINT to the trainer": send("SIGINT", "trainer"),
    "SIGKILL to dvc": send("SIGKILL", "dvc"),
    "SIGTERM to dvc": send("SIGTERM", "dvc"),
    "SIGINT to dvc": send("SIGINT", "dvc"),
    "Ctrl-C: SIGINT to both": send("SIGINT", "dvc", "trainer"),
    "a byte of the newest checkpoint flipped": flip_a_byte,
    "a file of the newest checkpoint cut short": cut_a_file,
    "half a checkpoint left aside": leave_a_temporary,
    "half a line left in the journal": tear_the_journal,
    "the store deleted": delete_the_store,
    "the store deleted while in use": delete_the_store_in_use,
    "the store overwritten with garbage": spoil_the_store,
    "the tracking server refuses": refuse,
    "disk full during a save": fill_the_disk,
    "a second trainer of the same": train_twice,
}


@dataclass(frozen=True)
class Played:
    """A round that is over: the faults that were really injected, and what was lost."""

    faults: list[str]
    lost: list[str]
    attempts: int


def deck(dice: random.Random, names: list[str]) -> Iterator[str]:
    """Every fault, in a new order each time, so that a short soak has most of them."""
    while True:
        yield from dice.sample(names, len(names))


def play(round_: Round, chosen: list[str], reference: Outcome) -> Played:
    for name in chosen:
        if not round_.done and FAULTS[name](round_):
            round_.injected.append(name)
    round_.finish()
    lost = list(round_.lost)
    if round_.done:
        try:
            lost += differences(outcome(round_.folder), reference)
        except Exception as error:  # whatever cannot be read back is lost, and the soak goes on
            lost.append(f"the outcome cannot be read: {type(error).__name__}: {error}")
    return Played(round_.injected, lost, round_.attempts)


def prepare(folder: Path) -> None:
    """A workspace whose training is all that is left to do, without a store."""
    made: Checkout = tiny_pipeline(folder)
    params = OmegaConf.load(folder / "params.yaml")
    for name, value in RECIPE.items():
        OmegaConf.update(params, name, value)
    OmegaConf.save(params, folder / "params.yaml")
    made.dvc("repro", "tokenize", "import_hf_weights")
    made.run("git", "add", "--all")
    made.run("git", "commit", "--quiet", "--message", "ready to train")
    Round(folder, random.Random()).without_store()


def table(rounds: list[Played]) -> str:
    """By fault: how often, in rounds that lost nothing, in rounds that lost something."""
    counts = {name: [0, 0, 0] for name in [*FAULTS, "all"]}
    for played in rounds:
        for name in played.faults:
            for line in (counts[name], counts["all"]):
                line[0] += 1
                line[2 if played.lost else 1] += 1
    rows = [[name, *line] for name, line in counts.items()]
    return markdown(["fault", "injected", "survived", "lost"], rows)


def soak(minutes: float, names: list[str], seed: int, work: Path) -> list[Played]:
    """Rounds until the time is up, each as it comes on stderr; one that has begun is ended."""
    until_then = time.monotonic() + 60 * minutes
    dice = random.Random(seed)
    prepare(work / "ready")
    undisturbed = Round.of(work / "ready", work / "reference", dice)
    began = time.monotonic()
    undisturbed.finish()
    reference = outcome(undisturbed.folder)
    if lost := undisturbed.lost + differences(reference, reference):
        sys.exit("the undisturbed training is not whole:\n" + "\n".join(lost))
    print(f"an undisturbed training takes {time.monotonic() - began:.0f} s", file=sys.stderr)
    played, faults = [], deck(dice, names)
    while time.monotonic() < until_then:
        number = f"round-{len(played) + 1:03}"
        round_ = Round.of(work / "ready", work / number, dice, undisturbed.trained_seconds)
        try:
            chosen = [next(faults) for _ in range(dice.randint(1, MOST_FAULTS))]
            played.append(play(round_, chosen, reference))
        finally:
            round_.close()
        report(number, played[-1], round_.folder)
    return played


def report(number: str, played: Played, folder: Path) -> None:
    what = ", then ".join(played.faults) or "nothing injected in time"
    print(f"{number}: {what}: {played.attempts} attempts", file=sys.stderr)
    for problem in played.lost:
        print(f"  LOST {problem}", file=sys.stderr)
    if played.lost:
        print(f"  the workspace, and what each call said beside it: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)


def main() -> None:
    terminal.guard()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the choice of faults"
    )
    parser.add_argument("--only", default="", help="faults whose name holds this")
    asked = parser.parse_args()
    names = [name for name in FAULTS if asked.only in name]
    if not names:
        parser.error(f"--only {asked.only!r}: no such fault; there are: {', '.join(FAULTS)}")
    if os.name == "nt":
        sys.exit("error: the faults are POSIX signals and limits: run this on Linux or macOS")
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    played = soak(asked.minutes, names, asked.seed, work)
    lost = sum(bool(one.lost) for one in played)
    print(table(played))
    print(
        f"{len(played)} trainings in {asked.minutes:g} minutes, {sum(p.attempts for p in played)} "
        f"calls of dvc; {lost} lost something. Seed {asked.seed}."
    )
    if lost:
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
