"""A language model with real knowledge, inside of the library's classes and our own, with a random tower: attaching changes no answer.

    python -m pytest tests/real/test_smollm2.py --prompts 100

asks a hundred prompts, of every method on every class, for some hours of one core; the suite asks two, of four of them. Skipped where
SmolLM2 is not prepared.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
)

import foveate
from foveate.errors import NotApplicable
from foveate.model import from_backbones
from foveate.reducers import METHODS, in_model
from tests.real.cache import cached
from tests.real.conftest import PROMPTS

CLASSES = ("llava", "smolvlm", "foveate")
TOKENS, NEW = 16, 8  # of a picture, and of an answer
# By method: a setting that reduces, and one that keeps everything.
SETTINGS = {name: (method.examples[0], method.keeps_all[0]) for name, method in METHODS.items() if in_model([method()])}
FEW = ("fastv", "divprune", "pyramiddrop", "tome")  # in the model, before it, in several places, in the tower

PLACES = "France Germany Italy Spain Japan China Egypt Canada Peru Kenya Norway Greece Turkey India Brazil Cuba Poland Iran Chile Ghana"
THINGS = "lemon rocket dog violin bicycle teapot hammer mushroom castle umbrella tractor guitar zebra lighthouse candle drum kite anchor"
QUESTIONS = [
    *(f"What is the capital of {place}?" for place in PLACES.split()),
    *(f"Name a city in {place}." for place in PLACES.split()),
    *(f"What is a {thing} used for?" for thing in THINGS.split()),
    *(f"Is a {thing} bigger than a house?" for thing in THINGS.split()),
    *(f"What is {a} plus {b}?" for a in range(2, 8) for b in range(1, 5)),
]


@dataclass(eq=False)
class Loaded:
    """A model with SmolLM2 inside, its tokenizer, the word that stands for a visual token, and the shape of its pictures."""

    model: Any
    tokenizer: Any
    placeholder: str
    shape: tuple[int, ...]

    def inputs(self, questions: list[str], pictures: bool = True) -> dict[str, Tensor]:
        """Chat prompts, each with a picture of its own before the question, padded on the left."""
        seen = self.placeholder * TOKENS if pictures else ""
        asked = [[{"role": "user", "content": seen + question}] for question in questions]
        texts = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        made = self.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        inputs = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        if pictures:
            seeds = [QUESTIONS.index(question) for question in questions]
            inputs["pixel_values"] = torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return inputs

    def answers(self, inputs: dict[str, Tensor]) -> Tensor:
        made: Tensor = self.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return made


@functools.cache
def language_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(cached("smollm2"), dtype=torch.float32).eval()


@functools.cache
def load(name: str) -> Loaded:
    torch.manual_seed(0)
    folder = cached("smollm2")
    tokenizer, lm, placeholder = AutoTokenizer.from_pretrained(folder), language_model(), "<file_sep>"
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8}
    if name == "foveate":
        with tempfile.TemporaryDirectory() as tower:
            CLIPVisionModel(CLIPVisionConfig(**vision, image_size=32, initializer_factor=5.0)).save_pretrained(tower)
            CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tower)
            model, processor = from_backbones(tower, folder, {"kind": "mlp"}, add_image_token=True, dtype=torch.float32)
        return Loaded(model.eval(), processor.tokenizer, "<image>", (3, 32, 32))
    placed = {"text_config": lm.config, "image_token_id": tokenizer.convert_tokens_to_ids(placeholder), "tie_word_embeddings": True}
    if name == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**vision, image_size=32), **placed))
        shape: tuple[int, ...] = (3, 32, 32)
    else:
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(vision_config=SmolVLMVisionConfig(**vision, image_size=64), scale_factor=2, **placed)
        )
        shape = (1, 3, 64, 64)
    model.get_decoder().load_state_dict(lm.model.state_dict())
    model.lm_head.load_state_dict(lm.lm_head.state_dict())
    model.generation_config = lm.generation_config
    return Loaded(model.eval(), tokenizer, placeholder, shape)


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> bool:
    return int(request.config.getoption("--prompts", PROMPTS)) > PROMPTS


@pytest.fixture
def questions(request: pytest.FixtureRequest) -> list[str]:
    count = int(request.config.getoption("--prompts", PROMPTS))
    assert 0 < count <= len(QUESTIONS), f"there are {len(QUESTIONS)} prompts"
    return QUESTIONS[:: len(QUESTIONS) // count][:count]


def batches(questions: list[str]) -> Iterator[list[str]]:
    return (questions[start : start + 10] for start in range(0, len(questions), 10))


@functools.lru_cache(maxsize=200)
def bare(name: str, questions: tuple[str, ...], pictures: bool) -> Tensor:
    loaded = load(name)
    return loaded.answers(loaded.inputs(list(questions), pictures))


def attach(name: str, reducers: str) -> Any:
    try:
        return foveate.attach(load(name).model, reducers)
    except NotApplicable as reason:
        pytest.skip(f"{reason.reason.name}: {reason}")


def test_it_knows_the_capital_of_france() -> None:
    lm, tokenizer = language_model(), AutoTokenizer.from_pretrained(cached("smollm2"))
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(lm.generate(ids, max_new_tokens=2, do_sample=False)[0]) == "The capital of France is Paris."


@pytest.mark.parametrize("name", CLASSES)
def test_without_a_picture_it_answers_as_the_language_model_alone(name: str, questions: list[str]) -> None:
    """Bare, and with a method attached that would cut a picture."""
    loaded, lm = load(name), language_model()
    for some in batches(questions):
        inputs = loaded.inputs(some, pictures=False)
        right = lm.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(bare(name, tuple(some), False), right)
        with attach(name, "divprune:keep=0.25+pyramiddrop"):
            assert torch.equal(loaded.answers(inputs), right)


@pytest.mark.parametrize("name", CLASSES)
def test_a_random_picture_is_looked_at(name: str, questions: list[str]) -> None:
    """Else the tests with pictures would show nothing: another picture, another distribution."""
    loaded, inputs = load(name), load(name).inputs(questions[:1])
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    with torch.no_grad():
        assert not torch.allclose(loaded.model(**inputs).logits[0, -1], loaded.model(**other).logits[0, -1], atol=1e-2)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_who_keeps_everything_changes_no_answer(name: str, method: str, whole: bool, questions: list[str]) -> None:
    if not whole and method not in (FEW if name == "foveate" else FEW[:1]):
        pytest.skip("with --prompts 100")
    loaded = load(name)
    for some in batches(questions):
        inputs = loaded.inputs(some)
        with attach(name, SETTINGS[method][1]):
            made = loaded.answers(inputs)
        assert torch.equal(made, bare(name, tuple(some), True)), loaded.tokenizer.batch_decode(made)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_with_fewer_tokens_a_batch_is_its_prompts_and_the_cache_is_the_whole_run(
    name: str, method: str, whole: bool, questions: list[str]
) -> None:
    if not whole and method not in (FEW if name == "foveate" else FEW[:1]):
        pytest.skip("with --prompts 100")
    loaded, asked = load(name), questions[:3]
    inputs = loaded.inputs(asked)
    N = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    # A special token would be taken for one more picture, or end the answer.
    options |= {"max_new_tokens": 4, "suppress_tokens": sorted(loaded.tokenizer.added_tokens_decoder)}
    with attach(name, SETTINGS[method][0]) as run:
        singles = [loaded.model.generate(**loaded.inputs([question]), **options) for question in asked]
        out = loaded.model.generate(**inputs, **options)
        maps = run.maps
    assert min(run.last.visual_tokens) < TOKENS * len(asked)
    for row, alone in enumerate(singles):
        torch.testing.assert_close(out.logits[0][row], alone.logits[0][0], rtol=1e-3, atol=2e-3)
        assert torch.equal(out.sequences[row, -4:], alone.sequences[0, -4:])
    longer = inputs | {
        "input_ids": out.sequences[:, :-1],
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1),
    }
    longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with foveate.attach(loaded.model, maps=maps), torch.no_grad():
        again = loaded.model(**longer, use_cache=False).logits
    for step in range(4):
        torch.testing.assert_close(out.logits[step], again[:, N - 1 + step], rtol=1e-3, atol=2e-3)


def test_with_the_real_tower_too_nothing_changes_where_all_is_kept() -> None:
    cached("efficientnet")
    model, processor = from_backbones(
        "real:efficientnet", cached("smollm2"), {"kind": "mlp"}, vision_feature_layer=-1, add_image_token=True, dtype=torch.float32
    )
    count = model.model.bridge.tokens(model.grid)
    assert count == 49
    loaded = Loaded(model.eval(), processor.tokenizer, "<image>" * count, (3, 224, 224))
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>" * count + QUESTIONS[0]}], tokenize=False, add_generation_prompt=True
    )
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 224, 224)}
    right = loaded.answers(inputs)
    for reducers in ("fastv:keep=1.0", "divprune:keep=1.0"):
        with foveate.attach(model, reducers):
            assert torch.equal(loaded.answers(inputs), right)
    with foveate.attach(model, "divprune:keep=0.25+pyramiddrop") as run:
        loaded.answers(inputs)
    assert run.last.visual_tokens[0] == 12
    assert run.last.visual_tokens[-1] < 12
