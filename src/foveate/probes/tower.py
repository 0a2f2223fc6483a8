"""What the vision tower says of each visual token: attention of [CLS], attention received, keys; and how it gets from patches to tokens.

A score belongs to a patch of the tower, a token to the language model. Between them patches are merged (pixel shuffle, pooling, grouped
patches, a bridge's windows); a token's score is the mean over its patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from foveate.anatomy import Extras, Laid, Patches, blocks, extras_of
from foveate.contract import AttentionRows, ClsAttention, ReceivedAttention, Signal, TowerKeys
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.probes.hooks import Hook
from foveate.probes.layer import LayerProbe
from foveate.tokens import Kind

TOWER_SIGNALS = (ClsAttention, ReceivedAttention, TowerKeys)


def never() -> bool:
    """The answer of who is never idle."""
    return False


class TowerProbes:
    """Watches the blocks that the signals name, whenever the tower runs in a thread that is not `idle`."""

    def __init__(self, tower: nn.Module, signals: Sequence[Signal], idle: Callable[[], bool] = never) -> None:
        layers = blocks(tower)
        self._extras = extras_of(tower)
        self.signals = list(signals)
        self._probes: dict[int, LayerProbe] = {}
        for signal in self.signals:
            if not -len(layers) <= signal.layer < len(layers):  # type: ignore[attr-defined]
                raise FoveateError(f"{signal}: the tower has {len(layers)} blocks; choose a layer from {-len(layers)} to {len(layers) - 1}")
        # Counted from the end, -1 is the last block, whose output is the last hidden state.
        for block in {signal.layer % len(layers) for signal in self.signals}:  # type: ignore[attr-defined]
            self._probes[block] = probe_of(layers[block])
        self._depth = len(layers)
        self._hooks = [probe.layer.register_forward_pre_hook(Hook(_arm, probe, idle)) for probe in self._probes.values()]

    def read(self, segments: int | None = None) -> dict[Signal, list[Tensor]]:
        """For each signal, crop by crop, one value a patch, (P,) or (P, h), of the pass that has just run; the probes forget it.

        segments: how many crops (images, frames) a tower that packs them ought to have seen. FoveateError if it saw more of them: then
        the block attends within windows, and scores of one window do not compare with those of another."""
        crops: dict[Signal, list[Tensor]] = {}
        for signal in self.signals:
            probe = self._probes[signal.layer % self._depth]  # type: ignore[attr-defined]
            crops[signal] = [values for call in probe.calls for values in values_of(signal, call, self._extras)]
            seen = len(crops[signal])
            if not seen or (segments is not None and seen != segments):
                how = f"attends within windows ({seen} of them in {segments} images or frames)" if seen else "has no attention to read"
                reason = Reason.WINDOWED if seen else Reason.NO_TOWER_ATTENTION
                raise NotApplicable(reason, f"{signal}: this block of the vision tower {how}; choose a block with full attention")
        for probe in self._probes.values():
            probe.forget()
        return crops

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for probe in self._probes.values():
            probe.remove()


def probe_of(block: nn.Module) -> LayerProbe:
    """A probe of a tower's block. NotApplicable for blocks whose attention nobody can watch, such as those that are not of transformers."""
    try:
        return LayerProbe(block)
    except NotApplicable as refused:
        raise NotApplicable(Reason.NO_TOWER_ATTENTION, f"{refused}, or another method") from refused


def _arm(probe: LayerProbe, idle: Callable[[], bool], *_: Any) -> None:
    if not idle():
        probe.arm()


def values_of(signal: Signal, call: AttentionRows, extras: Extras, valid_Cn: Tensor | None = None) -> list[Tensor]:
    """One tensor a crop: a value for each patch. valid: the tokens that are no padding; None: all."""
    b, n = call.query.shape[0], call.query.shape[2]
    if isinstance(signal, ClsAttention) and signal.joint:
        call = call.as_one_head()
    if isinstance(signal, TowerKeys):
        values = call.mean(call.key.to(torch.float32))
    elif isinstance(signal, ClsAttention) and extras.cls:
        values = replace(call, causal=False).row(torch.full((b,), n - 1 if extras.behind else 0, device=call.query.device))
    else:
        rows = torch.ones((b, n), dtype=torch.bool, device=call.query.device) if valid_Cn is None else valid_Cn
        values = replace(call, causal=False).received(rows)
    return list(extras.patches(values))


