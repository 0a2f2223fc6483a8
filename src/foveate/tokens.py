"""Layout and TokenMap: what each slot of a batch of sequences is, and how one batch of slots becomes another.

Shape legend, used as suffixes of tensor names everywhere in Foveate:

    B  sequences in the batch          D  hidden width
    N  slots before a map              E  sources of one target (padded with -1)
    M  slots after a map               I  images of the batch, in the order in which they were given
    L  visual tokens of one image      T  visual tokens kept of one image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
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
    position  int64, the position that the language model's rotary embedding sees
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

    @property
    def shape(self) -> tuple[int, int]:
        return self.kind.shape[0], self.kind.shape[1]

    @property
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
        if scope not in SCOPES:
            raise FoveateError(f"scope={scope!r} is not possible; choose one of {', '.join(SCOPES)}")
        B, N = self.shape
        row = torch.arange(B, device=self.kind.device)[:, None].expand(B, N)
        parts = [row] if scope == "sample" else [row, self.image]
        if scope in ("crop", "frame"):
            parts.append(self.place[..., PLACE.index(scope)])
        visual = self.visual
        group = torch.full((B, N), -1, dtype=torch.int64, device=row.device)
        group[visual] = torch.unique(torch.stack(parts, -1)[visual], dim=0, return_inverse=True)[1]
        return group

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

    def same(self, other: Layout) -> bool:
        """Whether both describe the same slots (positions may differ: a map may move them)."""
        return self is other or (
            self.shape == other.shape
            and torch.equal(self.kind, other.kind)
            and torch.equal(self.valid, other.valid)
            and torch.equal(self.place, other.place)
        )


@dataclass(frozen=True)
class TokenMap:
    """A sparse linear map from the slots of one Layout to those of another.

    member          (B, M, E) int64: sources of each target, -1 where there are fewer than E
    weight          (B, M, E) float64, 0 where there is no member; None means 1 everywhere. Weights need not sum to 1.
    representative  (B, M) int64: the source whose place (and by default position) the target takes; -1 for an empty target
    mean            whether targets take the truncated mean of their members' positions instead
    """

    source: Layout
    target: Layout
    member: Tensor
    weight: Tensor | None
    representative: Tensor
    mean: bool = False

    # ---- makers

    @classmethod
    def identity(cls, layout: Layout) -> TokenMap:
        B, N = layout.shape
        index = torch.arange(N, device=layout.kind.device).expand(B, N)
        return cls(layout, layout, index[..., None], None, index)

    @classmethod
    def keep(cls, layout: Layout, kept_BN: Tensor) -> TokenMap:
        """Keeps the visual slots where `kept_BN` (bool) is True; text is never dropped. Padding goes once anything is dropped."""
        index = _compact(_survivors(layout, kept_BN))
        return cls(layout, layout.take(index), index[..., None], None, index)

    @classmethod
    def pool(cls, layout: Layout, stride: int) -> TokenMap:
        """Means over `stride` consecutive visual slots of each image, in sequence order; the last L mod stride slots are dropped.

        Targets stand at the member number (stride - 1) // 2 and take the truncated mean of the members' positions.
        Raises FoveateError when an image has fewer visual slots than `stride`.
        """
        visual, rank, length = layout.visual, layout.rank_in_image, layout.image_length
        if bool((visual & (length < stride)).any()):
            shortest = int(length[visual].min())
            raise FoveateError(
                f"stride {stride} is larger than the {shortest} visual tokens of an image: nothing would be left of it; "
                f"choose a stride of at most {shortest}"
            )
        middle = (stride - 1) // 2
        anchor = visual & (rank % stride == middle) & (rank < length // stride * stride)
        index = _compact(_survivors(layout, anchor))
        if stride == 1:
            return cls(layout, layout.take(index), index[..., None], None, index)
        # Members by their order among the row's visual slots, so that newlines between patches do no harm.
        order = visual.cumsum(1) - 1
        slots = torch.argsort((~visual).to(torch.int8), dim=1, stable=True)
        pooled = (index >= 0) & anchor.gather(1, index.clamp(min=0))
        ordinal = order.gather(1, index.clamp(min=0))[..., None] - middle + torch.arange(stride, device=index.device)
        B, M = index.shape
        group = slots.gather(1, ordinal.clamp(0, slots.shape[1] - 1).view(B, -1)).view(B, M, stride)
        single = torch.full_like(group, -1)
        single[..., 0] = index
        member = torch.where(pooled[..., None], group, single)
        weight = torch.where(pooled[..., None], 1.0 / stride, (member >= 0).to(torch.float64))
        return cls._with_targets(layout, member, weight, index, mean=True)

    @classmethod
    def merge(cls, layout: Layout, member_BME: Tensor, weight_BME: Tensor | None, representative_BM: Tensor) -> TokenMap:
        """Any map: see the class for the arguments. Positions are the representatives'."""
        if weight_BME is not None:
            weight_BME = torch.where(member_BME >= 0, weight_BME.to(torch.float64), 0.0)
        return cls._with_targets(layout, member_BME, weight_BME, representative_BM, mean=False)

    @classmethod
    def _with_targets(cls, layout: Layout, member: Tensor, weight: Tensor | None, representative: Tensor, *, mean: bool) -> TokenMap:
        B, M, E = member.shape
        sizes = layout.size.gather(1, member.clamp(min=0).view(B, -1)).view(B, M, E)
        target = replace(layout.take(representative), size=torch.where(member >= 0, sizes, 0.0).sum(-1))
        token_map = cls(layout, target, member, weight, representative)
        if mean:
            target = replace(target, position=token_map.positions(layout.position, mean=True))
            token_map = replace(token_map, target=target, mean=True)
        return token_map

    # ---- what it does to tensors

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes (looks at values; waits for the device)."""
        N = self.source.shape[1]
        if self.member.shape[1:] != (N, 1) or self.weight is not None:
            return False
        return bool((self.member[..., 0] == torch.arange(N, device=self.member.device)).all())

    @cached_property
    def _many(self) -> tuple[Tensor, Tensor]:
        """(row, target) of the targets that are not just a copy of their representative."""
        copies = self.member.shape[-1] == 1 and self.weight is None
        if copies:
            differ = self.member[..., 0] != self.representative
        else:
            ones = (self.member >= 0).sum(-1) == 1
            plain = torch.ones_like(ones) if self.weight is None else (self.weight.sum(-1) == 1.0)
            is_copy = ones & plain & (self.member.max(-1).values == self.representative)
            differ = ~is_copy & (self.member.max(-1).values >= 0)
        rows, targets = differ.nonzero(as_tuple=True)
        return rows, targets

    def apply(self, x_BND: Tensor) -> Tensor:
        """(B, N, ...) -> (B, M, ...). A target with one source of weight 1 is a bit-exact copy; sums are taken in float32 or wider.

        Raises FoveateError for a finite sum that x's dtype cannot hold (float16 ends at 65504)."""
        B, M = self.representative.shape
        shape = (B, M, *x_BND.shape[2:])
        x = x_BND.reshape(*x_BND.shape[:2], -1)
        y = x.gather(1, self.representative.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
        y = torch.where((self.representative >= 0)[..., None], y, torch.zeros((), dtype=x.dtype, device=x.device))
        rows, targets = self._many
        if rows.numel():
            sources = self.member[rows, targets]
            weights = (sources >= 0).to(torch.float64) if self.weight is None else self.weight[rows, targets]
            y = y.index_put((rows, targets), _mixed(x, rows, sources, weights))
        return y.view(shape)

    @cached_property
    def owner(self) -> Tensor:
        """(B, N) int64: the target that a source went into (the first, if several); for a dropped source that of the nearest
        surviving source before it, or the row's first target if there is none; -1 in a row without targets."""
        return self._owner(None)

    def _owner(self, samples_BN: Tensor | None) -> Tensor:
        B, N = self.source.shape
        M = self.representative.shape[1]
        owner = torch.full((B, N + 1), M, dtype=torch.int64, device=self.member.device)
        targets = torch.arange(M, device=self.member.device)[None, :, None].expand_as(self.member)
        at = torch.where(self.member >= 0, self.member, N)
        owner = owner.scatter_reduce(1, at.reshape(B, -1), targets.reshape(B, -1), "amin")[:, :N]
        index = torch.arange(N, device=owner.device).expand(B, N)
        last = torch.where(owner < M, index, -1).cummax(1).values
        first = (self.member >= 0).any(-1).to(torch.int8).argmax(1, keepdim=True) if M else last
        filled = torch.where(last >= 0, owner.gather(1, last.clamp(min=0)), first)
        if samples_BN is not None:  # of packed samples, where none before it survives, the next one
            after = torch.where(owner < M, index, N).flip(1).cummin(1).values.flip(1)
            elsewhere = (last < 0) | (samples_BN.gather(1, last.clamp(min=0)) != samples_BN)
            filled = torch.where(elsewhere & (after < N), owner.gather(1, after.clamp(max=N - 1)), filled)
        return torch.where(owner < M, owner, filled) if M else torch.full_like(owner, -1)

    def expand(self, y_BMD: Tensor, samples_BN: Tensor | None = None) -> Tensor:
        """(B, M, ...) -> (B, N, ...): every source receives the row of its `owner`; with `samples_BN` (int64, ascending), which says what
        packed samples the sources belong to, of one in its own sample."""
        owner = self.owner if samples_BN is None else self._owner(samples_BN)
        y = y_BMD.reshape(*y_BMD.shape[:2], -1)
        if y.shape[1] == 0:
            return torch.zeros((*owner.shape, *y_BMD.shape[2:]), dtype=y.dtype, device=y.device)
        x = y.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, y.shape[-1]))
        return x.view(*owner.shape, *y_BMD.shape[2:])

    def positions(self, position_BN: Tensor, *, mean: bool = False) -> Tensor:
        """(B, M) int64: positions of the targets: the representative's, or the truncated mean of the members'. 0 for empty targets."""
        representative = torch.where(
            self.representative >= 0, position_BN.expand(self.source.shape).gather(1, self.representative.clamp(min=0)), 0
        )
        if not mean:
            return representative
        B, M, E = self.member.shape
        there = self.member >= 0
        members = position_BN.expand(self.source.shape).gather(1, self.member.clamp(min=0).view(B, -1)).view(B, M, E)
        count = there.sum(-1)
        # Integers throughout: the mean is exact at any position, where the reference code's float16 is not above 1023.
        centre = torch.div(torch.where(there, members, 0).sum(-1), count.clamp(min=1), rounding_mode="floor")
        return torch.where(count > 0, centre, representative)

    def then(self, after: TokenMap) -> TokenMap:
        """First self, then `after`. Raises FoveateError when `after` does not start where self ends."""
        if not self.target.same(after.source):
            raise FoveateError(
                f"cannot compose token maps: the first ends in a layout of shape {self.target.shape}, the second starts from another "
                f"one of shape {after.source.shape}; make the second from `first.target`"
            )
        B, M, E2 = after.member.shape
        E1 = self.member.shape[-1]
        middle = after.member.clamp(min=0).view(B, -1, 1).expand(-1, -1, E1)
        member = self.member.gather(1, middle).view(B, M, E2, E1)
        member = torch.where(after.member[..., None] >= 0, member, -1).view(B, M, E2 * E1)
        weight: Tensor | None = None
        if self.weight is not None or after.weight is not None:
            w1 = (self.member >= 0).to(torch.float64) if self.weight is None else self.weight
            w2 = (after.member >= 0).to(torch.float64) if after.weight is None else after.weight
            weight = (w1.gather(1, middle).view(B, M, E2, E1) * w2[..., None]).view(B, M, E2 * E1)
        if E1 * E2 > 1:
            member, weight = _coalesce(member, weight)
        representative = torch.where(after.representative >= 0, self.representative.gather(1, after.representative.clamp(min=0)), -1)
        return TokenMap(self.source, after.target, member, weight, representative)

    def onto(self, layout: Layout) -> TokenMap:
        """The same map on a sequence that goes on behind its source: what comes there stays. FoveateError if it begins otherwise."""
        B, N = self.source.shape
        if layout.shape[0] != B or layout.shape[1] < N or not torch.equal(layout.kind[:, :N], self.source.kind):
            raise FoveateError(f"this map belongs to another batch: its source has shape {(B, N)}, the sequences here {layout.shape}")
        more = torch.arange(N, layout.shape[1], device=self.member.device).expand(B, -1)
        single = torch.nn.functional.pad(more[..., None], (0, self.member.shape[-1] - 1), value=-1)
        weight = None if self.weight is None else torch.cat([self.weight, (single >= 0).to(torch.float64)], 1)
        member, representative = torch.cat([self.member, single], 1), torch.cat([self.representative, more], 1)
        return TokenMap._with_targets(layout, member, weight, representative, mean=self.mean)

    def aligned(self) -> TokenMap:
        """The same map with its empty targets in front, in rows whose source ends in a token: what comes next stands right behind it, as
        layers that recur and caches that hold the last slots only expect."""
        empty = self.representative < 0
        if not bool(empty.any()):
            return self
        order = torch.argsort(torch.where(self.source.valid[:, -1:], (~empty).to(torch.int8), 0), dim=1, stable=True)
        many = order[..., None].expand_as(self.member)
        weight = None if self.weight is None else self.weight.gather(1, many)
        return TokenMap(
            self.source, self.target.take(order), self.member.gather(1, many), weight, self.representative.gather(1, order), self.mean
        )

    def sources(self, row: int, slot: int) -> list[int]:
        """The source slots that made target `slot` of batch row `row`, ascending."""
        return sorted(int(s) for s in self.member[row, slot] if s >= 0)

    def with_positions(self, position_BM: Tensor) -> TokenMap:
        return replace(self, target=replace(self.target, position=position_BM))


