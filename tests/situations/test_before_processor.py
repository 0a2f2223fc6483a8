"""Reducers in front of the processor: whoever makes the inputs, every image is made smaller first, and afterwards none is."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor, Qwen2VLImageProcessorPil, Qwen2VLProcessor

import foveate
from foveate import FoveateError
from foveate.accounting import predict
from foveate.contract import BeforeProcessor, FromLayer
from foveate.inference import load_model
from foveate.inspect.catalogue import acts, needs
from foveate.reducers import METHODS, Downsample, Preparing, Reducer, before_processor, in_model, parse, prepare
from foveate.reducers.base import acting
from tests.conformance.family import tokenizer
from tests.tiny import llava as tiny_llava

QUARTER = parse("downsample:keep=0.25")
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endfor %}"
)


def llava() -> tuple[Any, str]:
    """Makes all images one size."""
    words, mark = tokenizer(image_token="<image>"), "<image>"
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    made = LlavaProcessor(images, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    made.chat_template = TEMPLATE.replace("MARK", mark)
    return made, mark


def qwen() -> tuple[Any, str]:
    """Of dynamic resolution: tokens are as many as the pixels make them."""
    words, mark = (
        tokenizer(["<|vision_start|>", "<|vision_end|>"], image_token="<|image_pad|>", video_token="<|video_pad|>"),
        "<|image_pad|>",
    )
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 128 * 128})
    made = _Qwen(images, words, _Videos())
    made.chat_template = TEMPLATE.replace("MARK", mark)
    return made, mark


class _Videos(Qwen2VLImageProcessorPil):
    """In place of the library's video processor, which wants torchvision, as does the check of what is handed in."""

    def __call__(self, videos: Any, **kwargs: Any) -> Any:
        return self.preprocess(videos, **kwargs)


class _Qwen(Qwen2VLProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


PROCESSORS = {"llava": llava, "qwen2_vl": qwen}
every_processor = pytest.mark.parametrize("name", PROCESSORS)


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


def smaller(images: Any) -> Any:
    return [smaller(image) for image in images] if isinstance(images, list) else prepare(QUARTER, images)


@every_processor
def test_every_way_to_hand_in_images(name: str, tmp_path: Path) -> None:
    processor, mark = PROCESSORS[name]()
    one, two = picture(0), picture(1, 40, 56)
    one.save(tmp_path / "one.png")
    text = [f"{mark} what is this", f"{mark} {mark} tell me"]
    how = {"return_tensors": "pt", "padding": True}
    given: list[tuple[Any, Any]] = [
        ([one, two, one], [one, two, one]),
        ([[one], [two, one]], [[one], [two, one]]),
        ([(one,), (two, one)], [[one], [two, one]]),
        ([str(tmp_path / "one.png"), two, one], [one, two, one]),
        ([np.asarray(one), two, torch.from_numpy(np.array(one)).permute(2, 0, 1)], [one, two, one]),
    ]
    bare = processor(images=[one, two, one], text=text, **how)
    for images, plain in given:
        expected = processor(images=smaller(plain), text=text, **how)
        with Preparing(processor, QUARTER):
            found = processor(images=images, text=text, **how)
        assert same(found, expected)
        assert not torch.equal(found["pixel_values"], bare["pixel_values"]) if name == "llava" else True
    if name == "qwen2_vl":
        assert expected["input_ids"].shape[1] < bare["input_ids"].shape[1] / 2
    assert same(processor(images=[one, two, one], text=text, **how), bare)


@every_processor
def test_chat_templates_with_their_images(name: str, tmp_path: Path) -> None:
    processor, _ = PROCESSORS[name]()
    picture(2).save(tmp_path / "two.png")
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}

    def chat(first: Any, **second: Any) -> Any:
        content = [{"type": "image", "image": first}, {"type": "text", "text": "what is this"}, {"type": "image", **second}]
        return processor.apply_chat_template([{"role": "user", "content": content}], **how)

    expected = chat(prepare(QUARTER, picture(1)), image=prepare(QUARTER, picture(2)))
    with Preparing(processor, QUARTER):
        assert same(chat(picture(1), path=str(tmp_path / "two.png")), expected)
        assert same(chat(picture(1), image=picture(2)), expected)
    assert not same(chat(picture(1), image=picture(2)), expected)


