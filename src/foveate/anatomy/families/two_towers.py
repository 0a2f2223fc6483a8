"""Two towers: one for images and one for videos, or several that see every picture, of which the first is asked for scores.

Video-LLaVA; Foveate's own models with several towers.
"""

from __future__ import annotations

from torch import nn


def tower_of(core: nn.Module, modality: str) -> nn.Module | None:
    own = getattr(core, f"{modality}_tower", None)
    if isinstance(own, nn.Module):
        return own
    several = getattr(getattr(core, "vision_tower", None), "towers", None)
    return several[0] if isinstance(several, nn.ModuleList) else None