def _mixed(x_BND: Tensor, rows: Tensor, sources: Tensor, weights: Tensor) -> Tensor:
    """(T, D) weighted sums of the `sources` (T, E) of some targets in batch rows `rows`.

    Member by member, the targets with many members first: so a sum does not depend on how many members another target has, and nothing
    is as large as all targets with as many members as the largest."""
    wide = torch.promote_types(x_BND.dtype, torch.float32)
    order = torch.argsort((sources < 0).to(torch.int8), dim=1, stable=True)
    sources, weights = sources.gather(1, order), weights.gather(1, order)
    counts = (sources >= 0).sum(1)
    largest = torch.argsort(counts, descending=True, stable=True)
    rows, sources, weights = rows[largest], sources[largest], weights[largest].to(wide)
    total = torch.zeros((len(rows), x_BND.shape[2]), dtype=wide, device=x_BND.device)
    for e, active in enumerate((counts[:, None] > torch.arange(sources.shape[1], device=counts.device)).sum(0).tolist()):
        total[:active] += x_BND[rows[:active], sources[:active, e]].to(wide) * weights[:active, e, None]
    mixed = total.to(x_BND.dtype)
    if mixed.dtype != wide and bool((lost := mixed.isinf() & total.isfinite()).any()):
        raise FoveateError(
            f"merged tokens add up to {float(total.detach()[lost].abs().max()):.3g}, and {str(mixed.dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(mixed.dtype).max:.6g}: load the model in bfloat16 or float32, or take means where the method offers them "
            "(merge=mean)"
        )
    return mixed[torch.argsort(largest)]


