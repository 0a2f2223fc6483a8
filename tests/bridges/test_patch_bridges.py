"""MLP, AvgPool2d, PixelShuffle and Resampler against plain equations, torch's own pooling, and transformers' modules."""

import math
from typing import Any

import pytest
import torch
from tests.bridges.bridge_oracle import block, layer_norm, linear, mlp, weights_of
from torch import nn
from torch.nn import functional as F
from transformers import Idefics3Config, InternVLConfig, LlavaConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from foveate.bridges import MLP, AvgPool2d, PixelShuffle, Resampler, build_bridge
from foveate.errors import FoveateError

LLAMA = {"model_type": "llama", "hidden_size": 6, "num_attention_heads": 2}


def features(grid: tuple[int, int], levels: int, width: int) -> list[torch.Tensor]:
    return [torch.randn(2, grid[0] * grid[1], width, dtype=torch.float64) for _ in range(levels)]


def close(got: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected), atol=1e-12, rtol=1e-12)


def test_mlp_equals_its_equation() -> None:
    bridge, x = MLP(levels=2, vision_width=5, text_width=7).double(), features((2, 3), 2, 5)
    w = weights_of(bridge)
    out = bridge(x, (2, 3))
    for image in range(2):
        for patch in range(6):
            close(out[image, patch], mlp(torch.cat([level[image, patch] for level in x]).numpy(), w))


def test_mlp_normalises_each_level() -> None:
    """Levels whose scales differ by a thousand count alike."""
    bridge, x = MLP(norm=True, levels=2, vision_width=5, text_width=7).double(), features((2, 3), 2, 5)
    for weight in bridge.norms.parameters():
        nn.init.normal_(weight)
    w, out = weights_of(bridge), bridge(x, (2, 3))
    for patch in range(6):
        deep = [torch.as_tensor(layer_norm(level[1, patch].numpy(), w, f"norms.{i}")) for i, level in enumerate(x)]
        close(out[1, patch], mlp(torch.cat(deep).numpy(), w))
    torch.testing.assert_close(bridge([1000 * x[0], x[1]], (2, 3)), out, atol=1e-3, rtol=1e-3)


def test_mlp_says_where_tokens_are() -> None:
    """By a linear map of sines and cosines of their centres in shares of the image; nothing at first."""
    settings: dict[str, Any] = {"levels": 1, "vision_width": 5, "text_width": 7}
    bridge, x = MLP(places=True, **settings).double(), features((2, 3), 1, 5)
    plain = MLP(**settings).double()
    plain.load_state_dict({name: value for name, value in bridge.state_dict().items() if name != "place.weight"})
    assert torch.equal(bridge(x, (2, 3)), plain(x, (2, 3)))
    assert bridge.place is not None
    nn.init.normal_(bridge.place.weight)
    added = bridge(x, (2, 3)) - plain(x, (2, 3))
    for patch, (y, x_) in enumerate((row / 2 + 0.25, column / 3 + 1 / 6) for row in range(2) for column in range(3)):
        known = [wave(math.pi * 2**k * share) for share in (y, x_) for wave in (math.sin, math.cos) for k in range(4)]
        expected = bridge.place.weight @ torch.tensor(known, dtype=torch.float64)
        torch.testing.assert_close(added[1, patch], expected, atol=1e-5, rtol=1e-5)
    assert build_bridge(bridge.config()).config() == bridge.config()


def test_mlp_takes_llavas_weights() -> None:
    config = LlavaConfig(vision_config={"model_type": "clip_vision_model", "hidden_size": 8, "num_attention_heads": 2}, text_config=LLAMA)
    llava = LlavaMultiModalProjector(config)
    bridge = MLP(vision_width=8, text_width=6)
    bridge.load_state_dict(llava.state_dict())
    x = torch.randn(2, 9, 8)
    assert torch.equal(bridge([x], (3, 3)), llava(x))


def test_average_pooling_equals_torchs() -> None:
    bridge, x = AvgPool2d(pool=2, levels=2, vision_width=5, text_width=7).double(), features((4, 6), 2, 5)
    pooled = [F.avg_pool2d(level.transpose(1, 2).view(2, 5, 4, 6), 2).flatten(2).transpose(1, 2) for level in x]
    close(bridge(x, (4, 6)), bridge.mlp(pooled, (2, 3)))


def test_average_pooling_by_one_is_the_mlp_bit_for_bit() -> None:
    bridge, x = AvgPool2d(pool=1, vision_width=5, text_width=7).double(), features((4, 4), 1, 5)
    assert torch.equal(bridge(x, (4, 4)), bridge.mlp(x, (4, 4)))


