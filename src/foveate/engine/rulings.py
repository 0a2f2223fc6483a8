"""Who sees whom: rules laid over the masks of layers, in terms of the slots that are left.

A rule is asked about the layouts of a chunk's queries and of all slots of the sequence so far, and what it says is laid over the mask that
the layer would get without it. Where a rule changes nothing that mask itself goes on, so that the layer computes to the bit what it would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import Anatomy
from foveate.contract import Visibility, Visible
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.tokens import Layout

Rules = tuple[Visible, ...]


@dataclass(frozen=True)
class Ruling:
    """A rule that has been decided on, and the layers in which it holds."""

    site: Visibility
    visible: Visible


def rules_at(layer: int, rulings: Sequence[Ruling]) -> Rules:
    """The rules that hold in a decoder layer."""
    return tuple(ruling.visible for ruling in rulings if ruling.site.at(layer))


def check_rules(site: Visibility, anatomy: Anatomy, who: str) -> None:
    """FoveateError where some of a site's layers cannot be given a rule."""
    backend = str(anatomy.text_config._attn_implementation)
    if "flash" in backend or "flex" in backend:
        raise FoveateError(
            f"{who} says which token sees which, and {backend} takes no such mask: load the model with sdpa or eager attention"
        )
    for layer in range(len(anatomy.layers)):
        if site.at(layer) and anatomy.recurrent(layer):
            kind = type(anatomy.layers[layer]).__name__
            raise NotApplicable(
                Reason.RECURRENT,
                f"{who} says which token sees which, and decoder layer {layer} ({kind}) does not attend; choose other layers",
            )


def hidden_by(rules: Rules, query: Layout, key: Layout) -> Tensor | None:
    """(B, M, N) bool: what the rules hide; None: nothing. The queries are the last M of the N keys."""
    found: Tensor | None = None
    for rule in rules:
        if rule.sees is not None:
            hides = ~rule.sees(query, key)
            found = hides if found is None else found | hides
    # Padding sees what it sees: a row that sees nothing would be NaN in some kernels.
    return None if found is None else found & ~_own(query, key) & query.valid[..., None]


def opened_by(rules: Rules, query: Layout, key: Layout) -> Tensor | None:
    """(B, M, N) bool: what the rules open, of tokens that come in one pass; None: nothing."""
    found: Tensor | None = None
    for rule in rules:
        if rule.opens is not None:
            opens = rule.opens(query, key)
            found = opens if found is None else found | opens
    if found is None:
        return None
    now = torch.arange(key.shape[1], device=found.device) >= key.shape[1] - query.shape[1]
    return found & now & query.valid[..., None] & key.valid[:, None]


def bias_of(rules: Rules, query: Layout, key: Layout) -> Tensor | None:
    """(B, M or 1, N) float32: what the rules add; None: nothing."""
    found = [rule.bias(query, key) for rule in rules if rule.bias is not None]
    return torch.stack(torch.broadcast_tensors(*found)).sum(0) if found else None


def laid_over(mask: Any, rules: Rules, query: Layout, key: Layout, causal: Callable[[], Tensor], keys: int, dtype: torch.dtype) -> Any:
    """A layer's mask with the rules laid over it; where they change nothing, the mask itself.

    mask    (B, 1 or H, M, K) bool or additive; None: `causal` gives it (B, 1, M, K), bool
    key     the layout of all N slots of the sequence, of which the layer holds the last K, or all and some empty ones behind them
    dtype   of the layer's states
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        raise NotApplicable(Reason.NO_MASK, "the decoder layers are given masks over which no rule of who sees whom can be laid")
    hidden, opened, bias = hidden_by(rules, query, key), opened_by(rules, query, key), bias_of(rules, query, key)
    if not any(part is not None and bool(part.any()) for part in (hidden, opened, bias)):
        return mask

    def held(part: Tensor | None) -> Tensor:
        if part is None:
            return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=query.kind.device)
        more = keys - part.shape[2]
        return (torch.nn.functional.pad(part, (0, more)) if more > 0 else part[..., -more:])[:, None]

    mask = causal() if mask is None else mask
    additive = mask.dtype != torch.bool
    low = torch.finfo(mask.dtype if additive else dtype).min
    shown = mask > low / 2 if additive else mask
    seen = (shown & ~held(hidden)) | held(opened)
    if bias is None and not additive:
        return seen
    given = torch.where(shown, mask, 0) if additive else torch.zeros((), dtype=dtype, device=mask.device)
    if bias is not None:
        given = given + held(bias).to(given.dtype)
    return torch.where(seen, given, torch.where(shown, low, mask) if additive else low)


def kept_back(rules: Rules, layout: Layout, before: Tensor, after: Tensor) -> Tensor:
    """(B, M, D) the states behind a layer, those of visual tokens as they came to it where a rule holds them."""
    return torch.where(layout.visual[..., None], before, after) if any(rule.holds for rule in rules) else after


def unseen_pairs(rules: Rules, layout: Layout) -> list[int]:
    """(query, key) pairs of each row, of all its slots with all, that need not be computed under the rules."""
    hidden = hidden_by(rules, layout, layout)
    if hidden is None:
        hidden = torch.zeros(1, 1, 1, dtype=torch.bool, device=layout.valid.device)
    if any(rule.holds for rule in rules):
        hidden = hidden | layout.visual[..., None]
    return (hidden & layout.valid[..., None] & layout.valid[:, None]).sum((1, 2)).tolist()


def _own(query: Layout, key: Layout) -> Tensor:
    """(M, N) bool: the key that is the query's own."""
    M, N = query.shape[1], key.shape[1]
    return torch.ones(M, N, dtype=torch.bool, device=query.kind.device).triu(N - M).tril(N - M)
