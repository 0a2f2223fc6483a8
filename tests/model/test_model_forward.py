"""Images in the sequence: batches, padding, caches, errors, dtypes, training without images, checkpointing, adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tests.model.tiny_backbones import COS, Assembled, Backbones
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.errors import FoveateError
from foveate.model import FoveateProcessor

Assemble = Callable[..., Assembled]
Picture = Callable[..., Image.Image]
Pictures = list[Image.Image]
PROMPTS = ["<image>\nOne image here?", "No image at all.", "First <image> then <image>."]


@pytest.fixture
def pictures(picture: Picture) -> Pictures:
    return [picture(i) for i in range(3)]


def rows(processor: FoveateProcessor, pictures: Pictures) -> list[dict[str, torch.Tensor]]:
    """Each prompt of PROMPTS alone."""
    images = [pictures[:1], [], pictures[1:]]
    return [processor(images=i, text=t, return_tensors="pt") for i, t in zip(images, PROMPTS, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_its_rows_give(assemble: Assemble, pictures: Pictures, side: str) -> None:
    model, processor = assemble(COS)
    batch = processor(images=pictures, text=PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    assert batch["pixel_values"].shape[0] == 3
    logits = model(**batch).logits
    for row, (single, mask) in enumerate(zip(rows(processor, pictures), batch["attention_mask"].bool(), strict=True)):
        torch.testing.assert_close(logits[row][mask], model(**single).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_batched_generation_gives_what_its_rows_give(assemble: Assemble, pictures: Pictures, beams: int) -> None:
    model, processor = assemble()
    batch = processor(images=pictures, text=PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    out = model.generate(**batch, **options)[:, -5:]
    for row, single in zip(out, rows(processor, pictures), strict=True):
        assert row.tolist() == model.generate(**single, **options)[0, -5:].tolist()


def test_visual_tokens_stand_where_the_placeholders_were(assemble: Assemble, pictures: Pictures) -> None:
    model, processor = assemble()
    batch = processor(images=pictures[1:], text=PROMPTS[2], return_tensors="pt")
    features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
    embeds, visual = model.model.merge(batch["input_ids"], batch["pixel_values"])
    where = batch["input_ids"][0] == processor.image_token_id
    assert where.sum() == 32
    assert torch.equal(embeds[0, where], features)
    assert visual is not None
    assert torch.equal(visual, features)
    assert torch.equal(embeds[0, ~where], model.get_input_embeddings()(batch["input_ids"])[0, ~where])


def test_images_can_come_encoded_and_text_as_embeddings(assemble: Assemble, pictures: Pictures) -> None:
    model, processor = assemble()
    batch = processor(images=pictures[:1], text=PROMPTS[0], return_tensors="pt")
    expected = model(**batch)
    encoded = model.get_image_features(batch["pixel_values"])
    assert torch.equal(model(input_ids=batch["input_ids"], mm_encoder_outputs={"image": encoded}).logits, expected.logits)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds, pixel_values=batch["pixel_values"]).logits, expected.logits)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected.logits)
    assert torch.equal(expected.image_hidden_states, torch.cat(encoded.pooler_output))
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3


def test_mismatches_name_both_numbers(assemble: Assemble, pictures: Pictures) -> None:
    model, processor = assemble()
    batch = processor(images=pictures[:1], text=PROMPTS[0], return_tensors="pt")
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    with pytest.raises(FoveateError, match=r"16 image placeholders.*32 visual tokens"):
        model(input_ids=ids, pixel_values=pixels.repeat(2, 1, 1, 1))
    with pytest.raises(FoveateError, match=r"16 image placeholders.*0 visual tokens"):
        model(input_ids=ids)
    with pytest.raises(FoveateError, match=r"0 image placeholders.*16 visual tokens"):
        model(input_ids=torch.ones_like(ids), pixel_values=pixels)
    with pytest.raises(FoveateError, match="exactly one"):
        model(pixel_values=pixels)
    with pytest.raises(FoveateError, match="once"):
        model(input_ids=ids, pixel_values=pixels, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=[])})


def test_a_model_may_say_its_own_image_token_while_decoding(assemble: Assemble) -> None:
    model, processor = assemble()
    first = model(**processor(text="hi", return_tensors="pt"), use_cache=True)
    token = torch.tensor([[processor.image_token_id]])
    assert model(input_ids=token, past_key_values=first.past_key_values).logits.shape[1] == 1


def test_blank_image_lets_every_part_take_part_and_changes_nothing(assemble: Assemble) -> None:
    model, processor = assemble(COS, vision_feature_layer=[-1])
    batch = processor(text=["only text", "again"], padding=True, return_tensors="pt")
    model.train()
    plain = model(**batch, labels=batch["input_ids"])
    plain.loss.backward()
    before = {n: p.grad for n, p in model.named_parameters()}
    assert all(before[n] is None for n in before if "bridge" in n)
    model.zero_grad(set_to_none=True)

    model.config.always_run_vision = True
    blank = model(**batch, labels=batch["input_ids"])
    blank.loss.backward()
    assert torch.equal(blank.loss, plain.loss)
    assert torch.equal(blank.logits, plain.logits)
    seen = {n for n, p in model.named_parameters() if p.grad is not None}
    expected = {n for n in before if "post_layernorm" not in n}
    assert seen == expected
    for name, p in model.named_parameters():
        if "bridge" in name or "vision_tower" in name:
            assert p.grad is None or not p.grad.any()
        else:
            assert torch.equal(p.grad, before[name])
    model.eval()
    tower_ran: list[bool] = []
    model.model.vision_tower.register_forward_hook(lambda *_: tower_ran.append(True))
    model(**batch)
    assert not tower_ran


def test_blank_image_where_several_processes_evaluate_a_model_under_training(assemble: Assemble, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may be waiting in the tower. With a cache nobody is: each process generates as much as it likes."""
    model, processor = assemble(COS)
    monkeypatch.setattr("foveate.model.merging.several_processes", lambda: True)
    batch = processor(text="only text", return_tensors="pt")
    tower_ran: list[bool] = []
    model.model.vision_tower.register_forward_hook(lambda *_: tower_ran.append(True))
    plain = model.eval()(**batch).logits
    assert not tower_ran
    model.config.always_run_vision = True
    assert torch.equal(model(**batch).logits, plain)
    assert tower_ran == [True]
    model.generate(**batch, max_new_tokens=2)
    assert tower_ran == [True]


