import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.train import tiny_training
from tests.train.tiny_training import RECIPE


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones with attention dropout, so that random numbers matter (`lm-plain` is without), and data."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_training.save_backbones(folder, dropout=0.1)
    tiny_training.save_data(folder)
    shutil.copytree(folder / "lm", folder / "lm-plain")
    config = folder / "lm-plain" / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.1', '"attention_dropout": 0.0'))
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


@pytest.fixture
def recipe_file(root: Path) -> Callable[..., Path]:
    """Writes the three-stage recipe for an output folder inside `root`."""

    def write(output: str, text: str = RECIPE) -> Path:
        path = root / f"{output}.yaml"
        path.write_text(text.format(root=root, output=output))
        return path

    return write
