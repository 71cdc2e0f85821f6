"""Where rows and their artifacts lie: after a move, under odd names, from temporary workspaces."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import paths
from pipeline.experiments import sync
from pipeline.records.run_data import Experiment
from pipeline.tracking import mlflow_run, mlflow_store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ODD = "a b#c%20d?e@f"


@pytest.fixture(params=["plain", pytest.param(ODD, marks=pytest.mark.fault(65))])
def before(request, tmp_path: Path, empty_store: Path, monkeypatch) -> Path:
    """The current directory: a repository with an empty store that was made for it."""
    if os.name == "nt" and request.param == ODD:
        pytest.skip("Windows has no such names")
    root = tmp_path / request.param
    (root / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(root)
    for name in [name for name in os.environ if name.startswith(("DVC_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    shutil.copyfile(empty_store, root / "mlflow.db")
    client = mlflow_store.connect()  # the store follows from where the session has made it
    assert client.get_experiment("0").artifact_location == f"{root.as_uri()}/mlartifacts/0"
    return root


def log_into(client: Any, run_id: str, name: str) -> None:
    client.log_text(run_id, "text", f"{name}.txt")


def filled(client: Any) -> str:
    """A run with an artifact and a model, in an experiment as a stage makes it."""
    experiment = mlflow_run._experiment(client, "gpt2")
    run_id = client.create_run(experiment).info.run_id
    log_into(client, run_id, "first")
    client.create_logged_model(experiment, name="best", source_run_id=run_id)
    return run_id


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.txt"))


def moved(before: Path, how: str, monkeypatch) -> Path:
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # as another process finds it
    after = before.with_name("after " + before.name)
    if how == "move":
        before.rename(after)
    else:
        shutil.copytree(before, after)
    monkeypatch.chdir(after)
    return after


@pytest.mark.fault(62)
@pytest.mark.parametrize("how", ["move", "copy"])
def test_artifacts_are_found_and_written_where_the_repository_lies_now(
    before: Path, how: str, monkeypatch
) -> None:
    run_id = filled(mlflow_store.connect())
    after = moved(before, how, monkeypatch)
    client = mlflow_store.connect()
    assert Path(client.download_artifacts(run_id, "first.txt")).read_text("utf-8") == "text"
    log_into(client, run_id, "second")
    again = client.create_run(mlflow_run._experiment(client, "gpt2"))
    log_into(client, again.info.run_id, "third")
    assert files(after) == ["first.txt", "second.txt", "third.txt"]
    assert files(before) == ([] if how == "move" else ["first.txt"])
    (model,) = client.search_logged_models([again.info.experiment_id])
    assert model.artifact_location.startswith(f"{after.as_uri()}/mlartifacts/gpt2/")


@pytest.mark.fault(62, control=True)
def test_a_client_of_its_own_writes_into_the_folder_that_was_left(
    before: Path, monkeypatch
) -> None:
    from mlflow import MlflowClient

    filled(mlflow_store.connect())
    moved(before, "move", monkeypatch)
    client = MlflowClient(mlflow_store.store_uri())
    run = client.create_run(client.get_experiment_by_name("gpt2").experiment_id)
    log_into(client, run.info.run_id, "second")
    assert files(before) == ["second.txt"]


def locations(client: Any) -> dict[str, str]:
    return {found.name: found.artifact_location for found in client.search_experiments()}


@pytest.mark.fault(62)
def test_places_that_a_person_chose_elsewhere_stay(before: Path, monkeypatch) -> None:
    client = mlflow_store.connect()
    chosen = {"s3": "s3://bucket/runs", "near": f"{before.as_uri()}-runs"}
    within = {"uri": f"{before.as_uri()}/runs", "path": f"{before.as_posix()}/runs"}
    for name, place in (chosen | within).items():
        client.create_experiment(name, artifact_location=place)
    after = moved(before, "move", monkeypatch)
    found = locations(mlflow_store.connect())
    expected = chosen | {"uri": f"{after.as_uri()}/runs", "path": f"{after.as_posix()}/runs"}
    assert {name: found[name] for name in expected} == expected


def test_another_name_of_the_same_folder_and_a_shared_store_change_nothing(
    before: Path, monkeypatch
) -> None:
    filled(mlflow_store.connect())
    known = locations(mlflow_store.connect())
    link = before.with_name("link")
    link.symlink_to(before)
    monkeypatch.setenv("DVC_ROOT", str(link))
    assert locations(mlflow_store.connect()) == known
    other = before.with_name("other")
    (other / ".dvc").mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(other))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.sqlite_uri(before / "mlflow.db"))
    assert locations(mlflow_store.connect()) == known


@pytest.mark.fault(65)
def test_a_repository_with_characters_that_uris_know_has_its_store_and_no_folder_beside_it(
    before: Path,
) -> None:
    (before / "mlflow.db").unlink()
    filled(mlflow_store.connect())
    assert mlflow_store.sqlite_path(mlflow_store.store_uri()) == before / "mlflow.db"
    assert files(before / "mlartifacts") == ["first.txt"]
    assert [path.name for path in before.parent.iterdir()] == [before.name]


@pytest.mark.fault(65, control=True)
def test_a_joined_uri_of_such_a_folder_names_another_one() -> None:
    from sqlalchemy.engine import make_url

    path = Path("/home", ODD, "mlflow.db")
    assert make_url(f"sqlite:///{path.as_posix()}").database != path.as_posix()


@pytest.fixture
def aside(before: Path, monkeypatch) -> Path:
    """A stage's folder in one of DVC's temporary workspaces of the repository `before`."""
    place = before / ".dvc/tmp/exps/standalone/tmp1"
    (place / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("DVC_ROOT", str(before))
    return place


@pytest.mark.fault(64)
def test_a_relative_store_lies_at_the_main_root(before: Path, aside: Path, monkeypatch) -> None:
    shutil.move(before / "mlflow.db", before / "my.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///my.db")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///models.db")
    filled(mlflow_store.connect())
    assert os.environ["MLFLOW_REGISTRY_URI"] == mlflow_store.sqlite_uri(before / "models.db")
    assert list(aside.rglob("*")) == [aside / ".dvc"]
    assert files(before / "mlartifacts") == ["first.txt"]


@pytest.mark.fault(64, control=True)
def test_sqlalchemy_opens_a_relative_file_in_the_current_folder(aside: Path) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    create_engine("sqlite:///my.db", poolclass=NullPool).connect().close()
    assert (aside / "my.db").exists()


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("sqlite:///sub/my.db", "sqlite:///{root}/sub/my.db"),
        ("sqlite:///my.db?timeout=9", "sqlite:///{root}/my.db?timeout=9"),
        ("runs", "file://{root}/runs"),
        ("./runs", "file://{root}/runs"),
        ("file:runs", "file://{root}/runs"),
        ("file:./my%20runs", "file://{root}/my%20runs"),
    ],
)
def test_relative_means_relative_to_the_main_root(given: str, meant: str, monkeypatch) -> None:
    monkeypatch.setenv("DVC_ROOT", "/main")
    assert mlflow_store.at_root(given) == meant.format(root="/main")


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite:////a/my.db", "sqlite://", "sqlite:///:memory:", "file:///a/runs", "/a/runs"),
        *("http://host:5000", "postgresql://me:pw@host/db", "databricks", "databricks://profile"),
        *("sqlite:nonsense", "http://[nonsense"),
    ],
)
def test_other_uris_stay_as_they_are(uri: str) -> None:
    assert mlflow_store.at_root(uri) == uri


@pytest.mark.fault(64)
@pytest.mark.parametrize("uri", ["postgresql://host/db", "mysql+pymysql://host/db"])
def test_the_artifacts_of_a_database_elsewhere_do_not_go_into_a_temporary_workspace(
    uri: str, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert mlflow_store.artifact_location("gpt2") == (paths.root() / "mlartifacts/gpt2").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert mlflow_store.artifact_location("gpt2") is None


# --- a row's name


def experiment(name: str, *ids: str) -> Experiment:
    """A DVC experiment of that name whose records came from one that was called `first`."""
    stages = ("tokenize", "train")
    found = {
        stage: [{"id": id_, "stage": stage, "time": number, "name": "first"}]
        for number, (stage, id_) in enumerate(zip(stages, ids, strict=False))
    }
    return Experiment(name, "rev", found)


def row(client: Any, name: str, **parts: str) -> str:
    tags = {mlflow_run.RECORDS: json.dumps(parts), "dvc.exp_name": name}
    return client.create_run(
        mlflow_run._experiment(client, "gpt2"), run_name=name, tags=tags
    ).info.run_id


def names(client: Any, *ids: str) -> list[tuple[str, str]]:
    found = [client.get_run(id_) for id_ in ids]
    return [(run.info.run_name, run.data.tags["dvc.exp_name"]) for run in found]


def test_a_row_follows_the_name_that_dvc_has_now(own_store: Path) -> None:
    client = mlflow_store.connect()
    own = row(client, "first", tokenize="a")
    later = row(client, "later", tokenize="a", train="b")  # the same tokens, and more
    found = [experiment("second", "a"), experiment("later", "a", "b")]
    assert sync._renamed(client, found) == {own: "second"}
    assert names(client, own, later) == [("second", "second"), ("later", "later")]
    assert sync._renamed(client, found) == {}


def test_a_name_that_a_person_gave_or_that_dvc_still_has_stays(own_store: Path) -> None:
    client = mlflow_store.connect()
    own = row(client, "first", tokenize="a")
    client.set_tag(own, "mlflow.runName", "my best")
    sync._renamed(client, [experiment("second", "a")])
    assert names(client, own) == [("my best", "second")]
    shared = row(client, "first", tokenize="c")
    assert sync._renamed(client, [experiment("first", "c"), experiment("twin", "c")]) == {}
    assert names(client, shared) == [("first", "first")]