def _survivors(layout: Layout, kept_BN: Tensor) -> Tensor:
    """(B, N) bool: everything that is not a dropped patch; padding stays only while nothing at all is dropped (then nothing moves)."""
    visual = layout.visual
    stays = ~visual | kept_BN.to(torch.bool)
    return stays if bool(stays.all()) else stays & layout.valid


def _compact(stays_BN: Tensor) -> Tensor:
    """(B, M) int64: indices of the True slots in order, padded with -1 to the longest row."""
    counts = stays_BN.sum(1)
    longest = int(counts.max()) if stays_BN.numel() else 0
    index = torch.argsort((~stays_BN).to(torch.int8), dim=1, stable=True)[:, :longest]
    return torch.where(torch.arange(longest, device=index.device) < counts[:, None], index, -1)


def _coalesce(member: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sorts the members of each target, adds up the weights of equal ones and trims the padding."""
    far = torch.iinfo(torch.int64).max
    member, order = torch.where(member >= 0, member, far).sort(dim=-1, stable=True)
    same = torch.zeros_like(member, dtype=torch.bool)
    same[..., 1:] = (member[..., 1:] == member[..., :-1]) & (member[..., 1:] != far)
    if weight is None and bool(same.any()):
        weight = torch.ones_like(member, dtype=torch.float64)
        order = torch.arange(member.shape[-1], device=member.device).expand_as(member)
    slot = torch.where(same, 0, 1).cumsum(-1) - 1
    out = torch.full_like(member, far).scatter_reduce(-1, slot, member, "amin")
    if weight is not None:
        weight = weight.gather(-1, order)
        weight = torch.where(member != far, weight, 0.0)
        weight = torch.zeros_like(weight).scatter_add(-1, slot, weight)
    width = max(1, int((out != far).sum(-1).max())) if out.numel() else 1
    out = torch.where(out == far, -1, out)[..., :width]
    return out, None if weight is None else weight[..., :width]


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
