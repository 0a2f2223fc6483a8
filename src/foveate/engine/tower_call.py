"""A call of a vision tower under way: its units, where they stand, and what was cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import Crops, Units
from foveate.engine.standing import Standing
from foveate.errors import NotApplicable, Reason
from foveate.probes.tower_pass import TowerPass
from foveate.tokens import Layout, TokenMap


@dataclass
class TowerCall:
    """given are the call's arguments by name; what is here of crops and units is there once its first block begins (`open`)."""

    given: dict[str, Any]
    pixels: Tensor | None
    crops: Crops = field(init=False)
    units: Units = field(init=False)
    first: Standing = field(init=False)
    entry: Standing = field(init=False)  # as it was when the block under way began
    seen: TowerPass | None = None
    layouts: list[Layout] = field(default_factory=list)
    stands: dict[int, Standing] = field(default_factory=dict)  # by block in front of which something was cut
    here: TokenMap | None = None  # what the reducers in front of the block under way have made of its tokens
    block: int = 0  # the one under way
    shape: torch.Size | None = None  # of the states that are left, without their width
    over: bool = False  # whether all blocks have run
    merged: bool = False  # whether attention is to be proportional to what the tokens stand for
    ragged: bool = False  # whether rows have fewer slots than others
    _known: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def open(self, crops: Crops, units: Units, slots: int) -> None:
        self.crops, self.units = crops, units
        if crops.packed and self.pixels is not None and self.pixels.shape[:2] == (1, sum(crops.patches)):
            self.pixels = self.pixels[0]  # a batch of one row, as the states may be
        self.first = Standing(units.slot, slots, crops.packed)
        self.layouts, self.seen = [units.layout], TowerPass(units.layout)

    def enter(self, block: int) -> None:
        self.block, self.entry, self.here = block, self.standing, None

    @property
    def standing(self) -> Standing:
        return next(reversed(self.stands.values())) if self.stands else self.first

    @property
    def whole(self) -> TokenMap:
        """What has become of the tokens that came to the first block."""
        assert self.seen is not None
        return self.seen.whole

    def cut(self, token_map: TokenMap, proportional: bool) -> None:
        """What is left in front of the block under way."""
        assert self.seen is not None
        before = self.seen.maps.get(self.block)
        self.here = token_map if self.here is None else self.here.then(token_map)
        self.seen.maps[self.block] = token_map if before is None else before.then(token_map)
        self.stands[self.block] = self.standing.cut(token_map)
        self.layouts.append(token_map.target)
        self.merged |= token_map.member.shape[-1] > 1 and proportional
        self.ragged |= not self.standing.even
        self._known = {}

    def beside(self, value: Any) -> Any:
        """What the blocks are given beside the states, as it is after the cuts; most of them are given the same."""
        if id(value) not in self._known:
            self._known[id(value)] = value, self.standing.beside(value)
        return self._known[id(value)][1]

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """(R, n) what is added to attention to each slot; None: nothing."""
        if not self.merged and not self.ragged:
            return None
        size = self.standing.each(self.layouts[-1].size)
        added = size.clamp(min=1).log() if self.merged else torch.zeros_like(size)
        return added.to(dtype).masked_fill(self.standing.slot < 0, torch.finfo(dtype).min)

    def full(self, states: Tensor, block: int) -> Tensor:
        """States that have gone through the cuts in front of blocks 0 to `block`, at full length, merged as the other cuts say."""
        assert self.seen is not None
        standing = next((stood for at, stood in reversed(self.stands.items()) if at <= block), self.first)
        tokens = standing.tokens(standing.rows(states))
        for at, token_map in self.seen.maps.items():
            if at > block:
                tokens = token_map.apply(tokens)
        for token_map in reversed(self.seen.maps.values()):
            tokens = token_map.expand(tokens)
        return self.first.states(tokens, states)

    # ---- pixels

    @property
    def crop_pixels(self) -> Tensor | list[Tensor] | None:
        """Those of each crop; None where they are not told apart."""
        if self.pixels is None:
            return None
        if self.crops.packed:
            patches = self.crops.patches
            return list(self.pixels.split(patches)) if len(self.pixels) == sum(patches) else None
        return self.pixels if len(self.pixels) == len(self.crops.grids) else None

    def pixels_of_units(self) -> Tensor:
        """(C, U, values) float32 of each unit of the first block, 0 for the tower's own tokens. NotApplicable where they are not known."""
        patches = self._patches()
        if patches is None:
            raise NotApplicable(
                Reason.UNKNOWN_PATCHES, "which pixels are of which patch of the vision tower is not known; choose another method"
            )
        patch = self.units.patch
        found = patches.detach().flatten(1).to(torch.float32)[patch.clamp(min=0)]
        return torch.where((patch >= 0)[..., None], found, 0.0).flatten(2)

    def _patches(self) -> Tensor | None:
        """(patches, ...) of all crops, patch by patch."""
        pixels, crops = self.crop_pixels, self.crops
        if pixels is None or self.pixels is None:
            return None
        if crops.packed:
            return self.pixels
        rows, columns = (cells * crops.side for cells in crops.grids[0])
        if self.pixels.ndim != 4 or not columns or self.pixels.shape[2] // rows != self.pixels.shape[3] // columns:
            return None
        side = self.pixels.shape[2] // rows
        found = self.pixels[..., : rows * side, : columns * side].unfold(2, side, side).unfold(3, side, side)
        return found.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
