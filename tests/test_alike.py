"""Blocks that stand for one another in a dry run, and images that cost the same: what is counted is what would be without."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

from foveate.accounting import Trained, dry_run, predict
from foveate.accounting.alike import made, one_for_all
from foveate.accounting.counter import Counter
from foveate.accounting.dry_run import Told, encode, settled, skeleton
from foveate.accounting.prompts import image_of, plan_call, reached
from foveate.contract import ClsAttention, ReceivedAttention, Signal, TowerKeys
from foveate.model import FoveateConfig
from foveate.reducers import parse
from foveate.train.account import Costs
from tests.tiny import assembled, llava

TEXT = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99)
VISION = CLIPVisionConfig(hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)


def tiled(tiling: str) -> FoveateConfig:
    config = FoveateConfig(
        vision_config=VISION, text_config=TEXT, bridge={"kind": "mlp"}, vision_feature_layer=[-2], image_token_id=90, tiling=tiling
    )
    assert isinstance(config, FoveateConfig)
    return config


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The tower's blocks that were really run."""
    seen: list[nn.Module] = []
    model: Any = skeleton(llava().config)
    block: Any = type(model.model.vision_tower.encoder.layers[0])
    forward = block.forward

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", noted)
    dry_run._encode.cache_clear()
    yield seen
    dry_run._encode.cache_clear()


