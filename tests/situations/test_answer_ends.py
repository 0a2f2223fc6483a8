"""Where an answer ends: in training, in what is saved, and where a model is asked. What else a model's own configuration would change."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from foveate import inference
from foveate.data.chat import Renderer
from foveate.data.collate import Collator
from foveate.data.conversations import Conversation
from foveate.errors import FoveateError
from foveate.inference import ask, model_inputs, prompts
from foveate.inference.answering import without_thought
from foveate.inspect.look import _ask
from foveate.integrations.lmms_eval import answering as harness
from foveate.model import from_backbones
from foveate.train.opening import save_end
from foveate.train.run import main
from foveate.world import resolve
from foveate.world.pictures import render, scene
from foveate.world.questions import conversation
from tests.model.tiny_backbones import COS, llama_config, save_clip, save_lm
from tests.situations import templates
from tests.situations.templates import ENDS, processor
from tests.tiny import llava
from tests.train import tiny_training

# ---- in training ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDS)
def test_the_end_is_found_in_the_template(name: str) -> None:
    template, end, appended = ENDS[name]
    renderer = Renderer(processor(template))
    assert renderer.end_id == renderer.tokenizer.convert_tokens_to_ids(end)
    assert renderer.end == appended
    for turns in ([("user", "a"), ("assistant", "b")], [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]):
        found = renderer.tokenise(turns)
        assert found.ids[found.supervised][-1] == renderer.end_id  # the last supervised token
        assert (found.ids[found.supervised] == renderer.end_id).sum() == len(turns) // 2


def test_an_end_that_is_no_token_is_not_taken_for_one() -> None:
    """A model would have to write such an end letter by letter, and no generation stops at it."""
    renderer = Renderer(processor(templates.CHATML.replace("<|im_end|>", "<|stop|>")))
    text, [(start, end)] = renderer.render([("user", "a"), ("assistant", "b")])
    assert (text[start:end], renderer.end_id) == ("b</s>", renderer.tokenizer.eos_token_id)


def test_the_shipped_models_learn_what_they_have_learnt_before() -> None:
    """The hash is of what the collator of the published runs makes of these scenes: tokens, mask and labels."""
    samples = []
    for i in range(6):
        turns: list[tuple[str, str]] = []
        drawn = scene(f"golden/{i}")
        for number, asked in enumerate(conversation(drawn)):
            turns += [("user", ("<image>\n" if number == 0 else "") + asked.question), ("assistant", asked.answer)]
        samples.append(Conversation(i, str(i), turns, [Image.fromarray(render(drawn, 64))]))
    samples.append(Conversation(9, "t", [("user", "hello "), ("assistant", " a red star. ")], []))
    batch = Collator(AutoProcessor.from_pretrained(resolve("asset:vlm")), 2048)(samples)
    digest = hashlib.sha256(b"".join(batch[name].numpy().tobytes() for name in ("input_ids", "attention_mask", "labels")))
    assert int((batch["labels"] >= 0).sum()) == 140
    assert digest.hexdigest()[:16] == "b35372ac99d7098b"


# ---- in what is saved ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes folders (tower, language model) with a chat template; the eos of the model is </s>."""
    folder = tmp_path_factory.mktemp("backbones")
    tower = save_clip(folder / "tower")

    def make(name: str, **generation: Any) -> tuple[Path, Path]:
        words = templates.tokenizer(ENDS[name][0])
        lm = save_lm(folder / name, words, llama_config(len(words)))
        GenerationConfig(eos_token_id=257, bos_token_id=256, **generation).to_json_file(lm / "generation_config.json")
        return tower, lm

    return make


@pytest.mark.parametrize(
    ("name", "eos"),
    [("chatml", "<|im_end|>"), ("gemma2", "<end_of_turn>"), ("llama3", "<|eot_id|>"), ("phi3", "</s>"), ("mistral", "</s>")],
)
def test_the_end_is_saved(name: str, eos: str, backbones: Any, tmp_path: Path) -> None:
    """In the configurations before the old one, and in the tokenizer unless the template (Phi-3's) writes the old one by its name."""
    tower, lm = backbones(name)
    model, made = from_backbones(tower, lm, COS)
    before = Renderer(made).render([("user", "a"), ("assistant", "b")])
    save_end(model, made)
    save_end(model, made)  # as in the next stage
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    model, made = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    end = made.tokenizer.convert_tokens_to_ids(ENDS[name][1])
    wanted = 257 if end == 257 else [end, 257]
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id == wanted
    assert made.tokenizer.eos_token == eos
    assert Renderer(made).render([("user", "a"), ("assistant", "b")]) == before
    assert set(inference.ends(model, made.tokenizer)) == {end, 257}


