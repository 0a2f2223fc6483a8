"""Tiny models of several architectures, prompts for them, and a stand-in for flash attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from tests.tiny import IMAGE, PATCHES, assembled, llava

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 1000, "suppress_tokens": [IMAGE, 91, 92, 93]}


def qwen(attn: str = "sdpa") -> Any:
    """A Qwen2.5-VL whose images have 16 tokens: positions of three rows, packed pixels."""
    torch.manual_seed(0)
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0, 1],
    }
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
    text: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    text |= {"rope_parameters": rope, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
    tokens = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(vision_config={**vision, "window_size": 16}, text_config=text, **tokens, attn_implementation=attn)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def mistral(attn: str = "sdpa", window: int = 8) -> Any:
    """A LLaVA over a language model whose layers reach back `window` tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    text = MistralConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=99,
        initializer_range=0.2,
        sliding_window=window,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, attn_implementation=attn)
    return LlavaForConditionalGeneration(config).eval()


MODELS = {"llava": llava, "foveate": assembled, "qwen2_5_vl": qwen}


def media(name: str, count: int, seed: int = 1) -> dict[str, Tensor]:
    """Pixels of `count` images of PATCHES tokens each."""
    generator = torch.Generator().manual_seed(seed)
    if name != "qwen2_5_vl":
        return {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}
    grid = torch.tensor([[1, 8, 8]] * count)
    return {"pixel_values": torch.randn(64 * count, 3 * 2 * 4 * 4, generator=generator), "image_grid_thw": grid}


def inputs(name: str, rows: list[list[int]], seed: int = 1) -> dict[str, Any]:
    """Rows of equal length, with pixels for their placeholders: tensors by name."""
    ids = torch.tensor(rows)
    found = {"input_ids": ids, **media(name, int((ids == IMAGE).sum()) // PATCHES, seed)}
    return found | ({"mm_token_type_ids": (ids == IMAGE).int()} if name == "qwen2_5_vl" else {})


def kept(run: Any, image: int = 0) -> list[int]:
    """Of one image of the last pass, the ranks of the tokens that went through the first cut."""
    cut = next(iter(run.last.maps.values()))
    mine = (cut.source.image == image).nonzero()
    first = int(mine[0, 1])
    row = int(mine[0, 0])
    return [int(i) - first for i in cut.representative[row][cut.target.visual[row] & (cut.target.image[row] == image)]]


def flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the library's flash attention computes, from all that it is handed: padding by a 2-D mask, causal and windowed by slots, packed
    samples by `cu_seq_lens_q` or by positions that begin anew."""
    N, K = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.shape[1] < K:  # a cache of fixed length: the slots that are filled
        K = attention_mask.shape[1]
        key, value = key[:, :, :K], value[:, :, :K]
    assert scaling is not None
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    i, j = torch.arange(N)[:, None] + K - N, torch.arange(K)[None]
    seen = ((j <= i) & (j > i - sliding_window) if sliding_window else j <= i)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, -K:]
    else:
        starts = cu_seq_lens_q
        if starts is None and _is_packed_sequence(position_ids, query.shape[0]):
            (starts, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
        if starts is not None:
            assert int(starts[-1]) == N
            sample = torch.searchsorted(starts[1:].long(), torch.arange(N), right=True)
            seen = seen & (sample[:, None] == sample[None])
    weights = scores.masked_fill(~seen, -1e30).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


AttentionInterface.register("flash_stand_in", flash)
AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)


def text_backend(model: Any, name: str) -> Any:
    """The same model whose decoder attends by that backend."""
    decoder = model.model.language_model
    decoder.config._attn_implementation = name
    return model