@pytest.mark.parametrize("make", [llava, assembled, lambda: None], ids=["llava", "foveate", "tiled"])
def test_one_block_runs_and_all_are_counted(make: Any, ran: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    config = tiled("internvl:tiles=6") if model is None else model.config
    call = plan_call(config, config.plan_image(64, 90)) if model is None else image_of(config, None, None)
    found = encode(config, call)
    blocks = config.vision_config.num_hidden_layers
    assert len(ran) == 1
    dry_run._encode.cache_clear()
    ran.clear()
    monkeypatch.setattr(dry_run, "one_for_all", lambda model, counted: nullcontext())
    assert encode(config, call) == found
    assert len(ran) == blocks > 1
    assert found.flops["tower"] > 0


@pytest.mark.parametrize(
    ("needs", "inside", "runs"),
    [
        ([TowerKeys(-2)], False, [0, 3]),
        ([ClsAttention(-1), ReceivedAttention(1)], False, [0, 1, 4]),
        ([], True, [0, 1]),  # the first one is watched for its heads
        ([ClsAttention(0)], True, [0, 1]),
    ],
)
def test_blocks_that_are_watched_are_run(
    needs: list[Signal], inside: bool, runs: list[int], ran: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiled("internvl:tiles=6")
    call = plan_call(config, config.plan_image(64, 90))
    found = encode(config, call, needs, blocks=inside)
    stack: Any = skeleton(config)
    assert ran == [stack.model.vision_tower.encoder.layers[block] for block in runs]
    dry_run._encode.cache_clear()
    monkeypatch.setattr(dry_run, "one_for_all", lambda model, counted: nullcontext())
    assert encode(config, call, needs, blocks=inside) == found
    assert (found.flops["scores"] > 0) is any(not isinstance(signal, TowerKeys) for signal in needs)
    assert bool(found.calls) is inside


class Block(nn.Module):
    """Multiplies by a weight, and by a mask that has values; `often` says how many times."""

    def __init__(self, number: int, width: int = 4, often: int = 1) -> None:
        super().__init__()
        self.layer_idx, self.often = number, often
        self.inner = nn.Linear(4, width, bias=False, device="meta")
        self.outer = nn.Linear(width, 4, bias=False, device="meta")

    def forward(self, states: Tensor, mask: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        for _ in range(self.often):
            states = self.outer(self.inner(states[: int(mask.sum())]))
        return states * scale, mask


def counted(blocks: list[Block], masks: list[Tensor], scales: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """FLOPs of a stack with blocks standing for one another, and without."""
    stack = nn.ModuleList(blocks)
    tower = nn.Sequential()
    tower.add_module("blocks", stack)
    monkeypatch.setattr("foveate.accounting.alike.parts_of", lambda model: {tower: "tower"})
    monkeypatch.setattr("foveate.accounting.counter.parts_of", lambda model: {})
    found = []
    for standing in (True, False):
        counter = Counter(tower)
        with torch.no_grad(), counter, one_for_all(tower, counter) if standing else nullcontext():
            states = torch.empty(6, 4, device="meta")
            for block, mask, scale in zip(stack, masks, scales, strict=True):
                states, kept = block(states, mask, scale=scale)
                assert kept is mask
        assert all("forward" not in vars(block) for block in stack)
        found.append(counter.flops["other"])
    return found[0], found[1]


ONES = torch.ones(6)


@pytest.mark.parametrize(
    ("blocks", "masks"),
    [
        ([Block(0), Block(1), Block(2)], [ONES] * 3),
        ([Block(0), Block(1, width=9), Block(2)], [ONES] * 3),  # other weights
        ([Block(0), Block(1, often=3), Block(2)], [ONES] * 3),  # another setting
        ([Block(0), Block(1), Block(2)], [ONES, torch.tensor([1, 1, 0, 0, 0, 0]), ONES]),  # other values, and then another shape
        ([Block(0), Block(1), Block(2)], [torch.ones(6), torch.ones(6), torch.ones(6)]),  # values that are not known to be the same
    ],
    ids=["alike", "weights", "settings", "values", "copies"],
)
def test_blocks_that_differ_are_all_run(blocks: list[Block], masks: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    own, all_of_them = counted(blocks, masks, [1.0, 1.0, 1.0], monkeypatch)
    assert own == all_of_them > 0


def test_what_makes_blocks_alike() -> None:
    assert made(Block(0)) == made(Block(7))
    assert made(Block(0)) != made(Block(0, width=5))
    assert made(Block(0)) != made(Block(0, often=2))


@pytest.mark.parametrize("tiling", ["internvl:tiles=6", "anyres", "slime", "native", "s2"])
def test_images_that_are_cut_alike_cost_the_same(tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer counts of each is what is predicted of it; only those that are not alike are counted anew."""
    config = tiled(tiling)
    predicted = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        predicted.append(kwargs["images"])
        return predict(*args, **kwargs)

    monkeypatch.setattr("foveate.train.account.predict", noted)
    costs, draw = Costs(config, Trained(bridge=True, lm=True)), np.random.RandomState(0)
    plans = [config.plan_image(*(int(side) for side in draw.randint(20, 200, 2))) for _ in range(25)]
    for plan in plans:
        right = predict(config, images=[plan], text_tokens=9, mode="train", trained=costs.trained, head_tokens=4)
        assert costs.of("none", (plan,), 9, 4) == right.total_flops
    assert len(predicted) == len({plan.cost for plan in plans}) < len(set(plans)) == len(plans)


@pytest.mark.parametrize("reducers", ["", "tome:keep=0.5,site=tower,blocks=1"])
@pytest.mark.parametrize("levels", [[-1], [-2], [1, 3]])
def test_a_trained_tower_is_gone_back_through_as_far_as_its_deepest_level(levels: list[int], reducers: str) -> None:
    """Forward through every block, and twice as much back through those that a visual token depends on; less what cuts in it save there."""
    config = FoveateConfig(vision_config=VISION, text_config=TEXT, bridge={"kind": "mlp"}, vision_feature_layer=levels, image_token_id=90)
    given: dict[str, Any] = {"text_tokens": 5, "reducers": parse(reducers)}
    whole, deep = (predict(one, **given).flops["tower"] for one in (config, reached(config)))
    assert (deep < whole) is (levels != [-1])
    trained = predict(config, **given, mode="train", trained=Trained(bridge=True, tower=True))
    assert trained.flops["tower"] == whole + 2 * deep
    if reducers:
        assert whole < predict(config, text_tokens=5).flops["tower"]


def test_dry_runs_of_several_threads_do_not_meet() -> None:
    config = tiled("anyres")
    calls = [plan_call(config, config.plan_image(32 + 8 * n, 64)) for n in range(8)]
    dry_run._encode.cache_clear()
    alone = [encode(config, call) for call in calls]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(3):
            dry_run._encode.cache_clear()
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(lambda call: encode(config, call), calls)) == alone
    finally:
        sys.setswitchinterval(before)


def test_a_settled_configuration_is_not_written_again() -> None:
    config = tiled("internvl:tiles=6")
    told = Told.by(config)
    with settled(told):
        assert Told.by(config) is told
        assert Told.by(tiled("internvl:tiles=6")) is not told
    config.bridge["width"] = 48
    assert Told.by(config) != told
