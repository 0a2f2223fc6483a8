"""Models of transformers as checkpoints: their own processors decide what stands for an image, and the labels find the answers in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from foveate.data.collate import Collator
from foveate.data.conversations import Conversation
from foveate.data.library import LibraryCollator, image_plan
from foveate.errors import FoveateError
from foveate.train.run import main
from tests.conformance.families.qwen2_vl import PIXELS
from tests.conformance.families.qwen2_vl import words as qwen_words
from tests.conformance.family import families, picture

# Contents as lists of parts, with the family's own tokens around an image; the end of a turn is an end of sequence.
TEMPLATE = (
    "{% for m in messages %}{{ 'which ' if m.role == 'user' else 'one ' }}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ 'MARK' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'one ' }}{% endif %}"
)
SAMPLES = [
    ([("user", "<image>\nwhat is this"), ("assistant", "a red cat")], 1),
    ([("user", "<image>\n<image>\nin two"), ("assistant", "the dog"), ("user", "and now"), ("assistant", "no")], 2),
    ([("user", "tell me a story"), ("assistant", "yes")], 0),
]
FIXED = {"llava": 16, "gemma3": 18, "deepseek_vl": 16}  # tokens that stand for an image; the others' depend on the image
VARYING = ("idefics3", "llava_next", "ovis2", "qwen2_5_vl")


class Pictures(Qwen2_5_VLProcessor):
    """Without videos, whose processor needs a library that is not always there."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path | None, Any, tuple[int, int]]]:
    """(folder of the checkpoint, its processor, size of a picture) of a family, made once."""
    made: dict[str, tuple[Path | None, Any, tuple[int, int]]] = {}

    def one(name: str) -> tuple[Path | None, Any, tuple[int, int]]:
        if name not in made:
            family = families()[name]
            template = TEMPLATE.replace("MARK", family.prompt(1, "").strip())
            if name == "qwen2_5_vl":
                made[name] = None, Pictures(Qwen2VLImageProcessorPil(**PIXELS), qwen_words(), None), family.size
            else:
                folder = tmp_path_factory.mktemp(name)
                torch.manual_seed(0)
                family.build(folder)
                made[name] = folder, AutoProcessor.from_pretrained(folder), family.size
            made[name][1].chat_template = template
        return made[name]

    return one


def samples(size: tuple[int, int], *chosen: int) -> list[Conversation]:
    """Pictures of several sizes and shapes."""
    sizes = [size, (size[0] * 2, size[1]), (size[0], size[1] * 3)]
    return [
        Conversation(i, f"s{i}", SAMPLES[i][0], [picture(sizes[(i + k) % 3], 10 * i + k) for k in range(SAMPLES[i][1])]) for i in chosen
    ]


def runs(batch: dict[str, Any], row: int) -> list[list[int]]:
    """Of a row, the stretches of supervised tokens."""
    found: list[list[int]] = [[]]
    for token in batch["labels"][row].tolist():
        if token >= 0:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


@pytest.mark.parametrize("name", [*FIXED, *VARYING])
def test_tokens_are_the_processors_own(name: str, load: Any) -> None:
    _, processor, size = load(name)
    collator = LibraryCollator(processor, 4096)
    mixed = samples(size, 2, 0, 1)  # without a picture, with one, with two and two turns
    batch = collator(mixed)
    words = processor.tokenizer
    for row, sample in enumerate(mixed):
        text = collator.renderer.render(sample.turns)[0]
        own = processor(text=[text], images=[sample.images], return_tensors="pt") if sample.images else words([text], return_tensors="pt")
        length = own["input_ids"].shape[1]
        assert batch["input_ids"][row, :length].tolist() == own["input_ids"][0].tolist()
        assert batch["attention_mask"][row].sum() == length
        answers = [f"{text} </s>" for role, text in sample.turns if role == "assistant"]
        assert [words.decode(run) for run in runs(batch, row)] == answers
        assert (batch["labels"][row, length:] == -100).all()
        for key, value in own.items():  # token types and whatever else has a number for each token
            if key != "labels" and value.shape == own["input_ids"].shape:
                assert batch[key][row, :length].tolist() == value[0].tolist()


@pytest.mark.parametrize("name", [*FIXED, *VARYING])
def test_images_are_the_processors_own(name: str, load: Any) -> None:
    """Every other input as the processor makes it of all pictures of the batch at once: nothing is resized or padded again."""
    _, processor, size = load(name)
    collator = LibraryCollator(processor, 4096)
    mixed = samples(size, 0, 2, 1)
    batch, shown = collator(mixed), [sample for sample in mixed if sample.images]
    texts = [collator.renderer.render(sample.turns)[0] for sample in shown]
    own = processor(text=texts, images=[sample.images for sample in shown], padding=True, return_tensors="pt")
    extra = {key for key, value in own.items() if value.shape != own["input_ids"].shape}
    assert "pixel_values" in extra
    for key in extra:
        assert torch.equal(batch[key], own[key])
    assert set(batch) == extra | {"input_ids", "attention_mask", "labels"} | (
        {"token_type_ids", "mm_token_type_ids"} & set(processor.model_input_names)
    )
    alone = collator(samples(size, 2))
    assert not extra & set(alone)  # a batch of text only