@every_processor
def test_an_image_processor_alone_and_one_that_is_called_by_itself(name: str) -> None:
    processor, _ = PROCESSORS[name]()
    images = processor.image_processor
    expected = images(prepare(QUARTER, picture(0)), return_tensors="pt")
    for given in (processor, images):
        with Preparing(given, QUARTER):
            assert same(images(picture(0), return_tensors="pt"), expected)
            assert same(images.preprocess(images=[picture(0)], return_tensors="pt"), expected)


@every_processor
def test_nothing_is_left_behind_and_nothing_is_saved(name: str, tmp_path: Path) -> None:
    processor, _ = PROCESSORS[name]()
    before = type(processor.image_processor), dict(vars(processor.image_processor)), processor.image_processor.to_dict()
    preparing = Preparing(processor, QUARTER)
    with preparing:
        assert processor.image_processor.to_dict() == before[2]
        assert type(processor.image_processor).__name__ == before[0].__name__
        assert isinstance(processor.image_processor, before[0])
        processor.image_processor.save_pretrained(tmp_path)
    preparing.remove()  # does nothing the second time
    with pytest.raises(TypeError), preparing:
        processor.image_processor(1)
    assert (type(processor.image_processor), vars(processor.image_processor), processor.image_processor.to_dict()) == before
    assert "downsample" not in (tmp_path / "preprocessor_config.json").read_text()
    with Preparing(processor, []):
        assert type(processor.image_processor) is before[0]


@every_processor
def test_copies_and_pickles_prepare_as_well(name: str) -> None:
    """As in the worker processes of a loader."""
    images = PROCESSORS[name]()[0].image_processor
    expected = images(prepare(QUARTER, picture(0)), return_tensors="pt")
    with Preparing(images, QUARTER):
        others = [copy.deepcopy(images), copy.copy(images), pickle.loads(pickle.dumps(images))]
    for other in others:
        assert same(other(picture(0), return_tensors="pt"), expected)
    assert not same(images(picture(0), return_tensors="pt"), expected)


def test_what_cannot_be_prepared_is_refused() -> None:
    processor, mark = qwen()
    with Preparing(processor, QUARTER):
        with pytest.raises(FoveateError, match="downsample prepares images and no videos"):
            processor(videos=[np.zeros((4, 32, 32, 3), dtype=np.uint8)], text=["<|video_pad|> what"])
        for images, what in (
            (np.zeros((8, 8, 3)), "ndarray of float64 and shape"),
            (torch.zeros(3, 8, 8), "Tensor of torch.float32"),
            (np.zeros((2, 8, 8, 3), dtype=np.uint8), r"ndarray of uint8 and shape \(2, 8, 8, 3\)"),
        ):
            with pytest.raises(FoveateError, match=f"downsample cannot prepare an image given as {what}"):
                processor.image_processor(images)
        with pytest.raises(FoveateError, match="already prepares its images"):
            Preparing(processor, QUARTER).install()
        with pytest.raises(FoveateError, match="already prepares its images"):
            Preparing(processor.image_processor, QUARTER).install()
    with pytest.raises(FoveateError, match="has no image processor, so downsample cannot act before it"):
        Preparing(processor.tokenizer, QUARTER).install()
    assert processor(images=[picture(0)], text=[mark])


def test_arrays_whose_channels_come_first_by_word() -> None:
    images = llava()[0].image_processor
    wide = np.random.default_rng(0).integers(0, 256, (3, 16, 3), dtype=np.uint8)  # 3 rows, 16 columns, or three channels of 16 by 3
    with Preparing(images, QUARTER):
        for order, pixels in (("channels_last", wide), ("channels_first", wide.transpose(1, 2, 0))):
            found = images(wide, input_data_format=order, return_tensors="pt")
            images_alone = images(Image.fromarray(np.ascontiguousarray(pixels)), return_tensors="pt")
            assert same(found, images_alone)


