"""Backbones in folders, a way to assemble them, and pictures."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.model.tiny_backbones import Assembled, Backbones, save_clip, save_lm

from foveate.model import FoveateForConditionalGeneration


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    """A CLIP tower (32 px, patch 8, 3 blocks) and a Llama, each with its processor."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("backbones")
    return save_clip(root / "clip"), save_lm(root / "llama")


@pytest.fixture
def assemble(folders: Backbones) -> Callable[..., Assembled]:
    def build(bridge: Any = None, **options: Any) -> Assembled:
        return FoveateForConditionalGeneration.from_backbones(
            options.pop("vision", folders[0]), options.pop("text", folders[1]), bridge or {"kind": "mlp"}, **options
        )

    return build


@pytest.fixture
def picture() -> Callable[[int], Image.Image]:
    def make(seed: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))

    return make
