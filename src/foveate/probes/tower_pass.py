"""What was cut in one call of a tower."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.tokens import Layout, TokenMap


@dataclass
class TowerPass:
    """One call of a tower: the maps in front of its blocks, and all of them as one."""

    first: Layout
    maps: dict[int, TokenMap] = field(default_factory=dict)

    @property
    def whole(self) -> TokenMap:
        found = TokenMap.identity(self.first)
        for token_map in self.maps.values():
            found = found.then(token_map)
        return found

    def groups(self, prefix: int, start: int) -> list[Tensor]:
        """Crop by crop, (P, 2) as in `Groups`, slots counted through all crops from `start` on; without the first `prefix` and padding."""
        whole, (C, n) = self.whole, self.first.shape
        at = torch.where(whole.member >= 0, whole.member, n).flatten(1)
        survives = torch.zeros((C, n + 1), dtype=torch.bool, device=at.device).scatter(1, at, True)[:, :n]
        kept = torch.where(survives, whole.representative.gather(1, whole.owner.clamp(min=0)), -1)
        before = start + torch.arange(C, device=at.device)[:, None] * n
        own = before + torch.arange(n, device=at.device)
        groups = torch.stack([torch.where(kept >= 0, before + kept, -1), own], -1).double()
        return [crop[prefix:][valid[prefix:]] for crop, valid in zip(groups, self.first.valid, strict=True)]