@pytest.mark.parametrize("shipped", [{"temperature": 0.9, "top_p": 0.6}, {"top_k": 4, "penalty_alpha": 0.6}, {"length_penalty": 2.0}, {}])
def test_a_configuration_that_the_library_refuses_to_save_is_no_loss(shipped: dict[str, Any], backbones: Any, tmp_path: Path) -> None:
    """Vicuna's has a temperature and does not sample: a trained model with it could not be saved."""
    tower, lm = backbones("mistral", **shipped)
    model, _ = from_backbones(tower, lm, COS)
    model.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert (again.eos_token_id, again.bos_token_id, again.temperature) == (257, 256, None)


@pytest.mark.usefixtures("home")
def test_a_base_model_is_trained_to_stop(backbones: Any, tmp_path: Path, caplog: Any) -> None:
    """A run from a recipe with its own template: saved ends, template and what was cut."""
    tower, lm = backbones("mistral")
    tiny_training.save_data(tmp_path, samples=6)
    (tmp_path / "own.jinja").write_text(templates.CHATML)
    recipe = f"""
name: t
output: {tmp_path}/out
model: {{vision: {tower}, text: {lm}, bridge: {{kind: chain_of_sight, scales: [[4, 4], [2, 1]]}}, chat_template: {tmp_path}/own.jinja}}
log_steps: 1
workers: 0
stages:
  - name: s
    data: {{conversations: {tmp_path}/data.json, images: {tmp_path}/images}}
    train: {{bridge: true}}
    steps: 1
    batch_size: 2
    learning_rate: 1.0e-3
    max_length: 75
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    final = main(tmp_path / "recipe.yaml")
    assert "max_length 75 cuts 3 of 6 samples" in caplog.text
    model, made = AutoModelForImageTextToText.from_pretrained(final), AutoProcessor.from_pretrained(final)
    assert model.generation_config.eos_token_id == [made.tokenizer.convert_tokens_to_ids("<|im_end|>"), 257]
    assert made.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]) == (
        "<|im_start|>user\n<image>\na<|im_end|>\n"
    )


# ---- where a model is asked ----------------------------------------------------------------------------------------------------------


class Talker:
    """Says the same to every prompt, and pads."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, says: list[int], eos: Any = 257) -> None:
        self.says, self.generation_config = says, GenerationConfig(eos_token_id=eos)

    def generate(self, input_ids: Tensor, generation_config: GenerationConfig, **given: Any) -> Tensor:
        self.given = generation_config
        said = torch.tensor([self.says]).repeat(len(input_ids), 1)
        return torch.cat([input_ids, said], 1)


@pytest.mark.parametrize("name", ["chatml", "phi3", "gemma2", "llama3", "mistral", "vicuna"])
def test_answers_stop_at_the_templates_end(name: str) -> None:
    """Also where the model's own configuration does not know of it."""
    template, end, _ = ENDS[name]
    words = templates.tokenizer(template)
    ids = words(f"red{end}\nblue{end}", add_special_tokens=False)["input_ids"]
    model = Talker(ids)
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    for skip in (False, True):
        said = inference.answer(model, words, inputs, end=Renderer(processor(template)).end_id, skip_special_tokens=skip)
        assert [(one.text, one.tokens, one.thinking) for one in said] == [("red", 4, False)] * 2
    assert set(model.given.eos_token_id) == {257, words.convert_tokens_to_ids(end)}


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llava()


PROMPT = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
HOSTILE: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 5.0, "top_p": 0.9},
    {"repetition_penalty": 9.0},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 3, "length_penalty": -2.0},
    {"min_new_tokens": 12},
    {"min_length": 30},
    {"suppress_tokens": list(range(40))},
    {"begin_suppress_tokens": list(range(60))},
    {"forced_eos_token_id": 3, "max_length": 9},
    {"forced_bos_token_id": 3},
    {"bad_words_ids": [[token] for token in range(40)]},
    {"sequence_bias": [[[4], 1e9]]},
    {"exponential_decay_length_penalty": [1, 9.0]},
    {"stop_strings": ["a"]},
    {"max_time": 1e-9},
    {"renormalize_logits": True, "guidance_scale": 9.0},
    {"num_return_sequences": 2, "num_beams": 2},
    {"return_dict_in_generate": True, "output_scores": True},
]


def spoken(model: Any, words: Any, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any], **options: Any) -> list[inference.Said]:
    config = GenerationConfig(eos_token_id=2, bos_token_id=1)
    for name, value in own.items():
        setattr(config, name, value)
    monkeypatch.setattr(model, "generation_config", config)
    with torch.inference_mode():
        return inference.answer(model, words, PROMPT, **{"max_new_tokens": 8, **options})


