"""Any tower: what stands before the patches is dropped, other resolutions are interpolated, several levels are handed on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.model.tiny_backbones import COS, Assembled, Backbones
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SwinConfig,
    SwinModel,
)

from foveate.errors import FoveateError
from foveate.model import FoveateForConditionalGeneration
from foveate.model.towers import patch_states

Assemble = Callable[..., Assembled]
Picture = Callable[..., Image.Image]
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TOWERS = {  # model type -> (extra settings, tokens before the patches)
    "clip_vision_model": ({}, 1),
    "siglip_vision_model": ({}, 0),
    "vit": ({}, 1),
    "dinov2": ({"mlp_ratio": 2}, 1),
    "dinov2_with_registers": ({"mlp_ratio": 2, "num_register_tokens": 4}, 5),
    "dinov3_vit": ({"num_register_tokens": 4}, 5),
}


def save_tower(folder: Path, kind: str, **changes: Any) -> Path:
    AutoModel.from_config(CONFIG_MAPPING[kind](**COMMON | TOWERS[kind][0] | changes)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", TOWERS)
def test_each_level_is_the_towers_hidden_state_without_prefix(kind: str, tmp_path: Path, folders: Backbones) -> None:
    path = save_tower(tmp_path / "tower", kind)
    model, _ = FoveateForConditionalGeneration.from_backbones(path, folders[1], {"kind": "mlp"}, vision_feature_layer=[1, -2])
    pixels = torch.randn(2, 3, 32, 32)
    alone = AutoModel.from_pretrained(path).eval()(pixels, output_hidden_states=True).hidden_states
    seen: list[list[torch.Tensor]] = []
    model.model.bridge.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = model.get_image_features(pixels).pooler_output
    assert [tuple(f.shape) for f in features] == [(16, 32), (16, 32)]
    prefix = TOWERS[kind][1]
    assert len(alone) == 4
    assert alone[1].shape[1] == 16 + prefix
    for level, index in zip(seen[0], (1, 2), strict=True):
        torch.testing.assert_close(level, alone[index][:, prefix:], rtol=0, atol=0)


@pytest.mark.parametrize("kind", TOWERS)
def test_other_resolutions(kind: str, tmp_path: Path, folders: Backbones, picture: Picture) -> None:
    path = save_tower(tmp_path / "tower", kind)
    model, processor = FoveateForConditionalGeneration.from_backbones(path, folders[1], {"kind": "mlp"}, image_size=48)
    assert model.grid == (6, 6)
    assert processor.num_image_tokens == 36
    batch = processor(images=[picture(0)], text=["<image>x"], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 48, 48)
    assert torch.isfinite(model(**batch).logits).all()


def test_own_resolution_is_not_interpolated(assemble: Assemble) -> None:
    model, _ = assemble()
    calls: list[dict[str, Any]] = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    model.get_image_features(torch.randn(1, 3, 32, 32))
    model.get_image_features(torch.randn(1, 3, 64, 64))
    assert [call.get("interpolate_pos_encoding", False) for call in calls] == [False, True]


def test_features_equal_the_towers_at_another_resolution(assemble: Assemble, folders: Backbones) -> None:
    model, _ = assemble(image_size=64)
    pixels = torch.randn(1, 3, 64, 64)
    states = AutoModel.from_pretrained(folders[0])(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    expected = model.model.bridge([states[-2][:, 1:]], (8, 8))
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output[0], expected[0], rtol=0, atol=0)


def test_a_towers_odd_pixels_fill_no_patch(tmp_path: Path, folders: Backbones) -> None:
    """As SigLIP's 384 px with patches of 14: 27 x 27 patches."""
    path = save_tower(tmp_path / "tower", "siglip_vision_model", image_size=36)
    model, processor = FoveateForConditionalGeneration.from_backbones(path, folders[1], {"kind": "mlp"})
    assert model.grid == (4, 4)
    assert processor.num_image_tokens == len(model.get_image_features(torch.randn(1, 3, 36, 36)).pooler_output[0]) == 16


def test_vision_side_of_a_model_with_two_sides(tmp_path: Path, folders: Backbones) -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    clip = CLIPModel(CLIPConfig(vision_config=COMMON, text_config=text, projection_dim=16))
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    model, processor = FoveateForConditionalGeneration.from_backbones(tmp_path / "clip", folders[1], {"kind": "mlp"})
    ours, theirs = model.model.vision_tower.state_dict(), clip.vision_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert processor.image_size == 32


