"""Where the question about an image ends: no map depends on an answer, and each image has a question of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import foveate
from foveate import FoveateError
from tests.situations.models import GREEDY, MODELS, inputs, kept, text_backend
from tests.tiny import IMAGE, PATCHES, llava

ASKING = ["fastv:keep=0.25,layer=2", "pyramiddrop:keep=0.5", "schedule:keeps=2:0.25", "sparsevlm:keep=0.3,layers=2", "cdpruner:keep=0.25"]
ONE = [5, 6, 7] + [IMAGE] * PATCHES + [1, 2, 3]
every_model = pytest.mark.parametrize("name", MODELS)
every_method = pytest.mark.parametrize("reducer", ASKING)


def labels_of(*parts: tuple[int, bool]) -> Tensor:
    """-100, or a token's number where it is supervised: (tokens, supervised) one after another."""
    return torch.tensor([[11 if supervised else -100 for count, supervised in parts for _ in range(count)]])


def sets(model: Any, reducer: str, image: int = 0, **call: Any) -> list[int]:
    with foveate.attach(model, reducer) as run, torch.no_grad():
        model(**call)
    return kept(run, image)


@every_model
@every_method
def test_training_keeps_what_inference_keeps(name: str, reducer: str) -> None:
    model = MODELS[name]()
    alone = sets(model, reducer, **inputs(name, [ONE]))
    for answer in ([11, 12], [14, 15]):
        call = inputs(name, [ONE + answer])
        assert sets(model, reducer, **call, labels=labels_of((len(ONE), False), (2, True))) == alone
        shifted = labels_of((len(ONE) - 1, False), (2, True), (1, False))
        if name != "qwen2_5_vl":
            assert sets(model, reducer, **call, labels=None, shift_labels=shifted) == alone


@every_model
@every_method
def test_an_image_after_an_earlier_answer_is_asked_about_after_it(name: str, reducer: str) -> None:
    model = MODELS[name]()
    two = ONE + [11, 12, 3] + [IMAGE] * PATCHES + [4, 5]
    labels = labels_of((len(ONE), False), (2, True), (1 + PATCHES + 2, False), (2, True))
    for image, prompt in ((1, two), (0, ONE)):
        expected = sets(model, reducer, image, **inputs(name, [prompt])) if image else None
        found = sets(model, reducer, image, **inputs(name, [[*two, 13, 14]]), labels=labels)
        other = sets(model, reducer, image, **inputs(name, [[*two, 8, 9]]), labels=labels)
        assert found == other
        assert expected is None or found == expected


@every_method
@pytest.mark.parametrize("attn", ["sdpa", "eager", "flash_stand_in"])
def test_packed_samples_ask_for_themselves(reducer: str, attn: str) -> None:
    model = text_backend(llava(), attn)
    sample = [*ONE, 11, 12]
    call = inputs("llava", [sample + sample])
    call["pixel_values"] = call["pixel_values"][:1].repeat(2, 1, 1, 1)
    call["position_ids"] = torch.arange(len(sample)).repeat(2)[None]
    labels = labels_of((len(ONE), False), (2, True), (len(ONE), False), (2, True))
    first, second = (sets(model, reducer, image, **call, labels=labels, use_cache=False) for image in (0, 1))
    assert first == second == sets(model, reducer, **inputs("llava", [ONE]))
    assert sets(model, reducer, 1, **call, use_cache=False) == sets(model, reducer, **inputs("llava", [sample]))


@every_method
def test_where_it_cannot_be_known_a_method_that_asks_says_so(reducer: str) -> None:
    model, call = llava(), inputs("llava", [[*ONE, 11, 12]])
    whole = torch.where(call["input_ids"] == IMAGE, -100, call["input_ids"])
    for labels in (whole, call["input_ids"].clone()):
        with pytest.raises(FoveateError, match=r"where the question ends is not known: the labels supervise"):
            sets(model, reducer, **call, labels=labels)
    with pytest.raises(FoveateError, match=r"training mode and was given no labels"):
        sets(model.train(), reducer, **call)
    assert sets(model, "divprune:keep=0.25", **call, labels=whole) == sets(model, "divprune:keep=0.25", **call)


