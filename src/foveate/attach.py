"""attach: the only code that touches a model. Hooks on the decoder and its layers; no source edited, no weight changed.

    with foveate.attach(model, VCC(layer=2, stride=8)) as run:
        model.generate(**inputs)
    run.ledger

What happens in one forward pass (prefill, training step or decoding step):

1. what the model encodes, and which slots it puts that into, is noted (`foveate.images`); cuts inside the tower are made, and carried out
   in front of the first decoder layer (`foveate.encoder`);
2. in front of the decoder a `Chunk` is made of the part of the sequence that arrives;
3. in front of every layer at which a reducer acts, the hidden states are cut; that layer and those behind it get masks, positions
   and side inputs cut by the same map (`foveate.chunk`);
4. behind the last layer the states are expanded to the caller's length, so that logits and labels keep their places.

What decoding needs of earlier passes is remembered on the request's cache (`foveate.memory`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from foveate import hooks
from foveate.anatomy import Anatomy, read
from foveate.chunk import Chunk, is_selection, put_back, valid_slots
from foveate.cost import Ledger, Prompt
from foveate.counting import scoring
from foveate.encoder import GROUPS, Carried, Encoder, Groups, ReplayInTower, TowerPass
from foveate.errors import FoveateError
from foveate.hooks import Hook
from foveate.images import MODALITIES, Encoded, Images, Watched
from foveate.memory import recall, remember
from foveate.probes import LayerProbe
from foveate.reducers import Reducer, load_reducers, parse, spell
from foveate.signals import Attention, Keys, Signal, View
from foveate.sites import Bypass, Cut, Decision, FromLayer, InEncoder, Site, ThroughLayer
from foveate.sizes import ImageSize
from foveate.tokens import Layout, TokenMap
from foveate.towers import TOWER_SIGNALS

_RUN = "_foveate_run"  # the attribute by which a model knows its attachment, and copies of it theirs
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_RECORD = ("none", "last", "all")


@dataclass
class Pass:
    """One forward pass as it was: what of the chunk went through each layer, the maps between them, and from all that arrives at a layer to
    what goes through it, where some pass it by."""

    layouts: list[Layout] = field(default_factory=list)
    maps: dict[int, TokenMap] = field(default_factory=dict)
    bypasses: dict[int, TokenMap] = field(default_factory=dict)
    tower: list[TowerPass] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    steps: list[Reducer] = field(default_factory=list)  # what was decided, one by one, to be done again
    encoded: list[tuple[Encoded, Fraction] | None] = field(default_factory=list)  # by item: what encoded it, None where that was not seen
    reducers: list[Reducer] = field(default_factory=list)  # what scored and decided; recorded maps do not

    @property
    def first(self) -> Layout:
        """What entered the language model."""
        entering = self.maps.get(0) or self.bypasses.get(0)
        return self.layouts[0] if entering is None else entering.source

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens that went through each decoder layer, over the whole batch: all tokens but those of text."""
        return [n - int((layout.valid & ~layout.visual).sum()) for n, layout in zip(self.tokens, self.layouts, strict=True)]

    @property
    def tokens(self) -> list[int]:
        """Tokens, text and visual, that went through each decoder layer, over the whole batch: by the shape of the states that the layer
        was given, without the padding in it."""
        return [layout.shape[0] * length - int((~layout.valid).sum()) for layout, length in zip(self.layouts, self.lengths, strict=True)]

    @property
    def images(self) -> int:
        """Images of the batch."""
        return int(self.first.image.max()) + 1

    def ledger(self, config: Any, **options: Any) -> Ledger:
        """The pass' tokens, KV bytes and FLOPs, from the token counts as they were; options as in `Ledger.observed`."""
        visual = [layout.visual.sum(1).tolist() for layout in self.layouts]
        total = [layout.valid.sum(1).tolist() for layout in self.layouts]
        if [sum(row) for row in total] != self.tokens:
            raise FoveateError(
                f"the layers saw {self.tokens} tokens where the maps leave {[sum(row) for row in total]}: please report this"
            )
        seen = [call for call in self.encoded if call is not None]
        if seen and len(seen) == len(self.encoded):
            calls: dict[int, tuple[Encoded, Fraction]] = {}
            for call, share in seen:  # counting a call takes a while, and many items may share one
                calls[id(call)] = call, share + calls.get(id(call), (call, Fraction(0)))[1]
            options = {"encoded": list(calls.values()), **options}
        return Ledger.observed(config, visual, total, images=self.images, reducers=self.reducers, prompts=self.prompts, **options)

    @property
    def prompts(self) -> list[Prompt]:
        """The sizes of what entered the language model, row by row."""
        layout = self.first
        found = []
        for visual, place, length in zip(layout.visual, layout.place, layout.valid.sum(1).tolist(), strict=True):
            images = [ImageSize.of(place[visual & (place[:, 0] == i)][:, 1:]) for i in place[visual][:, 0].unique().tolist()]
            found.append(Prompt(images, length - int(visual.sum())))
        return found

    def provenance(self, layer: int) -> TokenMap:
        """From the slots that entered the language model to those that went through decoder layer `layer`."""
        whole = TokenMap.identity(self.first)
        for at in sorted(self.maps):
            if at <= layer:
                whole = whole.then(self.maps[at])
        return whole.then(self.bypasses[layer]) if layer in self.bypasses else whole


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
        self._through: dict[int, tuple[Reducer, int]] = {}
        self._in_tower: dict[int, list[tuple[Reducer, int]]] = {}
        self._needs: set[Signal] = set()
        self._needs_in_tower: set[Signal] = set()
        for reducer in self.reducers:
            for stage, site in enumerate(reducer.sites(len(anatomy.layers))):
                if isinstance(site, InEncoder):
                    self._in_tower.setdefault(site.block, []).append((reducer, stage))
                    self._needs_in_tower.update(site.needs)
                elif site.layer >= len(anatomy.layers):
                    if not reducer.beyond:
                        last = len(anatomy.layers) - 1
                        raise FoveateError(f"{reducer}: there is no decoder layer {site.layer} to act at; choose one from 0 to {last}")
                else:
                    if not isinstance(site, ThroughLayer):
                        self._cuts.setdefault(site.layer, []).append((reducer, stage))
                    elif self._through.setdefault(site.layer, (reducer, stage)) != (reducer, stage):
                        raise FoveateError(f"two reducers say what goes through decoder layer {site.layer}; leave one of them out")
                    self._needs.update(site.needs)
        self._carry()
        for signal in self._needs:
            if isinstance(signal, TOWER_SIGNALS) and self._in_tower:
                raise FoveateError(
                    f"{signal} of a tower in which tokens are cut says nothing of whole images; attach one of the two reducers"
                )
            if isinstance(signal, (Attention, Keys)) and signal.layer in self._through:
                raise FoveateError(f"{signal}: some tokens pass this layer by and have no attention there; choose another layer")
        self._probes: dict[int, LayerProbe] = {}
        self._encoders: dict[nn.Module, Encoder] = {}
        self._hooks: list[Any] = []
        self._images: Images | None = None
        self._watched: Watched | None = None
        self._answers: Tensor | None = None
        self._mask: Any = None  # as the caller gave it, before the model makes it a mask for its layers
        self._pass: _PassState | None = None
        try:
            self._install(model)
        except Exception:
            self.detach()
            raise

    def _carry(self) -> None:
        """What is cut in the tower leaves the sequence in front of the language model; recorded maps do so themselves."""
        acting = [(reducer, stage) for at in self._in_tower.values() for reducer, stage in at if not isinstance(reducer, ReplayInTower)]
        if acting:
            renumber = any(reducer.positions_at(stage) == "renumber" for reducer, stage in acting)
            self._cuts.setdefault(0, []).insert(0, (Carried(positions="renumber" if renumber else "keep"), 0))
            self._needs.add(GROUPS)

    # ---- life

    def _install(self, model: nn.Module) -> None:
        core, decoder, layers = self.anatomy.core, self.anatomy.decoder, self.anatomy.layers
        _forget_compiled()
        hooks.prepare()
        setattr(core, _RUN, self)
        if not (self._cuts or self._through or self._in_tower) and self.record == "none":
            return
        for signal in self._needs:
            if isinstance(signal, (Attention, Keys)) and signal.layer not in self._probes:
                self._probes[signal.layer] = LayerProbe(layers[signal.layer])
        if self._in_tower:
            for modality in MODALITIES:
                tower = self.anatomy.tower_of(modality)
                if tower not in self._encoders:
                    self._encoders[tower] = Encoder(tower, self._in_tower, list(self._needs_in_tower), self._shortcuts)
        of = {modality: self._encoders[self.anatomy.tower_of(modality)] for modality in MODALITIES if self._encoders}
        self._images = Images(self.anatomy, self._needs, of)
        self._hooks = [
            model.register_forward_pre_hook(Hook(self._before_model), with_kwargs=True),
            core.register_forward_pre_hook(Hook(self._before_core), with_kwargs=True),
            core.register_forward_hook(Hook(self._after_core), always_call=True),
            decoder.register_forward_pre_hook(Hook(self._before_decoder), with_kwargs=True),
            decoder.register_forward_hook(Hook(self._after_decoder), always_call=True),
            *(layers[index].register_forward_hook(Hook(self._after_bypass, index), prepend=True) for index in self._through),
            layers[-1].register_forward_hook(Hook(self._after_last_layer)),
        ]
        if self.anatomy.rotary is not None:
            self._hooks.append(self.anatomy.rotary.register_forward_hook(Hook(self._after_rotary), with_kwargs=True))
        for index, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(Hook(self._before_layer, index), with_kwargs=True))
        if hasattr(type(model), "generate"):
            self._watched = Watched(model, "generate", self._before_generate)

    def detach(self) -> None:
        """Leaves the model as it was. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        if self._images is not None:
            self._images.remove()
        for probe in self._probes.values():
            probe.remove()
        for encoder in self._encoders.values():
            encoder.remove()
        if self._watched is not None:
            self._watched.remove()
        self._hooks, self._images, self._watched, self._pass = [], None, None, None
        if getattr(self.anatomy.core, _RUN, None) is self:
            delattr(self.anatomy.core, _RUN)
            _forget_compiled()

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
        in_tower: list[Reducer] = []
        for block in sorted({block for call in seen.tower for block in call.maps}):
            proportional = any(getattr(reducer, "proportional", False) for reducer, _ in self._in_tower[block])
            in_tower.append(ReplayInTower(block, tuple(call.maps.get(block) for call in seen.tower), proportional))
        return in_tower + seen.steps

    @property
    def ledger(self) -> Ledger:
        """Tokens, KV bytes and FLOPs of the last forward pass with images, as they really were."""
        return self.last.ledger(self.config)

    # ---- hooks

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels, proposed = kwargs.get("labels"), kwargs.get("logits_to_keep")
        self._answers = None if labels is None else labels >= 0
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if labels is None and isinstance(proposed, int) and proposed > 1 and given is not None:
            # Of the tokens behind the first row whose logits are asked for (what an assistant proposes) the prompt knows nothing.
            slots = torch.arange(given.shape[1], device=given.device).expand(given.shape[:2])
            self._answers = slots > given.shape[1] - proposed

    def _before_generate(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        configs = (kwargs.get("generation_config"), getattr(watched.module, "generation_config", None))
        size = kwargs.get("prefill_chunk_size", next((c.prefill_chunk_size for c in configs if c is not None), None))
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if size and (not isinstance(prompt, Tensor) or size < prompt.shape[1]):
            raise FoveateError(
                "prefill in chunks (prefill_chunk_size) would show the reducers pieces of images and of the prompt; leave it out: "
                "behind the cut the prompt is shorter anyway"
            )
        return watched.method(*args, **kwargs)

    def _before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        assert self._images is not None
        self._images.begin(kwargs.get("mm_encoder_outputs"), {"video": kwargs.get("video_compression_mask")})
        self._mask = kwargs.get("attention_mask")
        memory = recall(kwargs.get("past_key_values")) if kwargs.get("past_key_values") is not None else None
        if memory is not None and memory.valid is not None and kwargs.get("attention_mask") is None:
            # Without the caller's mask the library would take the prompt's padding for tokens.
            new = kwargs.get("input_ids", args[0] if args else None)
            new = kwargs["inputs_embeds"] if new is None else new
            mask = torch.nn.functional.pad(memory.valid, (0, new.shape[1]), value=True)
            return args, {**kwargs, "attention_mask": mask.to(torch.int64)}
        return None

    def _after_core(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._images is not None
        self._images.end()
        self._answers = self._mask = None

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
        mask = self._mask if self._mask is not None else kwargs.get("attention_mask")
        valid = valid_slots(mask, past, shape[1])
        assert self._images is not None
        layout, which = self._images.layout((shape[0], shape[1]), None if valid is None else valid.to(device), row.to(torch.int64))
        config = self.anatomy.text_config
        chunk = Chunk(layout, past, memory, cache, str(config._attn_implementation), self.anatomy.rotary)
        self._pass = _PassState(chunk, self._images, which, self._answers)
        injected = self.anatomy.injected(kwargs)
        if injected is None or min(self._cuts, default=len(self.anatomy.layers)) > max(injected[2], default=0):
            return None
        # Behind a cut the model would not find its slots again: what it adds is added here.
        new, slots, features = injected
        for layer, values in features.items():
            spread = torch.zeros((*shape, values.shape[-1]), dtype=values.dtype, device=values.device)
            self._pass.injected[layer] = spread.index_put((slots.to(values.device),), values)
        return args, new

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
            state.seen.tower = list(state.images.calls)
            state.seen.encoded = [item.call for item in state.images.items]
            state.seen.reducers = [reducer for reducer in self.reducers if not isinstance(reducer, (_Replay, ReplayInTower))]
            self.passes = [*self.passes, state.seen] if self.record == "all" else [state.seen]

    def _before_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        state = self._pass
        if state is None:
            return None
        state.started = True
        chunk = state.chunk
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if chunk.cache is None:  # the decoder has made one by itself
            chunk.cache = kwargs.get("past_key_values")
        added = state.injected.get(index)
        if added is not None:
            hidden = hidden + chunk.whole.apply(added.to(hidden.device, hidden.dtype)) if chunk.moves else hidden + added.to(hidden)
        if index == 0 and state.has_images and (self._cuts or self._through):
            state.view = self._view(0, state, hidden)
        if index in self._cuts or index in self._through:
            state.here, state.stage = TokenMap.identity(chunk.layout), chunk.stage
        if index in self._cuts:
            hidden = self._enter_stage(index, state, hidden)
        if index in self._through:
            hidden = self._enter_bypass(index, state, hidden)
        state.seen.layouts.append(chunk.layout)
        state.seen.lengths.append(hidden.shape[1])
        if index in self._probes and state.has_images:
            self._probes[index].arm()
        if not chunk.changed:
            return None if added is None else ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
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
                chunk.go_on(index)
            return hidden
        maps: list[TokenMap] = []
        for reducer, stage in self._cuts[index]:
            token_map = self._decided(Cut, reducer, stage, self._view(index, state, hidden))
            renumber = reducer.positions_at(stage) == "renumber"
            if self._shortcuts and chunk.memory is None and token_map.is_identity:
                continue
            hidden = token_map.apply(hidden)
            chunk.enter(index, token_map, renumber)
            state.here = state.here.then(token_map)
            maps.append(token_map)
            state.seen.steps.append(_Replay(index, token_map, positions="renumber" if renumber else "keep"))
        if maps:
            whole = state.here if len(maps) > 1 else maps[0]
            state.seen.maps[index] = TokenMap(whole.source, chunk.layout, whole.member, whole.weight, whole.representative, whole.mean)
        elif chunk.memory is not None or chunk.changed:
            chunk.pass_by(index)
        return hidden

    def _enter_bypass(self, index: int, state: _PassState, hidden: Tensor) -> Tensor:
        """Takes out of the chunk what goes through layer `index`."""
        chunk = state.chunk
        state.passing = None
        if not state.has_images:
            if chunk.memory is not None:
                state.passing = TokenMap.identity(chunk.layout), hidden
                chunk.go_through(index, state.passing[0])
            return hidden
        reducer, stage = self._through[index]
        token_map = self._decided(Bypass, reducer, stage, self._view(index, state, hidden))
        if not is_selection(token_map):
            raise FoveateError(
                f"{reducer.name}: what goes through decoder layer {index} must be a selection of its tokens, each of them once and of "
                "weight 1; where tokens are to be merged, decide a Cut at FromLayer"
            )
        if self._shortcuts and chunk.memory is None and token_map.is_identity:
            if chunk.changed:
                chunk.pass_by(index)
            return hidden
        state.passing = token_map, hidden
        chunk.go_through(index, token_map)
        state.seen.bypasses[index] = replace(token_map, target=chunk.layout)
        state.seen.steps.append(_Replay(index, token_map, through=True))
        return token_map.apply(hidden)

    def _after_bypass(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        state = self._pass
        if state is None:
            return None
        if state.passing is None:
            if state.chunk.changed:  # later chunks may pass this layer by: what follows is a stage of its own
                state.chunk.pass_by(index + 1)
            return None
        (token_map, before), state.passing = state.passing, None
        state.chunk.come_back(index + 1)
        hidden = put_back(token_map, output[0] if isinstance(output, tuple) else output, before)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _decided(self, kind: type[Decision], reducer: Reducer, stage: int, view: View) -> TokenMap:
        """The map of a reducer's decision, which must be of the kind that its site understands."""
        with scoring(), torch.autocast(view.layout.kind.device.type, enabled=False):  # scores are float32, also where the model is not
            decision: Decision = reducer.reduce(view, stage)
        if not isinstance(decision, kind):
            raise FoveateError(f"{reducer.name} decides {type(decision).__name__} at a site where {kind.__name__} is possible")
        # Recorded maps are aligned already, and meet each other as they did.
        return decision.map if isinstance(reducer, _Replay) else decision.map.aligned()

    def _view(self, index: int, state: _PassState, hidden: Tensor) -> View:
        """What the reducers at layer `index` may look at."""
        chunk = state.chunk
        layout = chunk.layout
        signals: dict[Signal, Any] = {}
        for signal in self._needs:
            if isinstance(signal, (Attention, Keys)) and signal.layer == index - 1:
                probe, here = self._probes[signal.layer], state.here
                start = chunk.cached(signal.layer, state.stage)
                if isinstance(signal, Attention):
                    signals[signal] = probe.attention().of_slots(here, start)
                else:
                    signals[signal] = here.apply(probe.keys()[:, start : start + here.source.shape[1]])
            elif isinstance(signal, (*TOWER_SIGNALS, Groups)):
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
        text = prompt & (layout.image < 0)
        return View(layout, hidden, state.images.keys, signals, text, asking, state.view, layers=len(self.anatomy.layers))

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
    images: Images
    which: Tensor  # of the images' tokens, which one each slot of the chunk holds
    answers: Tensor | None
    injected: dict[int, Tensor] = field(default_factory=dict)  # by layer, what the model adds to the states in front of it
    seen: Pass = field(default_factory=Pass)
    started: bool = False
    view: View | None = None  # in front of the first decoder layer
    here: Any = None  # what the reducers of the layer under way have made of the slots that arrived at it
    stage: int = 0  # the stage of the layer before it
    passing: tuple[TokenMap, Tensor] | None = None  # what goes through the layer under way, and the states of all

    @property
    def has_images(self) -> bool:
        return bool(self.images.items)

    def tower(self, signal: Signal) -> Tensor:
        """(B, N) or (B, N, h): what the tower said, at the slots that are left of the chunk."""
        spread = self.images.values(signal, self.which)
        return self.chunk.whole.apply(spread) if self.chunk.moves else spread


@dataclass(frozen=True)
class _Replay(Reducer):
    """A recorded map, on the same batch or on one that goes on behind it."""

    name: ClassVar[str] = "replay"
    paper: ClassVar[str] = "-"
    layer: int = 0
    map: TokenMap | None = None
    through: bool = False

    def sites(self, layers: int) -> list[Site]:
        return [ThroughLayer(self.layer) if self.through else FromLayer(self.layer)]

    def reduce(self, view: View, stage: int = 0) -> Decision:
        assert self.map is not None
        token_map = self.map.onto(view.layout)
        return Bypass(token_map) if self.through else Cut(token_map)

    def count(self, arriving: int, original: int, stage: int = 0) -> int:
        raise FoveateError("recorded maps have the counts of their batch, not of any image; see run.ledger")


def _forget_compiled() -> None:
    """Compiled code does not see hooks that come or go behind its back: what is compiled already is compiled anew."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


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
    if hasattr(anatomy.core, _RUN):
        attached = spell(getattr(anatomy.core, _RUN).reducers)
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