@pytest.mark.parametrize("name", [*FIXED, *VARYING])
def test_plans_have_the_tokens_of_each_image(name: str, load: Any) -> None:
    folder, processor, size = load(name)
    token = processor.image_token_id if folder is None else AutoConfig.from_pretrained(folder).image_token_id
    collator = LibraryCollator(processor, 4096, token)
    mixed = samples(size, 2, 0, 1)
    batch = collator(mixed)
    for row, sample in enumerate(mixed):
        alone = [Conversation(0, "one", [("user", "<image>"), ("assistant", "a")], [image]) for image in sample.images]
        assert [plan.visual for plan in sample.plans] == [int((collator([one])["input_ids"] == token).sum()) for one in alone]
        assert sum(plan.visual for plan in sample.plans) == int((batch["input_ids"][row] == token).sum())
    counts = {plan.visual for sample in mixed for plan in sample.plans}
    assert counts == {16} if name in FIXED else min(counts) > 0
    assert name in (*FIXED, "ovis2") or len(counts) > 1


@pytest.mark.parametrize("name", [*FIXED, "idefics3", "llava_next", "ovis2"])
def test_batches_are_what_the_models_take(name: str, load: Any) -> None:
    """A row's loss does not depend on its neighbours: what is padded is not seen, and each picture is the one of its row."""
    folder, processor, size = load(name)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    collator = LibraryCollator(processor, 4096)

    def loss(*chosen: int) -> tuple[float, int]:
        batch = collator(samples(size, *chosen))
        count = int((batch["labels"][:, 1:] >= 0).sum())
        with torch.no_grad():
            return float(model(**batch).loss) * count, count

    together, apart = loss(0, 2, 1), [loss(i) for i in range(3)]
    assert together[1] == sum(count for _, count in apart)
    assert together[0] == pytest.approx(sum(value for value, _ in apart), rel=1e-4)


@pytest.mark.parametrize("name", [*FIXED, "idefics3", "llava_next"])
def test_cutting_to_length(name: str, load: Any) -> None:
    _, processor, size = load(name)
    [sample] = samples(size, 1)
    whole = LibraryCollator(processor, 4096)([sample])
    length = whole["input_ids"].shape[1]
    shorter = LibraryCollator(processor, length - 2)
    cut = shorter([sample])
    assert (cut["input_ids"] == whole["input_ids"][:, : length - 2]).all()
    assert [(one.tokens, one.of, one.answers) for one in shorter.cut] == [(2, 5, 1)]
    token = processor.tokenizer.convert_tokens_to_ids("in")  # the first word after the pictures
    after = int((whole["input_ids"][0] == token).nonzero()[0])
    assert LibraryCollator(processor, after + 5)([sample])["input_ids"].shape[1] == after + 5
    with pytest.raises(FoveateError, match=f"s1 has no token of an answer within max_length {after}"):
        LibraryCollator(processor, after)([sample])
    with pytest.raises(FoveateError, match=rf"s1 has {length} tokens; cutting it to max_length {after - 1} would cut an image"):
        LibraryCollator(processor, after - 1)([sample])


def test_how_long_an_image_is(load: Any) -> None:
    plans = {name: image_plan(load(name)[1]) for name in (*FIXED, *VARYING)}
    assert {name: plan and (plan.tokens, plan.visual) for name, plan in plans.items()} == {
        **{name: (tokens, 16) for name, tokens in FIXED.items()},
        **dict.fromkeys(VARYING),
    }


def test_what_is_not_understood_is_refused(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor, size = load("llava")
    with pytest.raises(FoveateError, match="LlavaProcessor says itself what stands for an image"):
        Collator(processor, 99)
    collator = LibraryCollator(processor, 4096)
    monkeypatch.setattr(processor, "chat_template", "a " + processor.chat_template)
    real = type(processor).__call__

    def moved(self: Any, text: list[str], **given: Any) -> Any:
        return real(self, text=["the " + one for one in text], **given)

    monkeypatch.setattr(type(processor), "__call__", moved)
    with pytest.raises(FoveateError, match="sample s0: LlavaProcessor makes other tokens of the conversation"):
        collator(samples(size, 0))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", ["gemma3", "idefics3", "llava_next"])
def test_they_are_trained(name: str, load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run with pictures of several shapes, samples without, and the log's account of its images."""
    folder, processor, size = load(name)
    processor.save_pretrained(folder)
    rows = []
    for sample in samples(size, 0, 1, 2):
        names = [f"{sample.id}-{k}.png" for k in range(len(sample.images))]
        for image, file in zip(sample.images, names, strict=True):
            image.save(tmp_path / file)
        said = [{"from": "human" if role == "user" else "gpt", "value": text} for role, text in sample.turns]
        rows.append({"id": sample.id, "conversations": said} | ({"image": names} if names else {}))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.yaml").write_text(f"""
name: t
output: {tmp_path}/out
model: {{checkpoint: {folder}}}
log_steps: 1
workers: 0
stages:
  - name: s
    data: {{conversations: {tmp_path}/data.json, images: {tmp_path}}}
    train: {{bridge: true, lm: true}}
    steps: 2
    batch_size: 3
    learning_rate: 1.0e-3
    max_length: {116 if name == "llava_next" else 4096}
""")
    final = main(tmp_path / "recipe.yaml")
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in log] == [3, 6]
    cut = 1 if name == "llava_next" else 0  # of 117 tokens
    assert ("max_length 116 cuts 2 of 6 samples, 2 of their 10 answer tokens are lost" in caplog.text) == bool(cut)
    assert log[-1]["supervised_tokens"] == 2 * (4 + 5 + 2 - cut)
    assert log[-1]["tokens_per_image"] == (16 if name == "gemma3" else pytest.approx(log[0]["tokens_per_image"]))
    assert log[-1]["tokens_per_image"] > 1
    assert AutoModelForImageTextToText.from_pretrained(final).generation_config.eos_token_id == processor.tokenizer.eos_token_id
