"""Tiny random models for the tests, and batches of prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

from foveate.model import FoveateConfig, FoveateForConditionalGeneration

IMAGE, PATCHES, LAYERS = 90, 16, 4


def llava(attn: str = "sdpa", dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> Any:
    """A LLaVA of four decoder layers whose images have 16 tokens; weights are the same at every call."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    text = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=64,
        vocab_size=99,
        initializer_range=0.2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, attn_implementation=attn)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


def assembled(attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Foveate's own model with a Chain-of-Sight bridge that makes 4 + 4 * 3 = 16 tokens an image."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    text = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=99,
        initializer_range=0.2,
    )
    bridge = {"kind": "chain_of_sight", "scales": [[4, 4], [2, 3]]}
    config = FoveateConfig(
        vision_config=vision, text_config=text, bridge=bridge, vision_feature_layer=[1, 2], image_token_id=IMAGE, attn_implementation=attn
    )
    return FoveateForConditionalGeneration(config).to(dtype).eval()


MODELS: dict[str, Callable[..., Any]] = {"llava": llava, "foveate": assembled}


def prompt(images: int, text: list[int]) -> list[int]:
    ids = [5, 6, 7]
    for i in range(images):
        ids += [IMAGE] * PATCHES + [8 + i]
    return ids + text


ROWS = [prompt(1, [1, 2, 3]), prompt(2, [4, 5]), prompt(0, [6, 7, 8, 9])]


@dataclass
class Batch:
    """Prompts padded on one side, with their singles."""

    rows: list[list[int]]
    side: str = "right"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        count = sum(row.count(IMAGE) // PATCHES for row in self.rows)
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator).to(self.dtype)

    @property
    def inputs(self) -> dict[str, Tensor]:
        longest = max(map(len, self.rows))
        ids, mask = [], []
        for row in self.rows:
            pad = [0] * (longest - len(row))
            ids.append(pad + row if self.side == "left" else row + pad)
            mask.append(pad + [1] * len(row) if self.side == "left" else [1] * len(row) + pad)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return inputs | ({"pixel_values": self.pixels} if len(self.pixels) else {})

    @property
    def singles(self) -> list[dict[str, Tensor]]:
        out, start = [], 0
        for row in self.rows:
            n = row.count(IMAGE) // PATCHES
            out.append({"input_ids": torch.tensor([row])} | ({"pixel_values": self.pixels[start : start + n]} if n else {}))
            start += n
        return out

    def own(self, outputs: Tensor, row: int) -> Tensor:
        """The rows of `outputs` (B, N, …) that belong to prompt `row`, padding left out."""
        n = len(self.rows[row])
        return outputs[row, -n:] if self.side == "left" else outputs[row, :n]

    def labels(self) -> Tensor:
        """The prompt's last tokens are the answer: all but the first of what stands after the last image."""
        ids = self.inputs["input_ids"].clone()
        slot = torch.arange(ids.shape[1])
        last = torch.where(ids == IMAGE, slot, 2).max(1, keepdim=True).values
        begin = torch.where(self.inputs["attention_mask"] > 0, slot, ids.shape[1]).min(1, keepdim=True).values
        answer = (slot > torch.maximum(last, begin + 2) + 1) & (self.inputs["attention_mask"] > 0)
        return torch.where(answer, ids, -100)
