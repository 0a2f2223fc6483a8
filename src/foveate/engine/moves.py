"""What cuts do to positions, gaps that close, groups that have their mean, and steps that are fractions; and to what runs along a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.tokens import TokenMap

_ROUNDED = 1e-6  # of a sum of steps: 30 steps of 0.1 end at 3, not beyond it


@dataclass
class Move:
    """What one segment did to positions.

    map      of its cut (None: nothing is cut)
    earlier  (B,) the offset that earlier chunks have accumulated here
    closed   (B, M) by how much closing the gaps moves each target, None where they stay open
    """

    map: TokenMap | None
    earlier: Tensor
    closed: Tensor | None = None

    def __call__(self, positions: Tensor) -> Tensor:
        """(B, N) or (R, B, N) -> the same with M. Several rows a token (m-RoPE) name places in a grid: their gaps are not closed."""
        if self.map is None:
            return positions if positions.ndim == 3 else positions - self.earlier[:, None]
        if positions.ndim == 3:
            return torch.stack([self.map.positions(row, mean=self.map.mean) for row in positions])
        moved = self.map.positions(positions, mean=self.map.mean) - self.earlier[:, None]
        return moved if self.closed is None else moved - self.closed


def dropped_before(token_map: TokenMap, samples_BN: Tensor | None = None) -> Tensor:
    """(B, M) int64: by how many slots the part of the row up to each target has become shorter; of packed samples, of the target's own."""
    at = token_map.representative.clamp(min=0)
    gone = token_map.source.valid.cumsum(1).gather(1, at) - token_map.target.valid.cumsum(1)
    if samples_BN is None:
        return gone
    own, count = samples_BN.gather(1, at), int(samples_BN.max()) + 1
    less = samples_BN.new_zeros((samples_BN.shape[0], count))
    less = less.scatter_add(1, samples_BN, token_map.source.valid.to(torch.int64))
    less = less.scatter_add(1, own, -token_map.target.valid.to(torch.int64))
    return gone - (less.cumsum(1) - less).gather(1, own)


def saved(
    steps_BM: Tensor, position_BM: Tensor, valid_BM: Tensor, samples_BM: Tensor | None, goes_on: bool = False
) -> tuple[Tensor, Tensor]:
    """(B, M) float32, by how much each slot's position becomes smaller; (B,) int64, that of what comes after the row.

    steps: what a step to a slot counts in place of 1. After fractions the next slot stands one step from the next integer, so that what is
    saved is an integer again. Padding is passed over, and packed samples (int64, ascending) each count by themselves: their
    first slot is where it was, unless the rows go on after others.
    Exact for positions below 2^24 less the bits of the fraction: 1/256 at 65,536.
    """
    found = torch.zeros(position_BM.shape, dtype=torch.float64, device=position_BM.device)
    after = torch.zeros(position_BM.shape[0], dtype=torch.int64, device=position_BM.device)
    for row, there in enumerate(valid_BM):
        at = there.nonzero()[:, 0]
        if not at.numel():
            continue
        position, step = position_BM[row, at].to(torch.float64), steps_BM[row, at].to(torch.float64)
        sample = torch.zeros_like(at) if samples_BM is None else samples_BM[row, at]
        begins = torch.nn.functional.pad(sample[1:] != sample[:-1], (1, 0), value=True)
        was = torch.where(begins, float(goes_on), position - position.roll(1))
        kinds = torch.stack([sample, (step != 1).to(torch.int64)], 1)
        _, lengths = torch.unique_consecutive(kinds, dim=0, return_counts=True)
        gone, start = 0.0, 0
        for length in lengths.tolist():
            run = slice(start, start + length)
            gone, start = 0.0 if bool(begins[run.start]) else gone, run.stop
            found[row, at[run]] = gone
            if bool(step[run.start] != 1):
                found[row, at[run]] += (was[run] * (1 - step[run])).cumsum(0)
                # What has been dropped at its end, up to the slot after it, is a part of it.
                rest = float(was[run.stop]) - 1 if run.stop < len(at) and not bool(begins[run.stop]) else 0.0
                end = float((was[run] * step[run]).sum()) + rest * float(step[run.stop - 1])
                gone += float(was[run].sum()) + rest - math.ceil(end - _ROUNDED)
        after[row] = int(gone)
    return found.to(torch.float32), after


def in_order(index_BM: Tensor) -> Tensor:
    """The same slots in ascending order, empty ones where they are: what stands later sees what stands before it, wherever it was."""
    there = index_BM >= 0
    ascending = torch.where(there, index_BM, torch.iinfo(torch.int64).max).sort(dim=1).values
    return torch.where(there, ascending.gather(1, (there.cumsum(1) - 1).clamp(min=0)), -1)


def axis_of(value: Tensor, shape: tuple[int, int]) -> int | None:
    """The axis of a tensor that runs along a sequence of this shape (B, N): behind an axis of the batch (or of 1)."""
    B, N = shape
    for axis in range(1, min(value.ndim, 3)):
        if value.shape[axis] == N and value.shape[axis - 1] in (1, B):
            return axis
    return None


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(each(v, change) for v in value)
    return {name: each(v, change) for name, v in value.items()} if isinstance(value, dict) else value


def put_back(token_map: TokenMap, states_BMD: Tensor, all_BND: Tensor) -> Tensor:
    """(B, N, D) with the targets' states where a selection has taken them from; the other rows are what they were."""
    B, N = token_map.source.shape
    at = torch.where(token_map.representative >= 0, token_map.representative, N)
    target = torch.arange(at.shape[1], device=at.device).expand_as(at)
    came = torch.full((B, N + 1), -1, dtype=torch.int64, device=at.device).scatter(1, at, target)[:, :N, None]
    return torch.where(came >= 0, states_BMD.gather(1, came.clamp(min=0).expand(-1, -1, states_BMD.shape[2])), all_BND)
