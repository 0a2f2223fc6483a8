"""Fixtures that several situations share."""

from pathlib import Path

import pytest

from foveate.world.scenes import write_world


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's folder, in which training remembers checked images, is the test's own."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world on disk: three scenes to ask about, of 32 pixels."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, train=1, test=3, seed=0, size=32, progress=False, processes=1)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", help="folder of pictures that test_foreign_pictures.py looks at")
