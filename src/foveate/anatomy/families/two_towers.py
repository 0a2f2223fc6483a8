"""Two towers: one for images and one for videos.

Video-LLaVA.
"""

from __future__ import annotations

from torch import nn


def tower_of(core: nn.Module, modality: str) -> nn.Module | None:
    own = getattr(core, f"{modality}_tower", None)
    return own if isinstance(own, nn.Module) else None
