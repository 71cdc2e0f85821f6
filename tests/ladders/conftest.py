"""A repository of their own for these tests, with the default recipe as its settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import recipe


@pytest.fixture(autouse=True)
def _repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text(recipe(), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
