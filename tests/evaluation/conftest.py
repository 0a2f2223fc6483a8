"""A tiny LLaVA with random weights, one whose answer is known beforehand, and a tiny test set."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>", *(f"<loc{i}>" for i in range(16))]
TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}<assistant>"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other cost more than such small models are worth."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    size = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=make_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(hidden: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(3)
    vocab = 256 + len(SPECIAL)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, initializer_range=0.3
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=vocab,
        initializer_range=0.3,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=256 + SPECIAL.index("<image>"), image_seq_length=16)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 258
    return model


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return make_model(32)


@pytest.fixture
def parrot() -> tuple[Any, list[str]]:
    """A model that answers "<loc3><loc1><loc8><loc15>" to everything: each token's embedding is a unit vector, nothing is added to it on
    its way through the layers, and the head maps every token to its successor.
    """
    answer = ["<assistant>", "<loc3>", "<loc1>", "<loc8>", "<loc15>", "</s>"]
    vocab = 256 + len(SPECIAL)
    model = make_model(vocab + vocab % 4)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(vocab, vocab + vocab % 4))
        model.lm_head.weight.zero_()
        for token, successor in pairwise(answer):
            model.lm_head.weight[256 + SPECIAL.index(successor), 256 + SPECIAL.index(token)] = 1.0
    return model, answer


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Three test images of 20 px, five questions on each, in an order that interleaves the images."""
    folder = tmp_path / "scenes"
    (folder / "images" / "test").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(3):
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "test" / f"{number:06d}.png")
    questions = [
        ("presence", "Is there a red circle?", "yes"),
        ("count", "How many?", "2"),
        ("locating", "Where is the star?", "<loc3><loc1><loc8><loc15>"),
        ("locating", "Where is the small green square that you see?", "<loc0><loc0><loc1><loc1>"),
        ("reading", "Which word is printed?", "map"),
    ]
    for index, (family, question, answer) in enumerate(questions):
        for number in range(3):
            name = f"test/{number:06d}.png"
            rows.append({"id": f"{number}-{index}", "image": name, "question": question, "answer": answer, "family": family})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder
