"""One call of the model under way: the images that arrive, the questions about them, and what the reducers make of the sequence."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import Anatomy
from foveate.contract import Attention, Bypass, Cut, Groups, Keys, Signal, States, View, Visibility, Visible
from foveate.engine.arrivals import Arrivals, valid_slots
from foveate.engine.cache import CacheTable, capacity, recall, remember
from foveate.engine.chunk import Chunk
from foveate.engine.moves import put_back
from foveate.engine.questions import NO_LABELS, Asked, answers_of, samples_of
from foveate.engine.record import Record
from foveate.engine.replay import Replay, ReplayVisible, decide, held
from foveate.engine.rulings import Ruling, kept_back, rules_at
from foveate.engine.stretching import stretched, with_images
from foveate.engine.thinning import Thinning
from foveate.engine.wiring import Wiring
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.probes.layer import LayerProbe
from foveate.probes.tower import TOWER_SIGNALS
from foveate.probes.tower_pass import TowerPass
from foveate.reducers import Reducer, spell
from foveate.tokens import Layout, TokenMap


class ForwardPass:
    """Born when the model is called; `open` when its decoder is about to run, `close` when that has run.

    depth    which of the modules around the decoder was called, 0 the outermost
    entered  whether the module that merges images and text has begun
    opened   whether the decoder has
    """

    def __init__(
        self, depth: int, anatomy: Anatomy, wiring: Wiring, probes: Mapping[int, LayerProbe], keyed: bool, shortcuts: bool
    ) -> None:
        self.depth, self.anatomy, self.wiring, self.probes, self._shortcuts = depth, anatomy, wiring, probes, shortcuts
        self.arrivals = Arrivals(anatomy, keyed)
        self.entered = self.merged = self.opened = self.has_images = False
        self.record = Record()
        self.mask: Any = None  # as the caller gave it, before the model makes it a mask for its layers
        self.labels: dict[str, Any] = {}
        self.takes_labels = False  # whether labels belong to a call of this model
        self.under_way = False
        self._cut_by: list[Reducer] = []
        self._chunk: Chunk | None = None
        self._which: Tensor | None = None  # of the images' tokens, which one each slot of the chunk holds
        self._asked: Asked | None = None
        self._injected: dict[int, Tensor] = {}  # by layer, what the model adds to the states in front of it
        self._entered: dict[int, Tensor] = {}  # by layer, the states that went into it, until the next one has been decided on
        self._on_embeddings: View | None = None
        self._counted = True  # fractions name places, which several tokens may share: their gaps are not closed
        self._here: list[TokenMap] = []  # what the reducers of the layer under way have made of `_arriving`, the slots that came to it
        self._arriving: Layout | None = None
        self._passing: tuple[TokenMap, Tensor] | None = None  # what goes through the layer under way, and the states of the rest
        self._came: Tensor | None = None  # the states that came to the layer under way, where a rule holds some of them
        self._first: Tensor | None = None  # the states of all in front of the first layer, where some pass that by
        self.gain: Tensor | None = None  # (B, M) what the feed-forward branch of the layer under way is multiplied with
        self.losses: list[tuple[Reducer, Tensor]] = []  # what reducers whose weights are trained add to the loss, (B,)
        self.thinning = None if wiring.cache is None else Thinning(wiring.cache, wiring.thinned, probes)

    @property
    def chunk(self) -> Chunk:
        assert self._chunk is not None
        return self._chunk

    def note_labels(self, kwargs: dict[str, Any]) -> None:
        """The labels among the arguments of one of the modules around the decoder."""
        self.labels.update({name: kwargs[name] for name in ("labels", "shift_labels") if kwargs.get(name) is not None})

    # ---- the decoder begins and ends

    def open(self, kwargs: dict[str, Any], arriving: Tensor, prompt: int | None, cut_by: list[Reducer]) -> dict[str, Any] | None:
        """The decoder is about to run on `arriving` (B, N, …). prompt: tokens of the `generate` call's prompt. Returns the decoder's
        arguments where they must be others."""
        shape, device = (arriving.shape[0], arriving.shape[1]), arriving.device
        self.opened, self.has_images = True, bool(self.arrivals.items)
        cache = kwargs.get("past_key_values")
        memory = recall(cache)
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self.merged and self.wiring.tells_images and not self.has_images and past == 0:
            raise FoveateError(
                "inputs_embeds do not say which of them are of images, so that nothing could be reduced: hand in input_ids with "
                "pixel_values or mm_encoder_outputs (text alone: input_ids), or detach"
            )
        if not self.has_images and memory is None and cache is not None and self.thinning is None:
            return None  # text alone, and nothing before it was cut: nothing is to be done
        positions = kwargs.get("position_ids")
        if positions is None:
            row = torch.arange(past, past + shape[1], device=device)[None]
        else:
            row = positions if positions.ndim == 2 else positions[int(len(positions) == 4)]  # of four rows the first counts slots
        self._counted = not row.is_floating_point()
        valid = valid_slots(self.mask if self.mask is not None else kwargs.get("attention_mask"), past, shape[1])
        layout, which = self.arrivals.layout(shape, None if valid is None else valid.to(device), row.to(torch.int64))
        samples = samples_of({**kwargs, "attention_mask": self.mask}, shape, past > 0) if self.has_images else None
        implementation = str(self.anatomy.text_config._attn_implementation)
        self._chunk = Chunk(layout, past, memory, cache, implementation, self.anatomy, None if samples is None else samples.to(device))
        self._chunk.shows, self._which, self._cut_by = self.has_images, which, cut_by
        self._ask(prompt)
        if self.thinning is not None:
            self.thinning.begin(self._chunk, prompt)
        if memory is not None:
            memory.serve(self)
        self.under_way = True
        injected = self.anatomy.injected(kwargs)
        if injected is None or min(self.wiring.cuts, default=len(self.anatomy.layers)) > max(injected[2], default=0):
            return None
        # After a cut the model would not find its slots again: what it adds is added here.
        new, slots, features = injected
        while features:
            layer, values = features.popitem()
            spread = torch.zeros((*shape, values.shape[-1]), dtype=values.dtype, device=values.device)
            self._injected[layer] = spread.index_put((slots.to(values.device),), values)
        return new

    def _ask(self, prompt: int | None) -> None:
        """Where the questions end: told by the labels, else by the `generate` call, else by the end of the row."""
        chunk = self.chunk
        if not self.has_images:
            return
        layout, answers = chunk.arrived, answers_of(self.labels, chunk.arrived.shape)
        labelled = answers is not None
        if answers is None and prompt is not None and prompt < chunk.past + layout.shape[1]:
            answers = torch.arange(layout.shape[1], device=layout.valid.device).expand(layout.shape) >= prompt - chunk.past
        trains = self.takes_labels and self.anatomy.core.training and prompt is None
        unknown = NO_LABELS if trains and self.labels.get("labels") is None and not labelled else ""
        answers = None if answers is None else answers.to(layout.valid.device)
        self._asked = Asked.of(layout, answers, chunk.samples, unknown, labelled)

    def close(self) -> bool:
        """The decoder has run, or an exception has ended it: whether it went through to its last layer."""
        self.under_way = False
        if self._chunk is None or len(self.record.layouts) < len(self.anatomy.layers):
            return False
        chunk, seen = self._chunk, self.record
        if self.thinning is not None:
            self.thinning.finish(chunk)
            seen.cache, seen.ran, seen.stays = self.wiring.cache, self.thinning.ran, self.thinning.stays
        if chunk.cache is not None and (chunk.changed or chunk.held):
            by = [spell(self._cut_by)] * bool(self._cut_by or not chunk.held) + [str(self.wiring.cache)] * bool(chunk.held)
            chunk.remember(remember(chunk.cache, " and ".join(by)) if chunk.memory is None else chunk.memory)
        if self.has_images:
            items = self.arrivals.items
            calls: dict[int, TowerPass] = {id(call): call for item in items for call in item.tower}
            seen.tower = list(calls.values())
            seen.encoded = [item.call for item in items]
        return True

    # ---- a layer

    def before_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What decoder layer `index` is given in place of its arguments; None: those."""
        chunk, self.gain = self.chunk, None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if chunk.cache is None:  # the decoder has made one by itself
            chunk.cache = kwargs.get("past_key_values")
            if chunk.memory is None and recall(chunk.cache) is not None:
                raise FoveateError("a cache of a sequence that was cut came to the layers only: hand it to the model as past_key_values")
        added = self._injected.get(index)
        if added is not None:
            hidden = hidden + chunk.whole.apply(added.to(hidden.device, hidden.dtype)) if chunk.moves else hidden + added.to(hidden)
        if self.has_images:
            hidden = self._decide(index, hidden)
        elif chunk.begins(index):
            chunk.go_on(index)
        self.record.layouts.append(chunk.layout)
        self.record.rulings = chunk.rulings
        self.record.lengths.append(hidden.shape[1])
        if index in self.probes:
            self.probes[index].arm(self.has_images or (self.thinning is not None and self.thinning.looks))
        chunk.dtype, rules = hidden.dtype, rules_at(index, chunk.rulings)
        self._came = hidden if self.has_images and any(rule.holds for rule in rules) else None
        if self._came is not None and not self.wiring.puts_back(index):
            raise FoveateError(
                f"{spell(self._cut_by)!r} goes on with a sequence whose images another method lets pass decoder layer {index} unchanged: "
                "bring further images while that method is attached"
            )
        if rules and "attention_mask" not in kwargs:
            raise NotApplicable(Reason.NO_MASK, f"decoder layer {index} is given no mask over which a rule of who sees whom can be laid")
        if not chunk.changed:
            return None if added is None else ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        if args:
            new = self._given(index, kwargs)
            return (hidden, *map(chunk.side, args[1:])), new
        new = self._given(index, {name: value for name, value in kwargs.items() if name != "hidden_states"})
        return args, {**new, "hidden_states": hidden}

    def _given(self, index: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer in terms of the slots that are left: found once for all layers of a segment that are alike and
        are handed the same objects."""
        chunk, recurrent = self.chunk, self.anatomy.recurrent(index)
        window = self.anatomy.window(index) if chunk.flash else None
        rules, own = rules_at(index, chunk.rulings), -1 if chunk.thinned(index) is None else index
        key = (chunk.segment, own, recurrent, window, rules, *capacity(chunk.cache, index), *kwargs, *map(id, kwargs.values()))
        if key not in chunk.given:  # with the objects, so that none of them goes and leaves its id to another
            chunk.given[key] = list(kwargs.values()), self._cut_given(index, kwargs, recurrent, window)
        return dict(chunk.given[key][1])

    def _cut_given(self, index: int, kwargs: dict[str, Any], recurrent: bool, window: int | None) -> dict[str, Any]:
        chunk, new = self.chunk, dict(kwargs)
        beside = any(name.startswith("position_embeddings") for name in kwargs)
        varlen = chunk.varlen(kwargs)
        for name, value in kwargs.items():
            if name == "attention_mask":
                new[name] = chunk.mask(value, index, recurrent, window)
            elif name == "position_ids" and isinstance(value, Tensor):
                new[name] = chunk.counted(value) if beside else chunk.positions(value) if chunk.moved else chunk.side(value)
            elif name in varlen:
                new[name] = varlen[name]
            elif name != "past_key_values":
                new[name] = chunk.side(value)
        return new

    def _decide(self, index: int, hidden: Tensor) -> Tensor:
        """The states that go through layer `index`, after what acts in front of it and around it."""
        wiring, chunk = self.wiring, self.chunk
        if index not in wiring.cuts and index not in wiring.through:
            if index == 0 and wiring.decides:
                self._view(0, hidden)  # which those after it are shown
            if chunk.begins(index):
                chunk.go_on(index)
        self._arriving, self._here = chunk.layout, []
        if index in wiring.cuts:
            hidden = self._cut(index, hidden)
        if index in wiring.rulings:
            self._look(index, hidden)
        self._entered = {index: hidden.detach()} if index in wiring.remembered else {}
        return self._bypass(index, hidden) if index in wiring.through else hidden

    def _cut(self, index: int, hidden: Tensor) -> Tensor:
        chunk = self.chunk
        for reducer, number in self.wiring.cuts[index]:
            decision = decide(reducer, number, self._view(index, hidden, reducer), Cut)
            self._note_loss(reducer, decision)
            token_map = decision.map
            if not isinstance(reducer, Replay):  # recorded maps are aligned already, and meet each other as they did
                token_map = token_map.aligned()
            renumber = reducer.positions_at(number) == "renumber" and self._counted
            if decision.gain is not None:
                hidden = hidden * decision.gain[..., None].to(hidden.dtype)
            steps = self._steps(reducer, decision)
            plain = steps is None and decision.stretch is None
            same = self._shortcuts and chunk.memory is None and token_map.is_identity and plain
            if not same or decision.gain is not None:
                how, gain = "renumber" if renumber else "keep", held(decision.gain)
                more: dict[str, Any] = {"steps": steps, "several": decision.several, "stretch": decision.stretch}
                self.record.steps.append(Replay(index, token_map, gain=gain, positions=how, **more))
            if same:
                continue
            hidden = token_map.apply(hidden)
            self._stretch(index, reducer, decision)
            chunk.enter(index, token_map, renumber, steps, decision.several)
            self._here.append(token_map)
        if self._here:
            whole = self._here[0] if len(self._here) == 1 else self._so_far()
            self.record.maps[index] = TokenMap(whole.source, chunk.layout, whole.member, whole.weight, whole.representative, whole.mean)
        elif chunk.memory is not None or chunk.changed:
            chunk.pass_by(index)
        return hidden

    def _steps(self, reducer: Reducer, decision: Cut) -> Tensor | None:
        """A decision's steps where some of them are not 1. NotApplicable where positions are not what a decision can place tokens by."""
        steps = decision.steps
        if decision.several > 1 and not self.chunk.rotary_calls:
            raise NotApplicable(
                Reason.POSITIONS, f"{reducer.name} gives tokens several positions, and no rotary module of a known name turns by them"
            )
        if steps is None or not bool((steps != 1).any()):
            return None
        turned = [kwargs.get("position_ids", args[1] if len(args) > 1 else None) for args, kwargs, _ in self.chunk.rotary_calls]
        if not self._counted or not turned or any(positions is None or positions.ndim != 2 for positions in turned):
            raise NotApplicable(
                Reason.POSITIONS,
                f"{reducer.name} places tokens between integers, and the positions of this model are places in a grid, or turned by no "
                "rotary module of a known name: choose another method",
            )
        return steps.detach()

    def _stretch(self, index: int, reducer: Reducer, decision: Cut) -> None:
        """Other frequencies, where a decision has such, from here to the end of the sequence."""
        chunk = self.chunk
        if decision.stretch is None:
            return
        if index:
            raise FoveateError(
                f"{reducer.name} stretches the rotary embedding from layer {index} on; decide that at BeforeLM, for all layers"
            )
        call = next(((args, kwargs) for args, kwargs, _ in chunk.rotary_calls), None)
        shown = with_images(chunk.arrived.image, chunk.samples)
        chunk.stretch = stretched(reducer.name, decision.stretch, self.anatomy, call, shown, chunk.stretch, chunk.past)
        chunk.moved = True

    def _bypass(self, index: int, hidden: Tensor) -> Tensor:
        """Takes out of the chunk what goes through layer `index`."""
        chunk = self.chunk
        self._passing = None
        reducer, number = self.wiring.through[index]
        decision = decide(reducer, number, self._view(index, hidden, reducer), Bypass)
        self._note_loss(reducer, decision)
        token_map, self.gain = decision.map, decision.gain
        if not isinstance(reducer, Replay):
            token_map = token_map.aligned()
        if not is_selection(token_map):
            raise FoveateError(
                f"{reducer.name}: what goes through decoder layer {index} must be a selection of its tokens, each of them once and of "
                "weight 1; where tokens are to be merged, decide a Cut at FromLayer"
            )
        renumber = reducer.positions_at(number) == "renumber" and self._counted
        same = self._shortcuts and chunk.memory is None and token_map.is_identity
        if not same or decision.gain is not None:
            how, gain, passing = "renumber" if renumber else "keep", held(decision.gain), held(decision.passing)
            self.record.steps.append(Replay(index, token_map, True, gain, passing, positions=how))
        if same:
            if chunk.changed:
                chunk.pass_by(index)
            return hidden
        factor, self._first = decision.passing, hidden if index == 0 else self._first
        self._passing = token_map, hidden if factor is None else hidden * factor[..., None].to(hidden.dtype)
        chunk.go_through(index, token_map, renumber)
        if self.gain is not None:
            self.gain = self.gain.gather(1, token_map.representative.clamp(min=0))
        self.record.bypasses[index] = replace(token_map, target=chunk.layout)
        return token_map.apply(hidden)

    def _look(self, index: int, hidden: Tensor) -> None:
        """Decides who sees whom from layer `index` on."""
        for reducer, number, site in self.wiring.rulings[index]:
            ruling = Ruling(Visibility(site.layer, site.end), decide(reducer, number, self._view(index, hidden, reducer), Visible))
            self.record.steps.append(ReplayVisible(ruling))
            self.chunk.look(ruling)

    def _note_loss(self, reducer: Reducer, decision: Cut | Bypass) -> None:
        if decision.loss is not None:
            self.losses.append((reducer, decision.loss))

    def cached(self, index: int) -> None:
        """Layer `index` has cached what it was given: what stays of that."""
        if self.thinning is not None and self.chunk.cache is not None:
            self.thinning.after(index, self.chunk, self.record.layouts[index])

    def after_layer(self, index: int, output: Any) -> Any:
        """What comes out of layer `index`, with what has passed it by or is held as it came; None: that."""
        if not self.has_images:
            return None
        new = False
        if self._came is not None:
            states = output[0] if isinstance(output, tuple) else output
            states = kept_back(rules_at(index, self.chunk.rulings), self.chunk.layout, self._came, states)
            output, self._came, new = (states, *output[1:]) if isinstance(output, tuple) else states, None, True
        if self._passing is None:
            if index in self.wiring.through and self.chunk.changed:  # later chunks may pass this layer by: what follows is a segment
                self.chunk.pass_by(index + 1)
            return output if new else None
        (token_map, before), self._passing = self._passing, None
        self.chunk.come_back(index + 1)
        hidden = put_back(token_map, output[0] if isinstance(output, tuple) else output, before)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _so_far(self) -> TokenMap:
        """The map from the slots that came to the layer under way to those that its reducers have left by now."""
        assert self._arriving is not None
        return functools.reduce(TokenMap.then, self._here, TokenMap.identity(self._arriving))

    def _view(self, index: int, hidden: Tensor, reducer: Reducer | None = None) -> View:
        """What the reducers at layer `index` may look at, and what one of them decides by."""
        chunk = self.chunk
        signals: dict[Signal, Any] = {}
        for signal in self.wiring.needs:
            if isinstance(signal, (Attention, Keys)) and signal.layer == index - 1:
                probe, start = self.probes[signal.layer], chunk.cached(signal.layer)
                here = self._so_far()
                if isinstance(signal, Attention):
                    signals[signal] = probe.attention().of_slots(here, start)
                else:
                    signals[signal] = here.apply(probe.keys()[:, start : start + here.source.shape[1]])
            elif isinstance(signal, States) and signal.layer == index - 1:
                signals[signal] = self._so_far().apply(self._entered[signal.layer].to(hidden.device))
            elif isinstance(signal, (*TOWER_SIGNALS, Groups)):
                assert self._which is not None
                spread = self.arrivals.values(signal, self._which)
                signals[signal] = chunk.whole.apply(spread) if chunk.moves else spread
        assert self._asked is not None
        asked = None if self._asked.unknown else self._asked.at(chunk.whole if chunk.moves else None, chunk.layout)
        view = View(
            chunk.layout,
            hidden,
            self.arrivals.keys,
            signals,
            asked,
            self._on_embeddings,
            layers=len(self.anatomy.layers),
            unknown=self._asked.unknown,
        )
        if self._on_embeddings is None:
            self._on_embeddings = view
        return view if reducer is None else replace(view, weights=self.wiring.weights.get(reducer.name))

    # ---- what the caller gets

    def levels(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hidden states, each at the chunk's full length: level 0 is what the first layer was given, level i what layer i - 1 gave."""
        length = self.chunk.arrived.shape[1]
        if self._first is not None:
            states = (self._first, *states[1:])
        return tuple(
            x if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] == length else self.chunk.full_length(x, max(1, i))
            for i, x in enumerate(states)
        )


def padded_mask(memory: CacheTable, new: Tensor) -> Tensor:
    """(B, N) int64: the mask of a sequence that goes on with `new`, where the caller gives none and the prompt was padded."""
    assert memory.valid is not None
    return torch.nn.functional.pad(memory.valid, (0, new.shape[1]), value=True).to(torch.int64)


def is_selection(token_map: TokenMap) -> bool:
    """Whether every target is a copy of one source, and no source has two of them (looks at values; waits for the device)."""
    member, representative = token_map.member, token_map.representative
    there = representative >= 0
    single = ((member >= 0).sum(-1) == there) & (member.max(-1).values == representative)
    plain = True if token_map.weight is None else bool((token_map.weight.sum(-1) == there).all())
    ascending = representative.sort(dim=1).values
    twice = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    return plain and not token_map.mean and bool(single.all()) and not bool(twice.any())
