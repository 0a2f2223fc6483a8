"""Training as it was: the losses of each arm of the demo are those that are written down (`golden.py` says how they were made).

Counts are exact. Losses and gradients agree to 1e-4: processors round a sum in different orders, which 30 steps blow up to about 1e-5,
while any change of data order, mask, initial weights, learning rate or reducer moves a loss by more than 1e-3.
"""

import json
from pathlib import Path

import pytest
from tests.train.golden import ARMS, COUNTED, GOLDEN, make_world, trajectory


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("arm", ARMS)
def test_losses_are_those_written_down(arm: str, world: Path, tmp_path: Path) -> None:
    expected, found = json.loads((GOLDEN / f"{arm}.json").read_text()), trajectory(arm, world, tmp_path)
    assert [{name: row[name] for name in COUNTED} for row in found] == [{name: row[name] for name in COUNTED} for row in expected]
    for number in ("loss", "grad_norm"):
        assert [row[number] for row in found] == pytest.approx([row[number] for row in expected], rel=1e-4)
