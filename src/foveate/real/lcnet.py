"""PP-LCNetV4, the network below PP-OCRv6's reader of lines, as a tower. Its cells are narrow: 4 pixels across, up to 16 down.

The network is transformers' own.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import AutoBackbone, AutoConfig
from transformers.configuration_utils import SubConfigSpec

from foveate.real.maps import Level, MapsConfig, MapTower

STAGES = ("stage1", "stage2", "stage3", "stage4")


class LCNetConfig(MapsConfig):
    """`backbone_config`: that of PP-LCNetV4, with all of its stages as features."""

    model_type = "foveate_lcnet"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="pp_lcnet_v4", init_kwargs={"out_features": list(STAGES)})
    }

    hidden_size: int = 1536
    patch_size: int = 16
    image_size: int = 384
    backbone_config: Any = None


class LCNet(MapTower):
    config_class = LCNetConfig

    def __init__(self, config: LCNetConfig) -> None:
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config, attn_implementation="eager")  # it has none
        self.post_init()

    def maps(self, pixel_values: Tensor) -> list[Level]:
        network = self.config.backbone_config
        down = across = math.prod(network.stem_strides)
        found = []
        for features, blocks in zip(self.backbone(pixel_values).feature_maps, network.block_configs, strict=True):
            for _, _, _, stride, _ in blocks:
                rows, columns = (stride, stride) if isinstance(stride, int) else stride
                down, across = down * rows, across * columns
            found.append((features, (down, across)))
        return found
