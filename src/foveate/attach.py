"""attach: the only code that touches a model. Hooks on the decoder and its layers; no source edited, no weight changed.

    with foveate.attach(model, VCC(layer=2, stride=8)) as run:
        model.generate(**inputs)
    run.ledger

What happens in one forward pass (prefill, training step or decoding step):

1. where the images enter, the wrapper of `get_image_features` notes how many visual tokens each image has;
2. in front of the decoder, a Layout is made of the chunk of the sequence that arrives;
3. in front of every layer at which a reducer acts, the chunk is cut: hidden states, positions, rotary embedding and mask are
   all made from one TokenMap; the layers behind get them in place of what the library made once for all layers;
4. behind the last layer the states are expanded to the caller's length, so that logits and labels keep their places.

For decoding, a table of the slots that each stage holds is kept per request, weakly keyed by its cache; masks come from it
and from the library's own mask factory, positions from the logical length, never from the length of a shortened cache.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import create_causal_mask

from foveate.anatomy import Anatomy, read
from foveate.cost import Ledger
from foveate.errors import FoveateError
from foveate.reducers import Reducer, load_reducers, parse, spell
from foveate.signals import Noise, View, content_keys
from foveate.tokens import Layout, TokenMap

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_RECORD = ("none", "last", "all")


@dataclass
class _Images:
    """What is known of the images of the forward pass under way."""

    lengths: list[int] = field(default_factory=list)
    keys: Tensor | None = None


@dataclass
class _Request:
    """What must be remembered of a sequence between forward passes: for every stage, which of its cached slots are real, by how much
    its positions are shifted, and whether anything was ever cut."""

    length: int = 0
    valid: dict[int, Tensor] = field(default_factory=dict)
    shift: dict[int, Tensor] = field(default_factory=dict)
    changed: dict[int, bool] = field(default_factory=dict)


@dataclass
class Pass:
    """One forward pass as it was: the chunk's layout in front of each layer, and the maps between them."""

    layouts: list[Layout] = field(default_factory=list)
    maps: dict[int, TokenMap] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

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
        self._needs_keys = False
        for reducer in self.reducers:
            for stage, site in enumerate(reducer.sites(len(anatomy.layers))):
                if site.layer < len(anatomy.layers):
                    self._cuts.setdefault(site.layer, []).append((reducer, stage))
                self._needs_keys |= any(isinstance(signal, Noise) for signal in site.needs)
        self._requests: weakref.WeakKeyDictionary[Any, _Request] = weakref.WeakKeyDictionary()
        self._keys: Any = WeakTensorKeyDictionary()
        self._hooks: list[Any] = []
        self._images = _Images()
        self._input_ids: Tensor | None = None
        self._pass: _PassState | None = None
        self._install()

    # ---- life

    def _install(self) -> None:
        core, decoder, layers = self.anatomy.core, self.anatomy.decoder, self.anatomy.layers
        _ATTACHED[core] = self
        if not self._cuts and self.record == "none":
            return
        whole_features = core.get_image_features

        @functools.wraps(whole_features)  # type: ignore[arg-type]  # `generate` reads the signature
        def noting_images(*args: Any, **kwargs: Any) -> Any:
            outputs = whole_features(*args, **kwargs)  # type: ignore[operator]
            pixels = kwargs.get("pixel_values", args[0] if args else None)
            self._note_images(outputs.pooler_output if hasattr(outputs, "pooler_output") else outputs, pixels)
            return outputs

        core.get_image_features = noting_images  # type: ignore[assignment]
        self._hooks = [
            core.register_forward_pre_hook(self._before_core, with_kwargs=True),
            core.register_forward_hook(self._after_core, always_call=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
            layers[-1].register_forward_hook(self._after_last_layer),
        ]
        for index, layer in enumerate(layers):

            def before_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> Any:
                return self._before_layer(index, args, kwargs)

            self._hooks.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))

    def detach(self) -> None:
        """Leaves the model as it was. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            del self.anatomy.core.get_image_features
        self._hooks = []
        self._pass = None
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
    def ledger(self) -> Ledger:
        """Tokens, KV bytes and FLOPs of the last forward pass with images, as they really were."""
        return self.last.ledger(self.config)

    # ---- hooks

    def _note_images(self, features: Any, pixels: Tensor | None) -> None:
        features = list(features)
        self._images.lengths = [int(f.shape[0]) for f in features]
        if self._needs_keys:
            # `generate` encodes first and hands the features in later: the key that the pixels gave them goes with them, since the
            # last bits of features depend on what else was in the batch.
            if pixels is not None and pixels.shape[0] == len(features):
                self._keys.update(zip(features, content_keys(pixels), strict=True))
            known = [self._keys.get(f) for f in features]
            self._images.keys = content_keys(features) if any(k is None for k in known) else torch.stack(known)

    def _before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._images = _Images()
        self._input_ids = kwargs.get("input_ids", args[0] if args else None)
        handed_in = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if handed_in is not None:
            self._note_images(handed_in.pooler_output, None)

    def _after_core(self, module: nn.Module, args: Any, output: Any) -> None:
        self._images = _Images()
        self._input_ids = None

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        arriving = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if arriving is None:
            return None  # the decoder says itself what it lacks
        shape, device = arriving.shape[:2], arriving.device
        cache = kwargs.get("past_key_values")
        request = self._requests.get(cache) if cache is not None else None
        past = request.length if request is not None else (int(cache.get_seq_length()) if cache is not None else 0)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + shape[1], device=device)[None]
            if request is not None:
                kwargs = {**kwargs, "position_ids": positions}
        if positions.ndim != 2:
            raise FoveateError(f"positions of shape {tuple(positions.shape)} (several rows a token) cannot be reduced yet")
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise FoveateError("with a reducer attached, give a 2-D attention mask (batch, tokens) or none")
        visual = torch.zeros(shape, dtype=torch.bool, device=device)
        if self._images.lengths:
            # By identity of length, since the core hands the decoder embeddings only.
            visual = self.anatomy.visual_slots(self._input_ids, embeds).to(device)
            if mask is None and cache is None and bool((positions.diff(dim=1) != 1).any()):
                raise FoveateError("several samples packed into one row (positions restart, no mask) cannot be reduced yet; pad instead")
        layout = Layout.sequence(
            visual,
            self._images.lengths or None,
            valid_BN=None if mask is None else mask[:, -shape[1] :].to(device),
            position_BN=positions.to(torch.int64),
        )
        self._pass = _PassState(layout, request, past, bool(self._images.lengths), self._images.keys, mask is not None)
        return args, kwargs

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        state, self._pass = self._pass, None
        if state is None or len(state.seen.layouts) < len(self.anatomy.layers):
            return  # an exception ended the pass
        if state.request is not None:
            state.request.length = state.past + state.first.shape[1]
        if state.has_images and self.record != "none":
            self.passes = [*self.passes, state.seen] if self.record == "all" else [state.seen]

    def _before_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        state = self._pass
        if state is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if index == 0 and cache is not None and state.request is None:
            state.request = self._requests.setdefault(cache, _Request(length=state.past))
        if index in self._cuts:
            hidden = self._enter_stage(index, state, hidden, kwargs, cache)
        state.seen.layouts.append(state.layout)
        state.seen.lengths.append(hidden.shape[1])
        if not state.replaced:
            return None
        kwargs = {**kwargs, **{k: v for k, v in state.replaced.items() if k in kwargs}}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _enter_stage(self, index: int, state: _PassState, hidden: Tensor, kwargs: dict[str, Any], cache: Any) -> Tensor:
        """Cuts the chunk in front of layer `index` and makes what the layers behind it need."""
        request = state.request
        arriving = state.layout
        whole = TokenMap.identity(arriving)
        renumber = False
        if state.has_images:
            for reducer, stage in self._cuts[index]:
                token_map = reducer.reduce(View(whole.target, hidden, state.keys), stage).map
                hidden = token_map.apply(hidden)
                whole = whole.then(token_map) if len(self._cuts[index]) > 1 else token_map
                renumber |= reducer.positions == "renumber"
        cut_now = state.has_images and not (self._shortcuts and whole.is_identity)
        before = request.changed.get(index, False) if request is not None else False
        if not (cut_now or before or state.replaced or (state.has_images and not self._shortcuts)):
            if request is not None:
                request.valid[index] = _grown(request, index, state.past, arriving)
            return hidden
        # Positions: the stage's own shift from earlier chunks, then the gaps that this cut leaves, if they are to be closed.
        target = whole.target
        shift_before = state.shift_before if request is None else request.shift.get(index, state.shift_before)
        own = shift_before - state.shift_before
        position = target.position - own[:, None]
        shift = state.shift + own
        if renumber:
            position = position - torch.where(whole.representative >= 0, _dropped_before(whole), 0)
            shift = shift + arriving.valid.sum(1) - target.valid.sum(1)
        target = replace(target, position=position)
        state.layout = target
        if cut_now:
            state.seen.maps[index] = replace(whole, target=target)
        valid = target.valid
        if request is not None:
            valid = request.valid[index] = _grown(request, index, state.past, target)
            request.shift[index] = shift
            request.changed[index] = True
        state.shift, state.shift_before = shift, shift_before
        config = self.anatomy.text_config
        _refuse_windows(config, valid.shape[1])
        state.replaced = {
            "attention_mask": create_causal_mask(
                config=config,
                inputs_embeds=hidden,
                attention_mask=valid if state.has_mask or bool((~valid).any()) else None,
                past_key_values=cache,
                position_ids=None,
                layer_idx=index,
            ),
            "position_ids": target.position,
        }
        if kwargs.get("position_embeddings") is not None:
            state.replaced["position_embeddings"] = self.anatomy.decoder.rotary_emb(hidden, position_ids=target.position)  # type: ignore[operator]
        return hidden

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

    first: Layout
    request: _Request | None
    past: int
    has_images: bool
    keys: Tensor | None
    has_mask: bool
    seen: Pass = field(default_factory=Pass)
    replaced: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = self.first
        # (B,) by how much the positions of the stage under way are smaller than the logical ones, now and before this chunk.
        self.shift = torch.zeros(self.first.shape[0], dtype=torch.int64, device=self.first.kind.device)
        self.shift_before = self.shift


def _grown(request: _Request, index: int, past: int, chunk: Layout) -> Tensor:
    """(B, K) bool: the slots of the stage's cache that are real, this chunk's included."""
    old = request.valid.get(index)
    if old is None:
        old = torch.ones((chunk.shape[0], past), dtype=torch.bool, device=chunk.valid.device)
    return torch.cat([old, chunk.valid], dim=1)


def _dropped_before(token_map: TokenMap) -> Tensor:
    """(B, M) int64: by how many slots the part of the row up to each target has become shorter."""
    seen = token_map.source.valid.cumsum(1).gather(1, token_map.representative.clamp(min=0))
    return seen - token_map.target.valid.cumsum(1)


def _refuse_windows(config: Any, slots: int) -> None:
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if sliding and window is not None and slots > window:
        raise FoveateError(f"{slots} tokens are more than the sliding window of {window}; that cannot be reduced yet")


_SAVED: Any = object()


def attach(
    model: nn.Module,
    reducers: str | Reducer | Sequence[Reducer] | None = _SAVED,
    *,
    record: str = "last",
    shortcuts: bool = True,
) -> Run:
    """Reduces the visual tokens of `model` until the returned run is detached (or its `with` block is left).

    model: a transformers VLM, also wrapped by PEFT or DDP.
    reducers: a reducer, a list (applied in order of their layers), a spelling such as "vcc:layer=2,stride=8", None or "none" for
        none at all; left out, what `foveate.json` beside the model's weights says.
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
