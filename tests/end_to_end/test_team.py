"""What docs/team.md promises: results travel, links of every kind do, and nothing runs twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.records import stage_graph
from tests.conftest import Checkout, tiny_pipeline

pytestmark = pytest.mark.slow


class Team:
    """Anna, whose outputs are symbolic links, and Ben, who shares her cache by hard links."""

    def __init__(self, folder: Path):
        (folder / "anna").mkdir()
        self.folder = folder
        self.anna = tiny_pipeline(folder / "anna")
        self.anna.dvc("remote", "add", "--default", "store", (folder / "store").as_posix())
        self.anna.run("git", "commit", "--quiet", "--all", "--message", "remote")
        self.share_cache(self.anna, "symlink")
        self.anna.dvc("repro")
        self.anna.run("git", "add", "dvc.lock")
        self.anna.run("git", "commit", "--quiet", "--message", "results")
        self.anna.dvc("push")
        bare = (folder / "team.git").as_posix()
        self.anna.run("git", "init", "--quiet", "--bare", "--initial-branch=main", bare)
        self.anna.run("git", "remote", "add", "origin", bare)
        self.anna.run("git", "push", "--quiet", "origin", "main")

    def share_cache(self, repo: Checkout, links: str) -> None:
        repo.dvc("config", "--local", "cache.dir", str(self.folder / "cache"))
        repo.dvc("config", "--local", "cache.type", links)

    def member(self, name: str) -> Checkout:
        self.anna.run("git", "clone", "--quiet", "../team.git", f"../{name}")
        made = Checkout(self.folder / name)
        made.env = self.anna.env
        return made


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Team:
    return Team(tmp_path_factory.mktemp("team"))


def outputs(repo: Checkout) -> list[Path]:
    """Tokens, the trained model and every record, which lie in DVC's cache."""
    folders = ("data/tokens", "artifacts/model", "records")
    found = [file for folder in folders for file in (repo.folder / folder).iterdir()]
    assert len(found) > 3 + len(stage_graph.stages())
    return found


def test_a_second_clone_pulls_results_and_runs_nothing(team: Team) -> None:
    clone = team.member("carl")
    clone.dvc("pull")
    printed = clone.dvc("repro")
    skipped = [f"Stage '{stage}' didn't change, skipping" for stage in stage_graph.stages()]
    assert all(line in printed for line in skipped) and "Running stage" not in printed


def test_stages_and_experiments_work_with_links_and_a_shared_cache(team: Team) -> None:
    assert all(path.is_symlink() for path in outputs(team.anna))
    ben = team.member("ben")
    team.share_cache(ben, "hardlink")
    ben.dvc("checkout")  # nothing is pulled: Anna's objects are in the cache that they share
    assert all(path.stat().st_nlink > 1 for path in outputs(ben))
    ben.dvc("exp", "run", "-n", "faster", "-S", "train.lr=0.003")
    assert "every file is whole" in said(ben, "verify", "cache")

    ben.dvc("exp", "push", "origin", "faster")
    team.anna.dvc("exp", "pull", "origin", "faster")
    assert "faster" in said(team.anna, "show")
    assert "faster" in said(team.anna, "sync")


def said(repo: Checkout, *words: str) -> str:
    done = repo.run("python", "-m", "pipeline", *words)
    return done.stdout + done.stderr
