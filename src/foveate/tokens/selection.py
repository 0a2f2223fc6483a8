"""How methods select: a budget of tokens, and the highest scores."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.tokens.layout import Layout


def budget(keep: float | int, tokens: int) -> int:
    """How many of `tokens` to keep: an int is a number (at most `tokens`), a float in (0, 1] a share, rounded half up, at least 1."""
    number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
    if not number or (isinstance(keep, int) and keep < 1) or (isinstance(keep, float) and not 0.0 < keep <= 1.0):
        raise FoveateError(f"keep={keep!r} is not possible: give a share in (0, 1] as a float or a number of tokens >= 1 as an int")
    if isinstance(keep, int):
        return min(keep, tokens)
    # str() gives the decimal that was meant: 0.05 * 576 is 28.8 exactly, whatever its binary neighbour.
    return min(tokens, max(1, int((Decimal(str(keep)) * tokens).quantize(Decimal(1), rounding=ROUND_HALF_UP)))) if tokens else 0


def top(layout: Layout, score_BN: Tensor, keep: float | int, *, scope: str = "image", original_BN: Tensor | None = None) -> Tensor:
    """(B, N) bool: of each group of visual slots the highest scores; ties go to the lower raster index. A score that is not a number (its
    image is broken) counts as the highest: what the bare model would show is not hidden.

    As many of each group as `budget(keep, L)` says, L being the group's slots, or, with `original_BN` (int64, a number at each slot),
    what the group had before earlier cuts. A score of -inf is never kept. scope: as in `Layout.groups`.
    """
    visual = layout.visual
    flat = visual.flatten().nonzero()[:, 0]
    if flat.numel() == 0:
        return visual
    owner = layout.groups(scope).flatten()[flat]
    # Stable sorts from the least to the most important key: sequence order (already there), score, group.
    score = score_BN.flatten()[flat].to(torch.float32)
    by_score = torch.argsort(score, descending=True, stable=True)
    order = by_score[torch.argsort(owner[by_score], stable=True)]
    _, counts = torch.unique_consecutive(owner[order], return_counts=True)
    place = torch.cat([torch.arange(int(c), device=flat.device) for c in counts])
    firsts = order[torch.nn.functional.pad(counts.cumsum(0), (1, 0))[:-1]]
    before = counts if original_BN is None else original_BN.flatten()[flat[firsts]]
    kept = torch.cat([torch.full((int(c),), budget(keep, int(n)), device=flat.device) for c, n in zip(counts, before, strict=True)])
    out = torch.zeros(visual.numel(), dtype=torch.bool, device=flat.device)
    out[flat[order]] = (place < kept) & (score[order] != float("-inf"))
    return out.view(visual.shape)