def test_pixel_shuffle_equals_its_equation() -> None:
    bridge, x = PixelShuffle(ratio=2, levels=2, vision_width=5, text_width=7).double(), features((4, 6), 2, 5)
    nn.init.normal_(bridge.norm.weight)
    w, inner = weights_of(bridge), weights_of(bridge.mlp)
    out = bridge(x, (4, 6))
    for token in range(6):
        row, column = 2 * (token // 3), 2 * (token % 3)
        patches = [r * 6 + c for r in (row, row + 1) for c in (column, column + 1)]
        deep = torch.cat([level[1, patch] for patch in patches for level in x]).numpy()
        close(out[1, token], mlp(layer_norm(deep, w, "norm"), inner))


def test_pixel_shuffle_equals_internvls() -> None:
    """Same tokens, to the bit, with InternVL's weights. Where its code says (width, height), its tower hands it (rows, columns)."""
    config = InternVLConfig(vision_config={"hidden_size": 8}, text_config={"model_type": "qwen2", "hidden_size": 6})
    projector = InternVLMultiModalProjector(config)
    bridge = PixelShuffle(ratio=2, vision_width=8, text_width=6)
    bridge.norm.load_state_dict(projector.layer_norm.state_dict())
    bridge.mlp.linear_1.load_state_dict(projector.linear_1.state_dict())
    bridge.mlp.linear_2.load_state_dict(projector.linear_2.state_dict())
    x = torch.randn(2, 24, 8)
    shuffled = InternVLModel.pixel_shuffle(None, x.view(2, 4, 6, 8), scale_factor=0.5)
    assert shuffled.shape == (2, 2, 3, 32)
    assert torch.equal(bridge([x], (4, 6)), projector(shuffled.reshape(2, 6, 32)))


def test_pixel_shuffle_orders_channels_as_idefics3() -> None:
    config = Idefics3Config(scale_factor=2, vision_config={"hidden_size": 3, "num_attention_heads": 3}, text_config=LLAMA)
    x = torch.randn(2, 16, 3)
    bridge = PixelShuffle(ratio=2, vision_width=3, text_width=6)
    seen: list[torch.Tensor] = []
    bridge.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    bridge([x], (4, 4))
    assert torch.equal(seen[0], Idefics3Connector(config).pixel_shuffle(x, 2))


@pytest.mark.parametrize(
    ("bridge", "grid", "tokens"),
    [
        (MLP(vision_width=2, text_width=2), (24, 24), 576),  # LLaVA-1.5 at 336 px, patch 14
        (MLP(vision_width=2, text_width=2), (3, 5), 15),
        (AvgPool2d(pool=2, vision_width=2, text_width=2), (24, 24), 144),
        (AvgPool2d(pool=3, vision_width=2, text_width=2), (6, 9), 6),
        (PixelShuffle(ratio=2, vision_width=2, text_width=2), (32, 32), 256),  # InternVL at 448 px, patch 14
        (PixelShuffle(ratio=3, vision_width=2, text_width=2), (6, 9), 6),
        (Resampler(queries=80, vision_width=2, text_width=2, width=64), (16, 16), 80),
        (Resampler(queries=336, vision_width=2, text_width=2, width=64), (7, 5), 336),
    ],
)
def test_token_counts(bridge: MLP, grid: tuple[int, int], tokens: int) -> None:
    assert bridge.tokens(grid) == len(bridge.boxes(grid)) == tokens


def test_impossible_grids_are_named() -> None:
    with pytest.raises(FoveateError, match="pool 5 does not divide the grid of 24 x 24 patches"):
        AvgPool2d(pool=5, vision_width=2, text_width=2).tokens((24, 24))
    with pytest.raises(FoveateError, match="ratio 2 does not divide the grid of 4 x 27 patches"):
        PixelShuffle(ratio=2, vision_width=2, text_width=2).tokens((4, 27))
    with pytest.raises(FoveateError, match="pool 5 does not divide"):
        AvgPool2d(pool=5, vision_width=2, text_width=2)([torch.randn(1, 576, 2)], (24, 24))


def test_resampler_equals_its_equation() -> None:
    bridge, x = Resampler(queries=3, levels=2, vision_width=5, width=8, text_width=7, head_dim=4).double(), features((2, 3), 2, 5)
    for p in bridge.parameters():
        nn.init.normal_(p, std=0.5)
    w = weights_of(bridge)
    levels = [weights_of(bridge, f"resampler.blocks.{level}.") for level in range(2)]
    out = bridge(x, (2, 3))
    for image in range(2):
        for n in range(3):
            token = w["resampler.queries"][0, n]
            for level in range(2):
                token = block(token, list(x[level][image].numpy()), levels[level], head_dim=4)
            close(out[image, n], linear(layer_norm(token, w, "norm"), w, "proj"))


def test_resampler_takes_any_grid() -> None:
    bridge = Resampler(queries=3, vision_width=4, width=8, text_width=6, head_dim=4)
    x = torch.randn(1, 12, 4)
    assert torch.equal(bridge([x], (3, 4)), bridge([x], (2, 6)))  # no positions: only the set of patches counts
    assert bridge.boxes((3, 4)) == [(0, 0, 3, 4)] * 3
