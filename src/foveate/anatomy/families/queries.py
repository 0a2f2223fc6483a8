"""Queries: learned queries of the projector make the tokens, so that none of them belongs to certain patches.

Aria. They are a parameter of the projector, named so.
"""

from __future__ import annotations

from torch import nn


def resampled(core: nn.Module) -> bool:
    projector = getattr(core, "multi_modal_projector", None)
    return isinstance(projector, nn.Module) and any("quer" in name for name, _ in projector.named_parameters(recurse=False))
