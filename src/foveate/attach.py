"""attach: the only code that touches a model. Hooks on the decoder and its layers; no source edited, no weight changed.

    with foveate.attach(model, VCC(layer=2, stride=8)) as run:
        model.generate(**inputs)
    run.ledger

What happens in one forward pass (prefill, training step or decoding step):

1. the wrapper of `get_image_features` (and `get_video_features`) notes how many visual tokens each image has;
2. in front of the decoder a `Chunk` is made of the part of the sequence that arrives;
3. in front of every layer at which a reducer acts, the hidden states are cut; that layer and those behind it get masks, positions
   and side inputs cut by the same map (`foveate.chunk`);
4. behind the last layer the states are expanded to the caller's length, so that logits and labels keep their places.

What decoding needs of earlier passes is remembered on the request's cache (`foveate.memory`).
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from foveate.anatomy import Anatomy, read
from foveate.chunk import Chunk
from foveate.cost import Ledger
from foveate.errors import FoveateError
from foveate.memory import recall, remember
from foveate.probes import LayerProbe
from foveate.reducers import Reducer, load_reducers, parse, spell
from foveate.signals import Attention, Keys, Noise, Signal, View, content_keys
from foveate.sites import Cut, FromLayer, Site
from foveate.tokens import Layout, TokenMap
from foveate.towers import TOWER_SIGNALS, TowerProbes, carry, over_boxes

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_RECORD = ("none", "last", "all")
_REMEMBERED = 1024  # items of image features whose scores are kept until they enter the language model


@dataclass(frozen=True)
class _Item:
    """What is known of one item of image features: a key of its pixels, and the tower's values, one for each of its tokens."""

    key: Tensor
    values: dict[Signal, Tensor]


@dataclass
class _Images:
    """The image features of the forward pass under way, item by item."""

    lengths: list[int] = field(default_factory=list)
    items: list[_Item] = field(default_factory=list)

    @property
    def keys(self) -> Tensor | None:
        return torch.stack([item.key for item in self.items]) if self.items else None


@dataclass
class Pass:
    """One forward pass as it was: the chunk's layout in front of each layer, and the maps between them."""

    layouts: list[Layout] = field(default_factory=list)
    maps: dict[int, TokenMap] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    renumbered: set[int] = field(default_factory=set)

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens that went through each decoder layer, over the whole batch."""
        return [int(layout.visual.sum()) for layout in self.layouts]

    @property
    def tokens(self) -> list[int]:
        """Valid tokens, text and visual, that went through each decoder layer, over the whole batch."""
        return [int(layout.valid.sum()) for layout in self.layouts]

    @property
    def images(self) -> int:
        """Images of the batch."""
        return int((self.maps[0].source if 0 in self.maps else self.layouts[0]).image.max()) + 1

    def ledger(self, config: Any, **options: Any) -> Ledger:
        """The pass' tokens, KV bytes and FLOPs, from the token counts as they were; options as in `Ledger.observed`."""
        visual = [layout.visual.sum(1).tolist() for layout in self.layouts]
        total = [layout.valid.sum(1).tolist() for layout in self.layouts]
        return Ledger.observed(config, visual, total, images=self.images, **options)

    def provenance(self, layer: int) -> TokenMap:
        """From the slots that entered the language model to those in front of decoder layer `layer`."""
        whole = TokenMap.identity(self.layouts[0] if 0 not in self.maps else self.maps[0].source)
        for at in sorted(self.maps):
            if at <= layer:
                whole = whole.then(self.maps[at])
        return whole


