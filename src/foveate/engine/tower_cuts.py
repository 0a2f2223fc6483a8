"""Cuts inside a vision tower: in front of some of its blocks tokens are merged or dropped, and the blocks after them run on fewer of them.

A token of the tower is a unit (`foveate.anatomy.Units`): the patches that become one token of the language model, which stay and go
together. A merged unit has the mean of its members' first patches, of their second ones, and so on.

The model must not notice. After the last block the states are brought to full length again, as is every level that the tower returns, or
hands after a cut to a part beside its blocks: each unit gets its group's states, a dropped one those of its neighbour. The tokens that
the bridge makes of a group's members are equal then, and in front of the language model's first layer all of them but one are dropped
(`Carried`), which loses nothing. So the tower must give one token for each unit, and its bridge must look at each of them alone: what does
not fit is told by `NotApplicable`.

Levels in front of a cut that the tower returns are merged as the cut says, so that groups are equal at every level. What the tower has
handed to a part beside its blocks by then (DeepStack) is as it was: of a group's the one counts that enters the language model.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.anatomy import Anatomy, Extras, Units, blocks, extras_of
from foveate.contract import GROUPS, BeforeLM, Cut, Noise, Pixels, Signal, Site, TowerKeys, View, Workload, content_keys
from foveate.engine.replay import ReplayInTower, decide
from foveate.engine.standing import check_beside, laid
from foveate.engine.tower_call import TowerCall
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.probes.hooks import Hook
from foveate.probes.layer import LayerProbe
from foveate.probes.live import Live
from foveate.probes.marker import scoring
from foveate.probes.tower import TOWER_SIGNALS, probe_of, values_of
from foveate.probes.tower_pass import TowerPass
from foveate.probes.within import Within
from foveate.reducers.base import Reducer
from foveate.reducers.common import into
from foveate.tokens import Kind

NOT_ASKED = "the vision tower does not see the question; act in the language model or in front of it"
Acting = dict[int, list[tuple[Reducer, int]]]


class _Calls(Live):
    """Of the tower's calls: the one under way, what became of those since they were last taken, and how many there were."""

    def __init__(self) -> None:
        self.now: TowerCall | None = None
        self.done: list[TowerPass] = []
        self.count = 0


