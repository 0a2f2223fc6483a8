"""Counts and pixels against transformers' own processors, which are asked by their size functions alone."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from foveate.tilings import Tiling, cut, parse

NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]


def sizes(count: int) -> list[tuple[int, int]]:
    """(width, height): of photographs, small, and long ones, squares and exact proportions among them."""
    draw = random.Random(0)
    found = []
    for number in range(count):
        w, h = draw.randint(1, 4000), draw.randint(1, 4000)
        if number % 5 == 0:
            w, h = draw.randint(1, 400), draw.randint(1, 400)
        elif number % 5 == 1:
            h = max(1, w * draw.randint(1, 6) // draw.randint(1, 6))
        found.append((w, h))
    return found


def of(processor: Any, **facts: Any) -> Any:
    """Its function from sizes to tokens, without tokenizer and pixels."""
    me = SimpleNamespace(**facts)
    me._get_unpadded_features = processor._get_unpadded_features.__get__(me)
    return processor._get_number_of_features.__get__(me)


NEXT_COUNTS = of(
    LlavaNextProcessor, image_processor=SimpleNamespace(image_grid_pinpoints=NEXT), patch_size=14, num_additional_image_tokens=0
)
ONEVISION_COUNTS = of(
    LlavaOnevisionProcessor,
    image_processor=SimpleNamespace(image_grid_pinpoints=ONEVISION),
    num_image_tokens=729,
    vision_aspect_ratio="anyres_max_9",
)


def of_next(w: int, h: int) -> int:
    return int(NEXT_COUNTS(h, w, 336, 336))


def of_onevision(w: int, h: int) -> int:
    return int(ONEVISION_COUNTS(h, w, 384, 384))


INTERN = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True)
IDEFICS = Idefics3ImageProcessorPil(size={"longest_edge": 4 * 364}, max_image_size={"longest_edge": 364})


def of_internvl(w: int, h: int) -> int:
    return 256 * INTERN.get_number_of_image_patches(h, w)


def of_idefics(w: int, h: int) -> int:
    return 169 * (IDEFICS.get_number_of_image_patches(h, w)[0] or 1)


def of_qwen(w: int, h: int) -> int:
    high, wide = smart_resize(h, w, 28, 56 * 56, 1280 * 28 * 28)
    return max(1, high // 28) * max(1, wide // 28)


@pytest.mark.parametrize(
    ("tiling", "theirs"),
    [("anyres", of_next), ("onevision", of_onevision), ("internvl", of_internvl), ("idefics3", of_idefics), ("native", of_qwen)],
)
def test_counts(tiling: str, theirs: Any) -> None:
    ours, chosen = parse(tiling), sizes(10_000)
    if tiling == "native":
        chosen = [(w, h) for w, h in chosen if max(w, h) <= 200 * min(w, h)]
    wrong = [(size, found, wanted) for size in chosen if (found := ours.plan(*size).tokens) != (wanted := theirs(*size))]
    assert wrong == []


def arrays(tiling: Tiling, picture: Image.Image, resample: int) -> list[np.ndarray]:
    return [np.asarray(view).transpose(2, 0, 1) for view in cut(picture, tiling.plan(*picture.size), resample)]


PLAIN = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
VIEW: dict[str, Any] = {"size": {"height": 336, "width": 336}, "crop_size": {"height": 336, "width": 336}}
SHAPES = [(200, 100), (97, 389), (300, 300), (640, 480), (33, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels(shape: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (shape[1], shape[0], 3), dtype=np.uint8))
    theirs: list[tuple[str, Any]] = [
        ("anyres", LlavaNextImageProcessorPil(**VIEW, image_grid_pinpoints=NEXT, do_center_crop=False)),
        ("onevision:grids=1x1..2x2", LlavaOnevisionImageProcessorPil(image_grid_pinpoints=[p for p in ONEVISION if max(p) <= 768])),
        ("internvl", INTERN),
    ]
    for spelled, processor in theirs:
        wanted = np.asarray(processor(picture, **PLAIN)["pixel_values"])
        wanted = wanted[0] if wanted.ndim == 5 else wanted
        found = arrays(parse(spelled), picture, int(processor.resample))
        assert len(found) == len(wanted)
        for view, other in zip(found, wanted, strict=True):
            assert np.array_equal(view, other), spelled


@pytest.mark.parametrize("shape", [(131, 77), (29, 1003), (256, 256), (28, 28), (997, 1009)])
def test_pixels_at_native_resolution(shape: tuple[int, int]) -> None:
    """The library's patches, 2 x 2 neighbours one after the other and every one twice (as two frames), put together again."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (shape[1], shape[0], 3), dtype=np.uint8))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28**2, "longest_edge": 1280 * 28**2})
    made = processor(picture, **PLAIN)
    _, rows, columns = made["image_grid_thw"][0]
    patches = np.asarray(made["pixel_values"]).reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    whole = patches.transpose(4, 5, 0, 2, 6, 1, 3, 7).reshape(3, 2, 14 * rows, 14 * columns)
    (view,) = arrays(parse("native"), picture, int(processor.resample))
    assert np.array_equal(whole[:, 0], view)
    assert np.array_equal(whole[:, 1], view)


@pytest.mark.parametrize("shape", [(300, 300), (200, 100), (97, 388), (31, 31)])
def test_pixels_of_idefics3_where_all_sides_are_whole_tiles(shape: tuple[int, int]) -> None:
    """Where the library's second resizing has nothing to do; its overview is then made of the first, ours of the picture."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (shape[1], shape[0], 3), dtype=np.uint8))
    wanted = np.asarray(IDEFICS(picture, **PLAIN)["pixel_values"])[0]
    found = arrays(parse("idefics3"), picture, int(IDEFICS.resample))
    assert len(found) == len(wanted)
    for view, other in zip(found[:-1], wanted[:-1], strict=True):
        assert np.array_equal(view, other)
