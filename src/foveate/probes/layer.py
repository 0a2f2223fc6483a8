"""Watching attention where it happens: queries and keys as they enter the attention function of one layer.

An attention layer of transformers looks its function up at every call, by a name in its configuration. A watched layer has a stand-in for
its configuration, which names ours: that notes what comes in and calls the one that was meant. So any backend can be watched, no submodule
is called outside its forward, and nothing changes from call to call: threads do not meet, and an interrupted call leaves nothing behind.
A layer may be watched several times over: each stand-in then stands in for the one before, and each call goes through all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.anatomy import tensor_parallel_group
from foveate.contract import AttentionRows
from foveate.errors import NotApplicable, Reason
from foveate.probes.hooks import Hook, uncompiled
from foveate.probes.live import Live

WATCHED = "foveate_watched_"  # before the name of the backend that is meant


class _Calls(Live):
    """What a thread has seen of a layer since it armed the probe."""

    def __init__(self) -> None:
        self.armed = self.inside = False
        self.seen: list[AttentionRows] = []


class LayerProbe:
    """Watches the attention of one layer while it is armed. Every call is noted: a tower that packs its images makes one for each.

    mask: of a call's mask, queries and keys, what its attention is given in place of the mask, armed or not; None: its own."""

    def __init__(self, layer: nn.Module, mask: Callable[[Any, Tensor, Tensor], Any] | None = None) -> None:
        self.layer, self._mask = layer, mask
        self._live = _Calls()
        self._modules = [m for m in layer.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
        if not self._modules:
            raise NotApplicable(Reason.RECURRENT, f"{type(layer).__name__} has no attention that can be watched; choose another layer")
        for module in self._modules:
            module.config = WatchedConfig(module.config, self)  # type: ignore[assignment]
        self._hook = layer.register_forward_hook(Hook(self._after), always_call=True)

    @property
    def calls(self) -> list[AttentionRows]:
        """What this thread has seen since it armed the probe."""
        return self._live.seen

    def _after(self, *_: Any) -> None:
        self._live.armed = False

    def arm(self, on: bool = True) -> None:
        """From now until the layer has run, in this thread; `on=False`: not at all."""
        self._live.armed, self._live.seen = on, []

    def forget(self) -> None:
        """Lets go of what was seen."""
        self._live.seen = []

    def remove(self) -> None:
        """Leaves the layer as it was."""
        self._hook.remove()
        for module in self._modules:
            if isinstance(module.config, WatchedConfig) and module.config.watched_by is self:
                module.config = module.config.meant

    def attention(self) -> AttentionRows:
        """The layer's attention; FoveateError if it did not run any (recurrent and convolving layers) or ran it in several parts."""
        if len(self.calls) != 1:
            raise NotApplicable(
                Reason.RECURRENT,
                f"{type(self.layer).__name__} called its attention function {len(self.calls)} times; a score needs one call: "
                "choose a layer with full attention",
            )
        return self.calls[0]

    def keys(self) -> Tensor:
        """(B, K, G * h) float32 keys, heads side by side."""
        return self.attention().keys()

    # ---- the attention function

    def attend(self, name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        """What is called in place of the backend `name`."""
        live = self._live
        if self._mask is not None:
            attention_mask = self._mask(attention_mask, query, key)
        if live.armed:
            rows = _rows(name, query, key, attention_mask, kwargs)
            live.seen.append(replace(rows, group=tensor_parallel_group(module)))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager(type(module)))
        live.inside = True  # the backend may ask for its own name
        try:
            return function(module, query, key, value, attention_mask, **kwargs)
        finally:
            live.inside = False

    def name(self, meant: Any) -> Any:
        """The name of the backend that a watched layer's configuration gives."""
        if meant is None or self._live.inside:
            return meant
        watched = WATCHED + str(meant)
        if watched not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(watched, partial(_attend, str(meant)))
        return watched


class WatchedConfig:
    """A configuration in everything but the attention function that it names."""

    def __init__(self, meant: Any, watched_by: LayerProbe) -> None:
        self.__dict__.update(meant=meant, watched_by=watched_by)

    @property
    def _attn_implementation(self) -> Any:
        return uncompiled(self.watched_by.name, self.meant._attn_implementation)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "meant":  # asked for by copies and pickles of what is not there yet
            raise AttributeError(name)
        return getattr(self.meant, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.meant, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _attend(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    config: Any = module.config
    watching = []
    while isinstance(config, WatchedConfig):
        watching.append(config.watched_by)
        config = config.meant
    # The name that is meant says how many of them it has still to go through.
    return uncompiled(watching[-1 - name.count(WATCHED)].attend, name, module, *args, **kwargs)


def _rows(name: str, query: Tensor, key: Tensor, mask: Any, given: dict[str, Any]) -> AttentionRows:
    """The attention of a call, under the mask that its backend is given: 4-D, or what flash makes of 2-D ones and packed rows."""
    scale = given.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    rows = AttentionRows(query.detach(), key.detach(), scale, None, given.get("softcap"))
    if isinstance(mask, Tensor) and mask.ndim == 4:
        rows = AttentionRows(query.detach(), key.detach(), scale, mask, given.get("softcap"))
    elif "flash" in name:
        rows = rows.under_flash(mask if isinstance(mask, Tensor) else None, given.get("sliding_window"), _samples(query, key, mask, given))
    return rows


def _samples(query: Tensor, key: Tensor, mask: Any, given: dict[str, Any]) -> Tensor | None:
    """(1, N) int64: which packed sample a slot belongs to, as flash attention is told; None where nothing is packed."""
    N = query.shape[2]
    if isinstance(mask, Tensor) or N == 1 or key.shape[2] != N:
        return None
    slots = torch.arange(N, device=query.device)
    starts = given.get("cu_seq_lens_q")
    if starts is not None:
        return torch.searchsorted(starts.to(torch.int64)[1:], slots, right=True)[None]
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor) or query.shape[0] != 1 or positions.shape != (1, N):
        return None
    return (positions == positions.min()).cumsum(1)


def _eager(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The function that an attention layer calls in eager mode: not in the library's table, but named in the layer's own code."""
    forward: Any = inspect.unwrap(kind.forward)
    name = next((name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")), None)
    return None if name is None else forward.__globals__[name]
