"""Attention of one layer, computed only in the rows that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.tokens import TokenMap

BLOCK = 256  # query rows whose attention is held at once


@dataclass(frozen=True)
class AttentionRows:
    """Softmax attention of one layer, computed only in the rows asked for. Legend: H heads, G key heads, h head width, K keys.

    query   (B, H, N, h) and key (B, G, K, h) as they enter the attention function: after norm and rotary embedding
    scale   what their product is multiplied with; `softcap` bounds it as tanh(x / softcap) * softcap where the model does
    mask    (B or 1, 1 or H, N, K) bool (True: may attend) or additive; None: with `causal` as a causal mask has it, the last query beside
            the last key, else every query sees every key

    Rows and columns are those of the layer, or, with `slots`, those of the slots that are left of them (`of_slots`): the softmax was over
    all keys, and stays so. Under tensor parallelism the heads here are this rank's own, and `group` are the ranks that share the others
    out: what is said of all heads (`mean`, `most`, `row`, `received`, `keys`) is asked of all of them, so every rank must ask.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    softcap: float | None = None
    weights: Tensor | None = None
    slots: Tensor | None = None  # (B, M) int64: the query behind each slot; its key is `start` further on, behind what was cached before
    start: int = 0
    causal: bool = True
    valid: Tensor | None = None  # (B, <= K) bool: keys that are no padding; what lies beyond its width is no key at all
    window: int | None = None  # keys, the query's own among them, that a row reaches back to
    samples: Tensor | None = None  # (B or 1, N) int64: rows of one packed sample do not see another's keys
    group: Any = None  # a torch.distributed.ProcessGroup

    @classmethod
    def of(cls, weights_BHNK: Tensor) -> AttentionRows:
        """From a finished attention map, for tests and for use without a model."""
        empty = weights_BHNK.new_zeros(0)
        return cls(empty, empty, 1.0, weights=weights_BHNK.to(torch.float32))

    def rows(self, index_BR: Tensor) -> Tensor:
        """(B, H, R, K) attention of the rows `index_BR` (int64), head by head: `mean` makes one of them."""
        if self.slots is None:
            return self._rows(index_BR)
        found = self._rows(self.slots.gather(1, index_BR))
        return found.gather(3, (self.slots + self.start)[:, None, None].expand(-1, found.shape[1], found.shape[2], -1))

    def _rows(self, index_BR: Tensor) -> Tensor:
        if self.weights is not None:
            H, K = self.weights.shape[1], self.weights.shape[3]
            return self.weights.gather(2, index_BR[:, None, :, None].expand(-1, H, -1, K))
        B, H, N, h = self.query.shape
        G, K = self.key.shape[1], self.key.shape[2]
        R = index_BR.shape[1]
        q = self.query.gather(2, index_BR[:, None, :, None].expand(-1, H, -1, h)).to(torch.float32)
        logits = q.view(B, G, H // G, R, h) @ self.key.to(torch.float32)[:, :, None].transpose(-1, -2)
        logits = logits.view(B, H, R, K).mul_(self.scale)  # in place: new memory of this size costs more than the product
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.mask is None and self.causal:
            logits.masked_fill_(~self._seen(index_BR, N, K)[:, None], float("-inf"))
        elif self.mask is not None:
            mask = self.mask[..., :K].expand(B, -1, -1, -1)
            mask = mask.gather(2, index_BR[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            low = torch.finfo(torch.float32).min
            logits = logits.masked_fill_(~mask, low) if mask.dtype == torch.bool else logits.add_(mask.to(torch.float32)).clamp_(min=low)
        return logits.softmax(-1)

    def _seen(self, index_BR: Tensor, N: int, K: int) -> Tensor:
        """(B, R, K) bool: the keys that some rows attend to where no mask says it."""
        keys, whole = torch.arange(K, device=index_BR.device), K if self.valid is None else self.valid.shape[1]
        own = index_BR[..., None] + (whole - N)  # the last query stands beside the last key that there is
        seen = keys <= own
        if self.window is not None:
            seen = seen & (keys > own - self.window)
        if self.valid is not None:
            there = torch.nn.functional.pad(self.valid.to(torch.bool), (0, K - whole))[:, None]
            seen = seen & (there | (keys == own))  # a row of padding sees itself: no row may see nothing
        if self.samples is not None:
            samples = self.samples.expand(index_BR.shape[0], -1)
            seen = seen & (samples.gather(1, index_BR)[..., None] == samples[:, None])
        return seen

    def under_flash(self, valid: Tensor | None, window: int | None, samples: Tensor | None) -> AttentionRows:
        """The same as flash attention computes it: causal by slots, without padding, within a window, packed samples apart."""
        return replace(self, mask=None, valid=valid, window=window, samples=samples)

    def of_slots(self, here: TokenMap, start: int = 0) -> AttentionRows:
        """The same in terms of the slots that `here` leaves of the layer's queries, whose keys begin at number `start`."""
        return replace(self, slots=here.representative.clamp(min=0), start=start)

    def as_one_head(self) -> AttentionRows:
        """The same with all heads taken as one: queries and keys lie side by side, their product is divided by the root of that width.
        FoveateError where they are not there: of a finished map, and where ranks share the heads out."""
        if self.weights is not None or self.group is not None:
            where = (
                "of a finished attention map" if self.weights is not None else "under tensor parallelism, where each rank has some of them"
            )
            raise FoveateError(f"heads cannot be taken as one {where}: hand in queries and keys, or run the tower on one device")
        H, h = self.query.shape[1], self.query.shape[3]
        key = self.key.repeat_interleave(H // self.key.shape[1], 1)
        query, key = (part.transpose(1, 2).flatten(2)[:, None] for part in (self.query, key))
        return replace(self, query=query, key=key, scale=(H * h) ** -0.5)

    def mean(self, heads_BH: Tensor) -> Tensor:
        """(B, ...) mean over all heads of (B, H, ...), what was found for each head that is here."""
        own = heads_BH.mean(1)
        if self.group is None:
            return own
        own = own.contiguous()
        torch.distributed.all_reduce(own, group=self.group)
        return own / self.group.size()

    def most(self, heads_BH: Tensor) -> Tensor:
        """(B, ...) largest of (B, H, ...), what was found for each head that is here, over all heads."""
        own = heads_BH.amax(1)
        if self.group is not None:
            own = own.contiguous()
            torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, group=self.group)
        return own

    def keys(self) -> Tensor:
        """(B, K, G * h) float32 keys, all heads side by side."""
        own = self.key.to(torch.float32).transpose(1, 2).flatten(2).contiguous()
        if self.group is None:
            return own
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, own, group=self.group)
        return torch.cat(parts, 2)

    def row(self, index_B: Tensor) -> Tensor:
        """(B, K) attention of one row a sample, mean over heads."""
        return self.mean(self.rows(index_B[:, None])[:, :, 0])

    def received(self, rows_BN: Tensor, most: bool = False) -> Tensor:
        """(B, K) attention received from the rows where `rows_BN` (bool) is True, mean over heads (`most`: the largest of them, row by row)
        and over those rows; 0 without any."""
        B, of_heads = rows_BN.shape[0], self.most if most else self.mean
        total: Tensor | None = None
        for index in _blocks(rows_BN):
            part = of_heads(self.rows(index.clamp(min=0))) * (index >= 0)[..., None]
            total = part.sum(1) if total is None else total + part.sum(1)
        if total is None:
            keys = self.slots if self.slots is not None else self.key[0, 0] if self.weights is None else self.weights[0, 0].T
            return torch.zeros((B, keys.shape[1] if self.slots is not None else keys.shape[0]), device=rows_BN.device)
        return total / rows_BN.sum(1, keepdim=True).clamp(min=1)


def _blocks(rows_BN: Tensor) -> Iterator[Tensor]:
    """(B, <= BLOCK) indices of the True entries of each row, padded with -1, block by block."""
    counts = rows_BN.sum(1)
    order = torch.argsort((~rows_BN).to(torch.int8), dim=1, stable=True)
    place = torch.arange(order.shape[1], device=order.device)
    order = torch.where(place < counts[:, None], order, -1)
    for start in range(0, int(counts.max()) if counts.numel() else 0, BLOCK):
        yield order[:, start : min(start + BLOCK, int(counts.max()))]
