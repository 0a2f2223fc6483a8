"""Where the patches of a tower's tokens stand among the states of its blocks, and what the blocks are given beside the states.

A token of a tower is a unit: the patches that become one token of the language model, or one of the tower's own. Cuts are decided on
units; the blocks run on slots, a patch each. The slots that are left keep the order that the tower has given them, so that windows and
pictures stay side by side, and what runs along them (rotary embeddings, masks, where windows begin) is cut as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.errors import NotApplicable, Reason
from foveate.tokens import TokenMap

_FAR = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Standing:
    """Legend: C crops of U units of g patches; R rows of n slots: one row of all crops where the tower packs them, else one a crop.

    origin  (C, U, g) int64: of each unit's patches the slots, as they came to the first block and counted through all crops; -1: none
    slots   of each row, as they came to the first block
    packed  whether all crops are one row
    """

    origin: Tensor
    slots: int
    packed: bool

    def cut(self, token_map: TokenMap) -> Standing:
        """After a cut: a token stands where its representative stood."""
        at = token_map.representative[..., None].expand(-1, -1, self.origin.shape[2])
        return Standing(self.origin.gather(1, at.clamp(min=0)).masked_fill(at < 0, -1), self.slots, self.packed)

    @cached_property
    def _rows(self) -> Tensor:
        """(R, X) the origins, row by row."""
        return self.origin.reshape(1 if self.packed else len(self.origin), -1)

    @cached_property
    def _order(self) -> Tensor:
        """(R, X) the cells of `_rows`, those that are there in front, in the order of their slots."""
        return torch.where(self._rows >= 0, self._rows, _FAR).argsort(dim=1, stable=True)

    @cached_property
    def slot(self) -> Tensor:
        """(R, n) int64: which of its row's slots stands where, -1 where a row has fewer."""
        there = self._rows >= 0
        found = self._rows.gather(1, self._order)[:, : int(there.sum(1).max())]
        begins = torch.arange(len(found), device=found.device)[:, None] * self.slots
        return torch.where(found >= 0, found - begins, -1)

    @property
    def even(self) -> bool:
        """Whether no row has fewer slots than another."""
        return bool((self.slot >= 0).all())

    def rows(self, states: Tensor) -> Tensor:
        """(R, n, ...) of states, whatever the tower's way to hold them."""
        return states.reshape(*self.slot.shape, *states.shape[1 if self.packed and states.ndim == 2 else 2 :])

    def tokens(self, rows_RnD: Tensor) -> Tensor:
        """(R, n, D) of each slot -> (C, U, g, D), 0 where there is none."""
        order, there = self._order, self._rows >= 0
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        found = rows_RnD.gather(1, torch.where(there, rank, 0)[..., None].expand(-1, -1, rows_RnD.shape[2]))
        found = torch.where(there[..., None], found, torch.zeros((), dtype=found.dtype, device=found.device))
        return found.view(*self.origin.shape, -1)

    def mean(self, tokens_CUgD: Tensor) -> Tensor:
        """(C, U, D) of each unit the mean over its patches."""
        if tokens_CUgD.shape[2] == 1:
            return tokens_CUgD[:, :, 0]
        return tokens_CUgD.sum(2) / (self.origin >= 0).sum(2, keepdim=True).clamp(min=1)

    def states(self, tokens_CUgD: Tensor, like: Tensor) -> Tensor:
        """The states of the slots in the tower's way to hold them, which is that of `like`; 0 where a row has fewer."""
        R, n = self.slot.shape
        index = self._order[:, :n, None].expand(-1, -1, tokens_CUgD.shape[3])
        found = tokens_CUgD.reshape(R, -1, tokens_CUgD.shape[3]).gather(1, index)
        found = torch.where((self.slot >= 0)[..., None], found, torch.zeros((), dtype=found.dtype, device=found.device))
        if like.ndim == 3 and like.stride(1) < like.stride(2):  # held the other way round: sums go through memory as they did
            found = found.transpose(1, 2).contiguous().transpose(1, 2)
        return found[0] if like.ndim == 2 else found

    def each(self, units_CU: Tensor) -> Tensor:
        """(R, n) of each slot what is said of its unit."""
        return self.states(units_CU[..., None, None].expand(-1, -1, self.origin.shape[2], 1), units_CU[None])[..., 0]

    def beside(self, value: Any) -> Any:
        """What a block is given beside the states, cut as they are. `check_beside` says what is possible."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.beside(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if _is_table(value, self.slots):  # of where pictures or windows begin: those that have lost all their slots are none any more
            return torch.unique_consecutive(torch.searchsorted(self.slot[0], value.to(torch.int64)).to(value.dtype))
        if value.ndim == 4:
            return self._of_mask(value)
        return value[self.slot[0]] if value.shape[0] == self.slots else value[:, self.slot[0]]

    def _of_mask(self, mask: Tensor) -> Tensor:
        """(R, heads, n, n); a row that has fewer slots sees what its first one sees."""
        at, (R, n) = self.slot.clamp(min=0), self.slot.shape
        mask = mask.expand(R, -1, -1, -1)
        if mask.shape[2] > 1:
            mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return mask.gather(3, at[:, None, None].expand(-1, *mask.shape[1:3], n))


def check_beside(name: str, value: Any, crops: int, slots: int, packed: bool) -> None:
    """NotApplicable where what a tower gives its blocks, as the argument `name`, cannot be cut: it is known of what runs along the slots
    of pictures that are packed into one row, and of masks."""
    if isinstance(value, (tuple, list)):
        for part in value:
            check_beside(name, part, crops, slots, packed)
    if not isinstance(value, Tensor):
        return
    rows = 1 if packed else crops
    mask = value.ndim == 4 and value.shape[0] in (1, rows) and value.shape[2] in (1, slots) and value.shape[3] == slots
    along = packed and (_is_table(value, slots) or (0 < value.ndim < 4 and slots in _leading(value.shape)))
    if not (mask or along):
        raise NotApplicable(
            Reason.TOWER_INPUTS,
            f"the tower's blocks are given {name} of shape {tuple(value.shape)} beside the states of {slots} patches; it cannot be cut, so "
            "act before the LM",
        )


def _leading(shape: Sequence[int]) -> Sequence[int]:
    """The axis that may run along the slots: the first one, or the second one behind a batch of one."""
    return shape[:1] if shape[0] != 1 else shape[:2]


def _is_table(value: Tensor, slots: int) -> bool:
    """Whether a tensor says where parts of a row begin and where it ends."""
    return value.ndim == 1 and len(value) > 1 and not value.is_floating_point() and int(value[-1]) == slots and int(value[0]) == 0


def laid(own: Tensor | None, added: Tensor) -> Tensor:
    """(R, heads, n, n) what is added to attention, over a mask that the block has already (bool: True may be seen, or additive)."""
    if own is None:
        return added
    low = torch.finfo(added.dtype).min
    return torch.where(own, added, low) if own.dtype == torch.bool else (own + added).clamp(min=low)
