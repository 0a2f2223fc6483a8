"""Tiny backbones with random weights, saved to folders and loaded from there as any others."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from foveate.model import FoveateForConditionalGeneration, FoveateProcessor

Backbones = tuple[Path, Path]
Assembled = tuple[FoveateForConditionalGeneration, FoveateProcessor]
COS: dict[str, Any] = {"kind": "chain_of_sight", "scales": [[4, 4], [2, 1]]}


def byte_tokenizer(image_token: bool = True, pad: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, plus <s>, </s>, perhaps <pad> and perhaps <image>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>"} if pad else {}
    extra = ["<image>"] if image_token else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=extra, chat_template=template, **special
    )


def save_clip(folder: Path, **changes: Any) -> Path:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    CLIPVisionModel(CLIPVisionConfig(**settings | {"patch_size": 8} | changes)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_lm(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, config: PreTrainedConfig | None = None) -> Path:
    tokenizer = tokenizer or byte_tokenizer()
    config = config or llama_config(len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama_config(vocab_size: int, **changes: Any) -> LlamaConfig:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaConfig(vocab_size=vocab_size, bos_token_id=256, eos_token_id=257, initializer_range=0.2, **settings | changes)
