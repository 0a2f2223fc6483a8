"""Bridges that make as many tokens as they are asked for: a smaller budget is the beginning of a larger one, and costs what it says."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.bridges.bridge_oracle import linear, weights_of
from tests.bridges.test_every_bridge import GRID, features, small
from torch.utils.flop_counter import FlopCounterMode

from foveate.bridges import BRIDGES, ElasticBridge, build_bridge
from foveate.errors import FoveateError
from foveate.train.plan import plan

ELASTIC = sorted(kind for kind, bridge in BRIDGES.items() if issubclass(bridge, ElasticBridge))
elastic = pytest.mark.parametrize("kind", ELASTIC)
PAPERS = Path(__file__).parents[2] / "recipes" / "papers"


def test_which_are_elastic() -> None:
    assert ELASTIC == ["chain_of_sight", "mqt"]
    assert list(small("mqt").budgets(GRID)) == list(range(1, 10))
    assert small("chain_of_sight").budgets(GRID) == [3, 3 + 8]
    cos = build_bridge({"kind": "chain_of_sight", "scales": [[16, 16], [8, 16], [2, 4]], "grid": 16})
    assert cos.budgets((16, 16)) == [16, 80, 336]


@elastic
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(kind: str) -> None:
    bridge, x = small(kind).double(), features(torch.float64)
    whole = bridge(x, GRID)
    assert bridge.budgets(GRID)[-1] == bridge.tokens(GRID)
    for budget in bridge.budgets(GRID):
        found = bridge(x, GRID, budget)
        assert found.shape == (3, budget, 10)
        torch.testing.assert_close(found, whole[:, :budget], atol=1e-12, rtol=0)


@elastic
def test_flops_of_every_budget_agree_with_torch(kind: str) -> None:
    with torch.device("meta"):
        bridge: Any = small(kind)
    counts = []
    for budget in bridge.budgets(GRID):
        with FlopCounterMode(display=False) as counter:
            bridge(features(device="meta", images=1), GRID, budget)
        counts.append(counter.get_total_flops())
    assert [bridge.flops(GRID, budget) for budget in bridge.budgets(GRID)] == counts == sorted(counts)
    assert bridge.flops(GRID) == counts[-1]


@pytest.mark.parametrize("kind", BRIDGES)
def test_a_budget_that_a_bridge_cannot_serve(kind: str) -> None:
    bridge = small(kind)
    few = {"mqt": "1 to 9", "chain_of_sight": "3 or 11"}.get(kind, str(bridge.tokens(GRID)))
    for wrong in (0, -1, 12, 17):
        if wrong not in bridge.budgets(GRID):
            with pytest.raises(FoveateError, match=rf"the {kind} bridge makes {few} tokens of a view of 4 x 4 patches, not {wrong}"):
                bridge.within(GRID, wrong)
    if kind in ELASTIC:
        with pytest.raises(FoveateError, match="not 10"):
            bridge(features(), GRID, 10)
    else:
        with pytest.raises(FoveateError, match="mqt or chain_of_sight makes as many as it is asked for"):
            bridge.within(GRID, 999)


# ---- MQT -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["position", "features"])
def test_mqt_is_attention_at_fixed_places(keys: str) -> None:
    """Token by token from the formula: 4 queries on 2 x 2 patches, where no place has to be resized; one level of the bridge's width."""
    torch.manual_seed(0)
    bridge = build_bridge(
        {"kind": "mqt", "queries": 4, "keys": keys, "vision_width": 8, "width": 8, "head_dim": 4, "text_width": 6}
    ).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    w, patches = weights_of(bridge), x[0].numpy()
    w |= {"norm_key.bias": 0 * w["norm_key.weight"]}

    def norm(y, name):  # type: ignore[no-untyped-def]
        centred = y - y.mean()
        return centred / math.sqrt((centred**2).mean() + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    place = torch.tensor(
        [[f(v) for v in (column, row) for f in (lambda a: math.sin(a), lambda a: math.sin(a / 100), math.cos, lambda a: math.cos(a / 100))]
         for row in (0, 1) for column in (0, 1)], dtype=torch.float64
    ).numpy()  # fmt: skip
    found = bridge([x], (2, 2))[0]
    key = [
        w["to_k.weight"] @ (norm(p, "norm_key") if keys == "position" else norm(y, "norm_key") + p)
        for p, y in zip(place, patches, strict=True)
    ]
    value = [linear(norm(y, "norm_value"), w, "to_v") for y in patches]
    for m in range(4):
        q = linear(norm(w["query"][m] + place[m], "norm_query"), w, "to_q")
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            shares = [math.exp(q[part] @ k[part] / 2) for k in key]
            heads += list(np.sum([share * v[part] for share, v in zip(shares, value, strict=True)], axis=0) / sum(shares))
        token = w["proj.weight"] @ linear(torch.tensor(heads).double().numpy(), w, "mix")
        torch.testing.assert_close(found[m], torch.from_numpy(token), atol=1e-6, rtol=1e-5)


def test_mqt_as_released_pools_alike_whatever_the_image() -> None:
    """Swapping what is in two patches swaps no weights, and tokens are affine in the normalised features; with keys of features neither."""
    torch.manual_seed(1)
    given = {"kind": "mqt", "queries": 9, "vision_width": 16, "width": 16, "head_dim": 8, "text_width": 6}
    a, b = (torch.nn.functional.layer_norm(torch.randn(1, 16, 16, dtype=torch.float64), (16,)) for _ in range(2))
    for keys, fixed in (("position", True), ("features", False)):
        bridge = build_bridge({**given, "keys": keys}).double()
        bridge.norm_value = bridge.norm_key = torch.nn.Identity()
        mean = bridge([(a + b) / 2], GRID)
        assert torch.allclose(mean, (bridge([a], GRID) + bridge([b], GRID)) / 2, atol=1e-9) == fixed


def test_mqt_of_the_paper() -> None:
    with torch.device("meta"):
        bridge = build_bridge({"kind": "mqt"})
    assert sum(p.numel() for p in bridge.parameters()) == pytest.approx(8.65e6, rel=2e-3)
    assert (bridge.tokens((24, 24)), len(bridge.boxes((16, 16)))) == (256, 256)


def test_mqt_row_of_flops() -> None:
    """The language model's part of a forward pass with 64 tokens of text at 7B, beside LLaVA's 576 tokens (8.50)."""
    row = {1: 0.84, 2: 0.86, 16: 1.04, 36: 1.30, 64: 1.67, 144: 2.72, 256: 4.20}
    stage = plan(PAPERS / "mqt-7b.yaml", [f"stages.1.view_tokens={list(row)}"], text_tokens=64).stages[1]
    assert (stage.tokens_per_image, [part.view_tokens for part in stage.parts]) == (256, list(row))
    for part, tflops in zip(stage.parts, row.values(), strict=True):
        spent = sum(flops for name, flops in part.forward_flops.items() if name not in ("tower", "bridge", "head"))
        assert spent / 1e12 == pytest.approx(tflops, abs=0.006)
    assert stage.mean_tokens == 32 * Fraction(sum(row), len(row))


def test_what_mqt_cannot_be() -> None:
    for wrong, said in (({"queries": 8}, "8 is no square: take 9 or 16"), ({"keys": "both"}, "position or features, not 'both'")):
        with pytest.raises(FoveateError, match=said):
            build_bridge({"kind": "mqt", **wrong})
    with pytest.raises(FoveateError, match="multiple of 4, not 6"):
        build_bridge({"kind": "mqt", "queries": 4, "width": 6, "head_dim": 3})