def test_a_processor_of_one_size_that_can_be_resized_makes_smaller_images() -> None:
    _, processor = load_model("asset:vlm", "cpu")
    size, tokens = processor.image_size, processor.num_image_tokens
    before = dict(vars(processor))
    text, how = [f"{processor.image_token}what"], {"return_tensors": "pt"}
    bare = processor(images=[picture(0)], text=text, **how)
    with Preparing(processor, QUARTER):
        assert (processor.image_size, processor.num_image_tokens) == (size // 2, tokens // 4)
        found = processor(images=[picture(0)], text=text, **how)
        assert found["input_ids"].shape[1] == bare["input_ids"].shape[1] - tokens * 3 // 4
        with pytest.raises(FoveateError, match="already prepares"):
            Preparing(processor, QUARTER).install()
    assert vars(processor) == before
    assert same(processor(images=[picture(0)], text=text, **how), bare)


# ---- the site among the others


def test_who_acts_where() -> None:
    reducers = parse("downsample:keep=0.5+vcc:layer=2,stride=2+downsample:keep=0.25+pyramiddrop:stages=40")
    assert before_processor(reducers) == [reducers[0], reducers[2]]
    assert in_model(reducers) == [reducers[1], reducers[3]]
    for name, method in METHODS.items():
        own = [method.from_dict({"keeps": "1:0.5"}) if name == "schedule" else method()]
        assert (before_processor(own), in_model(own)) == ((own, []) if name == "downsample" else ([], own))
        assert (method.prepare is not Reducer.prepare) == (name == "downsample")


def test_accounts_pass_it_by() -> None:
    assert acts(Downsample) == "the image, before the processor"
    assert needs(Downsample) == ""
    reducers = parse("downsample:keep=0.25+vcc:layer=2,stride=2")
    assert [type(site) for site, _, _ in acting(reducers, 4)] == [FromLayer]
    assert [type(site) for site in Downsample().sites(4)] == [BeforeProcessor]
    config = tiny_llava().config
    assert predict(config, images=2, text_tokens=3, reducers=reducers) == predict(config, images=2, text_tokens=3, reducers=reducers[1:])


@pytest.mark.parametrize("value", ["downsample:keep=0.25", "random:keep=0.5+downsample", "downsample+vcc:layer=2,stride=2"])
def test_training_has_no_place_for_it(value: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from foveate.train.values import ReducerString

    with pytest.raises(ValidationError, match="downsample acts on the image, before the processor: in training say the stage's image_size"):
        TypeAdapter(ReducerString).validate_python(value)
    assert TypeAdapter(ReducerString).validate_python("vcc:layer=2,stride=2") == "vcc:layer=2,stride=2"


@pytest.mark.parametrize("spelling", ["downsample:keep=0.25", "downsample:keep=0.5+divprune:keep=0.5"])
def test_attach_refuses_or_prepares(spelling: str) -> None:
    """A method that acts on the images is never skipped in silence: it wants the processor, and leaves it as it was."""
    model, processor = load_model("asset:vlm")
    prompt = [f"{processor.image_token}\nwhat number is printed?"]
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    bare = processor(text=prompt, images=[picture], return_tensors="pt")
    with pytest.raises(FoveateError, match=r"processor=processor"):
        foveate.attach(model, spelling)
    with foveate.attach(model, spelling, processor=processor) as run, torch.no_grad():
        inputs = processor(text=prompt, images=[picture], return_tensors="pt")
        model(**inputs)
        (keep,) = (r.keep for r in run.reducers if isinstance(r, Downsample))
        placeholders = [int((x["input_ids"] == model.config.image_token_id).sum()) for x in (bare, inputs)]
        assert placeholders[1] == pytest.approx(keep * placeholders[0], rel=0.2)
        assert run.last.visual_tokens[0] == placeholders[1] // len(run.reducers)
    again = processor(text=prompt, images=[picture], return_tensors="pt")
    assert torch.equal(again["pixel_values"], bare["pixel_values"])
