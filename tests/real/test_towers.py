"""Towers of convolutions: what the networks compute, and how their maps become tokens."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

import foveate
from foveate.accounting import predict
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.model import FoveateForConditionalGeneration
from foveate.model.configuration import FoveateConfig
from foveate.real.convert import efficientnet_weights, fill_in_order
from foveate.real.efficientnet import LITE0, Convolution, EfficientNetLite, EfficientNetLiteConfig
from foveate.real.lcnet import LCNet
from foveate.real.maps import MapTower, tokens
from foveate.reducers import parse
from tests.real.towers import lcnet, lite

TOWERS = {"efficientnet": lite, "lcnet": lcnet}


# ---- EfficientNet-lite, beside the definition


def slow_convolution(unit: Convolution, x: Tensor) -> Tensor:
    """TensorFlow's definition, cell by cell, in float64: ceil(side / stride) cells, padding shared out, the odd one at the end."""
    weight, stride = unit.conv.weight.double(), unit.conv.stride[0]
    out, within, kernel, _ = weight.shape
    images, channels, height, width = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    total = [max(0, (cells - 1) * stride + kernel - side) for cells, side in ((rows, height), (columns, width))]
    padded = torch.zeros(images, channels, height + total[0], width + total[1], dtype=torch.float64)
    padded[:, :, total[0] // 2 : total[0] // 2 + height, total[1] // 2 : total[1] // 2 + width] = x
    y = torch.zeros(images, out, rows, columns, dtype=torch.float64)
    for channel, row, column in itertools.product(range(out), range(rows), range(columns)):
        first = channel // (out // unit.conv.groups) * within
        window = padded[:, first : first + within, row * stride : row * stride + kernel, column * stride : column * stride + kernel]
        y[:, channel, row, column] = (window * weight[channel]).sum((1, 2, 3))
    mean, variance, scale, shift = (v.double()[:, None, None] for v in (*statistics(unit.norm), unit.norm.weight, unit.norm.bias))
    y = (y - mean) / (variance + 1e-3).sqrt() * scale + shift
    return y if unit.linear else y.clamp(0, 6)


def statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def slow(model: EfficientNetLite, pixels: Tensor) -> list[Tensor]:
    """The last map of every stage, and of the head."""
    x, blocks, ends = slow_convolution(model.stem, pixels.double()), iter(model.blocks), []
    for repeats, _, stride, expansion, out in model.config.stages:
        for number in range(repeats):
            block: Any = next(blocks)
            before = x
            if expansion > 1:
                x = slow_convolution(block.expand, x)
            x = slow_convolution(block.project, slow_convolution(block.depthwise, x))
            if (number or stride == 1) and before.shape[1] == out:
                x = x + before
        ends.append(x)
    return [*ends, slow_convolution(model.head, x)]


@pytest.mark.parametrize("size", [(32, 32), (35, 48), (17, 50)])
def test_efficientnet_is_what_its_definition_says(size: tuple[int, int]) -> None:
    model, pixels = lite(), torch.randn(2, 3, *size)
    ends = slow(model, pixels)
    with torch.no_grad():
        found = model.maps(pixels)
    assert [strides for _, strides in found] == [(4, 4), (8, 8), (16, 16), (16, 16)]
    for (features, _), right in zip(found, (ends[2], ends[3], ends[4], ends[5]), strict=True):
        assert right.std() > 0.1
        torch.testing.assert_close(features.double(), right, rtol=1e-4, atol=1e-4)


def test_lite0_has_the_published_size() -> None:
    """4.65 million weights with the classifier of 1000 classes, by the authors' table."""
    with torch.device("meta"):
        model = EfficientNetLite(EfficientNetLiteConfig())
    assert model.config.stages == [list(stage) for stage in LITE0]
    weights = sum(p.numel() for p in model.parameters()) + 1281 * 1000
    assert round(weights / 1e4) == 465


def test_the_weights_of_the_package_have_our_names() -> None:
    model = EfficientNetLite(EfficientNetLiteConfig())
    norms = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2", "_conv_head": "_bn1"}
    theirs = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    for name, weight in model.state_dict().items():
        *above, part, kind, own = name.split(".")
        module = {"stem": "_conv_stem", "head": "_conv_head"}.get(part, f"_{part}_conv")
        prefix = f"_blocks.{above[1]}." if above else ""
        theirs[f"{prefix}{module if kind == 'conv' else norms[module]}.{own}"] = weight
    assert len(theirs) == len(model.state_dict()) + 2
    found = efficientnet_weights(theirs)
    assert found.keys() == model.state_dict().keys()
    EfficientNetLite(EfficientNetLiteConfig()).load_state_dict(found)


# ---- PP-LCNet, out of folded convolutions


def folded(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of every convolution, with the norm that follows it inside."""
    found = []
    modules = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    for module, following in itertools.pairwise([*modules, None]):
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            found.append((module.weight.data.clone(), module.bias.data.clone()))
        elif isinstance(module, nn.Conv2d):
            assert isinstance(following, nn.BatchNorm2d)
            mean, variance = statistics(following)
            scale = following.weight / (variance + following.eps).sqrt()
            found.append(((module.weight * scale[:, None, None, None]).detach(), (following.bias - mean * scale).detach()))
    return found


def test_folded_convolutions_make_the_same_network() -> None:
    model, other, pixels = lcnet(1), lcnet(2), torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        right = [features for features, _ in model.maps(pixels)]
    other.backbone = type(other.backbone)(other.config.backbone_config).eval()  # norms that do nothing, as a new network has them
    weights = iter(folded(model.backbone))
    fill_in_order(other.backbone, weights)
    assert next(weights, None) is None
    with torch.no_grad():
        found = other.maps(pixels)
    assert [strides for _, strides in found] == [(4, 4), (4, 4), (8, 4), (16, 4)]
    assert [tuple(x.shape[-2:]) for x, _ in found] == [(12, 10), (12, 10), (6, 10), (3, 10)]
    for (features, _), same in zip(found, right, strict=True):
        assert same.std() > 0.1
        torch.testing.assert_close(features, same, rtol=1e-4, atol=1e-4)


def test_a_convolution_of_another_shape_is_refused() -> None:
    model = lcnet()
    weights = folded(model.backbone)
    with pytest.raises(FoveateError, match=r"a convolution of shape \(2, 4, 2, 2\) came where \(4, 3, 3, 3\) was expected"):
        fill_in_order(model.backbone, iter(weights[1:]))


# ---- maps as tokens


def slow_tokens(features: Tensor, strides: tuple[int, int], patch: int, grid: tuple[int, int], width: int) -> Tensor:
    """One pixel after the other: which cell has it, and at which place of its token that cell stands."""
    images, channels = features.shape[:2]
    out = torch.zeros(images, grid[0] * grid[1], width)
    across = max(1, patch // strides[1])
    for y, x in itertools.product(range(grid[0] * patch), range(grid[1] * patch)):
        inside = y % patch // strides[0] * across + x % patch // strides[1]
        token = y // patch * grid[1] + x // patch
        out[:, token, inside * channels : (inside + 1) * channels] = features[:, :, y // strides[0], x // strides[1]]
    return out


@pytest.mark.parametrize("strides", [(8, 8), (4, 4), (2, 8), (16, 8), (16, 16), (4, 16)])
@pytest.mark.parametrize("side", [(32, 48), (39, 25)])  # pixels
def test_a_map_becomes_tokens_in_the_raster(strides: tuple[int, int], side: tuple[int, int]) -> None:
    features = torch.randn(2, 3, *(-(-pixels // stride) for pixels, stride in zip(side, strides, strict=True)))
    grid = side[0] // 8, side[1] // 8
    found = tokens((features, strides), 8, grid, 13)
    assert torch.equal(found, slow_tokens(features, strides, 8, grid, 13))


def test_a_fine_map_is_stacked_whole() -> None:
    features = torch.randn(1, 3, 8, 8)
    found = tokens((features, (2, 2)), 8, (2, 2), 48)
    assert torch.equal(found, slow_tokens(features, (2, 2), 8, (2, 2), 48))
    with pytest.raises(FoveateError, match="4 x 4 cells of 3 channels are more than hidden_size 47; take a smaller patch_size"):
        tokens((features, (2, 2)), 8, (2, 2), 47)


def test_tokens_say_where_they_are_in_channels_that_are_left() -> None:
    features, grid = torch.randn(2, 3, 6, 4), (3, 2)
    found = tokens((features, (4, 4)), 8, grid, 30, places=True)
    assert torch.equal(found[..., :14], tokens((features, (4, 4)), 8, grid, 30)[..., :14])
    for place, (y, x) in enumerate(itertools.product((1 / 6, 3 / 6, 5 / 6), (1 / 4, 3 / 4))):
        said = [turn(math.pi * 2**k * share) for share in (y, x) for turn in (math.sin, math.cos) for k in range(4)]
        torch.testing.assert_close(found[:, place, 14:], torch.tensor(said).expand(2, -1))
    full = tokens((features, (4, 4)), 8, grid, 27, places=True)  # 12 channels are taken and 15 left: no room
    assert torch.equal(full, tokens((features, (4, 4)), 8, grid, 27))


def test_a_tower_with_places_differs_in_them_alone() -> None:
    plain, placed, pixels = lite(), lite(places=True), torch.randn(1, 3, 48, 32)
    placed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        levels = [(one, two) for one, two in zip(plain(pixels).hidden_states, placed(pixels).hidden_states, strict=True)]
    apart = [bool((one != two).any()) for one, two in levels]
    room = [bool((one[..., -16:] == 0).all()) for one, _ in levels]
    assert apart == room
    assert True in room
    for one, two in levels:
        assert torch.equal(one[..., :-16], two[..., :-16])


def test_a_raster_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FoveateError, match="patch_size 12 and the 8 pixels between this network's cells are no multiples of each other"):
        tokens((torch.randn(1, 3, 4, 4), (8, 8)), 12, (2, 2), 48)
    with pytest.raises(FoveateError, match="a picture of 15 x 32 pixels has no patch of 16 pixels"):
        lite()(torch.randn(1, 3, 15, 32))


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (35, 70)])
def test_every_level_has_a_token_for_every_patch(name: str, size: tuple[int, int]) -> None:
    model = TOWERS[name]()
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert len(out.hidden_states) == 4
    for level in out.hidden_states:
        assert level.shape == (2, size[0] // 16 * (size[1] // 16), model.config.hidden_size)
        assert level.abs().sum(-1).gt(0).all()
    assert out.last_hidden_state is out.hidden_states[-1]


@pytest.mark.parametrize("name", TOWERS)
def test_a_finer_raster_has_more_tokens_with_what_is_coarse_repeated(name: str) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        coarse, fine = TOWERS[name]()(pixels).hidden_states, TOWERS[name](patch_size=8)(pixels).hidden_states
    assert {int(level.shape[1]) for level in coarse} == {4}
    assert {int(level.shape[1]) for level in fine} == {16}
    assert fine[0].abs().sum() == pytest.approx(coarse[0].abs().sum().item(), rel=1e-5)  # nothing is lost of a fine level
    last = fine[-1].view(4, 4, -1)
    if name == "efficientnet":
        assert torch.equal(last[0, 0], last[1, 1])
        assert torch.equal(last[0, 0], coarse[-1][0, 0])


@pytest.mark.parametrize("name", TOWERS)
def test_norms_keep_their_statistics_in_training(name: str) -> None:
    model, pixels = TOWERS[name](), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        right = model(pixels).last_hidden_state
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    found = model(pixels).last_hidden_state
    assert model.training
    assert torch.equal(found, right)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    found.sum().backward()
    assert next(p for p in model.parameters() if p.requires_grad).grad is not None


@pytest.mark.parametrize("name", TOWERS)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    model, pixels = TOWERS[name](), torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path)
    for attention in ("sdpa", "eager"):
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
        assert type(loaded) is type(model)
        with torch.no_grad():
            assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)
            half = loaded.to(torch.bfloat16)(pixels.bfloat16()).last_hidden_state
            assert half.dtype == torch.bfloat16


# ---- inside a vision-language model


def assembled(tower: MapTower, levels: list[int], bridge: dict[str, Any]) -> Any:
    text = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=99,
        initializer_range=0.2,
        eos_token_id=None,
    )
    config = FoveateConfig(
        vision_config=tower.config, text_config=text, bridge=bridge, vision_feature_layer=levels, image_token_id=90, image_size=64
    )
    return FoveateForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("bridge", [{"kind": "mlp"}, {"kind": "resampler", "queries": 5, "head_dim": 32}, {"kind": "pixel_shuffle"}])
def test_it_is_a_tower_like_any_other(name: str, bridge: dict[str, Any]) -> None:
    tower = TOWERS[name]()
    model = assembled(tower, [-2, -1], bridge)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    count = model.model.bridge.tokens((4, 4))
    inputs = {"input_ids": torch.tensor([[5, *[90] * count, 7, 8, 9]]), "pixel_values": torch.randn(1, 3, 64, 64)}
    with torch.no_grad():
        bare = model(**inputs).logits
        with foveate.attach(model, "fastv:keep=1.0,layer=1"):
            assert torch.equal(model(**inputs).logits, bare)
        with foveate.attach(model, "divprune:keep=0.5") as run:
            model(**inputs)
    assert run.last.visual_tokens == [round(count / 2 + 0.01)] * 4
    assert run.ledger == predict(model.config, images=1, text_tokens=4, reducers=parse("divprune:keep=0.5"))


@pytest.mark.parametrize("name", TOWERS)
def test_methods_that_read_the_towers_attention_refuse_it(name: str) -> None:
    model = assembled(TOWERS[name](), [-1], {"kind": "mlp"})
    for method in ("fastervlm:keep=0.5", "visionzip", "hired:keep=0.5"):
        with pytest.raises(NotApplicable) as told:
            foveate.attach(model, method)
        assert told.value.reason == Reason.NO_TOWER_ATTENTION


def test_bridges_that_attend_keep_their_own_heads_where_the_tower_has_none() -> None:
    bridge = {"kind": "resampler", "queries": 5}
    found = FoveateConfig(vision_config=lite().config, bridge=bridge, vision_feature_layer=[-1]).bridge
    assert (found["width"], "head_dim" in found) == (96, False)
    with pytest.raises(FoveateError, match="96"):  # no multiple of the resampler's own 64
        assembled(lite(), [-1], bridge)


def test_a_level_that_is_not_there_is_named() -> None:
    model = assembled(lite(), [7], {"kind": "mlp"})
    with pytest.raises(FoveateError, match="vision_feature_layer 7 is not there: the tower has hidden states 0 to 3"):
        model(input_ids=torch.tensor([[90] * 16]), pixel_values=torch.randn(1, 3, 64, 64))


def test_lively_towers_are_lively() -> None:
    """What the other tests rest on: no level is constant, and seeds differ."""
    with torch.no_grad():
        one, other = (lite(seed)(torch.ones(1, 3, 32, 32)).last_hidden_state for seed in (0, 1))
    assert not torch.allclose(one, other)
    assert isinstance(lcnet(), LCNet)