WORDS = SimpleNamespace(eos_token_id=2, pad_token_id=0, decode=lambda ids, skip_special_tokens=False: " ".join(map(str, ids)))


@pytest.mark.parametrize("own", HOSTILE, ids=lambda own: next(iter(own)))
def test_answers_are_greedy_whatever_the_model_ships(own: dict[str, Any], tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = spoken(tiny, WORDS, monkeypatch, {})
    assert plain == spoken(tiny, WORDS, monkeypatch, own)
    ids = PROMPT["input_ids"]
    with torch.inference_mode():  # by hand
        for _ in range(8):
            ids = torch.cat([ids, tiny(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    wanted = [row[: row.index(2)] if 2 in row else row for row in ids[:, 5:].tolist()]
    assert [one.text for one in plain] == [" ".join(map(str, row)) for row in wanted]


@pytest.mark.parametrize(
    ("options", "moved"), [({"num_beams": 4}, False), ({"repetition_penalty": 50.0}, True), ({"suppress_tokens": list(range(60))}, True)]
)
def test_what_a_harness_asks_for_applies(options: dict[str, Any], moved: bool, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = spoken(tiny, WORDS, monkeypatch, {}), spoken(tiny, WORDS, monkeypatch, {}, **options)
    assert len(other) == 2
    assert (plain != other) or not moved
    assert len(spoken(tiny, WORDS, monkeypatch, {}, max_new_tokens=3)[0].text.split()) <= 3


def test_logits_that_are_not_finite(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = tiny.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with pytest.raises(FoveateError, match="not finite"):
            spoken(tiny, WORDS, monkeypatch, {})
    finally:
        handle.remove()


# ---- thoughts ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "text", "thinking"),
    [
        ("<think>\n\n</think>\n\nred", "red", False),
        ("<think>It is blue. No.</think> red ", "red", False),
        ("\n<think>It is bl", "", True),
        ("so it is.\n</think>\n\nred", "red", False),  # opened by the prompt
        ("[THINK]hm[/THINK]red", "red", False),
        ("[THINK]hm", "", True),
        ("◁think▷hm◁/think▷red", "red", False),
        ("<seed:think>hm</seed:think>red", "red", False),
        ("red", "red", False),
        ("what I think> is <think", "what I think> is <think", False),
        ("red <think> blue", "red <think> blue", False),  # only in front
        ("", "", False),
    ],
)
def test_thoughts_are_no_part_of_an_answer(said: str, text: str, thinking: bool) -> None:
    assert without_thought(said) == (text, thinking)
    words = templates.tokenizer(templates.QWEN3)
    ids = words(said + "<|im_end|>", add_special_tokens=False)["input_ids"]
    for skip in (False, True):
        [one] = inference.answer(
            Talker(ids), words, {"input_ids": torch.zeros(1, 3, dtype=torch.long)}, end=ids[-1], skip_special_tokens=skip
        )
        assert (one.text, one.tokens, one.thinking) == (text, len(ids), thinking)


def test_every_way_of_asking_closes_the_thought(backbones: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation, pictures and the harness put the prompt of training, and stop where it has stopped."""
    tower, lm = backbones("qwen3")
    model, made = from_backbones(tower, lm, COS)
    picture = Image.new("RGB", (32, 32))
    text, [(start, _)] = Renderer(made).render([("user", "<image>\nwhat?"), ("assistant", "red")])
    wanted = made(text=[text[:start]], images=[[picture]], return_tensors="pt")["input_ids"].tolist()
    end = made.tokenizer.convert_tokens_to_ids("<|im_end|>")
    seen = []

    def generate(self: Any, **given: Any) -> Tensor:
        seen.append((given["input_ids"].tolist(), end in given["generation_config"].eos_token_id))
        said = made.tokenizer("<think>blue?</think>red<|im_end|>", return_tensors="pt")["input_ids"]
        return torch.cat([given["input_ids"], said], 1)

    monkeypatch.setattr(type(model), "generate", generate)
    asked = prompts(made, ["what?"])
    assert ask(model, made, [picture], [[0]], asked, 4).texts == ["red"]
    assert _ask(model, made, [picture], asked[0], [], 4).answer == "red"
    [one] = harness.answer(model, made, None, [harness.conversation(harness.question("what?", [picture]))], {"max_new_tokens": 4})
    assert one.text == "red"
    assert seen == [(wanted, True)] * 3
    assert model_inputs(made, [[picture]], asked)["input_ids"].tolist() == wanted
