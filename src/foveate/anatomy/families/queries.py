"""Queries: learned queries of the projector make the tokens, so that none of them belongs to certain patches.

Aria, Idefics2. They are a parameter of the projector (the connector), named so.
"""

from __future__ import annotations

from torch import nn

_PROJECTORS = ("multi_modal_projector", "connector")


def resampled(core: nn.Module) -> bool:
    projectors = [part for name in _PROJECTORS if isinstance(part := getattr(core, name, None), nn.Module)]
    own = [name.rpartition(".")[2] for projector in projectors for name, _ in projector.named_parameters()]
    return any("quer" in name or name == "latents" for name in own)
