"""ReSA, the Abstractors, LDPv2 and wide windows: the hand examples of their papers' rules, and their sizes."""

from typing import Any

import pytest
import torch
from torch import nn

from foveate import bridges
from foveate.bridges.wide_windows import around
from foveate.bridges.windows import adaptive_boxes
from foveate.errors import FoveateError


def build_bridge(config: dict[str, Any]) -> Any:
    """Parts of it are put in the place of others below."""
    return bridges.build_bridge(config)


def ids() -> torch.Tensor:
    """A grid of 4 x 4 patches, two channels with the patch's number in the first."""
    x = torch.zeros(1, 16, 2)
    x[0, :, 0] = torch.arange(16.0)
    return x


def test_ldpv2_is_pooling_after_the_mlp_and_a_convolution() -> None:
    bridge = build_bridge({"kind": "ldpv2", "side": 2, "vision_width": 2, "text_width": 2})
    bridge.mlp.forward = lambda features, grid: features[0]
    nn.init.zeros_(bridge.around.weight), nn.init.zeros_(bridge.around.bias)
    assert bridge([ids()], (4, 4))[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    bridge.around.weight.data[:, 0, 1, 1] = 0.5
    assert bridge([ids()], (4, 4))[0, :, 0].tolist() == [3.75, 6.75, 15.75, 18.75]
    with torch.device("meta"):
        whole = build_bridge({"kind": "ldpv2"})
    assert sum(p.numel() for p in whole.parameters()) == 1024 * 4096 + 4096 + 4096**2 + 4096 + 10 * 4096
    assert whole.tokens((24, 24)) == 144


def test_c_abstractor_without_its_convolutions_is_pooling() -> None:
    bridge = build_bridge({"kind": "c_abstractor", "side": 2, "grid": 4, "vision_width": 2, "width": 2, "text_width": 2})
    bridge.before = bridge.after = bridge.linear_2 = nn.Identity()
    nn.init.zeros_(bridge.places), nn.init.eye_(bridge.linear_1.weight), nn.init.zeros_(bridge.linear_1.bias)
    expected = torch.nn.functional.silu(torch.tensor([2.5, 4.5, 10.5, 12.5]))
    torch.testing.assert_close(bridge([ids()], (4, 4))[0, :, 0], expected)
    with torch.device("meta"):
        assert [build_bridge({"kind": "c_abstractor", "side": side}).tokens((24, 24)) for side in (12, 16, 24)] == [144, 256, 576]
    with pytest.raises(FoveateError, match="made for a grid of 4 x 4 patches, got 4 x 6"):
        bridge([ids()], (4, 6))


def test_resa_makes_64_queries_and_16_tokens_of_256_patches() -> None:
    with torch.device("meta"):
        bridge = build_bridge({"kind": "resa"})
    assert (bridge.tokens((16, 16)), bridge.places.shape[0], bridge.reads) == (16, 64, [3, 3, 3, 2, 2, 2, 1, 0])
    assert (len(bridge.blocks), len(bridge.among)) == (8, 7)


def test_resa_proposes_maxima_and_rearranges_neighbours() -> None:
    """With layers that do nothing: the maximum of 2 x 2 patches, then these 2 x 2 side by side."""
    bridge = build_bridge({"kind": "resa", "grid": 4, "reads": [0], "levels": 1, "vision_width": 4, "head_dim": 4, "text_width": 16})
    bridge.propose = bridge.to_query = bridge.norm = nn.Identity()
    bridge.blocks[0].forward = lambda q, context: q
    nn.init.zeros_(bridge.places), nn.init.eye_(bridge.proj.weight), nn.init.zeros_(bridge.proj.bias)
    x = torch.zeros(1, 16, 4)
    x[0, :, 0], x[0, :, 1] = torch.arange(16.0), -torch.arange(16.0)
    found = bridge([x], (4, 4))
    assert found.shape == (1, 1, 16)
    assert found.view(4, 4)[:, :2].tolist() == [[5, 0], [7, -2], [13, -8], [15, -10]]


def test_d_abstractor_begins_on_an_even_grid_around_which_it_looks() -> None:
    given = {"kind": "d_abstractor", "side": 2, "depth": 1, "grid": 4, "vision_width": 2, "width": 8, "head_dim": 2, "text_width": 8}
    bridge = build_bridge(given)
    assert torch.allclose(bridge.reference.sigmoid(), torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]))
    (layer,) = bridge.layers
    ways = layer.offsets.bias.view(4, 4, 2)  # heads, points, (columns, rows)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])[:, None] * torch.arange(1.0, 5)[:, None]
    torch.testing.assert_close(ways, expected, atol=1e-6, rtol=0)