class Run:
    """An attachment: made by `attach`, ended by `detach` or by leaving the `with` block."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, reducers: Sequence[Reducer], record: str, shortcuts: bool = True) -> None:
        self.anatomy = anatomy
        self.config = model.config
        self.reducers = list(reducers)
        self.record = record
        self.passes: list[Pass] = []
        self._shortcuts = shortcuts
        self._cuts: dict[int, list[tuple[Reducer, int]]] = {}
        self._needs: set[Signal] = set()
        for reducer in self.reducers:
            for stage, site in enumerate(reducer.sites(len(anatomy.layers))):
                if site.layer < len(anatomy.layers):
                    self._cuts.setdefault(site.layer, []).append((reducer, stage))
                    self._needs.update(site.needs)
        self._probes = {s.layer: LayerProbe(anatomy.layers[s.layer]) for s in self._needs if isinstance(s, (Attention, Keys))}
        tower = [signal for signal in self._needs if isinstance(signal, TOWER_SIGNALS)]
        self._tower = TowerProbes(anatomy.tower, tower) if tower else None
        self._wants_items = self._tower is not None or any(isinstance(signal, Noise) for signal in self._needs)
        self._encoded: dict[int, _Item] = {}
        self._hooks: list[Any] = []
        self._wrapped: list[str] = []
        self._images = _Images()
        self._input_ids: Tensor | None = None
        self._answers: Tensor | None = None
        self._pass: _PassState | None = None
        self._install(model)

    # ---- life

    def _install(self, model: nn.Module) -> None:
        core, decoder, layers = self.anatomy.core, self.anatomy.decoder, self.anatomy.layers
        _ATTACHED[core] = self
        if not self._cuts and self.record == "none":
            return
        for name in ("get_image_features", "get_video_features"):
            whole = getattr(core, name, None)
            if callable(whole):
                setattr(core, name, self._noting(whole))
                self._wrapped.append(name)
        self._hooks = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            core.register_forward_pre_hook(self._before_core, with_kwargs=True),
            core.register_forward_hook(self._after_core, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
            layers[-1].register_forward_hook(self._after_last_layer),
        ]
        if self.anatomy.rotary is not None:
            self._hooks.append(self.anatomy.rotary.register_forward_hook(self._after_rotary, with_kwargs=True))
        for index, layer in enumerate(layers):

            def before_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> Any:
                return self._before_layer(index, args, kwargs)

            self._hooks.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))

    def _noting(self, features: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(features)  # `generate` reads the signature
        def noting(*args: Any, **kwargs: Any) -> Any:
            outputs = features(*args, **kwargs)
            encoded = list(outputs.pooler_output if hasattr(outputs, "pooler_output") else outputs)
            if self._wants_items:
                given = inspect.signature(features).bind_partial(*args, **kwargs).arguments
                self._note_values(encoded, {**given, **given.pop("kwargs", {})})
            self._note_images(encoded)
            return outputs

        return noting

    def detach(self) -> None:
        """Leaves the model as it was. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        for name in self._wrapped:
            delattr(self.anatomy.core, name)
        for probe in self._probes.values():
            probe.remove()
        if self._tower is not None:
            self._tower.remove()
        self._hooks, self._wrapped, self._pass = [], [], None
        if _ATTACHED.get(self.anatomy.core) is self:
            del _ATTACHED[self.anatomy.core]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    # ---- what was seen

    @property
    def last(self) -> Pass:
        """The last forward pass that brought images; FoveateError if there was none or nothing is recorded."""
        if not self.passes:
            hint = ': attach with record="last"' if self.record == "none" else " yet"
            raise FoveateError(f"no forward pass with images was recorded{hint}")
        return self.passes[-1]

    @property
    def maps(self) -> list[Reducer]:
        """What was done in the last forward pass with images, to be done again: `attach(model, maps=run.maps)`."""
        seen = self.last
        return [
            _Replay(index, token_map, positions="renumber" if index in seen.renumbered else "keep")
            for index, token_map in sorted(seen.maps.items())
        ]

    @property
    def ledger(self) -> Ledger:
        """Tokens, KV bytes and FLOPs of the last forward pass with images, as they really were."""
        return self.last.ledger(self.config)

    # ---- hooks

    def _note_values(self, encoded: list[Tensor], given: dict[str, Any]) -> None:
        """Keep what pixels and tower say of each item until the item enters the language model, by the content of its features:
        `generate` encodes first, may repeat the features for its beams, and hands them in later."""
        pixels = next((v for name, v in given.items() if name.startswith("pixel_values") and v is not None), None)
        grids = next((v for name, v in given.items() if name.endswith("grid_thw") and v is not None), None)
        if pixels is not None and grids is not None:
            pixels = list(torch.split(pixels, grids.prod(-1).tolist()))
        keys = content_keys(pixels if pixels is not None and len(pixels) == len(encoded) else encoded)
        values: dict[Signal, list[Tensor]] = {}
        if self._tower is not None:
            lengths, pack = [int(item.shape[0]) for item in encoded], None
            core: Any = self.anatomy.core
            if hasattr(core, "pack_image_features"):
                raise FoveateError("tiles with newlines between their rows: the tower's scores cannot be carried to the tokens yet")
            if hasattr(getattr(core, "bridge", None), "boxes") and pixels is not None:
                grid = core.config.patch_grid(*pixels.shape[-2:])
                pack = over_boxes(core.bridge.boxes(grid), grid)
            for signal, crops in self._tower.read().items():
                values[signal] = carry(crops, lengths, grouped=self.anatomy.grouped, pack=pack)
        if len(self._encoded) > _REMEMBERED:
            self._encoded.clear()
        for i, name in enumerate(content_keys(encoded).tolist()):
            self._encoded[name] = _Item(keys[i], {signal: items[i] for signal, items in values.items()})

    def _note_images(self, features: Any) -> None:
        """Features enter the language model: look up what is known of them."""
        items = list(features)
        self._images.lengths += [int(f.shape[0]) for f in items]
        if self._wants_items:
            for item, name in zip(items, content_keys(items).tolist(), strict=True):
                known = self._encoded.get(name)
                if known is None and self._tower is not None:
                    raise FoveateError("images handed in as features have no tower scores: hand in pixel_values, or encode while attached")
                self._images.items.append(known or _Item(torch.tensor(name, device=item.device), {}))

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        self._answers = None if labels is None else labels >= 0

    def _before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        self._images = _Images()
        self._input_ids = kwargs.get("input_ids", args[0] if args else None)
        for modality in ("image", "video"):
            handed_in = (kwargs.get("mm_encoder_outputs") or {}).get(modality)
            if handed_in is not None:
                self._note_images(handed_in.pooler_output)
        memory = recall(kwargs.get("past_key_values")) if kwargs.get("past_key_values") is not None else None
        if memory is not None and memory.valid is not None and kwargs.get("attention_mask") is None:
            # Without the caller's mask the library would take the prompt's padding for tokens.
            new = self._input_ids if self._input_ids is not None else kwargs["inputs_embeds"]
            mask = torch.nn.functional.pad(memory.valid, (0, new.shape[1]), value=True)
            return args, {**kwargs, "attention_mask": mask.to(torch.int64)}
        return None

    def _after_core(self, module: nn.Module, args: Any, output: Any) -> None:
        self._images = _Images()
        self._input_ids = self._answers = None

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        arriving = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if arriving is None:
            return None  # the decoder says itself what it lacks
        shape, device = arriving.shape[:2], arriving.device
        cache = kwargs.get("past_key_values")
        memory = recall(cache) if cache is not None else None
        past = int(cache.get_seq_length()) if cache is not None else 0
        positions = kwargs.get("position_ids")
        if positions is None:
            row = torch.arange(past, past + shape[1], device=device)[None]
        else:
            row = positions if positions.ndim == 2 else positions[0]
        visual = torch.zeros(shape, dtype=torch.bool, device=device)
        if self._images.lengths:
            # By identity of length, since the core hands the decoder embeddings only.
            visual = self.anatomy.visual_slots(self._input_ids, embeds).to(device)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):
            mask = None
        layout = Layout.sequence(
            visual,
            self._images.lengths or None,
            valid_BN=None if mask is None or mask.ndim != 2 else mask[:, -shape[1] :].to(device),
            position_BN=row.to(torch.int64),
        )
        config = self.anatomy.text_config
        chunk = Chunk(layout, past, memory, cache, str(config._attn_implementation), self.anatomy.rotary)
        self._pass = _PassState(chunk, self._images, self._answers)
        return None

    def _after_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._pass is not None and not self._pass.started:
            self._pass.chunk.rotary_calls.append((args, kwargs, output))

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        state, self._pass = self._pass, None
        for probe in self._probes.values():
            probe.disarm()
        if state is None or len(state.seen.layouts) < len(self.anatomy.layers):
            return  # an exception ended the pass
        chunk = state.chunk
        if chunk.cache is not None and chunk.changed:
            chunk.remember(remember(chunk.cache) if chunk.memory is None else chunk.memory)
        if state.has_images and self.record != "none":
            self.passes = [*self.passes, state.seen] if self.record == "all" else [state.seen]

    def _before_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        state = self._pass
        if state is None:
            return None
        state.started = True
        chunk = state.chunk
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if chunk.cache is None:  # the decoder has made one by itself
            chunk.cache = kwargs.get("past_key_values")
        if index == 0 and self._cuts and state.has_images:
            state.view = self._view(0, state, hidden)
        if index in self._cuts:
            hidden = self._enter_stage(index, state, hidden)
        state.seen.layouts.append(chunk.layout)
        state.seen.lengths.append(hidden.shape[1])
        if index in self._probes and state.has_images:
            self._probes[index].arm()
        if not chunk.changed:
            return None
        recurrent = self.anatomy.recurrent(index)
        new: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name == "attention_mask":
                new[name] = chunk.mask(value, index, recurrent, hidden.dtype)
            elif name == "position_ids" and isinstance(value, Tensor):
                new[name] = chunk.positions(value) if chunk.moved else chunk.side(value)
            elif name not in ("past_key_values", "hidden_states"):
                new[name] = chunk.side(value)
            else:
                new[name] = value
        if args:
            return (hidden, *(chunk.side(value) for value in args[1:])), new
        return args, {**new, "hidden_states": hidden}

    def _enter_stage(self, index: int, state: _PassState, hidden: Tensor) -> Tensor:
        """Cuts the chunk in front of layer `index`."""
        chunk = state.chunk
        if not state.has_images:
            if chunk.memory is not None:
                chunk.enter(index, TokenMap.identity(chunk.layout), renumber=False)
            return hidden
        maps: list[TokenMap] = []
        state.here = TokenMap.identity(chunk.layout)
        for reducer, stage in self._cuts[index]:
            with torch.autocast(hidden.device.type, enabled=False):  # scores are float32, also where the model is not
                token_map = reducer.reduce(self._view(index, state, hidden), stage).map
            renumber = reducer.positions_at(stage) == "renumber"
            if self._shortcuts and chunk.memory is None and token_map.is_identity:
                continue
            hidden = token_map.apply(hidden)
            chunk.enter(index, token_map, renumber)
            state.here = state.here.then(token_map)
            maps.append(token_map)
        if maps:
            whole = state.here if len(maps) > 1 else maps[0]
            if any(reducer.positions_at(stage) == "renumber" for reducer, stage in self._cuts[index]):
                state.seen.renumbered.add(index)
            state.seen.maps[index] = TokenMap(whole.source, chunk.layout, whole.member, whole.weight, whole.representative, whole.mean)
        elif chunk.memory is not None or chunk.changed:
            chunk.pass_by(index)
        return hidden

    def _view(self, index: int, state: _PassState, hidden: Tensor) -> View:
        """What the reducers at layer `index` may look at."""
        chunk = state.chunk
        layout = chunk.layout
        signals: dict[Signal, Any] = {}
        for signal in self._needs:
            if isinstance(signal, (Attention, Keys)) and signal.layer == index - 1:
                probe, here = self._probes[signal.layer], state.here
                start = chunk.cached(signal.layer)
                if isinstance(signal, Attention):
                    signals[signal] = probe.attention().of_slots(here, start)
                else:
                    signals[signal] = here.apply(probe.keys()[:, start : start + here.source.shape[1]])
            elif isinstance(signal, TOWER_SIGNALS):
                signals[signal] = state.tower(signal)
        N = layout.shape[1]
        slot = torch.arange(N, device=hidden.device)
        prompt = layout.valid
        if state.answers is not None:
            answers = chunk.whole.representative
            answers = state.answers.to(hidden.device).gather(1, answers.clamp(min=0)) & (answers >= 0)
            first = torch.where(answers.any(1), answers.to(torch.int8).argmax(1), N)
            prompt = prompt & (slot < first[:, None])
        asking = torch.where(prompt, slot, 0).max(1).values
        return View(layout, hidden, state.images.keys, signals, prompt & ~layout.visual, asking, state.view)

    def _after_last_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        state = self._pass
        if state is None or not state.seen.maps:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        for index in sorted(state.seen.maps, reverse=True):
            hidden = state.seen.maps[index].expand(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@dataclass
class _PassState:
    """The forward pass under way."""

    chunk: Chunk
    images: _Images
    answers: Tensor | None
    seen: Pass = field(default_factory=Pass)
    started: bool = False
    view: View | None = None  # in front of the first decoder layer
    here: Any = None  # what the reducers of the layer under way have made of the slots that arrived at it

    @property
    def has_images(self) -> bool:
        return bool(self.images.lengths)

    def tower(self, signal: Signal) -> Tensor:
        """(B, N) or (B, N, h): what the tower said, at the slots that are left of the chunk."""
        first = self.chunk.first
        values = torch.cat([item.values[signal] for item in self.images.items]).to(first.kind.device)
        spread = torch.zeros((*first.shape, *values.shape[1:]), dtype=torch.float32, device=values.device)
        spread[first.visual] = values
        return self.chunk.whole.apply(spread) if self.chunk.moves else spread


@dataclass(frozen=True)
class _Replay(Reducer):
    """A recorded map, on the same batch or on one that goes on behind it."""

    name: ClassVar[str] = "replay"
    paper: ClassVar[str] = "-"
    layer: int = 0
    map: TokenMap | None = None

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        assert self.map is not None
        return Cut(self.map.onto(view.layout))

    def count(self, arriving: int, original: int, stage: int = 0) -> int:
        raise FoveateError("recorded maps have the counts of their batch, not of any image; see run.ledger")


_SAVED: Any = object()


def attach(
    model: nn.Module,
    reducers: str | Reducer | Sequence[Reducer] | None = _SAVED,
    *,
    maps: Sequence[Reducer] | None = None,
    record: str = "last",
    shortcuts: bool = True,
) -> Run:
    """Reduces the visual tokens of `model` until the returned run is detached (or its `with` block is left).

    model: a transformers VLM, also wrapped by PEFT or DDP.
    reducers: a reducer, a list (applied in order of their layers), a spelling such as "vcc:layer=2,stride=8", None or "none" for
        none at all; left out, what `foveate.json` beside the model's weights says.
    maps: `run.maps` of another attachment, in place of reducers: what was done there is done again, on the same batch or a longer one.
    record: which forward passes with images stay readable in `run.passes`: "none", "last" or "all".
    shortcuts: False runs the whole machinery even where nothing is to be done; results are the same (tests use it).

    Raises FoveateError for a model that cannot be opened, an unknown reducer, or a model that has something attached already.
    """
    if record not in _RECORD:
        raise FoveateError(f"record={record!r} is not possible; choose one of {', '.join(_RECORD)}")
    anatomy = read(model)
    if anatomy.core in _ATTACHED:
        attached = spell(_ATTACHED[anatomy.core].reducers)
        raise FoveateError(f"the model already has {attached!r} attached; detach it first, or give both reducers to one attach as a list")
    if maps is not None:
        if reducers is not _SAVED:
            raise FoveateError("give either reducers or maps, not both")
        reducers = list(maps)
    if reducers is _SAVED:
        name = getattr(model.config, "name_or_path", "")
        reducers = load_reducers(Path(str(name)))
    if reducers is None:
        reducers = []
    elif isinstance(reducers, str):
        reducers = parse(reducers)
    elif isinstance(reducers, Reducer):
        reducers = [reducers]
    return Run(model, anatomy, list(reducers), record, shortcuts)
