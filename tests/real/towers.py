"""Small random towers of convolutions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

import foveate.model  # noqa: F401  # registers the Auto classes
from foveate.real.convert import save_tower
from foveate.real.efficientnet import EfficientNetLite, EfficientNetLiteConfig
from foveate.real.lcnet import STAGES, LCNet, LCNetConfig

# strides 2 (stem), 4, 8, 16; levels of 6 and 8 channels and a head of 96
LITE = {
    "stem": 4,
    "stages": [[1, 3, 1, 1, 4], [2, 5, 2, 2, 6], [1, 3, 1, 3, 6], [2, 3, 2, 2, 8], [1, 5, 2, 2, 8]],
    "levels": [4, 8, 16],
    "hidden_size": 96,
    "patch_size": 16,
    "image_size": 32,
}


def lively(model: nn.Module, seed: int = 0) -> None:
    """Weights and statistics with which every cell says something else, however many convolutions lie above each other."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / module.weight[0].numel()) ** 0.5
        if isinstance(module, nn.BatchNorm2d):
            mean, variance = module.running_mean, module.running_var
            assert mean is not None
            assert variance is not None
            for value in (module.bias.data, mean):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            for value in (module.weight.data, variance):
                value.copy_(0.7 + torch.rand(value.shape, generator=generator))


def lite(seed: int = 0, **own: object) -> EfficientNetLite:
    model = EfficientNetLite(EfficientNetLiteConfig(**LITE | own))
    lively(model, seed)
    return model.eval()


def save_lite(folder: Path, seed: int = 0) -> None:
    save_tower(lite(seed), folder, mean=0.5, std=0.5)


def lcnet(seed: int = 0, **own: object) -> LCNet:
    blocks = [[[3, 8, 8, 1, True]], [[3, 8, 8, 1, False]], [[3, 8, 12, [2, 1], False], [3, 12, 12, 1, True]], [[3, 12, 16, [2, 1], False]]]
    network = AutoConfig.for_model("pp_lcnet_v4", block_configs=blocks, stem_channels=[3, 4, 8], out_features=list(STAGES))
    model = LCNet(LCNetConfig(backbone_config=network, hidden_size=128, image_size=32, **own))
    lively(model, seed)
    return model.eval()
