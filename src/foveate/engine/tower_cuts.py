"""Cuts inside a vision tower: in front of some of its blocks patches are merged or dropped, and the blocks behind run on fewer of them.

The model must not notice. Behind the last block the states are brought to full length again, as is every level that the tower returns:
each patch gets its group's state, a dropped one that of its neighbour. The tokens that the bridge makes of a group's members are equal
then, and in front of the language model's first layer all of them but one are dropped (`Carried`), which loses nothing. So the tower must
give one token for each patch, and its bridge must look at each of them alone: what does not fit is told by `NotApplicable`.

States that a cut has not seen yet (levels in front of it, which some models take their features from) are merged as the cut says, so
that groups are equal at every level.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.anatomy import Extras, blocks, columns_of, extras_of
from foveate.contract import GROUPS, BeforeLM, Cut, Noise, Signal, Site, View, Workload, content_keys
from foveate.engine.replay import ReplayInTower, decide
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.probes.hooks import Hook
from foveate.probes.layer import LayerProbe
from foveate.probes.live import Live
from foveate.probes.marker import scoring
from foveate.probes.tower import TOWER_SIGNALS, probe_of, values_of
from foveate.probes.tower_pass import TowerPass
from foveate.reducers.base import Reducer
from foveate.reducers.common import into
from foveate.tokens import PLACE, Kind, Layout, TokenMap

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

    def __init__(self, tower: nn.Module, acting: Acting, needs: Sequence[Signal], shortcuts: bool, idle: Callable[[], bool]) -> None:
        self.tower, self.acting, self.needs, self._shortcuts, self._idle = tower, acting, list(needs), shortcuts, idle
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
        self._live = _Calls()
        self._hooks = [
            tower.register_forward_pre_hook(Hook(self._begin), with_kwargs=True),
            tower.register_forward_hook(Hook(self._end), always_call=True),
        ]
        self._hooks.append(self.layers[-1].register_forward_hook(Hook(self._after_blocks), prepend=True))
        for index, layer in enumerate(self.layers):
            self._hooks.append(layer.register_forward_pre_hook(Hook(self._before_block, index), with_kwargs=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for probe in self._probes.values():
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
        self._live.now = TowerCall(pixels if isinstance(pixels, Tensor) else None)

    def _before_block(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._live.now
        if call is None:
            return None
        states: Any = args[0] if args else kwargs.get("hidden_states")
        if not call.layouts:
            self._check(states, args, kwargs)
            call.layouts.append(self._layout(states, call.pixels))
            call.seen = TowerPass(call.layouts[0])
        cut = states
        for reducer, stage in self.acting.get(index, ()):
            cut = self._cut(call, index, reducer, stage, cut)
        if index in self._probes:
            self._probes[index].arm()
        mask = call.mask(cut.dtype)
        if cut is states and mask is None:
            return None
        given = (cut, *args[1:]) if args else args
        kwargs = kwargs if args else {**kwargs, "hidden_states": cut}
        if mask is None:
            return given, kwargs
        names = list(inspect.signature(module.forward).parameters)
        implementation = str(getattr(self.tower.config, "_attn_implementation", ""))
        if "attention_mask" not in names:
            raise NotApplicable(
                Reason.NO_TOWER_MASK, f"{type(module).__name__} takes no mask, so attention cannot follow the tokens' sizes"
            )
        if "flash" in implementation:
            raise FoveateError(
                f"{implementation} takes no mask that follows the tokens' sizes: load the model with sdpa or eager attention"
            )
        at = names.index("attention_mask")
        if at < len(given):
            return (*given[:at], mask, *given[at + 1 :]), kwargs
        return given, {**kwargs, "attention_mask": mask}

    def _cut(self, call: TowerCall, index: int, reducer: Reducer, stage: int, states: Tensor) -> Tensor:
        assert call.seen is not None
        with scoring(), torch.autocast(states.device.type, enabled=False):
            view = self._view(call, index, states)
        token_map = decide(reducer, self._live.count if isinstance(reducer, ReplayInTower) else stage, view, Cut).map
        if self._shortcuts and token_map.is_identity:
            return states
        stays = torch.zeros_like(view.layout.valid).scatter(1, token_map.representative.clamp(min=0), True)
        if not bool((stays | (view.layout.kind == Kind.PATCH)).all()):
            raise FoveateError(f"{reducer.name} drops the tower's [CLS] or register tokens; it may drop patches only")
        whole = call.seen.maps.get(index)
        call.here = token_map if call.here is None else call.here.then(token_map)
        call.seen.maps[index] = token_map if whole is None else whole.then(token_map)
        call.layouts.append(token_map.target)
        call.merged |= token_map.member.shape[-1] > 1 and bool(getattr(reducer, "proportional", False))
        call.ragged |= not bool(token_map.target.valid.all())
        return token_map.apply(states)

    def _view(self, call: TowerCall, index: int, states: Tensor) -> View:
        layout, first = call.layouts[-1], call.layouts[0]
        if call.index != index:
            call.index, call.here = index, None
        signals: dict[Signal, Any] = {}
        for signal in self.needs:
            if isinstance(signal, TOWER_SIGNALS) and signal.layer % len(self.layers) == index - 1:
                values = torch.stack(values_of(signal, self._probes[index - 1].attention(), Extras(self.cls)))
                signals[signal] = values if call.here is None else call.here.apply(values)
        keys = None
        if call.pixels is not None and any(isinstance(signal, Noise) for signal in self.needs):
            keys = content_keys(call.pixels)
        before = None if layout is first else View(first, image_keys=keys, unknown=NOT_ASKED)
        return View(layout, states, keys, signals, first=before, layers=len(self.layers), unknown=NOT_ASKED)

    def _after_blocks(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self._live.now
        if call is None or call.seen is None or not call.seen.maps:
            return None
        states = output[0] if isinstance(output, tuple) else output
        return (call.full(states, len(self.layers)), *output[1:]) if isinstance(output, tuple) else call.full(states, len(self.layers))

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        live = self._live
        call, live.now = live.now, None
        if call is None or call.seen is None or output is None:
            return None  # an exception ended the call
        live.done.append(call.seen)
        live.count += 1
        if not call.seen.maps:
            return None
        levels = getattr(output, "hidden_states", None)
        if not levels:
            return None
        depth = len(self.layers)
        if len(levels) != depth + 1:
            raise NotApplicable(Reason.NOT_BY_PATCH, f"{len(levels)} hidden states of {depth} blocks: it is not known which is which")
        # Level i is what block i - 1 gave, the last at full length; level 0 is what came to block 0, behind a cut that may be there.
        full = [x if x is None or i == depth else call.full(x, max(i - 1, 0)) for i, x in enumerate(levels)]
        return type(output)(**{**output, "hidden_states": tuple(full)})

    # ---- what a block is given

    def _check(self, states: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = type(self.tower).__name__
        if not isinstance(states, Tensor) or states.ndim != 3:
            raise NotApplicable(Reason.NOT_BY_PATCH, f"{name} does not hold its patches as (crops, patches, width)")
        if any(_tensors(value) for value in args[1:]) or any(_tensors(v) for name, v in kwargs.items() if name != "hidden_states"):
            raise NotApplicable(
                Reason.TOWER_INPUTS,
                f"{name} gives its blocks masks or positions beside the states; these cannot be cut, so act before the LM",
            )

    def _layout(self, states: Tensor, pixels: Tensor | None) -> Layout:
        C, n = states.shape[:2]
        device, patches = states.device, n - self.prefix
        kind = torch.full((C, n), int(Kind.PATCH), device=device)
        kind[:, : self.prefix] = int(Kind.REGISTER)
        kind[:, : int(self.cls)] = int(Kind.CLS)
        visual = kind == Kind.PATCH
        place = torch.full((C, n, len(PLACE)), -1, dtype=torch.int64, device=device)
        place[..., 0] = torch.where(visual, torch.arange(C, device=device)[:, None], -1)
        columns = columns_of(self.tower, patches, pixels)
        if columns:
            rank = torch.arange(patches, device=device)
            place[:, self.prefix :, 3], place[:, self.prefix :, 4] = rank // columns, rank % columns
        position = torch.arange(n, device=device).expand(C, n)
        return Layout(kind, torch.ones_like(visual), position, place, visual.to(torch.float32))


@dataclass
class TowerCall:
    """A call of the tower under way."""

    pixels: Tensor | None
    layouts: list[Layout] = field(default_factory=list)
    seen: TowerPass | None = None
    merged: bool = False  # whether attention is to be proportional to what the tokens stand for
    ragged: bool = False  # whether some crops have fewer tokens than others
    index: int = -1
    here: TokenMap | None = None  # what the reducers in front of the block under way have made of its slots

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """(C, 1, n, n) what is added to attention; None: nothing."""
        if not self.merged and not self.ragged:
            return None
        layout = self.layouts[-1]
        added = layout.size.clamp(min=1).log() if self.merged else torch.zeros_like(layout.size)
        added = added.to(dtype).masked_fill(~layout.valid, torch.finfo(dtype).min)
        return added[:, None, None].expand(-1, 1, layout.shape[1], -1)

    def full(self, states: Tensor, block: int) -> Tensor:
        """States that have gone through the cuts in front of blocks 0 to `block`, at full length, merged as the other cuts say."""
        assert self.seen is not None
        for at, token_map in self.seen.maps.items():
            if at > block:
                states = token_map.apply(states)
        for token_map in reversed(self.seen.maps.values()):
            states = token_map.expand(states)
        return states


def _tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_tensors, value)))


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