def carry(crops: list[Tensor], items: Sequence[Laid], how: Patches) -> list[Tensor]:
    """From one value a patch, crop by crop, to one value a token, item by item of the image features; 0 for what is no patch.
    NotApplicable where it is not known which patches made which token."""
    if how.boxes is not None:
        each = how.each or (how.boxes,) * len(crops)
        return [_over_boxes(crop, boxes[: len(kind)], grid) for crop, (kind, _), (boxes, grid) in zip(crops, items, each, strict=True)]
    flat = torch.cat(crops)
    patch = [kind == Kind.PATCH for kind, _ in items]
    total = sum(int(p.sum()) for p in patch)
    if how.grouped:
        if total == 0 or len(flat) % (total * how.grouped):
            raise NotApplicable(
                Reason.UNKNOWN_PATCHES,
                f"{len(flat)} patches of the tower became {total} tokens: it is not known which patches made which token",
            )
        merged = flat.view(len(flat) // how.grouped, how.grouped, *flat.shape[1:]).mean(1)
        merged = merged if how.order is None else merged[torch.argsort(how.order)]
        merged = _paired(merged, items, len(merged) // total)
    elif how.pooled is not None:
        merged = _pooled(flat, how.pooled.to(flat.device))
    else:
        flat = flat if how.order is None else flat[torch.argsort(how.order.to(flat.device))]
        merged = flat if len(flat) == total else torch.cat(_blocks(flat, items, patch, total))
    found = []
    for (kind, _), p in zip(items, patch, strict=True):
        values = merged.new_zeros((len(kind), *merged.shape[1:]))
        values[p] = merged[: int(p.sum())]
        merged = merged[int(p.sum()) :]
        found.append(values)
    return found


def _pooled(flat: Tensor, of: Tensor) -> Tensor:
    """Means over the patches that each token names."""
    there = (of >= 0).to(flat.dtype).view(*of.shape, *[1] * (flat.ndim - 1))
    summed: Tensor = (flat[of.clamp(min=0)] * there).sum(1)
    return summed / there.sum(1)


def _paired(groups: Tensor, items: Sequence[Laid], frames: int) -> Tensor:
    """Means over `frames` frames, one after the other, that become one."""
    if frames == 1:
        return groups
    found, start = [], 0
    for kind, place in items:
        parts = max(1, int(place[:, 1].max()) + 1)
        count = len(kind) * frames
        found.append(groups[start : start + count].view(parts, frames, len(kind) // parts, *groups.shape[1:]).mean(1).flatten(0, 1))
        start += count
    return torch.cat(found)


def _blocks(flat: Tensor, items: Sequence[Laid], patch: list[Tensor], total: int) -> list[Tensor]:
    """Means over blocks of each crop's raster of patches, one for each of its tokens."""
    parts = []
    for (_, place), p in zip(items, patch, strict=True):
        _, counts = torch.unique_consecutive(place[p][:, :2], dim=0, return_counts=True)
        parts += list(torch.split(place[p], counts.tolist()))
    found, start = [], 0
    for place in parts:
        patches = len(flat) * len(place) // total if total else 0
        rows, columns = int(place[:, 2].max()) + 1, int(place[:, 3].max()) + 1
        wide = math.isqrt(patches * columns // rows) if rows else 0
        if len(flat) * len(place) % total or rows * columns != len(place) or not wide or patches % wide:
            raise NotApplicable(
                Reason.UNKNOWN_PATCHES,
                f"{patches} patches of the tower became {len(place)} tokens, not in blocks of a raster: it is not known which patches "
                "made which token",
            )
        values = flat[start : start + patches].view(patches // wide, wide, -1).permute(2, 0, 1)
        pooled = adaptive_avg_pool2d(values, (rows, columns)).permute(1, 2, 0)
        found.append(pooled.reshape(rows * columns, *flat.shape[1:]))
        start += patches
    return found


def _over_boxes(crop: Tensor, boxes: Sequence[tuple[int, int, int, int]], grid: tuple[int, int]) -> Tensor:
    if list(boxes) == [(r, c, r + 1, c + 1) for r in range(grid[0]) for c in range(grid[1])]:  # a token of each patch, in their order
        return crop
    if not boxes:  # a view that is joined to another's channels
        return crop[:0]
    values = crop.view(*grid, *crop.shape[1:])
    return torch.stack([values[r0:r1, c0:c1].flatten(0, 1).mean(0) for r0, c0, r1, c1 in boxes])
