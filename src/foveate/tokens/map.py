"""TokenMap: how one batch of slots becomes another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.tokens.layout import Layout


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
        """(B, M): positions of the targets: the representative's, or the mean of the members', truncated where they are int64. 0 for empty
        targets."""
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
        rounding = None if position_BN.is_floating_point() else "floor"
        centre = torch.div(torch.where(there, members, 0).sum(-1), count.clamp(min=1), rounding_mode=rounding)
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
        """The same map on a sequence that goes on after its source: what comes there stays. FoveateError if it begins otherwise."""
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
