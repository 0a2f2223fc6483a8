"""Language models of other makes: served whole, or refused by name before anything is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, CLIPImageProcessorPil, CLIPVisionModel

import foveate
from foveate.errors import FoveateError
from foveate.model import FoveateForConditionalGeneration
from foveate.train.plan import plan
from foveate.train.run import main as train
from tests.conformance.family import picture
from tests.model.tiny_backbones import byte_tokenizer, save_lm
from tests.train import tiny_training

BASE = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "initializer_range": 0.3}
SIDES = BASE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
GROUPED = SIDES | {"num_key_value_heads": 1}
HEADS = GROUPED | {"head_dim": 16}
SHORT = BASE | {"n_embd": 32, "n_layer": 3, "n_head": 2}
WIDE = BASE | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SERVED: dict[str, dict[str, Any]] = {
    "gemma2": HEADS,
    "gpt_neox": SIDES,
    "mistral": GROUPED,
    "mixtral": GROUPED,
    "opt": WIDE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},  # learned positions
    "phi": SIDES,
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "smollm3": GROUPED,  # some layers without positions
}
BARE: dict[str, dict[str, Any]] = {  # whole as models, without reducers and recipes
    "gpt2": SHORT | {"n_positions": 128},
    "gptj": SHORT | {"rotary_dim": 8},
    "falcon": WIDE,
    "falcon:alibi": WIDE | {"alibi": True},
    "bloom": BASE | {"hidden_size": 32, "n_layer": 3, "n_head": 2},
    "mpt": BASE | {"d_model": 32, "n_layers": 3, "n_heads": 2},
    "xglm": BASE | {"d_model": 32, "num_layers": 3, "attention_heads": 2, "ffn_dim": 48},
}
REFUSED: dict[str, dict[str, Any]] = {
    "mamba": BASE | {"hidden_size": 32, "num_hidden_layers": 3},
    "mamba2": BASE | {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "rwkv": BASE | {"hidden_size": 32, "num_hidden_layers": 3},
    "xlnet": {"vocab_size": 260, "d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 48},
}


def config(name: str) -> Any:
    return CONFIG_MAPPING[name.partition(":")[0]](**(SERVED | BARE | REFUSED)[name])


def assembled(name: str) -> Any:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config(name)).eval()
    tower = CLIPVisionModel(CONFIG_MAPPING["clip_vision_model"](**SIDES | {"initializer_range": 0.02}, image_size=32, patch_size=8))
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    how = {"tokenizer": byte_tokenizer(), "image_processor": images}
    return lm, *FoveateForConditionalGeneration.from_backbones(tower, lm, {"kind": "mlp"}, **how)


def prompts(processor: Any, *texts: str) -> Any:
    pictures = [picture((32, 32), seed) for seed in range(len(texts))]
    return processor(text=list(texts), images=pictures, padding=True, padding_side="left", return_tensors="pt")


GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("name", [*SERVED, *BARE])
def test_the_model_is_whole(name: str, tmp_path: Path) -> None:
    """Text is the language model's own; with an image: a loss, decoding as the whole run again, rows as alone, saved and loaded."""
    lm, model, processor = assembled(name)
    text = processor(text=["hello there"], return_tensors="pt")
    one, both = prompts(processor, "<image>\nwhat"), prompts(processor, "<image>\nwhat", "<image>\nwhat is this?")
    with torch.no_grad():
        assert torch.equal(model(**text).logits, lm(**text).logits)
        assert model(**both, labels=both["input_ids"]).loss.isfinite()
        ids = one["input_ids"]
        for _ in range(GREEDY["max_new_tokens"]):
            logits = model(input_ids=ids, pixel_values=one["pixel_values"], use_cache=False).logits[:, -1]
            logits[:, 257] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        answers = model.generate(**both, **GREEDY)[:, -4:]
        assert model.generate(**one, **GREEDY).tolist() == ids.tolist()
        assert answers[0].tolist() == ids[0, -4:].tolist()
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForImageTextToText.from_pretrained(tmp_path)(**both).logits, model(**both).logits)


