from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

RECIPE = """
name: tiny
output: {root}/{output}
model:
  vision: {root}/tower
  text: {root}/lm
  bridge: {{kind: chain_of_sight, scales: [[4, 2], [2, 1]], width: 32, head_dim: 16}}
log_steps: 2
workers: 0
stages:
  - name: pretrain
    data: &data {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: true}}
    epochs: 1
    batch_size: 4
    micro_batch: 2
    learning_rate: 1.0e-2
    save_steps: 2
  - name: grow
    data: *data
    image_size: 64
    bridge: {{scales: [[8, 2], [4, 2], [2, 1]]}}
    train: {{bridge: true, lm: {{lora: {{rank: 4, dropout: 0.1}}}}}}
    steps: 6
    batch_size: 4
    learning_rate: 1.0e-2
    warmup: 0.2
    save_steps: 2
    reducers:
      - {{share: 1/3, reducer: "vcc:layer=1,stride=4"}}
      - {{share: 1/3, cycle: [none, "random:keep=0.5"]}}
      - {{share: 1/3, reducer: none}}
  - name: all
    data: *data
    train: {{bridge: true, lm: true, tower: true}}
    steps: 5
    batch_size: 4
    learning_rate: 1.0e-2
    weight_decay: 0.1
    save_steps: 2
    reducers: [{{share: 1, reducer: "vcc:layer=1,stride=2"}}]
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones with attention dropout, so that random numbers matter, and data."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_backbones(folder, dropout=0.1)
    tiny.save_data(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


@pytest.fixture()
def recipe_file(root: Path) -> Callable[..., Path]:
    """Writes the three-stage recipe for an output folder inside `root`."""

    def write(output: str, text: str = RECIPE) -> Path:
        path = root / f"{output}.yaml"
        path.write_text(text.format(root=root, output=output))
        return path

    return write
