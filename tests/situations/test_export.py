"""A Foveate model that is a LLaVA in all but name becomes one; what is none is told why.

Of one image the logits are the same to the last bit. Several at once lie otherwise in memory when they come to LLaVA's projector, whose
products are then rounded otherwise.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import foveate
from foveate.cli import main
from foveate.errors import FoveateError
from foveate.model import FoveateForConditionalGeneration
from foveate.model.export import export, to_llava
from foveate.reducers import parse, save_reducers
from tests.conformance.family import picture
from tests.model.tiny_backbones import byte_tokenizer

SIDES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = SIDES | {"image_size": 32, "patch_size": 8}
TEXT = SIDES | {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "initializer_range": 0.3}


def assembled(tower: str = "clip_vision_model", lm: str = "llama", bridge: Any = None, options: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return FoveateForConditionalGeneration.from_backbones(
        AutoModel.from_config(CONFIG_MAPPING[tower](**VISION | ({"mlp_ratio": 2} if "dino" in tower else {}))),
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[lm](**TEXT | changes)),
        bridge or {"kind": "mlp"},
        tokenizer=byte_tokenizer(),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        **options or {},
    )


@pytest.mark.parametrize(
    ("tower", "lm", "changes", "options"),
    [
        ("clip_vision_model", "llama", {"num_key_value_heads": 1}, {}),
        ("clip_vision_model", "llama", {"tie_word_embeddings": True}, {"vision_feature_layer": -1}),
        ("siglip_vision_model", "qwen2", {"num_key_value_heads": 1}, {}),  # no token before the patches
        ("clip_vision_model", "qwen3", {"head_dim": 16, "num_key_value_heads": 1}, {"vision_feature_layer": [1, -2]}),
        ("clip_vision_model", "mistral", {"num_key_value_heads": 1}, {"dtype": torch.bfloat16}),
        ("dinov2", "gpt_neox", {}, {}),
    ],
)
def test_it_is_the_same_model(tower: str, lm: str, changes: Any, options: Any, tmp_path: Path) -> None:
    model, processor = assembled(tower, lm, options=options, **changes)
    one: dict[str, Any] = {"text": ["<image>\nwhat is it?"], "images": [picture((40, 50), 1)]}
    two = {"text": [*one["text"], "a <image> b"], "images": [*one["images"], picture((32, 32), 2)], "padding": True, "padding_side": "left"}
    inputs = processor(**one, return_tensors="pt")
    before = model(**inputs).logits
    export(model, processor, tmp_path / "out")

    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert (type(plain), type(again)) == (LlavaForConditionalGeneration, LlavaProcessor)
    assert torch.equal(plain(**again(**one, return_tensors="pt")).logits, before)
    assert torch.equal(model(**inputs).logits, before)  # the exported model is as it was
    ours, theirs = processor(**two, return_tensors="pt"), again(**two, return_tensors="pt")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    how = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(**inputs, **how), model.generate(**inputs, **how))
    if model.dtype == torch.float32:
        torch.testing.assert_close(plain(**theirs).logits, model(**ours).logits, rtol=0, atol=1e-4)
        assert torch.equal(plain.generate(**theirs, **how), model.generate(**ours, **how))
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert again.apply_chat_template(conversation) == processor.apply_chat_template(conversation)
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == changes.get("tie_word_embeddings", False)


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("a chain_of_sight bridge", {"bridge": {"kind": "chain_of_sight", "scales": [[4, 4], [2, 1]]}}),
        ("a pixel_shuffle bridge", {"bridge": {"kind": "pixel_shuffle"}}),
        ("the mlp bridge normalises levels", {"bridge": {"kind": "mlp", "norm": True}}),
        ("the mlp bridge says where tokens are", {"bridge": {"kind": "mlp", "places": True}}),
        ("images of 48 pixels and its tower was made for 32", {"options": {"image_size": 48}}),
        ("the model cuts images by internvl", {"options": {"tiling": "internvl"}}),
        ("5 tokens before its patches", {"tower": "dinov2_with_registers"}),
        ("logits differ", {"lm": "gemma2", "final_logit_softcapping": 3.0, "head_dim": 16, "num_key_value_heads": 1}),
        ("logits differ", {"lm": "granite", "logits_scaling": 4.0, "num_key_value_heads": 1}),
        ("head of PhiForCausalLM is no matrix alone", {"lm": "phi"}),
    ],
)
def test_what_is_no_llava_is_told_why(reason: str, make: dict[str, Any], tmp_path: Path) -> None:
    model, processor = assembled(**make)
    with pytest.raises(FoveateError, match=reason):
        export(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_our_own_models_and_only_into_empty_folders(tmp_path: Path) -> None:
    model, processor = assembled()
    plain, _ = to_llava(copy.deepcopy(model), processor)
    with pytest.raises(FoveateError, match=r"only Foveate's own models.*LlavaForConditionalGeneration"):
        export(plain, processor, tmp_path / "out")
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FoveateError, match="is there already"):
        export(model, processor, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_and_the_reducers_that_go_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = assembled()
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    save_reducers(parse("vcc:layer=1,stride=2"), tmp_path / "trained")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "trained"), str(tmp_path / "out")])
    assert ended.value.code == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    with foveate.attach(plain) as run:
        assert str(run.reducers[0]) == "vcc:layer=1,stride=2"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "out"), str(tmp_path / "again")])
    assert ended.value.code == 2
    assert "only Foveate's own models" in capsys.readouterr().err
