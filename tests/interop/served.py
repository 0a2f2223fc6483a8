"""Tiny random checkpoints that vLLM can serve, and what `attach` makes of their prompts in transformers: what a server has to equal.

Heads are as wide as vLLM's kernels want them, and the weights of such a size that answers differ from one another and from prompt to
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import foveate
from foveate.engine.record import Record
from tests.conformance.family import picture, tokenizer

NEW = 16  # tokens of an answer
SPREAD = 0.35  # of weights


def text(words: Any, **own: Any) -> dict[str, Any]:
    return {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": len(words),
        "max_position_embeddings": 2048,
        "initializer_range": SPREAD,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        **own,
    }


def llava(folder: Path) -> None:
    """64 tokens an image, whatever its size."""
    words = tokenizer(image_token="<image>")
    vision = CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=8, initializer_range=0.2
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text(words)), image_token_id=words.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    renamed(folder, "vision_tower.", "vision_tower.vision_model.")
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor = LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>"
    )
    processor.save_pretrained(folder)


def renamed(folder: Path, old: str, new: str) -> None:
    """Weights as published checkpoints name them: transformers' own, saved anew, lack a level."""
    path = folder / "model.safetensors"
    weights = {name.replace(old, new) if new not in name else name: value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


PIXELS: dict[str, Any] = {"patch_size": 4, "size": {"shortest_edge": 8 * 8, "longest_edge": 96 * 96}}
VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5]}


def qwen_words() -> tuple[Any, dict[str, int]]:
    words = tokenizer(["<|vision_start|>", "<|vision_end|>"], image_token="<|image_pad|>", video_token="<|video_pad|>")
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return words, {name: words.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def qwen2_vl(folder: Path) -> None:
    words, ids = qwen_words()
    vision = {**VISION, "embed_dim": 64, "hidden_size": 128}
    config = Qwen2VLConfig(vision_config=vision, text_config=text(words, rope_parameters=MROPE), **ids)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLProcessor(Qwen2VLImageProcessor(**PIXELS), words, Qwen2VLVideoProcessor(**PIXELS)).save_pretrained(folder)


def qwen2_5_vl(folder: Path) -> None:
    words, ids = qwen_words()
    vision = {**VISION, "hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text(words, rope_parameters=MROPE), **ids)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**PIXELS), words, Qwen2VLVideoProcessor(**PIXELS)).save_pretrained(folder)


def qwen3_vl(folder: Path) -> None:
    words, ids = qwen_words()
    vision = {
        **VISION,
        "hidden_size": 64,
        "out_hidden_size": 128,
        "intermediate_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {**MROPE, "mrope_interleaved": True}
    config = Qwen3VLConfig(vision_config=vision, text_config=text(words, head_dim=32, rope_parameters=rope), **ids)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen3VLProcessor(Qwen2VLImageProcessor(**PIXELS), words, Qwen3VLVideoProcessor(**PIXELS)).save_pretrained(folder)


@dataclass(frozen=True)
class Served:
    """build writes a checkpoint; image is how a prompt writes one."""

    build: Callable[[Path], None]
    image: str

    def prompt(self, images: int, words: str) -> str:
        return self.image * images + words


QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
MODELS = {
    "llava": Served(llava, "<image> "),
    "qwen2_vl": Served(qwen2_vl, QWEN),
    "qwen2_5_vl": Served(qwen2_5_vl, QWEN),
    "qwen3_vl": Served(qwen3_vl, QWEN),
}


@dataclass(frozen=True)
class Request:
    """A prompt with pictures in front of its words or, `behind`, after the first of them."""

    images: tuple[Image.Image, ...]
    words: str
    behind: bool = False

    def text(self, served: Served) -> str:
        first, _, rest = self.words.partition(" ")
        return f"{first} {served.prompt(len(self.images), rest)}" if self.behind else served.prompt(len(self.images), self.words)


def requests() -> list[Request]:
    """One picture, two of unlike sizes, none; words before and behind."""
    one, two, three = (picture(size, seed) for seed, size in enumerate([(48, 32), (64, 64), (32, 40)], start=1))
    return [
        Request((one,), "what is this"),
        Request((two, three), "which one is big and red"),
        Request((), "tell me a story now"),
        Request((three,), "a dog sat on the mat", behind=True),
        Request((two,), "yes or no"),
    ]


class Reference:
    """The checkpoint in transformers."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.served, self.folder = served, folder
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def answers(self, reducer: str, given: Sequence[Request]) -> tuple[list[list[int]], list[list[list[int]]]]:
        """(greedy tokens of each request, the kept places of each image of each request)."""
        tokens, kept = [], []
        with foveate.attach(self.model, reducer or "none") as run:
            for request in given:
                inputs = self.processor(text=[request.text(self.served)], images=list(request.images) or None, return_tensors="pt")
                run.passes = []
                with torch.no_grad():
                    out = self.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
                tokens.append(out[0, inputs["input_ids"].shape[1] :].tolist())
                kept.append(places(run.last) if request.images else [])
        return tokens, kept


def places(seen: Record) -> list[list[int]]:
    """Of each image of a prompt, which of its tokens are left, or whose places what they were mixed to has taken."""
    image, left = seen.entered.image[0], seen.left.representative[0]
    found = []
    for one in range(int(image.max()) + 1):
        slots = (image == one).nonzero()[:, 0].tolist()
        found.append([slots.index(at) for at in left.tolist() if at in set(slots)])
    return found