def test_gradient_checkpointing_changes_nothing(assemble: Assemble, pictures: Pictures) -> None:
    model, processor = assemble(COS)
    batch = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    model.train()

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, grads = step()
    model.gradient_checkpointing_enable()
    decoder: Any = model.get_decoder()
    assert any(getattr(m, "gradient_checkpointing", False) for m in decoder.layers)
    again, grads_again = step()
    assert torch.equal(loss, again)
    assert grads.keys() == grads_again.keys()
    assert all(torch.equal(grads[n], grads_again[n]) for n in grads)


def test_bfloat16_and_float32_loading(assemble: Assemble, pictures: Pictures, tmp_path: Path) -> None:
    model, processor = assemble(dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = processor(images=pictures[:1], text=PROMPTS[0], return_tensors="pt")
    assert batch["pixel_values"].dtype == torch.float32
    assert model(**batch).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).dtype == torch.bfloat16
    wide = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {c.dtype for c in (wide.config, wide.config.text_config, wide.config.vision_config)} == {torch.float32}
    mixed = AutoModelForImageTextToText.from_pretrained(tmp_path)
    mixed.model.bridge.float()  # a trained bridge in full precision between halves
    torch.testing.assert_close(mixed(**batch).logits, model(**batch).logits, rtol=0.1, atol=0.1)


def test_attention_is_chosen_for_all_parts_and_survives_assembly(assemble: Assemble, pictures: Pictures) -> None:
    def chosen(model: Any) -> list[str]:
        parts = (model.model.vision_tower, model.model.causal_lm, model.get_decoder())
        return [part.config._attn_implementation for part in parts]

    model, processor = assemble()
    assert chosen(model) == ["sdpa"] * 3
    eager, _ = assemble(attn_implementation="eager")
    assert chosen(eager) == ["eager"] * 3
    eager.model.bridge.load_state_dict(model.model.bridge.state_dict())
    batch = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(eager(**batch).logits[mask], model(**batch).logits[mask], rtol=1e-4, atol=1e-5)


def test_lora_on_the_language_model(assemble: Assemble, pictures: Pictures, tmp_path: Path) -> None:
    model, processor = assemble()
    model.save_pretrained(tmp_path / "base")
    batch = processor(images=pictures[:1], text=PROMPTS[0], return_tensors="pt")
    before = model(**batch).logits
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=r".*\.causal_lm\..*\.(q_proj|v_proj)", init_lora_weights=False))
    assert {n.split(".lora_")[0].split(".causal_lm.")[0] for n, p in tuned.named_parameters() if p.requires_grad} == {
        "base_model.model.model"
    }
    after = tuned(**batch).logits
    assert not torch.equal(before, after)
    assert tuned.generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2
    tuned.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "adapter")(**batch).logits, after)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, after, rtol=1e-4, atol=1e-5)


def test_ready_modules_and_a_ready_bridge(assemble: Assemble, folders: Backbones, pictures: Pictures) -> None:
    reference, processor = assemble()
    parts = {"vision": reference.model.vision_tower, "text": reference.model.causal_lm, "bridge": reference.model.bridge}
    state = {n: v.clone() for n, v in reference.state_dict().items()}
    model, again = assemble(**parts, image_processor=processor.image_processor, tokenizer=processor.tokenizer)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    batch = again(images=pictures[:1], text=PROMPTS[0], return_tensors="pt")
    assert torch.equal(model(**batch).logits, reference(**batch).logits)
    with pytest.raises(FoveateError, match=r"image_processor"):
        assemble(vision=reference.model.vision_tower)


def test_a_fresh_bridge_keeps_its_own_initialisation(assemble: Assemble) -> None:
    torch.manual_seed(5)
    model, _ = assemble(COS)
    bridge: Any = model.model.bridge
    for name, p in bridge.named_parameters():
        if name.endswith("weight") and p.dim() == 2:  # truncated normal, 0.02, of Chain-of-Sight
            assert 0.01 < p.std() < 0.03, name
    assert torch.equal(bridge.norm.weight, torch.ones_like(bridge.norm.weight))
