"""The models that are measured: sizes of published checkpoints, random weights, and prompts of random pixels and words for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from foveate.anatomy.config import sides_of

BEFORE, AFTER = 8, 32  # text tokens around the images
IMAGE_TOKEN = 5  # of the LLaVA shapes; the Qwen ones have their own


@dataclass(frozen=True)
class Shape:
    """config     the model's configuration, with so many layers in tower and language model (None: as published)
    per_image  visual tokens of one image
    tokens     visual tokens to measure at, unless told; multiples of `per_image`
    lm         the language model alone, for costs, where the whole configuration cannot be costed
    options    what a method needs on this model, beside its budget
    """

    what: str
    config: Callable[[int | None], Any]
    per_image: int
    tokens: tuple[int, ...]
    lm: Callable[[Any], Any] | None = None
    options: dict[str, str] = field(default_factory=dict)

    def cost(self, config: Any) -> Any:
        return config if self.lm is None else self.lm(config.text_config)


def build(config: Any, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def words(config: Any, count: int, seed: int = 1) -> Tensor:
    """[1, count] ids of no meaning, none of them an image's."""
    high = 1000 if config.text_config.vocab_size > 1000 else 90
    return torch.randint(10, high, (1, count), generator=torch.Generator().manual_seed(seed))


def prompt(
    shape: Shape, config: Any, tokens: int, device: str, dtype: torch.dtype, *, after: int = AFTER, seed: int = 0
) -> dict[str, Tensor]:
    """The inputs of one prompt: some words, the images (if any) one after the other, `after` more words. No mask: nothing is padded."""
    images, generator = tokens // shape.per_image, torch.Generator().manual_seed(seed)
    text = words(config, BEFORE + after, seed + 1)[0].tolist()
    image = [config.image_token_id] * shape.per_image
    if hasattr(config, "vision_start_token_id"):
        image = [config.vision_start_token_id, *image, config.vision_end_token_id]
    ids = torch.tensor([text[:BEFORE] + image * images + text[BEFORE:]])
    inputs = {"input_ids": ids}
    if not images:
        return {"input_ids": ids.to(device)}
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):  # a picture is a row of flattened patches, of a grid that is given beside it
        side = round((shape.per_image * vision.spatial_merge_size**2) ** 0.5)
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(images * side * side, width, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * images)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    else:
        pixels = torch.randn(images, 3, *(sides_of(vision, "image_size") or ()), generator=generator)
    return {name: value.to(device) for name, value in {**inputs, "pixel_values": pixels.to(dtype)}.items()}


def _llava(vision: dict[str, Any], text: dict[str, Any]) -> Callable[[int | None], Any]:
    """LLaVA over CLIP and LLaMA of these sizes."""

    def config(layers: int | None) -> Any:
        fewer = {} if layers is None else {"num_hidden_layers": layers}
        vision_config, text_config = CLIPVisionConfig(**{**vision, **fewer}), LlamaConfig(**{**text, **fewer})
        return LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_id=IMAGE_TOKEN)

    return config


def _sizes(width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


_tiny = _llava(_sizes(32, 64, 3, 2, image_size=64, patch_size=8), _sizes(64, 128, 8, 4, num_key_value_heads=2, vocab_size=99))
_small = _llava(
    _sizes(192, 768, 4, 3, image_size=224, patch_size=14), _sizes(384, 1024, 8, 6, vocab_size=8192, max_position_embeddings=4096)
)
_llava_7b = _llava(
    _sizes(1024, 4096, 24, 16, image_size=336, patch_size=14, projection_dim=768),
    _sizes(4096, 11008, 32, 32, vocab_size=32064, max_position_embeddings=4096),
)


def _onevision(layers: int | None) -> Any:
    """LLaVA-OneVision-Qwen2-0.5B without its newlines and its cutting of images: several crops are several images of 27 x 27 patches."""
    vision = _sizes(1152, 4304, layers or 26, 16, image_size=384, patch_size=14, vision_use_head=False)
    text = _sizes(896, 4864, layers or 24, 14, num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768)
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True}
    return LlavaConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(**text),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def _qwen2_5_vl(full: list[int], vision: dict[str, Any], text: dict[str, Any]) -> Any:
    """`full`: blocks whose attention is not within windows."""
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section")}
    return Qwen2_5_VLConfig(vision_config={**vision, "fullatt_block_indexes": full}, text_config=text)


