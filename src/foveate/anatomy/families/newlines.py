"""Newlines: rows among the features are the model's own newline or separator, put there where no other shape expects them.

Of the tested families none, as their packing, frames or marks say it; models kin to LLaVA that write a parameter of the core in by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.anatomy.raster import Laid
from foveate.tokens import Kind


def told_apart(core: nn.Module, laid: Laid, features: Tensor) -> Laid:
    """The same with such rows named so, where none was expected. Nothing is known then of the raster of the others."""
    named = core.named_parameters(recurse=False)
    marks = [p.to(features) for name, p in named if name.endswith(("newline", "separator")) and p.shape == features.shape[1:]]
    if not marks or features.is_meta:
        return laid
    mark = torch.stack([(features == p).all(-1) for p in marks]).any(0)
    if not bool((mark & (laid.kind != Kind.NEWLINE)).any()):
        return laid
    return Laid(torch.where(mark, int(Kind.NEWLINE), int(Kind.PATCH)), torch.full_like(laid.place, -1))
