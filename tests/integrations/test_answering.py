"""What stands between lmms-eval and a model, on the shipped model: arguments, batches, conversations, answers and their counts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.data.films import gif, number_of

from foveate.data.clips import Uniform
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.inference import load_model
from foveate.integrations.lmms_eval import answering
from foveate.integrations.lmms_eval.answering import Messages, Reply
from foveate.reducers import METHODS, parse
from foveate.world.pictures import render, scene

PATCHES, LAYERS = 64, 6  # of the shipped model
GREEDY = answering.generation({}, 12)


@pytest.fixture(scope="module")
def shipped() -> Iterator[tuple[Any, Any]]:
    with torch.inference_mode():
        yield load_model("asset:vlm", "cpu")


def picture(number: int) -> Image.Image:
    return Image.fromarray(render(scene(f"world/0/{number}", "test")))


def asked(text: str, *pictures: int) -> Messages:
    return answering.conversation(answering.question(text, [picture(number) for number in pictures]))


def answers(shipped: tuple[Any, Any], reducers: str, conversations: list[Messages], options: dict[str, Any] = GREEDY) -> list[Reply]:
    model, processor = shipped
    with attach(model, reducers) as run:
        return answering.answer(model, processor, run, conversations, options)


# ---- arguments


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("fastv:keep=0.25:layer=3", "fastv:keep=0.25,layer=3"),
        ("fastv:keep=0.25,layer=3", "fastv:keep=0.25,layer=3"),
        ('"vcc:layer=2,stride=8+random:keep=0.5"', "vcc:layer=2,stride=8+random:keep=0.5"),
        ("vcc:layer=2:stride=8+random:keep=0.5:seed=3+divprune", "vcc:layer=2,stride=8+random:keep=0.5,seed=3+divprune"),
        (
            "schedule:keeps=1:0.75/3:0.4:positions=keep+vcc:layer=2:stride=8",
            "schedule:keeps=1:0.75/3:0.4,positions=keep+vcc:layer=2,stride=8",
        ),
        ("none", "none"),
        ("", ""),
    ],
)
def test_colons_stand_for_commas(written: str, meant: str) -> None:
    assert answering.spelling(written) == meant


def test_every_method_can_be_spelled_with_colons() -> None:
    for method in METHODS.values():
        for text in (method.name, *method.examples):
            assert parse(answering.spelling(text.replace(",", ":"))) == parse(text)


@pytest.mark.parametrize("value", ["auto", "0", -1, "2.5", None])
def test_numbers_are_whole(value: Any) -> None:
    assert answering.whole("batch_size", "16") == 16
    with pytest.raises(FoveateError, match=r"batch_size=.* is not possible; give a whole number"):
        answering.whole("batch_size", value)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ({}, {"max_new_tokens": 99, "num_beams": 1, "do_sample": False}),
        ({"until": ["\n\n"], "image_aspect_ratio": "pad"}, {"max_new_tokens": 99, "num_beams": 1, "do_sample": False}),
        ({"max_new_tokens": 5, "num_beams": 3, "temperature": 0}, {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {"max_new_tokens": 99, "num_beams": 1, "do_sample": False}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 3}, {"max_new_tokens": 99, "num_beams": 1, "do_sample": False}),
        ({"temperature": 1, "top_p": None}, {"max_new_tokens": 99, "num_beams": 1, "do_sample": True, "temperature": 1.0}),
        ({"do_sample": True, "top_p": 0.9}, {"max_new_tokens": 99, "num_beams": 1, "do_sample": True, "top_p": 0.9}),
    ],
)
def test_generation_is_greedy_unless_sampling_is_asked_for(task: dict[str, Any], options: dict[str, Any]) -> None:
    found = answering.generation(task, 99)
    assert found == options
    assert type(found.get("temperature", 1.0)) is float  # transformers takes no other


@pytest.mark.parametrize(
    ("until", "left"),
    [(None, "a red star. b\n\nc"), ([], "a red star. b\n\nc"), ("star", "a red"), (["\n\n", ".", "z", ""], "a red star"), (["a"], "")],
)
def test_the_first_stop_ends_the_text(until: Any, left: str) -> None:
    assert answering.cut("a red star. b\n\nc ", until) == left


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 9))), st.integers(1, 5))
def test_batches_hold_every_request_once(keys: list[tuple[str, int]], size: int) -> None:
    found = answering.batches(keys, size)
    assert sorted(number for batch in found for number in batch) == list(range(len(keys)))
    for batch in found:
        assert 1 <= len(batch) <= size
        assert len({keys[number][0] for number in batch}) == 1
    for options in "xyz":
        lengths = [keys[number][1] for batch in found for number in batch if keys[number][0] == options]
        assert lengths == sorted(lengths, reverse=True)
        assert sum(keys[batch[0]][0] == options for batch in found) == -(-len(lengths) // size)


# ---- conversations


@pytest.mark.parametrize(
    ("text", "visuals", "parts"),
    [
        ("what?", ["a"], ["image a", "text what?"]),
        ("what?", "a", ["image a", "text what?"]),
        ("what?", ["a", "b"], ["image a", "image b", "text what?"]),
        ("<image>\nis it <image> ?", ["a", "b"], ["image a", "text is it ", "image b", "text  ?"]),
        ("what is <image> ?", ["a", "b"], ["image a", "image b", "text what is <image> ?"]),
        ("what?", ["a.mp4"], ["video a.mp4", "text what?"]),
        ("what?", None, ["text what?"]),
        ("what?", [], ["text what?"]),
    ],
)
def test_images_stand_at_their_markers_or_in_front(text: str, visuals: Any, parts: list[str]) -> None:
    [message] = answering.question(text, visuals)
    assert message["role"] == "user"
    assert [f"{part['type']} {part.get('text', part.get('url'))}" for part in message["content"]] == parts


def test_images_are_decoded_and_prepared(tmp_path: Path) -> None:
    Image.new("L", (40, 20), 9).save(tmp_path / "grey.png")
    messages = [{"role": "system", "content": "be brief"}, *answering.question("what?", [str(tmp_path / "grey.png")])]
    for reducers, size in (([], (40, 20)), (parse("downsample:keep=0.25"), (20, 10))):
        system, user = answering.conversation(messages, reducers)
        assert system == {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
        image = user["content"][0]["image"]
        assert (image.mode, image.size) == ("RGB", size)
        assert np.unique(np.asarray(image)).tolist() == [9]


def test_a_processor_without_videos_is_shown_frames(tmp_path: Path) -> None:
    film = str(gif(tmp_path / "a.gif", [100] * 4))
    messages = [{"role": "user", "content": [{"type": "video", "url": film}, {"type": "text", "text": "what?"}]}]
    for reducers, side in (([], 32), (parse("downsample:keep=0.25"), 16)):
        [user] = answering.conversation(messages, reducers, Uniform(frames=2), videos=False)
        assert [part["type"] for part in user["content"]] == ["image", "image", "text"]
        assert [number_of(part["image"]) for part in user["content"][:2]] == [1, 3]
        assert user["content"][0]["image"].size == (side, side)
    [user] = answering.conversation(messages, [], Uniform(frames=2))
    assert len(user["content"][0]["video"]) == 2


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "url": "nowhere.mp4"}, "cannot read the clip nowhere.mp4: it is missing"),
        ({"type": "video", "url": [0.0]}, "brings video, but only images, files of videos and text"),
        ({"type": "audio", "url": "clip.wav"}, "brings audio, but only images, files of videos and text"),
        ({"type": "image", "url": "nowhere/clip.mp4"}, "brings 'nowhere/clip.mp4', which is no image"),
        ({"type": "image", "url": {"array": [0.0]}}, "brings a dict, which is no image"),
    ],
)
def test_what_is_no_image_is_named(part: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        answering.conversation([{"role": "user", "content": [part]}])


def test_chat_templates_must_read_parts(shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    processor = shipped[1]
    answering.check_template(processor)
    for template, message in ((None, "no chat template"), ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no lists of parts")):
        monkeypatch.setattr(processor, "chat_template", template)
        with pytest.raises(FoveateError, match=message):
            answering.check_template(processor)


# ---- answers


@pytest.mark.parametrize("reducers", ["none", "fastv:keep=0.25,layer=2", "fastervlm:keep=0.25"])
def test_batches_answer_what_single_prompts_do(shipped: tuple[Any, Any], reducers: str) -> None:
    """Against prompts written out by hand, one at a time."""
    model, processor = shipped
    together = [("describe the image.", [1]), ("how many objects are there?", [2, 3]), ("what number is printed?", [27])]
    found = answers(shipped, reducers, [asked(text, *pictures) for text, pictures in together])
    for (text, pictures), answer in zip(together, found, strict=True):
        prompt = "<s><user>" + "<image>\n" * len(pictures) + text + "<assistant>"
        inputs = processor(text=prompt, images=[picture(number) for number in pictures], return_tensors="pt")
        with attach(model, reducers):
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.output_tokens == len(ids)
    assert len({answer.text for answer in found}) == 3


COUNTED = {
    "none": [64] * LAYERS,
    "fastervlm:keep=0.25": [16] * LAYERS,
    "fastv:keep=0.25,layer=2": [64, 64, 16, 16, 16, 16],
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("reducers", COUNTED)
def test_tokens_are_counted_where_they_are(shipped: tuple[Any, Any], reducers: str, beams: int) -> None:
    words = shipped[1].tokenizer("<s><user>\nis there a star?<assistant>")["input_ids"]
    conversations = [asked("is there a star?", 4), asked("is there a star?", 5, 6)]
    one, two = answers(shipped, reducers, conversations, {**GREEDY, "num_beams": beams})
    assert one.visual_tokens == tuple(COUNTED[reducers])
    assert two.visual_tokens == tuple(2 * count for count in COUNTED[reducers])
    assert one.input_tokens == len(words) + COUNTED[reducers][0]
    assert two.input_tokens == len(words) + 1 + 2 * COUNTED[reducers][0]  # another line break


def test_text_alone_after_images(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    with attach(model, "fastv:keep=0.25,layer=2") as run:
        answering.answer(model, processor, run, [asked("is there a star?", 4)], GREEDY)
        [answer] = answering.answer(model, processor, run, [asked("is there a star?")], GREEDY)
    assert answer.visual_tokens == ()
    assert answer.input_tokens == len(processor.tokenizer("<s><user>is there a star?<assistant>")["input_ids"])


def test_not_a_number_is_an_error(shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = shipped[0].lm_head.forward
    monkeypatch.setattr(shipped[0].lm_head, "forward", lambda states: forward(states) * float("nan"))
    with pytest.raises(FoveateError, match="not finite"):
        answers(shipped, "none", [asked("is there a star?", 4)])
