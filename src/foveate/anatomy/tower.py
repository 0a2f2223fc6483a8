"""A vision tower from inside: its blocks, the tokens that it has beside its patches, and the raster of these."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from foveate.anatomy.layers import attends
from foveate.errors import NotApplicable, Reason

_CLS = ("class_embedding", "cls_token", "class_token")
_REGISTERS = ("reg_token", "distillation_token", "dist_token")
_BEHIND = "positional_embedding_vlm"  # the layout of Llama 4


def blocks(tower: nn.Module) -> nn.ModuleList:
    """The tower's attention blocks. FoveateError for a tower without any (convolutions)."""
    found = _longest(tower)
    if found is None:
        name = type(tower).__name__
        raise NotApplicable(
            Reason.NO_TOWER_ATTENTION,
            f"{name} has no attention that can be read (convolutions, or blocks that are not of transformers); use another method",
        )
    layers: nn.ModuleList = tower.get_submodule(found)  # type: ignore[assignment]
    return layers


def _longest(tower: nn.Module) -> str | None:
    """The name of the tower's longest list of blocks that attend; some of them may convolve instead, if all are of one kind."""
    lists = {
        name: len(module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList)
        and (any(map(attends, module)) if len({type(block) for block in module}) == 1 else len(module) and attends(module[0]))
    }
    return max(lists, key=lists.__getitem__) if lists else None


class Extras(NamedTuple):
    """The tokens that a tower has beside its patches.

    cls     whether the first of them (the only one, `behind`) is a [CLS] token
    number  how many there are, registers and a distillation token among them
    behind  whether they stand behind the patches, rather than before them
    """

    cls: bool = False
    number: int = 0
    behind: bool = False

    def patches(self, values: Tensor) -> Tensor:
        """(C, P, ...) of (C, n, ...), what was said of all tokens."""
        start = 0 if self.behind else self.number
        return values[:, start : start + values.shape[1] - self.number]


def extras_of(tower: nn.Module) -> Extras:
    """The [CLS] token, registers and distillation token of a tower, by the names of its parameters. Those that it has behind its blocks
    belong to a head, which pools its patches, and never enter the sequence."""
    within = _longest(tower)
    cls, registers, behind = 0, 0, False
    for name, parameter in tower.named_parameters():
        if within is not None and name.startswith(f"{within}."):
            break
        own = name.rpartition(".")[2]
        count = parameter.shape[-2] if parameter.ndim > 1 else 1
        if own in _CLS:
            cls = count
        elif "register_token" in own or own in _REGISTERS:
            registers += count
        behind |= own == _BEHIND
    return Extras(cls > 0, cls + registers, behind)


def columns_of(tower: nn.Module, patches: int, pixels: Tensor | None) -> int:
    """Columns of the raster of a crop's patches, 0 where it is not known."""
    size = getattr(tower.config, "patch_size", None)
    if pixels is not None and pixels.ndim == 4 and isinstance(size, int):
        rows, columns = pixels.shape[-2] // size, pixels.shape[-1] // size
        return columns if rows * columns == patches else 0
    side = math.isqrt(patches)
    return side if side * side == patches else 0
