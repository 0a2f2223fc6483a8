"""The hooks on a model: each hears of one moment of a call and passes it on to the call's `ForwardPass`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from foveate.anatomy import MODALITIES, Anatomy
from foveate.engine.arrivals import Ahead
from foveate.engine.cache import recall
from foveate.engine.forward import ForwardPass, padded_mask
from foveate.engine.gains import Gains
from foveate.engine.tower_cuts import Encoder
from foveate.engine.wiring import Wiring
from foveate.errors import FoveateError
from foveate.probes.encoding import Encodings, Item
from foveate.probes.hooks import Hook
from foveate.probes.layer import LayerProbe
from foveate.probes.live import Live
from foveate.probes.watched import Watched
from foveate.reducers import Reducer

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Request:
    """A call of `generate`: how many tokens its prompt has, and what it has encoded."""

    def __init__(self, prompt: int | None) -> None:
        self.prompt = prompt
        self.ahead = Ahead(most=None)


class Chosen(Live):
    """Which of the drivers on a model acts in the calling thread, by its number; None: none of them."""

    def __init__(self) -> None:
        self.number: int | None = 0


class _Calls(Live):
    """What the thread is in the middle of."""

    def __init__(self) -> None:
        self.forward: ForwardPass | None = None
        self.requests: list[_Request] = []


class Driver:
    """Everything that an attachment has put on a model. `done(forward, reducers)` is told of every pass that has gone through.

    around  the modules from the outermost one to that which merges images and text, each in the one before
    number  of several on one model: this one acts in the threads that have chosen it, in the others it does nothing
    """

    def __init__(
        self,
        around: list[nn.Module],
        anatomy: Anatomy,
        wiring: Wiring,
        reducers: list[Reducer],
        done: Callable[[ForwardPass, list[Reducer]], None],
        shortcuts: bool,
        chosen: Chosen,
        number: int = 0,
    ) -> None:
        self._chosen, self.number = chosen, number
        self.anatomy, self.wiring, self._reducers, self._done, self._shortcuts = anatomy, wiring, reducers, done, shortcuts
        self._around = around
        self._takes_labels = any("labels" in inspect.signature(module.forward).parameters for module in around)
        self._live = _Calls()
        self._ahead = Ahead()  # encoded by hand, outside of `generate`
        self._probes: dict[int, LayerProbe] = {}
        self._encoders: dict[nn.Module, Encoder] = {}
        self._encodings: Encodings | None = None
        self._watched: list[Watched] = []
        self._hooks: list[Any] = []
        self._gains = Gains()
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _idle(self) -> bool:
        """Whether this thread's calls are not its own."""
        return self._chosen.number != self.number

    def _install(self) -> None:
        anatomy, wiring, layers = self.anatomy, self.wiring, self.anatomy.layers
        core, decoder = anatomy.core, anatomy.decoder
        behind = [index for index in range(len(layers)) if wiring.puts_back(index)]
        for index in sorted(wiring.watched):
            self._probes[index] = LayerProbe(layers[index])
        if wiring.tower:
            for modality in MODALITIES:
                tower = anatomy.tower_of(modality)
                if tower not in self._encoders:
                    self._encoders[tower] = Encoder(anatomy, tower, wiring.tower, list(wiring.tower_needs), self._shortcuts, self._idle)
        of = {modality: self._encoders[anatomy.tower_of(modality)] for modality in MODALITIES if self._encoders}
        self._encodings = Encodings(anatomy, wiring.needs, self._encoded, of, self._idle)
        if anatomy.slot_method is not None:
            self._watched.append(Watched(core, anatomy.slot_method, self._placed))
        for depth, module in enumerate(self._around[:-1]):
            self._hooks.append(module.register_forward_pre_hook(Hook(self._before_model, depth), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(Hook(self._after_model, depth), always_call=True))
        self._hooks += [
            core.register_forward_pre_hook(Hook(self._before_core), with_kwargs=True),
            core.register_forward_hook(Hook(self._after_model, len(self._around) - 1), always_call=True),
            decoder.register_forward_pre_hook(Hook(self._before_decoder), with_kwargs=True),
            decoder.register_forward_hook(Hook(self._after_decoder), always_call=True),
            *(layers[index].register_forward_hook(Hook(self._after_layer, index), prepend=True) for index in behind),
            *(hook for index in wiring.through for hook in self._gains.hooks(layers[index])),
            *(layers[index].register_forward_hook(Hook(self._cached, index)) for index in wiring.thinned),
            layers[-1].register_forward_hook(Hook(self._after_last_layer)),
        ]
        if anatomy.rotary is not None:
            self._hooks.append(anatomy.rotary.register_forward_hook(Hook(self._after_rotary), with_kwargs=True))
        for index, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(Hook(self._before_layer, index), with_kwargs=True))
        for module in self._around:
            if hasattr(type(module), "generate"):
                self._watched.append(Watched(module, "generate", self._generate))

    def remove(self) -> None:
        """Leaves the model as it was. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        if self._encodings is not None:
            self._encodings.remove()
        parts: list[LayerProbe | Encoder | Watched] = [*self._probes.values(), *self._encoders.values(), *reversed(self._watched)]
        for part in parts:
            part.remove()
        self._hooks, self._encodings, self._watched, self._live = [], None, [], _Calls()

    # ---- a request

    def _generate(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._idle():
            return watched.method(*args, **kwargs)
        configs = (kwargs.get("generation_config"), getattr(watched.module, "generation_config", None))
        size = kwargs.get("prefill_chunk_size", next((c.prefill_chunk_size for c in configs if c is not None), None))
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if prompt is None or prompt.shape[1] == 0:
            prompt = kwargs.get("inputs_embeds", prompt)
        if size and (not isinstance(prompt, Tensor) or size < prompt.shape[1]):
            raise FoveateError(
                "prefill in chunks (prefill_chunk_size) would show the reducers pieces of images and of the prompt; leave it out: "
                "after the cut the prompt is shorter anyway"
            )
        requests = self._live.requests
        if requests and requests[-1].prompt is not None and watched.module is not self._around[0]:
            return watched.method(*args, **kwargs)  # a wrapper's `generate` calls that of the model in it
        requests.append(_Request(prompt.shape[1] if isinstance(prompt, Tensor) else None))
        try:
            return watched.method(*args, **kwargs)
        finally:
            requests.pop()

    # ---- what is encoded, and where it goes

    def _encoded(self, modality: str, items: list[Item], features: list[Tensor]) -> None:
        live = self._live
        if live.forward is not None and live.forward.entered:
            live.forward.arrivals.encoded(modality, items)
        else:
            (live.requests[-1].ahead if live.requests else self._ahead).note(items, features)

    def _placed(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self._live.forward
        return watched.method(*args, **kwargs) if forward is None else forward.arrivals.placed(watched, args, kwargs)

    # ---- a forward pass

    def _forward(self, depth: int) -> ForwardPass:
        """The pass that a call of the module at `depth` belongs to: one that a module around it has begun, or a new one. What an
        interrupted call has left behind ends here."""
        forward = self._live.forward
        if forward is None or forward.entered or depth <= forward.depth:
            assert self._encodings is not None
            forward = ForwardPass(depth, self.anatomy, self.wiring, self._probes, self._encodings.keyed, self._shortcuts)
            forward.takes_labels = self._takes_labels
            self._live.forward = forward
        return forward

    def _before_model(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._idle():
            self._forward(depth).note_labels(kwargs)

    def _before_core(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        if self._idle():
            return None
        forward, live = self._forward(len(self._around) - 1), self._live
        forward.entered = True
        forward.note_labels(kwargs)  # of a model that is one module, head and all
        ahead = [request.ahead for request in reversed(live.requests)] + [self._ahead]
        forward.arrivals.begin(kwargs.get("mm_encoder_outputs"), self.anatomy.kept(kwargs), ahead)
        forward.mask = kwargs.get("attention_mask")
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        forward.merged = ids is None and embeds is not None
        if self.anatomy.slot_method is None and ids is not None:
            forward.arrivals.placed_at({"image": self.anatomy.placeholders(ids, ids if embeds is None else embeds)})
        memory = recall(kwargs.get("past_key_values"))
        if memory is not None and memory.valid is not None and forward.mask is None:
            # Without the caller's mask the library would take the prompt's padding for tokens.
            return args, {**kwargs, "attention_mask": padded_mask(memory, ids if ids is not None else kwargs["inputs_embeds"])}
        return None

    def _after_model(self, depth: int, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._live.forward
        if forward is not None and forward.depth == depth:
            self._live.forward = None

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        arriving = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if arriving is None or self._idle():
            return None  # the decoder says itself what it lacks
        live = self._live
        forward = live.forward
        if forward is None or forward.opened:  # called by itself, without the model around it
            live.forward = None
            forward = self._forward(len(self._around))
            forward.entered = True
        new = forward.open(kwargs, arriving, live.requests[-1].prompt if live.requests else None, self._reducers)
        return None if new is None else (args, new)

    def _after_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = self._live.forward
        if forward is not None and forward.under_way and not forward.record.layouts:
            forward.chunk.rotary_calls.append((args, kwargs, output))

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._live.forward
        if forward is None:
            return None
        for probe in self._probes.values():
            probe.arm(False)
        whole = forward.close()
        if forward.depth == len(self._around):
            self._live.forward = None
        if not whole:
            return None  # an exception ended the pass
        if forward.has_images:
            self._done(forward, self._reducers)
        levels = getattr(output, "hidden_states", None)
        if levels and (forward.record.maps or forward.record.bypasses):
            output.hidden_states = forward.levels(levels)
        return None

    def _before_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        forward = self._live.forward
        if forward is None or not forward.under_way:
            return None
        new = forward.before_layer(index, args, kwargs)
        if forward.gain is not None:
            self._gains.begin(module, forward.gain)
        return new

    def _after_layer(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._live.forward
        return forward.after_layer(index, output) if forward is not None and forward.under_way else None

    def _cached(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._live.forward
        if forward is not None and forward.under_way:
            forward.cached(index)

    def _after_last_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._live.forward
        if forward is None or not forward.under_way or not forward.record.maps:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = forward.chunk.full_length(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