def _qwen2_5_vl_7b(layers: int | None) -> Any:
    full = [7, 15, 23, 31] if layers is None else [layers - 1]
    vision = {"depth": layers or 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    text = _sizes(3584, 18944, layers or 28, 28, num_key_value_heads=4, vocab_size=152064, mrope_section=[16, 24, 24])
    return _qwen2_5_vl(full, vision, text)


def _qwen2_5_vl_half(layers: int | None) -> Any:
    full = [7, 15, 23, 31] if layers is None else [max(0, layers // 2 - 1), layers - 1]
    vision = {"depth": layers or 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 896}
    text = _sizes(896, 4864, layers or 24, 14, num_key_value_heads=2, vocab_size=151936, mrope_section=[8, 12, 12])
    return _qwen2_5_vl(full, vision, text)


def _qwen2_5_vl_tiny(layers: int | None) -> Any:
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "window_size": 32,
    }
    text = _sizes(64, 128, 4, 4, num_key_value_heads=2, vocab_size=152064, mrope_section=[2, 3, 3])
    return _qwen2_5_vl([1, 3], vision, text)


def _internvl(vision: dict[str, Any], text: dict[str, Any], size: int, patch: int) -> Any:
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, image_size=[size, size], patch_size=[patch, patch]),
        text_config=Qwen2Config(**text),
        image_token_id=IMAGE_TOKEN,
    )


def _internvl_1b(layers: int | None) -> Any:
    vision = _sizes(1024, 4096, layers or 24, 16, attention_bias=True, norm_type="layer_norm")
    text = _sizes(896, 4864, layers or 24, 14, num_key_value_heads=2, vocab_size=151674, max_position_embeddings=32768)
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True}
    return _internvl(vision, text, 448, 14)


def _internvl_tiny(layers: int | None) -> Any:
    return _internvl(_sizes(32, 64, 4, 2), _sizes(64, 128, 4, 4, num_key_value_heads=2, vocab_size=99), 64, 4)


def _qwen3_vl_8b(layers: int | None) -> Any:
    deep = [8, 16, 24] if layers is None else list(range(min(3, layers)))
    vision = {"depth": layers or 27, "out_hidden_size": 4096, "deepstack_visual_indexes": deep}  # the rest is the library's default
    text = _sizes(4096, 12288, layers or 36, 32, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return Qwen3VLConfig(vision_config=vision, text_config=text)


def _alone(kind: Any) -> Callable[[Any], Any]:
    """The plain language model of the same sizes."""
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    names += ["num_attention_heads", "num_key_value_heads", "head_dim"]
    return lambda text: kind(**{name: getattr(text, name) for name in names if getattr(text, name, None) is not None})


# In the windowed tower only the blocks with full attention have scores that compare: the last one, and 7, the first of them.
_WINDOWS = {"fastervlm": "layer=-1", "fopru": "layer=-1", "visionzip": "layer=-1", "hired": "layer=-1,budget_layer=7"}

SHAPES = {
    "tiny": Shape("a LLaVA of a few thousand weights, to try the benchmark itself", _tiny, 64, (64,)),
    "small": Shape("a LLaVA of 23 million weights, large enough for matrix products to take most of the time", _small, 256, (256,)),
    "0.5b": Shape("LLaVA-OneVision-Qwen2-0.5B's sizes: SigLIP-so400m/14 at 384 px, Qwen2-0.5B", _onevision, 729, (729, 3645)),
    "7b": Shape("LLaVA-1.5-7B's sizes: CLIP-L/14 at 336 px, Vicuna-7B", _llava_7b, 576, (576, 2880)),
    "qwen2.5-vl-7b": Shape("Qwen2.5-VL-7B's sizes, images of 896 px", _qwen2_5_vl_7b, 1024, (1024, 4096), _alone(Qwen2Config), _WINDOWS),
    "qwen2.5-vl-0.5b": Shape("Qwen2.5-VL's tower and Qwen2.5-0.5B, images of 448 px", _qwen2_5_vl_half, 256, (256, 1024)),
    "qwen2.5-vl-tiny": Shape("a Qwen2.5-VL of a few thousand weights, to try the benchmark itself", _qwen2_5_vl_tiny, 64, (64,)),
    "internvl-1b": Shape("InternVL3-1B's sizes: InternViT-300M at 448 px, Qwen2.5-0.5B", _internvl_1b, 256, (1024,)),
    "internvl-tiny": Shape("an InternVL of a few thousand weights, to try the benchmark itself", _internvl_tiny, 64, (128,)),
    "qwen3-vl-8b": Shape("Qwen3-VL-8B's sizes, images of 1024 px", _qwen3_vl_8b, 1024, (1024, 4096), _alone(Qwen3Config)),
}
