"""What several cache policies share: attention that keys receive, and scores that are kept whatever it is."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.contract import BLOCK, CacheView
from foveate.errors import FoveateError

ALWAYS = float(1 << 22)  # above any sum of attention; the ages added to it stay whole numbers in float32


def received(name: str, view: CacheView, last: int | None = None, *, alike: bool = False) -> Tensor:
    """(B, G, K) float32: attention that each slot receives, sum over the last `last` queries (None: all) and mean over the query heads of
    its key head; `alike`: (B, 1, K), mean over all heads. FoveateError where the view has no attention."""
    attention = view.attention
    if attention is None:
        raise FoveateError(f"{name} looks at attention and the view has none: give CacheView(attention=…)")
    B, N = view.asking.shape
    at = torch.where(view.asking, torch.arange(N, device=view.asking.device), -1).sort(dim=1, descending=True).values[:, :last]
    total: Tensor | None = None
    for index in at.split(BLOCK, dim=1):
        part = (attention.rows(index.clamp(min=0)) * (index >= 0)[:, None, :, None]).sum(2)
        total = part if total is None else total + part
    if total is None:
        raise FoveateError(f"{name}: no query was seen, so there is no attention to look at")
    if alike and view.place.shape[1] == 1:  # what heads hold of different tokens has no mean
        return attention.mean(total)[:, None]
    return total.view(B, view.keys.shape[1], -1, total.shape[2]).mean(2)


def protect(view: CacheView, score: Tensor, kept: Tensor) -> Tensor:
    """The scores, those of the slots `kept` (bool) above all others; among them the newer one is worth more."""
    return torch.where(kept, ALWAYS - view.age.to(torch.float32), score)


def in_order(view: CacheView, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the slots (B, 1 or G, K) by place, empty slots last, and the slots they are of."""
    place, values = torch.broadcast_tensors(torch.where(view.there, view.place, torch.iinfo(torch.int64).max), values)
    order = place.argsort(dim=-1, stable=True)
    return values.gather(-1, order), order
