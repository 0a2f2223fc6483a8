"""Any causal LM: families that differ in tying, head bias, logit scaling and capping, embedding scaling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.model.tiny_backbones import Assembled, Backbones, byte_tokenizer, save_lm
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from foveate.model import FoveateForConditionalGeneration, FoveateModel

Family = tuple[Path, Assembled]
Picture = Callable[..., Image.Image]
COMMON = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KV = {"num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": KV | {"tie_word_embeddings": True},
    "qwen3": KV | {"head_dim": 16, "tie_word_embeddings": False},
    "gemma2": KV | {"head_dim": 16, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "cohere": KV | {"logit_scale": 0.25},
    "granite": KV | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
    "gpt_neox": {"tie_word_embeddings": False},
    "phi": {"tie_word_embeddings": False},
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path, folders: Backbones) -> Family:
    settings = COMMON | FAMILIES[request.param] | {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "initializer_range": 0.3}
    text = save_lm(tmp_path / "lm", config=CONFIG_MAPPING[request.param](**settings))
    return text, FoveateForConditionalGeneration.from_backbones(folders[0], text, {"kind": "mlp"})


def test_text_only_logits_and_loss_are_the_language_models_own(family: Family) -> None:
    text, (model, processor) = family
    alone = AutoModelForCausalLM.from_pretrained(text)
    batch = processor(text=["a longer prompt", "short"], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ours, theirs = model(**batch, labels=labels), alone(**batch, labels=labels)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(model(**batch, logits_to_keep=2).logits, theirs.logits[:, -2:])


def test_save_and_load_give_the_same_model_tied_or_not(family: Family, tmp_path: Path, picture: Picture) -> None:
    _, (model, processor) = family
    batch = processor(images=[picture(0)], text=["<image>\nwhat?"], return_tensors="pt")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert type(again) is FoveateForConditionalGeneration
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert tied == model.config.text_config.tie_word_embeddings == again.config.tie_word_embeddings
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    body = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(body) is FoveateModel
    assert torch.equal(body(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


def test_decoder_is_found_and_greedy_generation_is_the_full_rerun(family: Family, picture: Picture) -> None:
    _, (model, processor) = family
    decoder: Any = model.get_decoder()
    assert len(decoder.layers) == 2
    batch = processor(images=[picture(1)], text=["<image>\nwhat?"], return_tensors="pt")
    cached = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    ids = batch["input_ids"]
    for _ in range(4):
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"], use_cache=False).logits[:, -1]
        logits[:, 257] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert cached.tolist() == ids.tolist()


def test_added_image_token_resizes_both_ends(family: Family, tmp_path: Path, folders: Backbones, picture: Picture) -> None:
    """The families again, now with a tokenizer that lacks the token."""
    text, _ = family
    byte_tokenizer(image_token=False).save_pretrained(text)
    lm = AutoModelForCausalLM.from_pretrained(text)
    lm.resize_token_embeddings(259)
    lm.save_pretrained(text)
    model, processor = FoveateForConditionalGeneration.from_backbones(folders[0], text, {"kind": "mlp"}, add_image_token=True)
    assert model.config.image_token_id == processor.image_token_id == 259
    both: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert [len(matrix.weight) for matrix in both] == [260, 260]
    assert model.config.text_config.vocab_size == 260
    batch = processor(images=[picture(0)], text=["<image>x"], return_tensors="pt")
    labels = batch["input_ids"]
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**batch, labels=labels).loss, model(**batch, labels=labels).loss)
