"""What the vision tower says of each visual token: attention of [CLS], attention received, keys; and how it gets from patches to tokens.

A score belongs to a patch of the tower, a token to the language model. Between them patches are merged (pixel shuffle, pooling, grouped
patches, a bridge's windows); a token's score is the mean over its patches. Models that pack tiles with newlines between their rows are
refused where a tower score is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.probes import LayerProbe
from foveate.signals import AttentionRows, ClsAttention, ReceivedAttention, Signal, TowerKeys

TOWER_SIGNALS = (ClsAttention, ReceivedAttention, TowerKeys)


def blocks(tower: nn.Module) -> nn.ModuleList:
    """The tower's attention blocks. FoveateError for a tower without any (convolutions)."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) and any(_attends(x) for x in m[0].modules())]
    if not lists:
        name = type(tower).__name__
        raise FoveateError(f"{name} has no attention blocks, so there are no attention scores of patches; use a method without them")
    return max(lists, key=len)


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "config") and "attention" in type(module).__name__.lower()


class TowerProbes:
    """Watches the blocks that the signals name, whenever the tower runs."""

    def __init__(self, tower: nn.Module, signals: Sequence[Signal]) -> None:
        layers = blocks(tower)
        self._prefix = prefix_of(tower)
        self.signals = list(signals)
        self._probes: dict[int, LayerProbe] = {}
        for signal in self.signals:
            layer = signal.layer  # type: ignore[attr-defined]
            if not -len(layers) <= layer < len(layers):
                raise FoveateError(f"{signal}: the tower has {len(layers)} blocks; choose a layer from {-len(layers)} to {len(layers) - 1}")
            # Counted from the end, -1 is the last block, whose output is the last hidden state.
            if layer % len(layers) not in self._probes:
                self._probes[layer % len(layers)] = LayerProbe(layers[layer])
        self._depth = len(layers)
        self._hooks = [probe.layer.register_forward_pre_hook(_armer(probe)) for probe in self._probes.values()]

    def read(self) -> dict[Signal, list[Tensor]]:
        """For each signal, crop by crop, one value a patch, (P,) or (P, h), of the pass that has just run; the probes forget it."""
        crops: dict[Signal, list[Tensor]] = {}
        for signal in self.signals:
            probe = self._probes[signal.layer % self._depth]  # type: ignore[attr-defined]
            crops[signal] = [values for call in probe.calls for values in _values(signal, call, *self._prefix)]
        for probe in self._probes.values():
            probe.calls = []
        return crops

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for probe in self._probes.values():
            probe.remove()


def _armer(probe: LayerProbe) -> Callable[..., None]:
    return lambda *_: probe.arm()


def _values(signal: Signal, call: AttentionRows, cls: bool, prefix: int) -> list[Tensor]:
    """One tensor a crop: a value for each patch."""
    b, n = call.query.shape[0], call.query.shape[2]
    if isinstance(signal, TowerKeys):
        values = call.key.float().mean(1)
    elif isinstance(signal, ClsAttention) and cls:
        bidirectional = AttentionRows(call.query, call.key, call.scale, _all(call), call.softcap)
        values = bidirectional.row(torch.zeros(b, dtype=torch.int64, device=call.query.device))
    else:
        bidirectional = AttentionRows(call.query, call.key, call.scale, _all(call), call.softcap)
        values = bidirectional.received(torch.ones((b, n), dtype=torch.bool, device=call.query.device))
    return list(values[:, prefix:])


def _all(call: AttentionRows) -> Tensor:
    """The call's mask; a tower without one lets every patch see every other."""
    if call.mask is not None:
        return call.mask
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=call.query.device).expand(1, 1, call.query.shape[2], call.key.shape[2])


def prefix_of(tower: nn.Module) -> tuple[bool, int]:
    """Whether a tower has a [CLS] token, and how many tokens stand before the patches ([CLS] and registers)."""
    named = {name.rpartition(".")[2]: p for name, p in tower.named_parameters()}
    cls = any(name in named for name in ("class_embedding", "cls_token", "class_token"))
    registers = next((p.shape[-2] for name, p in named.items() if "register_token" in name), 0)
    return cls, int(cls) + registers


Pack = Callable[[list[Tensor]], list[Tensor]]


def carry(crops: list[Tensor], items: Sequence[int], *, grouped: bool, pack: Pack | None = None) -> list[Tensor]:
    """From one value a patch, crop by crop, to one value a token, item by item of the image features.

    items: tokens of each item; grouped: patches that become one token stand side by side (else they are square blocks of the grid);
    pack: how the model puts the crops of an image together, where it does. FoveateError where the way is not known.
    """
    if pack is not None:
        return pack(crops)
    total, patches = sum(items), sum(len(c) for c in crops)
    if total == 0 or patches % total:
        raise FoveateError(f"{patches} patches of the tower became {total} tokens: it is not known which patches made which token")
    ratio = patches // total
    merged = [merge(crop, ratio, grouped) for crop in crops]
    flat = torch.cat(merged)
    return list(torch.split(flat, list(items)))


def merge(values: Tensor, ratio: int, grouped: bool) -> Tensor:
    """(P, ...) -> (P / ratio, ...): means of `ratio` patches, side by side or in square blocks of a square grid."""
    if ratio == 1:
        return values
    P, rest = values.shape[0], values.shape[1:]
    if grouped:
        return values.view(P // ratio, ratio, *rest).mean(1)
    side, block = math.isqrt(P), math.isqrt(ratio)
    if side * side != P or block * block != ratio or side % block:
        raise FoveateError(f"{P} patches became {P // ratio} tokens, not in square blocks: it is not known which patches made which token")
    grid = values.view(side // block, block, side // block, block, *rest)
    return grid.mean((1, 3)).reshape(P // ratio, *rest)


def over_boxes(boxes: Sequence[tuple[int, int, int, int]], grid: tuple[int, int]) -> Pack:
    """For a bridge that says from which box of patches each token is made: the mean over the box."""

    def pack(crops: list[Tensor]) -> list[Tensor]:
        found = []
        for crop in crops:
            values = crop.view(*grid, *crop.shape[1:])
            found.append(torch.stack([values[r0:r1, c0:c1].flatten(0, 1).mean(0) for r0, c0, r1, c1 in boxes]))
        return found

    return pack
