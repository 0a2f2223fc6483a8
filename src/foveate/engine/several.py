"""Tokens that stand in several places: the frequencies of the rotary embedding are shared out among a merged token's positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.errors import NotApplicable, Reason
from foveate.tokens import TokenMap


def nth_member(token_map: TokenMap, n: int) -> Tensor:
    """(B, M) int64: of each target's sources, ascending, the `n`-th from the last one backwards, and round again; empty targets' own."""
    far = torch.iinfo(torch.int64).max
    members = torch.where(token_map.member >= 0, token_map.member, far).sort(-1).values
    count = (members < far).sum(-1, keepdim=True)
    at = count - 1 - n % count.clamp(min=1)
    return torch.where(count > 0, members.gather(-1, at.clamp(min=0)), token_map.representative[..., None].clamp(min=0))[..., 0]


def turned(turn: Callable[[Tensor], Any], positions: Sequence[Tensor]) -> Any:
    """(cos, sin) of the model's rotary module, (B, M, h), whose frequencies turn by `positions`, each (B, M), or (R, B, M) with R rows a
    token: the frequencies of each row are cut into as many equal parts as there are positions. NotApplicable where that cannot be."""
    each = [turn(part) for part in positions]
    if not isinstance(each[0], tuple) or len(each[0]) != 2 or each[0][0].shape[:-1] != positions[0].shape[-2:]:
        raise NotApplicable(Reason.POSITIONS, "the model's rotary module does not give one row of cosines and one of sines a token")
    half = each[0][0].shape[-1] // 2
    if not torch.equal(each[0][0][..., :half], each[0][0][..., half:]):
        raise NotApplicable(Reason.POSITIONS, "the model's rotary module does not give its frequencies twice, one half after the other")
    row, part = _rows(turn, positions[0], half), torch.zeros(half, dtype=torch.int64)
    for number in range(int(row.max()) + 1):
        own = row == number
        if int(own.sum()) % len(positions):
            lengths = " + ".join(str(length) for length in row.bincount().tolist())
            raise NotApplicable(
                Reason.POSITIONS,
                f"{len(positions)} positions a token cannot share the rotary embedding's {lengths} frequencies evenly; choose a number "
                "that divides them",
            )
        part[own] = torch.arange(len(positions)).repeat_interleave(int(own.sum()) // len(positions))
    of = part.repeat(2).to(each[0][0].device)
    return tuple(_picked([one[i] for one in each], of) for i in range(2))


def _rows(turn: Callable[[Tensor], Any], positions: Tensor, half: int) -> Tensor:
    """(h / 2,) int64: by which of a token's rows of positions each frequency turns, found by turning one row at a time."""
    found = torch.zeros(half, dtype=torch.int64)
    for row in range(positions.shape[0] if positions.ndim == 3 else 0):
        one = torch.zeros_like(positions[:, :1, :1])
        one[row] = 1
        found[(turn(one)[1][0, 0, :half] != 0).cpu()] = row
    return found


def _picked(values: Sequence[Tensor], of_h: Tensor) -> Tensor:
    """Of several tensors (..., h) in each column the one that is named."""
    return torch.stack([*values]).gather(0, of_h.expand(1, *values[0].shape))[0]