@pytest.mark.parametrize("reducer", ["divprune:keep=0.5,positions=keep", "fastv:keep=0.5,layer=1"])
@pytest.mark.parametrize("name", SERVED)
def test_reducers_leave_what_masking_would(name: str, reducer: str) -> None:
    """What is dropped in front of layer 0 is as if it had been masked out of the bare model; batches are as their rows."""
    _, model, processor = assembled(name)
    one, both = prompts(processor, "<image>\nwhat"), prompts(processor, "<image>\nwhat", "<image>\nwhat is this?")
    with torch.no_grad():
        with foveate.attach(model, reducer) as run:
            alone = model.generate(**one, **GREEDY)
            assert model.generate(**both, **GREEDY)[0, -4:].tolist() == alone[0, -4:].tolist()
            cut = model(**one).logits
            made, left = run.last.provenance(2), run.last.visual_tokens
        assert left[-1] == 8
        with foveate.attach(model, "none"):
            assert torch.equal(model(**one).logits, model(**one).logits)
        if reducer.startswith("divprune"):
            kept = sorted(source for slot in range(made.target.shape[1]) for source in made.sources(0, slot))
            mask = torch.zeros_like(one["attention_mask"])
            mask[0, kept] = 1
            masked = model(**{**one, "attention_mask": mask, "position_ids": torch.arange(mask.shape[1])[None]}).logits
            torch.testing.assert_close(cut[0, kept], masked[0, kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BARE)
def test_reducers_are_refused_by_name(name: str) -> None:
    _, model, _ = assembled(name)
    with pytest.raises(FoveateError, match=r"(no decoder layers named `layers`|by code of its own).*reducers cannot be attached"):
        foveate.attach(model, "divprune:keep=0.5")


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_forget_the_prompt_is_refused_by_name(name: str) -> None:
    with pytest.raises(FoveateError, match=rf"(?i){name.rstrip('2')}\w+ cannot be the language model here: .*takes no past_key_values"):
        assembled(name)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "mamba"])
def test_a_recipe_refuses_it_by_name_before_any_step(name: str, tmp_path: Path) -> None:
    tiny_training.save_backbones(tmp_path)
    tiny_training.save_data(tmp_path)
    save_lm(tmp_path / "other", tiny_training.tokenizer(), CONFIG_MAPPING[name](**((BARE | REFUSED)[name] | {"vocab_size": 320})))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_training.RECIPE.format(root=tmp_path, output="out").replace(f"{tmp_path}/lm", f"{tmp_path}/other"))
    with pytest.raises(FoveateError, match=rf"(?i){name}\w+ (has no decoder layers|cannot be the language model|does not support)"):
        train(recipe)
    log = tmp_path / "out" / "log.jsonl"
    assert not log.exists() or not log.read_text()


@pytest.mark.parametrize("name", ["tiny.gguf", "deep/llama-Q4.gguf", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("part", ["text", "vision"])
def test_a_file_is_no_model_folder(part: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"GGUF" + bytes(32))
    parts = {"text": str(tmp_path / "lm"), "vision": str(tmp_path / "tower")}
    tiny_training.save_backbones(tmp_path)
    what = {"text": "language model", "vision": "vision tower"}[part]
    says = (
        r"is a GGUF file.*foveate real unpack .*\.gguf FOLDER, and give the folder"
        if name.endswith("gguf")
        else "is one file; give the folder"
    )
    with pytest.raises(FoveateError, match=f"the {what} '{file}' {says}"):
        FoveateForConditionalGeneration.from_backbones(**{**parts, part: str(file)}, bridge={"kind": "mlp"})


@pytest.mark.parametrize("command", [train, plan])
@pytest.mark.parametrize("part", ["lm", "tower"])
def test_a_recipe_says_the_same_of_a_file(part: str, command: Any, tmp_path: Path) -> None:
    tiny_training.save_backbones(tmp_path)
    tiny_training.save_data(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_training.RECIPE.format(root=tmp_path, output="out").replace(f"{tmp_path}/{part}\n", f"{tmp_path}/tiny.gguf\n"))
    with pytest.raises(FoveateError, match=r"tiny.gguf' is a GGUF file"):
        command(recipe)