def test_a_caption_that_follows_its_image_is_asked_for_by_the_image() -> None:
    model, caption = llava(), [5] + [IMAGE] * PATCHES
    alone = sets(model, ASKING[0], **inputs("llava", [caption]))
    for answer in ([11, 12], [13, 14]):
        labels = labels_of((1 + PATCHES, False), (2, True))
        assert sets(model, ASKING[0], **inputs("llava", [caption + answer]), labels=labels) == alone


@every_model
@every_method
def test_the_number_of_logits_says_nothing(name: str, reducer: str) -> None:
    model, call = MODELS[name](), inputs(name, [ONE])
    with foveate.attach(model, reducer), torch.no_grad():
        last = model(**call).logits[0, -1]
        for count in (1, 2, 5, len(ONE)):
            torch.testing.assert_close(model(**call, logits_to_keep=count).logits[0, -1], last)


@every_model
@every_method
def test_without_a_cache_or_with_an_assistant_the_answer_is_the_same(name: str, reducer: str) -> None:
    model = MODELS[name]()
    call = inputs(name, [[*ONE, 4, 1, 2, 3]])
    with foveate.attach(model, reducer), torch.no_grad():
        greedy = model.generate(**call, max_new_tokens=8, **GREEDY)
        assert torch.equal(greedy, model.generate(**call, max_new_tokens=8, use_cache=False, **GREEDY))
        assert torch.equal(greedy, model.generate(**call, max_new_tokens=8, prompt_lookup_num_tokens=3, **GREEDY))


@pytest.mark.parametrize("reducer", ["fastv:keep=0.25,layer=2", "sparsevlm:keep=0.3,layers=2", "cdpruner:keep=0.25"])
def test_label_smoothing_is_refused_where_the_question_matters(reducer: str, tmp_path: Path) -> None:
    samples = [
        {"input_ids": torch.tensor(ONE + a), "labels": labels_of((len(ONE), False), (2, True))[0], "pixel_values": torch.randn(3, 32, 32)}
        for a in ([11, 12], [14, 15])
    ]

    def trained(reducer: str, smoothing: float) -> Any:
        how: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=smoothing, disable_tqdm=True, **how)
        model = llava()
        with foveate.attach(model, reducer) as run:
            Trainer(model, arguments, train_dataset=samples).train()
        return run.last

    with pytest.raises(FoveateError, match="label_smoothing_factor"):
        trained(reducer, 0.1)
    assert trained(reducer, 0.0).visual_tokens[-1] < 2 * PATCHES
    assert trained("divprune:keep=0.25", 0.1).visual_tokens[-1] == 8


def test_labels_that_are_no_tokens_are_left_alone() -> None:
    from transformers import Gemma3Config, Gemma3ForSequenceClassification, Gemma3TextConfig, SiglipVisionConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    vision = SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=4, vision_use_head=False)
    text = Gemma3TextConfig(**sizes, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, vocab_size=99, pad_token_id=0)
    config = Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=16, image_token_index=90, num_labels=3)
    model = Gemma3ForSequenceClassification(config).eval()
    ids = torch.tensor([[5] + [90] * 16 + [7, 8, 9]] * 2)
    call = {"input_ids": ids, "token_type_ids": (ids == 90).long(), "pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        bare = model(**call, labels=torch.tensor([0, 2]))
        for reducer in ("random:keep=1.0", "fastv:keep=1.0,layer=2", "pyramiddrop:keep=1.0"):
            with foveate.attach(model, reducer):
                assert torch.equal(model(**call, labels=torch.tensor([0, 2])).loss, bare.loss)
        for reducer in ("divprune:keep=0.5", "fastv:keep=0.5,layer=2"):
            with foveate.attach(model, reducer) as run:
                losses = [float(model(**call, labels=labels).loss) for labels in (torch.tensor([0, 2]), torch.tensor([1, 1]))]
                assert run.last.visual_tokens[-1] == 16
            assert losses[0] != losses[1]
