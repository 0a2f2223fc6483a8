"""EfficientNet-lite: inverted bottlenecks without squeeze-and-excitation, ReLU6 everywhere, as TensorFlow pads.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv 1905.11946; the lite variant is Google's,
"Higher accuracy on vision models with EfficientNet-Lite" (2020).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from foveate.real.maps import Level, MapsConfig, MapTower

LITE0 = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))


class EfficientNetLiteConfig(MapsConfig):
    """The network: `stem` channels, then `stages` of (blocks, kernel, stride, expansion, channels), then `hidden_size` channels.

    `levels`: the strides whose last maps the tower gives, before the one behind the stages, which it always gives."""

    model_type = "foveate_efficientnet_lite"

    stem: int = 32
    stages: Any = LITE0
    levels: Any = (8, 16, 32)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.stages, self.levels = [list(stage) for stage in self.stages], list(self.levels)


class Convolution(nn.Module):
    """A convolution whose result has ceil(side / stride) cells, a batch norm, and ReLU6 unless it is `linear`."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=1e-3)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        down, across = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[-2:])
        x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))  # the odd one at the end
        x = self.norm(self.conv(x))
        return x if self.linear else F.relu6(x)


class Block(nn.Module):
    """Widen, look around in every channel by itself, narrow again; the input is added where it has the same shape."""

    def __init__(self, width: int, kernel: int, stride: int, expansion: int, out: int) -> None:
        super().__init__()
        wide = width * expansion
        self.expand = Convolution(width, wide) if expansion > 1 else nn.Identity()
        self.depthwise = Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = Convolution(wide, out, linear=True)
        self.stride, self.adds = stride, stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class EfficientNetLite(MapTower):
    config_class = EfficientNetLiteConfig
    _no_split_modules = ["Block"]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = Convolution(config.num_channels, config.stem, 3, 2)
        self.blocks = nn.ModuleList()
        width = config.stem
        for repeats, kernel, stride, expansion, out in config.stages:
            for number in range(repeats):
                self.blocks.append(Block(width, kernel, 1 if number else stride, expansion, out))
                width = out
        self.head = Convolution(width, config.hidden_size)
        self.post_init()

    def maps(self, pixel_values: Tensor) -> list[Level]:
        x, stride, found = self.stem(pixel_values), 2, []
        for block, after in pairwise([*self.blocks, None]):
            x, stride = block(x), stride * block.stride
            if stride in self.config.levels and (after is None or after.stride > 1):
                found.append((x, (stride, stride)))
        return [*found, (self.head(x), (stride, stride))]
