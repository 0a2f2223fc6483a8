"""Downsampling: sizes, what stays untouched, and what real processors make of the smaller image."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

from foveate import FoveateError
from foveate.contract import BeforeProcessor, View
from foveate.reducers import Downsample, parse, prepare, spell
from tests.reducers.ragged import counted


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("keep", "before", "after"),
    [
        (0.25, (336, 224), (168, 112)),
        (0.25, (335, 223), (168, 112)),  # half pixels round up
        (0.09, (335, 5), (101, 2)),  # 100.5 and 1.5: a float's root of .09 would give 100
        (0.5, (100, 200), (71, 141)),
        (1 / 9, (300, 30), (100, 10)),
        (0.0001, (30, 10), (1, 1)),
        (0.999, (10, 10), (10, 10)),
    ],
)
def test_both_sides_shrink_by_the_root(keep: float, before: tuple[int, int], after: tuple[int, int]) -> None:
    assert Downsample(keep).prepare(picture(*before)).size == after


def test_keeping_everything_is_the_same_image() -> None:
    image = picture(31, 17)
    assert Downsample(1.0).prepare(image) is image
    assert prepare(parse("random:keep=0.5+vcc"), image) is image


def test_a_constant_image_stays_constant_and_fine_stripes_become_grey() -> None:
    """The resize averages: single pixels picked out of the stripes would be black or white."""
    grey = Image.new("L", (64, 64), 77)
    assert set(np.unique(np.asarray(Downsample(0.25).prepare(grey)))) == {77}
    columns = np.zeros((64, 64), dtype=np.uint8)
    columns[:, ::2] = 255
    for image in (Image.fromarray(columns), Image.fromarray(columns).convert("P"), Image.fromarray(columns).convert("1")):
        small = np.asarray(Downsample(0.0625).prepare(image).convert("L"))
        assert small.shape == (16, 16)
        assert np.ptp(small) < 40
        assert 100 < small.mean() < 155


def test_several_act_one_after_the_other() -> None:
    assert prepare(parse("downsample:keep=0.25+downsample:keep=0.25"), picture(64, 32)).size == (16, 8)
    assert prepare([], picture(64, 32)).size == (64, 32)


def test_a_processor_of_dynamic_resolution_makes_fewer_tokens() -> None:
    processor = Qwen2VLImageProcessorPil()

    def tokens(image: Image.Image) -> int:
        return int(processor(image, return_tensors="pt")["image_grid_thw"].prod()) // 4

    image = picture(560, 448)
    assert tokens(image) == 20 * 16
    assert tokens(Downsample(0.25).prepare(image)) == 10 * 8
    assert tokens(Downsample(1.0).prepare(image)) == 20 * 16


def test_a_processor_of_one_size_makes_as_many_as_before() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture(64, 48)
    whole, small = (processor(i, return_tensors="pt")["pixel_values"] for i in (image, Downsample(0.25).prepare(image)))
    assert whole.shape == small.shape
    assert not (whole == small).all()


def test_it_acts_nowhere_in_the_model() -> None:
    reducer = Downsample()
    assert reducer.sites(32) == [BeforeProcessor()]
    assert reducer.visual_tokens(144, 4) == [144] * 4  # of the tokens that the processor made of the smaller image
    with pytest.raises(FoveateError, match="the processor makes them of the smaller image"):
        counted(reducer, 576, 576)
    with pytest.raises(FoveateError, match=r"call foveate.reducers.prepare before the processor"):
        reducer.reduce(View.of(torch.zeros(1, 4, 2)))


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -0.25, 64, True, "half"])
def test_impossible_shares(keep: object) -> None:
    with pytest.raises(FoveateError, match=r"keep=.* is not possible"):
        Downsample(keep)  # type: ignore[arg-type]


def test_the_spelling_is_read_back() -> None:
    for reducer in (Downsample(), Downsample(0.5)):
        assert parse(spell([reducer])) == [reducer]
        assert Downsample.from_dict(reducer.to_dict()) == reducer
