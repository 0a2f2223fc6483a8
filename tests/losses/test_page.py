"""docs/losses.md: every stage on it runs, its code runs, and it has every loss."""

import re
from pathlib import Path

import pytest
import torch

from foveate.losses import LOSSES
from foveate.train.run import main
from tests.tiny import ROWS, Batch, llava
from tests.train import tiny_training

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
STAGES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
RECIPE = """
name: page
output: {root}/{output}
model:
  vision: {root}/tower
  text: {root}/lm
  bridge: {{kind: mlp}}
workers: 0
stages:
  - name: stage
    data: {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: true}}
    steps: 4
    batch_size: 2
    learning_rate: 1.0e-2
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("page")
    tiny_training.save_backbones(folder, layers=3)
    tiny_training.save_data(folder)
    return folder


@pytest.mark.parametrize("number", range(len(STAGES)))
def test_every_stage_of_the_page_runs(root: Path, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    path = root / f"{number}.yaml"
    stage = "".join(f"    {line}\n" for line in STAGES[number].splitlines())
    path.write_text(RECIPE.format(root=root, output=f"run-{number}") + stage)
    main(path)
    log = (root / f"run-{number}" / "log.jsonl").read_text()
    assert '"losses": {"answers": ' in log


def test_the_page_has_every_loss() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, re.MULTILINE))
    assert rows.keys() == LOSSES.keys()
    for name, loss in LOSSES.items():
        assert loss.paper in rows[name]
        assert any(re.search(rf"\b{name}\b", stage) for stage in STAGES)


def test_the_code_of_the_page_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names = {"model": llava(), "inputs": Batch(ROWS).inputs}
    exec(compile(block, "docs/losses.md", "exec"), names)
    assert names["teacher"].shape == names["student"].shape == names["nearer"].shape
    assert names["came_from"].target.shape[1] < names["came_from"].source.shape[1]
