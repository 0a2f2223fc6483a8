"""Vision towers out of convolutions: their feature maps as tokens, one for each square patch, as other towers give them."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from foveate.bridges.windows import WAVES, Grid, waves
from foveate.errors import FoveateError

Level = tuple[Tensor, tuple[int, int]]
"""A feature map (images, channels, rows, columns), and the pixels that lie between its rows and between its columns."""


class MapsConfig(PreTrainedConfig):
    """What is common to these towers.

    - `hidden_size`: width of every level's tokens. `patch_size`: pixels of a token's side. `image_size`: the pictures that the network was
      trained on; it takes others. `places`: whether tokens say where in the picture they are (`MapTower.forward`).
    """

    hidden_size: int = 1280
    patch_size: int = 32
    image_size: int = 224
    num_channels: int = 3
    places: bool = False


class MapTower(PreTrainedModel):
    """A network whose levels are feature maps. The norms keep the statistics that they were trained with, in training too."""

    config_class = MapsConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # any will do: there is no attention

    def maps(self, pixel_values: Tensor) -> list[Level]:
        """The levels, fine before coarse."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **_: Any) -> BaseModelOutput | tuple[Any, ...]:
        """Pictures (images, 3, height, width), normalised -> `hidden_states`, each level as (images, patches, hidden_size) in raster order.

        All levels lie in the raster of `patch_size`: of a finer one the cells within a patch stand side by side in one token, a coarser
        one gives the same token several times, and what is missing to `hidden_size` is zero. Pixels at the right and the bottom that fill
        no patch are seen, but get no token. FoveateError where pictures are smaller than a patch, or a level is wider than a token.

        With `places`, sines and cosines of a token's place (`foveate.bridges.windows.waves`) are the last of the channels that a level
        leaves free, where it leaves as many: convolutions see the same thing alike everywhere.
        """
        patch, width = self.config.patch_size, self.config.hidden_size
        rows, columns = (side // patch for side in pixel_values.shape[-2:])
        if not rows or not columns:
            raise FoveateError(f"a picture of {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels has no patch of {patch} pixels")
        pictures = pixel_values.to(memory_format=torch.channels_last)
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (pixel_values, *self.parameters()))
        # The maps of one picture fit the caches of a processor, those of many do not.
        parts = [pictures] if trained or pictures.device.type != "cpu" else pictures.split(1)
        maps = [[tokens(level, patch, (rows, columns), width, self.config.places) for level in self.maps(part)] for part in parts]
        levels = tuple(torch.cat(level) for level in zip(*maps, strict=True))
        output = BaseModelOutput(last_hidden_state=levels[-1], hidden_states=levels)
        return output if return_dict is not False else output.to_tuple()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def tokens(level: Level, patch: int, grid: Grid, width: int, places: bool = False) -> Tensor:
    """A feature map as (images, rows * columns, width) in a `grid` (rows, columns) of patches; `MapTower.forward` says how."""
    features, strides = level
    inside = []  # cells of the map within a patch, down and across
    for axis, stride, side in ((2, strides[0], grid[0]), (3, strides[1], grid[1])):
        if patch % stride and stride % patch:
            raise FoveateError(f"patch_size {patch} and the {stride} pixels between this network's cells are no multiples of each other")
        if stride > patch:
            features = features.repeat_interleave(stride // patch, axis)
        inside.append(max(1, patch // stride))
        features = features.narrow(axis, 0, side * inside[-1])
    images, channels = features.shape[:2]
    own = channels * inside[0] * inside[1]
    if own > width:
        raise FoveateError(
            f"{inside[0]} x {inside[1]} cells of {channels} channels are more than hidden_size {width}; take a smaller patch_size"
        )
    cells = features.reshape(images, channels, grid[0], inside[0], grid[1], inside[1]).permute(0, 2, 4, 3, 5, 1)
    found = F.pad(cells.reshape(images, grid[0] * grid[1], own), (0, width - own))
    if places and own + 4 * WAVES <= width:
        found[..., -4 * WAVES :] = waves(grid, found)
    return found