def test_two_levels_reach_chain_of_sight_and_its_blanks_are_filled(assemble: Assemble, picture: Picture) -> None:
    model, processor = assemble(COS, vision_feature_layer=[1, 2])
    bridge = model.config.bridge
    assert (bridge["levels"], bridge["grid"], bridge["vision_width"], bridge["text_width"], bridge["width"]) == (2, 4, 32, 32, 32)
    assert processor.num_image_tokens == 4 + 4
    batch = processor(images=[picture(0)], text=["<image>x"], return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in model.model.vision_tower.named_parameters()}
    assert all((grads[f"encoder.layers.{i}.mlp.fc1.weight"] != 0).any() for i in (0, 1))


def test_scaling_the_bridge(assemble: Assemble, picture: Picture, tmp_path: Path) -> None:
    model, processor = assemble(COS, vision_feature_layer=[1, 2])
    model.model.bridge.requires_grad_(False)
    model.scale_bridge([[8, 4], [4, 4], [2, 1]], image_size=64, sources=[0, 0, 1])
    processor.set_bridge(model.config.bridge, model.config.image_size)
    assert model.grid == (8, 8)
    assert processor.num_image_tokens == 4 + 4 * 4 + 16
    assert not any(p.requires_grad for p in model.model.bridge.parameters())
    batch = processor(images=[picture(0)], text=["<image>x"], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = FoveateForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.image_size == 64
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_image_size_can_change_only_where_the_bridge_is_free_of_its_grid(assemble: Assemble) -> None:
    free, _ = assemble()
    free.set_image_size(64)
    assert free.config.image_size == 64
    assert free.grid == (8, 8)
    bound, _ = assemble(COS)
    with pytest.raises(FoveateError, match=r"4 x 4.*8 x 8"):
        bound.set_image_size(64)
    assert bound.config.image_size == 32
    with pytest.raises(FoveateError, match="mlp"):
        free.scale_bridge([[8, 4]], image_size=64)


def test_unused_parameters_are_those_without_a_gradient(assemble: Assemble) -> None:
    model, _ = assemble()
    unused = model.model.unused_tower_parameters()
    assert {name.split(".")[0] for name in unused} == {"encoder", "post_layernorm"}
    assert all(name.startswith(("encoder.layers.2.", "post_layernorm.")) for name in unused)
    sum(f.sum() for f in model.get_image_features(torch.randn(1, 3, 32, 32)).pooler_output).backward()
    assert {n for n, p in model.model.vision_tower.named_parameters() if p.grad is None} == set(unused)


def test_errors(assemble: Assemble, tmp_path: Path, folders: Backbones) -> None:
    with pytest.raises(FoveateError, match=r"vision_feature_layer 7 .*0 to 3"):
        assemble(vision_feature_layer=[7])[0].get_image_features(torch.randn(1, 3, 32, 32))
    with pytest.raises(FoveateError, match=r"takes 1 feature levels.*\[1, 2\]"):
        assemble({"kind": "mlp", "levels": 1}, vision_feature_layer=[1, 2])
    with pytest.raises(FoveateError, match="4 x 4 pixels is smaller than one patch of 8"):
        assemble(image_size=4)
    with pytest.raises(FoveateError, match="window 3"):
        assemble({"kind": "chain_of_sight", "scales": [[3, 1]]})
    with pytest.raises(FoveateError, match=r"nowhere.*could not be loaded"):
        assemble(vision=tmp_path / "nowhere")
    swin = SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4))
    swin.save_pretrained(tmp_path / "swin")
    CLIPImageProcessor().save_pretrained(tmp_path / "swin")
    with pytest.raises(FoveateError, match=r"'swin' model cannot be the vision tower: its num_attention_heads is \[1, 2\]"):
        assemble(vision=tmp_path / "swin")
    with pytest.raises(FoveateError, match="lacks one entry for each of 4 x 4 patches"):
        patch_states([torch.zeros(1, 15, 8)], 0, (4, 4))
    model, _ = assemble()
    model.model._interpolates = False  # as a tower without that argument
    with pytest.raises(FoveateError, match=r"made for images of 32 x 32 pixels and does not take 64 x 64"):
        model.get_image_features(torch.randn(1, 3, 64, 64))
    model.model.vision_tower.forward = lambda pixel_values, spatial_shapes: None
    with pytest.raises(FoveateError, match=r"besides pixel_values it needs spatial_shapes"):
        model.model._check_parts()