def test_deformable_attention_is_a_weighted_mean_of_points() -> None:
    """One head on a map of 4 x 4 whose values are the patches' numbers: four points, bilinear, zeros outside."""
    bridge = build_bridge({"kind": "d_abstractor", "side": 1, "depth": 1, "grid": 4, "width": 4, "head_dim": 4, "text_width": 4})
    (layer,) = bridge.layers
    for part in ("norm_among", "norm_read", "norm_mlp", "to_value", "read"):
        setattr(layer, part, nn.Identity())
    for part in (layer.mix, layer.linear_2):
        nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    layer.offsets.bias.data[:] = torch.tensor([0.0, 0, 1, 0, 0, 0.5, -9, 0])  # columns and rows from the middle of the map
    layer.weights.bias.data[:] = torch.tensor([1.0, 1, 2, 1]).log()
    x = torch.arange(16.0)[None, :, None].expand(1, 16, 4)
    found = layer(torch.zeros(1, 1, 4), x, (4, 4), torch.tensor([[0.5, 0.5]]))
    assert found[0, 0].tolist() == pytest.approx([(7.5 + 8.5 + 2 * 9.5 + 0) / 5] * 4)


def test_wide_windows_read_means_of_what_lies_around_them() -> None:
    x = torch.randn(2, 3, 8, 8)
    for ratio, start in ((1, [0, 2, 4, 6]), (2, [0, 1, 3, 4]), (4, [0, 0, 0, 0])):
        found = around(x, 2, ratio).unflatten(0, (2, 4, 4))
        for row, top in enumerate(start):
            for column, left in enumerate(start):
                area = x[:, :, top : top + 2 * ratio, left : left + 2 * ratio]
                pooled = torch.nn.functional.avg_pool2d(area, ratio).flatten(2).transpose(1, 2)
                torch.testing.assert_close(found[:, row, column], pooled)


def test_wide_windows_cost_the_same_whatever_the_ratio() -> None:
    with torch.device("meta"):
        cost = {
            tuple(ratios): build_bridge({"kind": "wide_windows", "ratios": ratios}).flops((24, 24)) for ratios in ([1], [2], [12], [2, 1])
        }
    assert cost[1,] == cost[2,] == cost[12,] < cost[2, 1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kind": "resa", "grid": 18}, "4 does not divide the grid of 18 x 18"),
        ({"kind": "resa", "reads": [4]}, r"reads \[4\] must name for each layer one of the 4 levels, 0 to 3"),
        ({"kind": "wide_windows", "ratios": [1, 2]}, "must go from the widest to the narrowest"),
        ({"kind": "wide_windows", "ratios": [16], "window": 2}, "fit into a grid of 24"),
        ({"kind": "d_abstractor", "width": 100}, "head_dim 64 does not divide the bridge width 100"),
        ({"kind": "c_abstractor", "side": 25}, "side 25 is more than a grid of 24 x 24 patches has"),
    ],
)
def test_what_they_cannot_be(config: dict[str, Any], said: str) -> None:
    with pytest.raises(FoveateError, match=said), torch.device("meta"):
        build_bridge(config)
    with pytest.raises(FoveateError, match="side 12 is more than a grid of 4 x 4"):
        build_bridge({"kind": "ldpv2"}).tokens((4, 4))


def test_adaptive_windows_are_those_of_torch() -> None:
    """A mean over the window of each, also where windows overlap."""
    x = torch.randn(1, 3, 7, 5)
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(2)
    for number, (top, left, bottom, right) in enumerate(adaptive_boxes((7, 5), 3)):
        torch.testing.assert_close(pooled[..., number], x[..., top:bottom, left:right].mean((2, 3)))