class Encoder:
    """The cuts in one tower. `idle` says of the calling thread whether nothing is to be done in it."""

    def __init__(
        self, anatomy: Anatomy, tower: nn.Module, acting: Acting, needs: Sequence[Signal], shortcuts: bool, idle: Callable[[], bool]
    ) -> None:
        self.anatomy, self.tower, self.acting, self.needs = anatomy, tower, acting, list(needs)
        self._shortcuts, self._idle = shortcuts, idle
        self.layers = blocks(tower)
        extras = extras_of(tower)
        self.cls, self.prefix = extras.cls, extras.number
        if extras.behind:
            raise NotApplicable(Reason.NOT_BY_PATCH, f"{type(tower).__name__} has its [CLS] token behind its patches; act before the LM")
        depth = len(self.layers)
        for block in acting:
            if not 0 <= block < depth:
                raise FoveateError(f"the vision tower has {depth} blocks: there is no block {block} to act in front of")
        self._probes: dict[int, LayerProbe] = {}
        for signal in self.needs:
            if isinstance(signal, TOWER_SIGNALS):
                block = signal.layer % depth
                if block + 1 not in acting:
                    raise FoveateError(f"{signal}: in the tower a reducer may look at the block before its own only")
                self._probes.setdefault(block, probe_of(self.layers[block]))
        self._live, self._within = _Calls(), Within()
        self._masked: dict[int, LayerProbe] = {}  # blocks that are given no mask: their attention is
        self._hooks: list[Any] = []
        self._install()

    def _install(self) -> None:
        tower, layers = self.tower, self.layers
        self._hooks = [
            tower.register_forward_pre_hook(Hook(self._begin), with_kwargs=True),
            tower.register_forward_hook(Hook(self._end), always_call=True),
            *(part.register_forward_pre_hook(Hook(self._before_part)) for part in _beside(tower, layers)),
            layers[-1].register_forward_hook(Hook(self._after_blocks), prepend=True),
        ]
        weighs = any(getattr(reducer, "proportional", False) for at in self.acting.values() for reducer, _ in at)
        for index, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(Hook(self._before_block, index), with_kwargs=True))
            packed = any("cu_seqlens" in _names(part) for part in layer.modules())  # each crop attends to itself, whatever its length
            if index >= min(self.acting) and (weighs if packed else "attention_mask" not in _names(layer)):
                with contextlib.suppress(NotApplicable):  # there may never be need of it
                    self._masked[index] = LayerProbe(layer, self._mask)
                    self._hooks.append(layer.register_forward_hook(Hook(self._within.end), always_call=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for probe in (*self._masked.values(), *self._probes.values()):
            probe.remove()
        self._hooks, self._live = [], _Calls()

    def take(self) -> list[TowerPass]:
        """The calls since the last time."""
        calls, self._live.done = self._live.done, []
        return calls

    def groups(self, calls: Sequence[TowerPass]) -> list[Tensor]:
        """`Groups` of every crop of some calls, (P, 2) each."""
        found, start = [], 0
        for call in calls:
            found += call.groups(self.prefix, start)
            start += call.first.valid.numel()
        return found

    # ---- hooks

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._idle():
            self._live.now = None
            return
        pixels = args[0] if args else kwargs.get("pixel_values")
        given = {**dict(zip(_names(module), args, strict=False)), **kwargs}
        self._live.now = TowerCall(given, pixels if isinstance(pixels, Tensor) else None)

    def _before_block(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._live.now
        if call is None:
            return None
        states: Any = args[0] if args else kwargs.get("hidden_states")
        if call.seen is None:
            self._open(call, states, args, kwargs)
        call.enter(index)
        cut = states
        for reducer, stage in self.acting.get(index, ()):
            cut = self._cut(call, reducer, stage, cut)
        if index in self._probes:
            self._probes[index].arm()
        if not call.stands:
            return None
        call.shape = cut.shape[:-1]
        given = (cut, *map(call.beside, args[1:])) if args else ()
        named = {name: cut if name == "hidden_states" else call.beside(value) for name, value in kwargs.items()}
        if named.get("max_seqlen") is not None:  # of flash attention
            named["max_seqlen"] = int(named["cu_seqlens"].diff().max())
        added = call.added(cut.dtype)
        return (given, named) if added is None else self._weighed(index, added, given, named)

    def _weighed(
        self, index: int, added_Rn: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a block whose attention some numbers are added to: as its mask, where it takes one."""
        layer, implementation = self.layers[index], str(getattr(self.tower.config, "_attn_implementation", ""))
        if "flash" in implementation:
            raise FoveateError(
                f"{implementation} takes no mask that follows the tokens' sizes: load the model with sdpa or eager attention"
            )
        if index in self._masked:
            self._within.begin(layer, added_Rn)
            return args, kwargs
        names = _names(layer)
        if "attention_mask" not in names:
            raise NotApplicable(Reason.NO_TOWER_MASK, f"{type(layer).__name__} takes no mask, so attention cannot follow the tokens' sizes")
        mask, at = added_Rn[:, None, None].expand(-1, 1, added_Rn.shape[1], -1), names.index("attention_mask")
        if at < len(args):
            return (*args[:at], laid(args[at], mask), *args[at + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": laid(kwargs.get("attention_mask"), mask)}

    def _mask(self, own: Any, query: Tensor, key: Tensor) -> Any:
        """The mask that a block's attention is given in place of its own: crop by crop, where they are packed."""
        if self._within.values is None:
            return own
        (added_Rn,) = self._within.values
        part = added_Rn[:, self._within.take(key.shape[2])].clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        return laid(own, part[:, None, None].expand(-1, 1, query.shape[2], -1))

    def _before_part(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """A part beside the blocks is given what one of them has made."""
        call = self._live.now
        if call is None or not call.stands or not args or not isinstance(args[0], Tensor):
            return None
        levels = [one for given in args if isinstance(given, list | tuple) for one in given if isinstance(one, Tensor)]
        if any(one.shape[:-1] == call.shape for one in levels):
            raise NotApplicable(Reason.NOT_BY_PATCH, f"{type(module).__name__} is given what several blocks of the tower have made at once")
        if call.over:
            return None
        return (call.full(args[0], call.block), *args[1:]) if args[0].shape[:-1] == call.shape else None

    def _after_blocks(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self._live.now
        if call is None or not call.stands:
            return None
        call.over = True
        states = output[0] if isinstance(output, tuple) else output
        states = call.full(states, len(self.layers))
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        live = self._live
        call, live.now = live.now, None
        if call is None or call.seen is None or output is None:
            return None  # an exception ended the call
        live.done.append(call.seen)
        live.count += 1
        levels = getattr(output, "hidden_states", None)
        if not call.stands or not levels:
            return None
        depth = len(self.layers)
        if len(levels) != depth + 1:
            raise NotApplicable(Reason.NOT_BY_PATCH, f"{len(levels)} hidden states of {depth} blocks: it is not known which is which")
        # Level i is what block i - 1 gave, the last at full length; level 0 is what came to block 0, after a cut that may be there.
        full = [x if x is None or i == depth else call.full(x, max(i - 1, 0)) for i, x in enumerate(levels)]
        return type(output)(**{**output, "hidden_states": tuple(full)})

    # ---- a cut

    def _open(self, call: TowerCall, states: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What came to the first block. NotApplicable where it cannot be cut."""
        if not isinstance(states, Tensor) or states.ndim < 2:
            raise NotApplicable(Reason.NOT_BY_PATCH, f"{type(self.tower).__name__} does not hold its patches as (crops, patches, width)")
        crops = self.anatomy.crops(self.tower, call.given, states.shape[:-1])
        for name, value in {**dict(zip(_names(self.layers[0])[1:], args[1:], strict=False)), **kwargs}.items():
            if name != "hidden_states":
                check_beside(name, value, len(crops.grids), states.shape[-2], crops.packed)
        call.open(crops, Units.of(crops, states.device), states.shape[-2])

    def _cut(self, call: TowerCall, reducer: Reducer, stage: int, states: Tensor) -> Tensor:
        assert call.seen is not None
        tokens = call.standing.tokens(call.standing.rows(states))
        with scoring(), torch.autocast(states.device.type, enabled=False):
            view = self._view(call, tokens)
        token_map = decide(reducer, self._live.count if isinstance(reducer, ReplayInTower) else stage, view, Cut).map
        if self._shortcuts and token_map.is_identity:
            return states
        layout = view.layout
        stays = torch.zeros_like(layout.valid).scatter(1, token_map.representative.clamp(min=0), True)
        if not bool((stays | (layout.kind == Kind.PATCH) | ~layout.valid).all()):
            raise FoveateError(f"{reducer.name} drops the tower's [CLS] or register tokens; it may drop patches only")
        call.cut(token_map, bool(getattr(reducer, "proportional", False)))
        return call.standing.states(token_map.apply(tokens), states)

    def _view(self, call: TowerCall, tokens_CUgD: Tensor) -> View:
        layout, first = call.layouts[-1], call.layouts[0]
        signals: dict[Signal, Any] = {}
        for signal in self.needs:
            if isinstance(signal, TOWER_SIGNALS) and signal.layer % len(self.layers) == call.block - 1:
                values = self._said(signal, call)
                signals[signal] = values if call.here is None else call.here.apply(values)
            elif isinstance(signal, Pixels):
                signals[signal] = call.whole.apply(call.pixels_of_units())
        keys = None
        if any(isinstance(signal, Noise) for signal in self.needs) and (pixels := call.crop_pixels) is not None:
            keys = content_keys(pixels)
        before = None if layout is first else View(first, image_keys=keys, unknown=NOT_ASKED)
        states = call.standing.mean(tokens_CUgD)
        return View(layout, states, keys, signals, first=before, layers=len(self.layers), unknown=NOT_ASKED)

    def _said(self, signal: Signal, call: TowerCall) -> Tensor:
        """(C, U) or (C, U, h) what the block before says of each token; of one of several patches, their mean."""
        probe, crops, stood = self._probes[call.block - 1], len(call.crops.grids), call.entry
        if call.crops.packed:
            parts = [values for rows in probe.calls for values in values_of(signal, rows, Extras(self.cls))]
        else:
            parts = values_of(signal, probe.attention(), Extras(self.cls), stood.slot >= 0)
        if not isinstance(signal, TowerKeys) and len(parts) != crops:
            raise NotApplicable(
                Reason.WINDOWED,
                f"{signal}: this block of the vision tower attends within windows ({len(parts)} of them in {crops} images or frames); "
                "choose a block with full attention",
            )
        said = stood.mean(stood.tokens(torch.cat(parts).reshape(*stood.slot.shape, -1)))
        return said if parts[0].ndim > 1 else said[..., 0]


def _names(module: nn.Module) -> list[str]:
    """Of the arguments of a module's forward."""
    return list(inspect.signature(module.forward).parameters)


def _beside(tower: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The parts of a tower that it calls beside its blocks."""
    around = [module for module in tower.modules() if module is not layers and any(part is layers for part in module.modules())]
    for module in around:
        for child in module.children():
            if child is not layers and not any(child is outer for outer in around):
                yield from child if isinstance(child, nn.ModuleList) else [child]


# ---- in front of the language model


@dataclass(frozen=True)
class Carried(Reducer):
    """Of each group of patches that the tower has merged one token enters the language model; all of the group's are equal."""

    name: ClassVar[str] = "carried"
    paper: ClassVar[str] = "-"

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((GROUPS,))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout = view.layout
        kept, own = view.signal(GROUPS).to(torch.int64).unbind(-1)
        slots = layout.visual.flatten().nonzero()[:, 0]
        kept, own = kept.flatten()[slots], own.flatten()[slots]
        image = layout.image.flatten()[slots]
        home = torch.full((layout.valid.numel(),), -1, dtype=torch.int64, device=slots.device)
        # The first of each group is the one it keeps, or, where that is not among the tokens (padding cut off), the first in sequence.
        order = (kept != own).to(torch.int8).argsort(stable=True)
        order = order[kept[order].argsort(stable=True)]
        order = order[image[order].argsort(stable=True)]
        start = torch.ones_like(order, dtype=torch.bool)
        start[1:] = (kept[order][1:] != kept[order][:-1]) | (image[order][1:] != image[order][:-1])
        first = order[start][start.cumsum(0) - 1]
        home[slots[order]] = torch.where(kept[order] >= 0, slots[first], -1)
        # All of a group's tokens are equal: the one that stays is copied, to the bit.
        weight = (home == torch.arange(len(home), device=home.device)) | ~layout.visual.flatten()
        return Cut(into(layout, home, weight.to(torch.float64)))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        raise FoveateError("what the tower leaves is counted by the reducer that acts in it")
