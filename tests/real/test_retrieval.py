"""Retrieval across drawing styles: who is nearest, by an oracle in plain loops, and what is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from foveate.errors import FoveateError
from foveate.real import retrieval as module
from foveate.real.retrieval import SIDE, encoded, markdown, open_tower, pixels, retrieval, share, shown
from foveate.real.stock import Stock
from foveate.real.things import hashed
from tests.real.little_stock import little_stock
from tests.real.towers import save_lite

STYLES = ("fluent", "noto", "photograph")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return little_stock(tmp_path_factory.mktemp("stock"), STYLES)


def mean_colour(images: Sequence[Image.Image]) -> Tensor:
    return torch.tensor(np.array([np.asarray(image).mean((0, 1)) for image in images]))


def test_the_nearest_is_found_in_plain_loops(stock: Stock) -> None:
    rows = retrieval(stock, {"colour": mean_colour, "pixels": pixels}, most=9, progress=False)
    assert [(row.sought, row.among) for row in rows] == [(a, b) for a in STYLES for b in STYLES if a != b]
    for row in rows:
        assert row.n == 9
        common = sorted(name for name in stock.pictures if {row.sought, row.among} <= {one.style for one in stock.pictures[name]})
        things = sorted(common, key=hashed)[:9]
        colours = []
        for style in (row.sought, row.among):
            own = [np.asarray(shown(stock, style, name), dtype=np.float64).mean((0, 1)) for name in things]
            colours.append([one - np.mean(own, axis=0) for one in own])
        right = 0
        for number, one in enumerate(colours[0]):
            cosines = [float(one @ other) / math.sqrt(float(one @ one) * float(other @ other)) for other in colours[1]]
            right += max(range(9), key=cosines.__getitem__) == number
        assert row.right["colour"] == pytest.approx(right / 9)


def test_who_knows_every_thing_is_always_right_and_who_knows_none_is_not(stock: Stock) -> None:
    things = {name: number for number, name in enumerate(stock.pictures)}
    images = [(number, shown(stock, style, name)) for name, number in things.items() for style in STYLES]
    by_bytes = {image.tobytes(): number for number, image in images if image is not None}

    def knows(images: Sequence[Image.Image]) -> Tensor:
        return torch.eye(len(things))[[by_bytes[image.tobytes()] for image in images]]

    def none(images: Sequence[Image.Image]) -> Tensor:
        return torch.ones(len(images), 4)

    for row in retrieval(stock, {"knows": knows, "none": none}, progress=False):
        assert row.right["knows"] == 1
        assert row.right["none"] <= 1 / row.n + 1e-6


def test_a_picture_is_laid_on_white_in_the_middle(stock: Stock) -> None:
    image = shown(stock, "noto", next(iter(stock.pictures)))
    assert image is not None
    assert (image.size, image.mode) == ((SIDE, SIDE), "RGB")
    found = np.asarray(image)
    assert (found[[0, -1]] == 255).all()
    assert (found[:, [0, -1]] == 255).all()
    rows, columns = np.nonzero((found != 255).any(-1))
    for least, most in ((rows.min(), rows.max()), (columns.min(), columns.max())):
        assert abs(least + most - SIDE) <= 6  # in the middle
    assert max(np.ptp(rows), np.ptp(columns)) == pytest.approx(SIDE / 1.15, abs=6)
    assert shown(stock, "twemoji", next(iter(stock.pictures))) is None


def test_pixels_are_means_of_blocks() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    blocks = np.asarray(image, dtype=np.float64).reshape(16, 14, 16, 14, 3).mean((1, 3))
    np.testing.assert_allclose(pixels([image])[0].numpy(), blocks.ravel(), atol=1)


def test_a_tower_is_the_mean_of_its_patches(tmp_path: Path) -> None:
    """Without [CLS], and not resized."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=32
    )
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path / "vit")
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "vit")
    save_lite(tmp_path / "lite")
    images = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for seed in (0, 1)]
    found = open_tower(str(tmp_path / "vit"))(images)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        states = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, states[:, 1:].mean(1), rtol=1e-4, atol=1e-4)
    assert open_tower(str(tmp_path / "lite"))(images).shape == (2, 96)
    assert encoded(open_tower(str(tmp_path / "lite")), images).norm(dim=-1).tolist() == pytest.approx([1, 1])
    with pytest.raises(FoveateError, match="is no tower: there is no"):
        open_tower(str(tmp_path))


def test_what_cannot_be_compared_is_told(stock: Stock) -> None:
    alone = stock.only(lambda name, picture: picture.style == "noto")
    with pytest.raises(FoveateError, match="no two of the styles noto show the same things; give several styles"):
        retrieval(alone, {"pixels": pixels}, progress=False)


def test_the_table_has_the_mean() -> None:
    rows = [module.Row("a", "b", 10, {"pixels": 0.5, "vit": 0.25}), module.Row("b", "a", 20, {"pixels": 0.25, "vit": 1.0})]
    assert markdown(rows).splitlines()[2:] == [
        "| a | b | 10 | 10.0 % | 50.0 % | 25.0 % |",
        "| b | a | 20 | 5.0 % | 25.0 % | 100.0 % |",
        "| mean | | | | 37.5 % | 62.5 % |",
    ]
    assert share(torch.eye(3), torch.eye(3)[[0, 2, 1]]) == pytest.approx(1 / 3)
