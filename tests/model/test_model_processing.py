"""Prompts and pictures -> inputs; chat templates; saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.model.tiny_backbones import COS, Assembled, Backbones, byte_tokenizer, llama_config, save_lm
from transformers import AutoProcessor, AutoTokenizer

from foveate.errors import FoveateError
from foveate.model import FoveateProcessor

Assemble = Callable[..., Assembled]
Picture = Callable[..., Image.Image]
OWN = (
    "{{- '<s>' -}}{%- for m in messages -%}{{- '[' + m['role'] + ']' + m['content'] -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}[assistant]{%- endif -%}"
)
TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def test_each_marker_becomes_exactly_the_bridges_tokens(assemble: Assemble, picture: Picture) -> None:
    model, processor = assemble(COS)
    assert processor.num_image_tokens == model.model.bridge.tokens(model.grid) == 8
    batch = processor(images=[picture(0), picture(1)], text=["a<image>b<image>c"])
    ids = batch["input_ids"][0]
    one = [processor.image_token_id] * 8
    a, b, c = (processor.tokenizer(t)["input_ids"] for t in "abc")
    assert ids == a + one + b + one + c


def test_pictures_are_squeezed_to_the_square_and_normalised(assemble: Assemble) -> None:
    _, processor = assemble()
    wide = Image.fromarray(np.concatenate([np.full((10, 30, 3), 255, np.uint8), np.zeros((10, 30, 3), np.uint8)], axis=1))
    pixels = processor(images=wide, text="<image>", return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    mean, std = torch.tensor(processor.image_processor.image_mean), torch.tensor(processor.image_processor.image_std)
    back = pixels[0] * std[:, None, None] + mean[:, None, None]
    # both ends are there: nothing was cropped away
    assert torch.allclose(back[:, :, :12], torch.ones(3, 32, 12), atol=1e-3)
    assert torch.allclose(back[:, :, 20:], torch.zeros(3, 32, 12), atol=1e-3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_other_modes(assemble: Assemble, picture: Picture, mode: str) -> None:
    _, processor = assemble()
    assert processor(images=picture(0).convert(mode), text="<image>", return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_flat_and_nested_images_text_only_and_mixed(assemble: Assemble, picture: Picture) -> None:
    _, processor = assemble()
    pictures = [picture(i) for i in range(3)]
    texts = ["<image>x", "none", "<image>y<image>"]
    flat = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[pictures[:1], [], pictures[1:]], text=texts, padding=True, return_tensors="pt")
    assert flat.keys() == nested.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(flat[k], nested[k]) for k in flat)
    assert flat["pixel_values"].shape[0] == 3
    nothings: tuple[Any, ...] = (None, [], [[], []])
    for nothing in nothings:
        assert "pixel_values" not in processor(images=nothing, text=["no", "image"])


def test_miscounts_name_both_numbers(assemble: Assemble, picture: Picture) -> None:
    _, processor = assemble()
    with pytest.raises(FoveateError, match="2 <image> markers but 1 images"):
        processor(images=[picture(0)], text="<image> and <image>")
    with pytest.raises(FoveateError, match="1 <image> markers but 0 images"):
        processor(text="<image>")
    with pytest.raises(FoveateError, match="0 <image> markers but 1 images"):
        processor(images=[picture(0)], text="nothing")
    with pytest.raises(FoveateError, match="prompt 0 holds 1 <image> markers but 0 images"):
        processor(images=[[], [picture(0)]], text=["<image>", "nothing"])
    with pytest.raises(FoveateError, match="1 lists of images were given for 2 prompts"):
        processor(images=[[picture(0)]], text=["<image>", "nothing"])


@pytest.mark.parametrize("bridge", [{"kind": "mlp"}, COS])
def test_saved_and_loaded_it_does_the_same(assemble: Assemble, picture: Picture, tmp_path: Path, bridge: dict[str, Any]) -> None:
    model, processor = assemble(bridge)
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is FoveateProcessor
    assert type(FoveateProcessor.from_pretrained(tmp_path)) is FoveateProcessor
    assert (again.bridge, again.image_size, again.patch_size, again.num_image_tokens) == (
        processor.bridge,
        processor.image_size,
        processor.patch_size,
        processor.num_image_tokens,
    )
    assert again.chat_template == processor.chat_template
    one, two = (p(images=picture(3), text="<image>\nq", return_tensors="pt") for p in (processor, again))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_last_call_is_not_saved(assemble: Assemble, tmp_path: Path) -> None:
    _, processor = assemble()
    before = processor(text=["four"])["input_ids"]
    processor(text=["four", "by"], padding=True, padding_side="left", truncation=True, max_length=2)
    processor.save_pretrained(tmp_path)
    again = FoveateProcessor.from_pretrained(tmp_path)
    assert again(text=["four"])["input_ids"] == before
    assert again.tokenizer.padding_side == "right"


def test_set_bridge_changes_count_and_pixels(assemble: Assemble, picture: Picture) -> None:
    _, processor = assemble()
    processor.set_bridge({"kind": "avg_pool2d", "pool": 4}, 64)
    batch = processor(images=picture(0), text="<image>", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    assert (batch["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens == 4
    with pytest.raises(FoveateError):
        processor.set_bridge({"kind": "avg_pool2d", "pool": 3}, 64)
    assert processor.num_image_tokens == 4


def test_llava_template_for_tokenizers_without_one(assemble: Assemble) -> None:
    _, processor = assemble()
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    chat = [*TURN, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == f"{system} USER: <image>\nWhat? ASSISTANT: A cat.</s> USER: Sure? ASSISTANT:"


def test_a_tokenizers_own_template_learns_about_images(folders: Backbones, assemble: Assemble, tmp_path: Path, picture: Picture) -> None:
    text = save_lm(tmp_path / "lm", byte_tokenizer(template=OWN))
    _, processor = assemble(text=text)
    assert processor.apply_chat_template(TURN, add_generation_prompt=True) == "<s>[user]<image>\nWhat?[assistant]"
    two = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same"}, {"type": "text", "text": "?"}]}
    ]
    assert processor.apply_chat_template(two) == "<s>[user]<image>\n<image>\nSame?"
    last = [{"role": "user", "content": [{"type": "text", "text": "See "}, {"type": "image"}]}]
    assert processor.apply_chat_template(last) == "<s>[user]See <image>"
    plain = [{"role": "user", "content": "Hello"}]
    assert processor.apply_chat_template(plain) == AutoTokenizer.from_pretrained(text).apply_chat_template(plain, tokenize=False)
    with pytest.raises(Exception, match="video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    conversation = [{"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What?"}]}]
    batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    by_hand = processor(images=picture(0), text="<s>[user]<image>\nWhat?", return_tensors="pt", add_special_tokens=False)
    assert torch.equal(batch["input_ids"], by_hand["input_ids"])
    assert torch.equal(batch["pixel_values"], by_hand["pixel_values"])


def test_missing_image_token_is_demanded_by_name(folders: Backbones, assemble: Assemble, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(image_token=False)
    text = save_lm(tmp_path / "lm", tokenizer)
    with pytest.raises(FoveateError, match=r"lm.*'<image>'.*add_image_token=True"):
        assemble(text=text)
    with pytest.raises(FoveateError, match="'<picture>'"):
        assemble(image_token="<picture>")
    _, processor = assemble(text=text, add_image_token=True)
    assert processor.tokenizer("a<image>b")["input_ids"][1] == processor.image_token_id == 259
    assert "<image>" not in AutoTokenizer.from_pretrained(text).get_vocab()


def rows(model: Any) -> int:
    """Of the embeddings."""
    return len(model.get_input_embeddings().weight)


def test_rows_that_the_embeddings_already_have_are_used(assemble: Assemble, tmp_path: Path) -> None:
    """Many models have more rows than their tokenizer has tokens."""
    text = save_lm(tmp_path / "lm", byte_tokenizer(image_token=False), llama_config(320))
    model, processor = assemble(text=text, add_image_token=True)
    assert rows(model) == 320
    assert processor.image_token_id == 259


def test_a_token_without_a_row_is_an_error(assemble: Assemble, tmp_path: Path) -> None:
    text = save_lm(tmp_path / "lm", byte_tokenizer(), llama_config(259))
    with pytest.raises(FoveateError, match=r"259.*259 embeddings"):
        assemble(text=text)
    model, _ = assemble(text=text, add_image_token=True)
    assert rows(model) == 260


def test_tokenizers_without_padding_get_some(assemble: Assemble, tmp_path: Path) -> None:
    _, processor = assemble(text=save_lm(tmp_path / "lm", byte_tokenizer(pad=False)))
    batch = processor(text=["long prompt", "s"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [11, 1]
