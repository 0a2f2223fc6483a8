"""Costs told from a configuration alone: as a counter sees them for whatever model, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PreTrainedConfig,
    Qwen2VLConfig,
)

from foveate import accounting as cost
from foveate.accounting import Trained, observed, predict, stack
from foveate.accounting import dry_run as shapes
from foveate.accounting.counter import Counter, parameters_of
from foveate.errors import FoveateError
from foveate.model import FoveateConfig, FoveateForConditionalGeneration
from foveate.reducers import parse
from foveate.train.plan import plan
from tests import tiny
from tests.conformance.family import Row, families

SIDES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = LlamaConfig(**SIDES, num_key_value_heads=2, vocab_size=99)
TOWERS: dict[str, PreTrainedConfig] = {
    "clip": CLIPVisionConfig(**SIDES, image_size=32, patch_size=8),
    "siglip": CONFIG_MAPPING["siglip_vision_model"](**SIDES, image_size=32, patch_size=8),
    "dinov2": CONFIG_MAPPING["dinov2"](**SIDES, mlp_ratio=2, image_size=32, patch_size=8),
    "dinov3": CONFIG_MAPPING["dinov3_vit"](**SIDES, num_register_tokens=4, image_size=32, patch_size=8),
    "internvl": InternVLVisionConfig(**SIDES, image_size=[32, 32], patch_size=[8, 8]),
    "idefics3": CONFIG_MAPPING["idefics3_vision"](**SIDES, image_size=32, patch_size=8),
    "smolvlm": CONFIG_MAPPING["smolvlm_vision"](**SIDES, image_size=32, patch_size=8),
}


def assembled(tower: PreTrainedConfig, size: int | None = None) -> FoveateConfig:
    config = FoveateConfig(vision_config=tower, text_config=TEXT, bridge={"kind": "mlp"}, image_token_id=90, image_size=size)
    config._attn_implementation = "eager"
    return config


# ---- any tower


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", TOWERS)
def test_any_tower_is_counted_as_it_runs(name: str, size: int) -> None:
    config = assembled(TOWERS[name], size)
    model = FoveateForConditionalGeneration(config).eval()
    tokens = (size // 8) ** 2
    ids = torch.tensor([[1, *[90] * tokens, 2, 3]])
    with torch.no_grad(), Counter(model) as counted:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, size, size), logits_to_keep=1)
    told = predict(config, text_tokens=3)
    assert told.visual_tokens == (tokens,) * 3
    assert told.flops == {part: counted.flops[part] for part in told.flops}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_trained_as_far_as_gradients_reach(name: str) -> None:
    config = assembled(TOWERS[name])
    model = FoveateForConditionalGeneration(config)
    unused = set(model.model.unused_tower_parameters())
    reached = sum(p.numel() for name, p in model.model.vision_tower.named_parameters() if name not in unused)
    assert cost.trainable(config, Trained(tower=True, bridge=True)) == {
        "tower": reached,
        "bridge": parameters_of(model)["bridge"],
        "lm": 0,
        "lora": 0,
    }


# ---- any family


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "vipllava", "llava", "deepseek_vl", "got_ocr2"])
def test_without_inputs_as_with_those_of_one_image(name: str, tmp_path: Path) -> None:
    """Their configuration says how large an image is; what is made of it is not LLaVA's."""
    family = families()[name]
    model, processor = family.load(tmp_path)
    inputs = family.inputs(processor, [Row(1, "what is this", "")])
    (prompt,), _ = cost.read_prompts(model.config, inputs)
    reducers = parse("random:keep=0.5")
    for mode in ("prefill", "train"):
        want = predict(model.config, inputs=inputs, reducers=reducers, mode=mode)
        assert predict(model.config, text_tokens=prompt.text, reducers=reducers, mode=mode) == want
    assert cost.image_tokens(model.config) == prompt.images[0].tokens
    assert cost.parameters(model.config) == parameters_of(model)
    layers = len(want.visual_tokens)
    seen = observed(model.config, [prompt.images[0].tokens] * layers, [prompt.tokens] * layers)
    assert seen == predict(model.config, text_tokens=prompt.text)


TILED = {"vision_config": CLIPVisionConfig(**SIDES, image_size=32, patch_size=8), "text_config": TEXT}
GEMMA3 = Gemma3Config(
    vision_config=dict(SIDES, image_size=64, patch_size=8),
    text_config=dict(SIDES, num_key_value_heads=2, head_dim=16),
    mm_tokens_per_image=16,
)
UNTOLD: dict[str, PreTrainedConfig] = {
    "qwen2_vl": Qwen2VLConfig(),
    "llava_next": LlavaNextConfig(**TILED),
    "idefics3": Idefics3Config(vision_config=dict(SIDES, image_size=32, patch_size=8), text_config=TEXT),
    "mistral3": Mistral3Config(vision_config=dict(SIDES, image_size=32, patch_size=8, model_type="pixtral"), text_config=TEXT),
    "glm4v": CONFIG_MAPPING["glm4v"](),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_cannot_be_told_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=rf"image of a '{name}' model.*predict\(config, inputs="):
        predict(UNTOLD[name])
    with pytest.raises(FoveateError, match=rf"image of a '{name}' model"):
        cost.image_tokens(UNTOLD[name])
    assert predict(UNTOLD[name], images=0, text_tokens=5).total_flops > 0  # text needs no image


@pytest.mark.parametrize(("own", "pixels"), [(LlavaConfig(**TILED), 32), (PaliGemmaConfig(), 224), (GEMMA3, 64)])
def test_only_our_own_models_are_asked_for_other_sizes(own: Any, pixels: int) -> None:
    assert predict(own, image_size=pixels, mode="decode", new_tokens=1) == predict(own, mode="decode", new_tokens=1)
    with pytest.raises(
        FoveateError, match=f"is of {pixels} x {pixels} pixels; what its processor makes of one of {2 * pixels} x {2 * pixels} is not"
    ):
        predict(own, image_size=2 * pixels)
    side = own.vision_config.patch_size
    with pytest.raises(FoveateError, match=f"one of {side} x {2 * side} is not"):
        predict(own, grid=(1, 2))


def test_the_formulas_of_llava() -> None:
    """Patch embedding, linear maps and attention of every block, [CLS] too; then two layers on the patches."""
    config = LlavaConfig(**TILED)
    vision = config.vision_config
    patches, width, inner, blocks = 16, vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    n = patches + 1
    tower = 2 * patches * 3 * 8 * 8 * width + blocks * (2 * n * (4 * width**2 + 2 * width * inner) + 4 * n**2 * width)
    told = predict(config, images=3, text_tokens=7)
    assert told.flops["tower"] == 3 * tower
    assert told.flops["bridge"] == 3 * 2 * patches * (width * TEXT.hidden_size + TEXT.hidden_size**2)
    whole = predict(LlavaConfig(**TILED, vision_feature_select_strategy="full"), images=3, text_tokens=7)
    assert whole.total_tokens == (3 * n + 7,) * 3
    assert whole.flops["bridge"] * patches == told.flops["bridge"] * n


# ---- who asks


@pytest.mark.parametrize("name", ["gemma3", "internvl tower", "qwen2_vl"])
def test_a_recipe_is_planned_by_the_same_count(name: str, tmp_path: Path) -> None:
    config = {"gemma3": GEMMA3, "internvl tower": assembled(TOWERS["internvl"], 48), "qwen2_vl": UNTOLD["qwen2_vl"]}[name]
    config.save_pretrained(tmp_path / "model")
    stage = {"name": "one", "data": {"conversations": "none.json", "images": "."}, "batch_size": 4, "learning_rate": 1e-3}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(str({"name": "r", "output": "out", "model": {"checkpoint": str(tmp_path / "model")}, "stages": [stage]}))
    if name in UNTOLD:
        with pytest.raises(FoveateError, match=r"stage one: Qwen2VL.* has no bridge beside its vision tower"):
            plan(recipe)
        return
    (planned,) = plan(recipe, text_tokens=3).stages
    assert planned.tokens_per_image == cost.image_tokens(config) == {"gemma3": 16, "internvl tower": 36}[name]
    if name == "gemma3":
        assert planned.training_flops == predict(config, text_tokens=3, mode="train", trained=Trained(), head_tokens=3).flops
    else:
        assert (planned.image_size, planned.grid) == (48, (6, 6))


def test_what_is_remembered_of_models_is_bounded() -> None:
    for remembered in (shapes._skeleton, shapes._encode, stack._decoder, stack.language):
        assert remembered.cache_info().maxsize is not None
    config = tiny.llava().config
    first = shapes.skeleton(config)
    assert shapes.skeleton(type(config).from_dict(config.to_dict())) is first  # by what it says, not by which object it is
    size = shapes._encode.cache_info().currsize
    for _ in range(3):
        predict(config, images=2)
    assert shapes._encode.cache_info().currsize <= size + 1
