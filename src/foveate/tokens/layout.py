"""Layout: what each slot of a batch of sequences is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from foveate.errors import FoveateError


class Kind(IntEnum):
    """What a slot holds."""

    TEXT = 0
    PATCH = 1
    NEWLINE = 2
    CLS = 3
    REGISTER = 4


PLACE = ("image", "crop", "frame", "row", "column")
SCOPES = ("image", "crop", "frame", "sample")


@dataclass(frozen=True)
class Layout:
    """What each slot of a padded batch of sequences is. All tensors are (B, N) unless said otherwise.

    kind      int64, a `Kind`
    valid     bool, False where the slot is padding
    position  int64, or float32 where tokens stand between integers: the position that the language model's rotary embedding sees
    place     int64 (B, N, 5): image (counted over the batch), crop, frame, row, column of a patch; -1 where it does not apply
    size      float32, the number of patches that the slot stands for (0 for text)
    """

    kind: Tensor
    valid: Tensor
    position: Tensor
    place: Tensor
    size: Tensor

    @classmethod
    def sequence(
        cls,
        visual_BN: Tensor,
        image_lengths: Sequence[int] | None = None,
        *,
        valid_BN: Tensor | None = None,
        position_BN: Tensor | None = None,
        grids: Sequence[tuple[int, int] | None] | None = None,
    ) -> Layout:
        """The layout of prompts whose visual slots are `visual_BN` (bool).

        image_lengths: visual tokens of each image in the order of the batch; without it every contiguous run is one image.
        grids: (rows, columns) of each image where its tokens are a raster of patches, else None.
        Raises FoveateError when the lengths do not add up to the number of visual slots.
        """
        B, N = visual_BN.shape
        device = visual_BN.device
        kind = visual_BN.to(torch.int64) * int(Kind.PATCH)
        valid = torch.ones_like(visual_BN) if valid_BN is None else valid_BN.to(torch.bool)
        position = torch.arange(N, device=device).expand(B, N) if position_BN is None else position_BN.expand(B, N)
        place = torch.full((B, N, len(PLACE)), -1, dtype=torch.int64, device=device)
        if image_lengths is None:
            first = visual_BN & ~torch.nn.functional.pad(visual_BN, (1, 0))[:, :-1]
            image = first.flatten().cumsum(0).view(B, N) - 1
        else:
            total = int(visual_BN.sum())
            if sum(image_lengths) != total:
                raise FoveateError(
                    f"the prompts have {total} visual placeholders, but the {len(image_lengths)} images make {sum(image_lengths)} visual "
                    "tokens; use the processor that belongs to the model"
                )
            ends = torch.tensor(list(image_lengths), device=device).cumsum(0)
            image = torch.searchsorted(ends, visual_BN.flatten().cumsum(0).view(B, N) - 1, right=True)
        place[..., 0] = torch.where(visual_BN, image, -1)
        layout = cls(kind, valid, position, place, visual_BN.to(torch.float32))
        if grids is not None and len(grids):
            columns = torch.tensor([g[1] if g else 0 for g in grids], device=device)[place[..., 0].clamp(min=0)]
            known = visual_BN & (columns > 0)
            rank = layout.rank_in_image
            place[..., 3] = torch.where(known, rank // columns.clamp(min=1), -1)
            place[..., 4] = torch.where(known, rank % columns.clamp(min=1), -1)
        return layout

    @classmethod
    def item(cls, kind_L: Tensor, place_L4: Tensor) -> Layout:
        """The layout (1, L) of one image alone: the kind of each token, and its crop, frame, row and column (-1: not known)."""
        here = torch.zeros_like(kind_L)
        place = torch.cat([here[:, None], place_L4], 1)
        position = torch.arange(len(kind_L), device=kind_L.device)
        parts = kind_L, torch.ones_like(here, dtype=torch.bool), position, place, (kind_L == Kind.PATCH).to(torch.float32)
        return cls(*(part[None] for part in parts))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.kind, self.valid, self.position, self.place, self.size

    @property
    def shape(self) -> tuple[int, int]:
        return self.kind.shape[0], self.kind.shape[1]

    @cached_property
    def visual(self) -> Tensor:
        """(B, N) bool: slots that hold patches."""
        return (self.kind == Kind.PATCH) & self.valid

    @property
    def image(self) -> Tensor:
        """(B, N) int64: image of the slot, counted over the batch, -1 for text."""
        return self.place[..., 0]

    @cached_property
    def rank_in_image(self) -> Tensor:
        """(B, N) int64: how many visual slots of the same image stand before this one in the sequence (0 where not visual)."""
        visual = self.visual
        count = visual.cumsum(1) - visual.to(torch.int64)
        before = torch.nn.functional.pad(self.image, (1, 0), value=-2)[:, :-1]
        # Slots between two patches of one image (newlines) have image -1: compare with the image of the last patch, not of the last slot.
        index = torch.arange(visual.shape[1], device=visual.device).expand_as(count)
        last = torch.where(visual, index, -1).cummax(1).values
        last = torch.nn.functional.pad(last, (1, 0), value=-1)[:, :-1]
        before = torch.where(last >= 0, self.image.gather(1, last.clamp(min=0)), -2)
        start = visual & (before != self.image)
        offset = torch.where(start, count, 0).cummax(1).values
        return torch.where(visual, count - offset, 0)

    def groups(self, scope: str = "image") -> Tensor:
        """(B, N) int64: which group a visual slot belongs to, counted over the batch; -1 for all other slots.

        scope: "image", "crop" (tiles of one image apart), "frame" (frames of one video apart) or "sample" (a row's images together).
        """
        owners, visual = self.owners(scope), self.visual
        group = torch.full(self.shape, -1, dtype=torch.int64, device=owners.device)
        group[visual] = torch.unique(owners[visual], return_inverse=True)[1]
        return group

    def owners(self, scope: str) -> Tensor:
        """(B, N) int64: the group of a visual slot, made of row, image, crop or frame: what stays the same when others are dropped."""
        if scope not in SCOPES:
            raise FoveateError(f"scope={scope!r} is not possible; choose one of {', '.join(SCOPES)}")
        owner = torch.arange(self.shape[0], device=self.kind.device)[:, None].expand(self.shape)
        parts = {"sample": [], "image": ["image"], "crop": ["image", "crop"], "frame": ["image", "frame"]}[scope]
        for part in parts:  # of which there are fewer than two million each
            owner = (owner << 21) + self.place[..., PLACE.index(part)] + 1
        return owner

    @cached_property
    def image_length(self) -> Tensor:
        """(B, N) int64: visual tokens of the image that the slot belongs to (0 for text)."""
        visual = self.visual
        images = int(self.image.max()) + 1 if self.image.numel() else 0
        if images <= 0:
            return torch.zeros_like(self.image)
        lengths = torch.zeros(images, dtype=torch.int64, device=self.image.device)
        lengths.index_add_(0, self.image[visual], torch.ones_like(self.image[visual]))
        return torch.where(visual, lengths[self.image.clamp(min=0)], 0)

    def lengths(self) -> list[int]:
        """Visual tokens of each image of the batch that has any, by image."""
        visual = self.visual
        images, counts = torch.unique(self.image[visual], return_counts=True)
        del images
        return [int(c) for c in counts]

    def take(self, index_BM: Tensor) -> Layout:
        """The slots named by `index_BM` (int64); an index of -1 gives an empty, invalid slot."""
        at = index_BM.clamp(min=0)
        there = index_BM >= 0
        return Layout(
            kind=torch.where(there, self.kind.gather(1, at), int(Kind.TEXT)),
            valid=there & self.valid.gather(1, at),
            position=torch.where(there, self.position.gather(1, at), 0),
            place=torch.where(there[..., None], self.place.gather(1, at[..., None].expand(-1, -1, len(PLACE))), -1),
            size=torch.where(there, self.size.gather(1, at), 0.0),
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The layout of which every part, (B, N) or (B, N, 5), is changed alike: rows chosen, slots cut off."""
        return Layout(*map(change, self._parts))

    def joined(self, after: Layout) -> Layout:
        """The same sequences going on with the slots of another layout, whose images are counted on behind those here."""
        return Layout(*(torch.cat(pair, 1) for pair in zip(self._parts, after.counted_on(self)._parts, strict=True)))

    def counted_on(self, before: Layout) -> Layout:
        """The same with its images counted on behind those of another layout."""
        seen = int(before.image.max()) + 1 if before.image.numel() else 0
        return replace(
            self, place=torch.cat([torch.where(self.place[..., :1] >= 0, seen, 0) + self.place[..., :1], self.place[..., 1:]], -1)
        )

    def same(self, other: Layout) -> bool:
        """Whether both describe the same slots (positions may differ: a map may move them)."""
        return self is other or (
            self.shape == other.shape
            and torch.equal(self.kind, other.kind)
            and torch.equal(self.valid, other.valid)
            and torch.equal(self.place, other.place)
        )
