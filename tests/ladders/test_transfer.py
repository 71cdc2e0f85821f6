"""The trainings of a transfer check, and what is said of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, InputError, NumericsError, StorageError
from pipeline.ladders import ladder, transfer
from pipeline.ladders.plan import Rung
from pipeline.ladders.transfer import Place, Transfer
from pipeline.records import record_file
from pipeline.resume import run_folder
from tests.helpers.rungs import trained

RATES = (0.001, 0.002, 0.004, 0.008)


def asked(**changes: Any) -> Transfer:
    given = {"widths": (32, 64), "rates": RATES, "steps": 100, "seeds": (7,)}
    return transfer.plan(**given | changes)


def loss(place: Place) -> float:
    """Lowest at 0.003 whatever the width; seeds 0.1 apart, and some noise."""
    noise = 0.001 * ((place.width // 32 + round(1000 * place.rate) + place.seed) % 3)
    return 6 + 0.2 * (math.log2(place.rate / 0.003)) ** 2 + 0.1 * (place.seed == 7) + noise


def finished(found: Transfer, code: str = "") -> list[ladder.Trained]:
    return [trained(rung, rung.name, loss(place), code) for place, rung in found.rungs.items()]


def test_every_width_has_every_rate_and_every_seed() -> None:
    found = asked(changes=["train.beta2=0.9"])
    assert list(found.rungs)[:3] == [
        Place(32, 0.001, 1337),
        Place(32, 0.001, 7),
        Place(32, 0.002, 1337),
    ]
    assert len(found.rungs) == 2 * 4 * 2
    for place, rung in found.rungs.items():
        config = rung.config
        assert (config.model.n_layer, config.model.n_embd) == (2, place.width)
        assert config.model.n_head == place.width // 32, "heads of one size"
        assert (config.train.lr, config.train.seed) == (place.rate, place.seed)
        assert config.init.seed == (7 if place.seed == 7 else 42)
        assert config.train.min_lr == pytest.approx(place.rate / 10), "its share stays"
        assert (config.train.steps, config.train.val_every, config.train.beta2) == (100, 100, 0.9)
    assert found.rungs[Place(64, 0.002, 7)].name == "transfer-2x64-0.002-seed-7"


def test_heads_are_of_one_size_that_divides_every_width() -> None:
    assert [transfer.head_size(widths, 32) for widths in ((32, 64), (48, 96), (16, 64))] == [
        *(32, 24, 16)
    ]


def test_the_rates_are_around_the_one_of_the_settings() -> None:
    assert asked(rates=()).rates == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016]
    assert asked(rates=(), changes=["train.lr=0.03"]).rates[0] == 0.0075


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"changes": ["model.n_embd=8"]}, "model.n_embd=8: `transfer` sets it itself"),
        ({"changes": ["train.seed=8"]}, "train.seed=8: `transfer` sets it itself"),
        (
            {"widths": (48, 100)},
            "--widths 48,100: heads of one size in all of them have 4 channels",
        ),
        ({"seeds": (7, 1337)}, "--seeds 1337: train.seed=1337 is the base's own, and would pass"),
        ({"seeds": (42,)}, "--seeds 42: init.seed=42 is the base's own, and would pass for no"),
        ({"widths": (32,)}, "--widths 32: expected two or more"),
        ({"rates": (0.1, 0.2)}, "--rates 0.1,0.2: expected 3 or more"),
        ({"rates": (0.1, 0.2, 20.0)}, "train.lr=20.0: expected a number above 0 and at most 10"),
        ({"steps": 50}, "train.warmup_steps=60: expected less than train.steps=50"),
        (
            {"changes": ["init.source=hf", "init.hf_model=my/gpt2"]},
            "init.source=hf: `transfer` trains fresh weights",
        ),
        ({"changes": ["checkpoint.resume=require"]}, "`transfer` begins trainings"),
    ],
)
def test_what_makes_no_check_is_refused_before_any_run(changes, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        asked(**changes)
    assert problem in str(error.value)


def test_one_message_names_all_that_makes_no_check() -> None:
    words = ["train.seed=8", "init.source=hf", "init.hf_model=my/gpt2"]
    with pytest.raises(ConfigError) as error:
        asked(widths=(48,), rates=(20.0, 30.0), seeds=(42,), changes=words)
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        *("train.seed=8", "--widths 48", "--rates 20.0,30.0", "init.source=hf", "--seeds 42"),
        *("train.lr=20.0", "train.lr=30.0"),
    ]
    with pytest.raises(ConfigError) as error:
        asked(widths=(), changes=["train.beta1=x", "train.beta2=y"])
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        *("--widths none", "train.beta1=x", "train.beta2=y")
    ]


def test_the_time_is_told_before_anything_runs_of_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(ladder, "seconds_per_step", lambda rung: 0.1)
    found = asked()
    said = transfer.planned(found, finished(found)[:9])
    assert "16 trainings, 9 of them finished; the rest takes about" in said
    assert "train.lr: 0.001, 0.002, 0.004, 0.008" in said
    rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()[-2:]]
    assert [(row[1], row[4], row[5]) for row in rows] == [("32", "8", "0"), ("64", "8", "7")]


def test_what_is_finished_is_not_run_again_unless_the_code_is_another(monkeypatch) -> None:
    found, ran = asked(), []
    known = finished(found)
    monkeypatch.setattr(ladder, "run", lambda member: ran.append(member.name))
    done = ladder.run_missing(list(found.rungs.values()), known)
    assert not ran and len(done) == 16
    with pytest.raises(InputError, match="transfer-2x32-0.001: ended, and its record is not there"):
        monkeypatch.setattr(ladder, "trained", list)
        monkeypatch.setattr(ladder.sweep, "new_name", lambda name, taken: name)
        monkeypatch.setattr(ladder.dvc_history, "names", list)
        ladder.run_missing(list(found.rungs.values()), finished(found, "another"))
    assert ran == ["transfer-2x32-0.001"]


def test_the_page_has_losses_best_rates_and_a_verdict(monkeypatch, tmp_path: Path, caplog) -> None:
    found = asked()
    known = finished(found)
    done = ladder.run_missing(list(found.rungs.values()), known)
    attached: list[str] = []
    monkeypatch.setattr(transfer, "attach", lambda ids, folder, name: attached.extend(ids))
    with caplog.at_level("INFO"):
        transfer.conclude(transfer.found_of(found, done))
    folder = tmp_path / "comparisons/transfer-gpt2-adamw"
    text = (folder / "transfer.md").read_text("utf-8")
    assert (folder / "transfer.png").stat().st_size > 10_000
    assert text.partition("\n\n")[2].strip() in caplog.text and len(attached) == 16
    mean = 6.05 + 0.2 * math.log2(0.002 / 0.003) ** 2
    shown = [float(line.split("|")[2]) for line in text.splitlines() if line.startswith("| 0.002")]
    assert shown == [pytest.approx(mean, abs=0.003)]
    best = [line for line in text.splitlines() if "±" in line and line.startswith("|")][1:]
    assert all(line.split("|")[4].strip().startswith("0.00") for line in best) and len(best) == 2
    assert "does not move with the width by more than the noise" in text


def test_a_rate_that_fails_is_told_and_the_others_go_on(monkeypatch, caplog) -> None:
    found = asked()
    rungs = found.rungs.items()
    there: list[ladder.Trained] = []

    def run(member) -> None:
        place, rung = next((p, r) for p, r in rungs if r.name == member.name)
        if place.rate == 0.008:
            raise InputError(f"{member.name}: failed (exit code 1), see its output above")
        there.append(trained(rung, rung.name, loss(place)))

    monkeypatch.setattr(ladder, "run", run)
    monkeypatch.setattr(ladder, "trained", lambda: list(there))
    monkeypatch.setattr(ladder.sweep, "new_name", lambda name, taken: name)
    monkeypatch.setattr(ladder.dvc_history, "names", list)
    failed: list[str] = []
    done = ladder.run_missing(list(found.rungs.values()), [], failed)
    assert len(done) == 12 and len(failed) == 4 and caplog.text.count("the others go on") == 4
    came = transfer.found_of(found, done)
    (row,) = [line for line in transfer.page(came).splitlines() if line.startswith("| 0.008")]
    assert row.count("failed") == 2
    assert len(list(transfer.lines(came))) == 2
    with pytest.raises(InputError, match=r"failed \(exit code 1\)"):
        ladder.run_missing(list(found.rungs.values()), [])


def fail(rung: Rung, error: Exception, tokens: str = "tokens") -> None:
    """Leave what a training leaves that ends with this error."""
    identity = run_folder.identity("train", rung.config, {"train": tokens})
    with pytest.raises(type(error)), run_folder.claim(identity) as run:
        start = record_file.start_event("train", rung.config)
        run.journal.write_text(json.dumps(start) + "\n", "utf-8")
        raise error


def test_a_rate_that_diverged_is_told_from_its_folder_and_not_trained_again(
    monkeypatch, caplog
) -> None:
    found = asked()
    low, high, full, other, *rest = found.rungs.values()
    fail(high, NumericsError("step 7: the loss is nan; no update was made\nmore"))
    fail(full, StorageError("the disk is full"))
    fail(other, NumericsError("step 7: the loss is nan"), tokens="of another corpus")
    known = [trained(rung, rung.name) for rung in (low, *rest)]
    ran: list[str] = []

    def run(member) -> None:
        ran.append(member.name)
        raise InputError(f"{member.name}: failed (exit code 1), see its output above")

    monkeypatch.setattr(ladder, "run", run)
    monkeypatch.setattr(ladder.sweep, "new_name", lambda name, taken: name)
    monkeypatch.setattr(ladder.dvc_history, "names", list)
    monkeypatch.setattr(ladder, "seconds_per_step", lambda rung: 0.1)
    assert "16 trainings, 13 of them finished, 1 failed before;" in transfer.planned(found, known)
    failed: list[str] = []
    done = ladder.run_missing(list(found.rungs.values()), known, failed)
    assert ran == [full.name, other.name] and len(done) == 13
    said = f"{high.name}: failed before with these settings, this code and corpus: step 7: the "
    assert failed[0].startswith(f"{said}loss is nan; no update was made; after `python -m pipe")
    assert failed[0] in caplog.text and len(failed) == 3
    monkeypatch.setattr(ladder.provenance, "code_of", lambda stage: {"stages/train.py": "edited"})
    assert not ladder.diverged([high], done)


def test_trainings_on_other_tokens_make_no_table() -> None:
    found = asked()
    known = finished(found)
    known[3].run.records["train"][1]["values"]["digest.train"] = "others"
    done = ladder.run_missing(list(found.rungs.values()), known)
    with pytest.raises(InputError, match="trained on different tokens"):
        transfer.found_of(found, done)
