"""A door that is no place in the sequence: what images become are low-rank weights of maps in the decoder (VLoRA, arXiv 2405.20339).

`foveate.bridges.vlora` says how they are made. Hooks on the maps add, row by row of a batch, what the weights of the row's images make of
their inputs; rows without images get zeros, and a pass without any is the bare language model's. The weights act on every token of a
prompt, the answer among them: they are made once, when the images come, and decoding finds them on the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from foveate.bridges import VLoRA
from foveate.errors import FoveateError, nearest
from foveate.model.entering import decoder_layers
from foveate.probes.hooks import Hook
from foveate.probes.live import Live
from foveate.probes.within import Within

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp")  # the paper's q, k, v, o and m, as Llama and its like call them
EVERY = 4  # layers, of which the last is a target
STATE = "foveate_weights"  # the attribute of a cache that holds those of its prompts


# ---- before there is a model -----------------------------------------------------------------------------------------------------------


def completed(bridge: Mapping[str, Any], text_config: Any) -> Mapping[str, Any]:
    """The configuration of a bridge with its `layers` and the sizes of its `targets` filled in where it makes weights; any other as it is.

    FoveateError for a language model that has not such maps."""
    if bridge.get("kind") != VLoRA.kind or isinstance(bridge.get("targets"), Mapping):
        return bridge
    with torch.device("meta"), torch.inference_mode(False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
    layers = decoder_layers(model)
    names = bridge.get("targets") or TARGETS
    names = [names] if isinstance(names, str) else list(names)
    chosen = bridge.get("layers") or list(range(EVERY - 1, len(layers), EVERY))
    if not chosen:
        raise FoveateError(
            f"the images of a {VLoRA.kind} bridge become weights of every {EVERY}th decoder layer, and the language model has "
            f"{len(layers)} layers: say which, counted from 0, as in layers: [0, 1]"
        )
    return {**bridge, "layers": chosen, "targets": {name: shared_size(layers, chosen, name, text_config) for name in names}}


def shared_size(layers: nn.ModuleList, chosen: Sequence[int], name: str, text_config: Any) -> list[int]:
    """[inputs, outputs] of a map in the chosen layers. FoveateError where they differ."""
    width = text_config.get_text_config().hidden_size
    sizes = {number: size_of(part_of(layers, number, name), width) for number in chosen}
    first, *others = sizes.values()
    if any(other != first for other in others):
        raise FoveateError(f"{name} differs from layer to layer, [inputs, outputs] by layer: {sizes}. Say layers in which it is one")
    return first


def part_of(layers: nn.ModuleList, number: int, name: str) -> nn.Module:
    """The module of a decoder layer that is called so. FoveateError where there is none, or several."""
    if not isinstance(number, int) or not 0 <= number < len(layers):
        raise FoveateError(f"images are to become weights of decoder layer {number}, but the layers are 0 to {len(layers) - 1}")
    found = [part for path, part in layers[number].named_modules() if path.rpartition(".")[2] == name]
    if len(found) != 1:
        there = sorted({path.rpartition(".")[2] for path, part in layers[number].named_modules() if isinstance(part, nn.Linear)})
        raise FoveateError(
            f"decoder layer {number} has {'no map' if not found else f'{len(found)} maps'} called {name!r} of which images could become "
            f"weights{nearest(name, there)}: it has {', '.join(there)}, and perhaps mlp, a branch of the hidden state's width"
        )
    return found[0]


def size_of(part: nn.Module, width: int) -> list[int]:
    """[inputs, outputs] of a linear map; of a branch of several maps the hidden state's `width` twice."""
    return [int(getattr(part, "in_features", width)), int(getattr(part, "out_features", width))]


# ---- in the model ----------------------------------------------------------------------------------------------------------------------


class _Pass(Live):
    """Of the pass under way, in each thread: A (rows, layers, inputs of all targets, rank), B (layers, outputs of all targets, rank), and
    which of the maps have met theirs."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.met: set[tuple[int, str]] = set()


class Weighing:
    """The weights that images have become, on their way into the maps of a decoder."""

    def __init__(self, bridge: Any) -> None:
        self.layers: list[int] = bridge.layers
        self.targets: dict[str, list[int]] = bridge.targets
        self._parts = [_slices(size[side] for size in self.targets.values()) for side in (0, 1)]
        self._pass, self._layer = _Pass(), Within()

    def open(self, language_model: nn.Module, width: int) -> list[Any]:
        """The hooks on the maps. FoveateError where they are not there, or of other sizes than the bridge was made for."""
        layers, hooks = decoder_layers(language_model), list[Any]()
        for at, number in enumerate(self.layers):
            parts = {name: part_of(layers, number, name) for name in self.targets}
            for name, part in parts.items():
                if (size := size_of(part, width)) != self.targets[name]:
                    raise FoveateError(f"{name} of decoder layer {number} has [inputs, outputs] {size}, the bridge {self.targets[name]}")
            hooks += [
                layers[number].register_forward_pre_hook(Hook(self._begin_layer, at)),
                *(part.register_forward_hook(Hook(self._add, at, place), with_kwargs=True) for place, part in enumerate(parts.values())),
                layers[number].register_forward_hook(Hook(self._end_layer), always_call=True),
            ]
        return hooks

    def begin(self, weights: Tensor, outputs: Tensor) -> None:
        """The pass under way has these weights; see `VLoRA`."""
        self._pass.a, self._pass.b = weights, outputs

    def recall(self, cache: Any, rows: int, outputs: Tensor) -> None:
        """The pass goes on with a cache: its prompts' weights, if they have some. FoveateError if rows of the batch have come or gone."""
        held = getattr(cache, STATE, None)
        if held is None:
            return
        if len(held) != rows:
            raise FoveateError(
                f"the cache was filled by {len(held)} rows and is now used for {rows}, but what the images of a row have become is known "
                "by row: begin anew without the cache"
            )
        self.begin(held, outputs)

    def keep(self, cache: Any) -> None:
        """The pass has gone through: what the cache must remember of it. FoveateError where weights have met no map."""
        now = self._pass
        if now.a is not None and len(now.met) < len(self.layers) * len(self.targets):
            raise FoveateError(
                f"only {len(now.met)} of {len(self.layers) * len(self.targets)} maps of the language model have met the weights that the "
                "images became: modules of it were exchanged since it was made; call the model's `open_doors()` once more"
            )
        if cache is not None and (now.a is not None or hasattr(cache, STATE)):
            setattr(cache, STATE, now.a)

    def end(self) -> None:
        """Nothing of the pass is left, after an exception too."""
        self._pass.end()

    def _begin_layer(self, at: int, layer: nn.Module, args: Any) -> None:
        a, b = self._pass.a, self._pass.b
        if a is not None and b is not None:
            self._layer.begin(layer, a[:, at], b[at])

    def _end_layer(self, layer: nn.Module, *_: Any) -> None:
        self._layer.end(layer)

    def _add(self, at: int, place: int, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output of a map with y = B Aᵀ x added, row by row."""
        if self._layer.values is None:
            return None
        a, b = self._layer.values
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(output, Tensor) or x.ndim != 3 or len(x) != len(a):
            raise FoveateError(
                f"the {type(part).__name__} of a decoder layer takes {tuple(x.shape)} and gives {type(output).__name__}: weights of images "
                "are for maps that take and give states (rows, tokens, width)"
            )
        self._pass.met.add((at, list(self.targets)[place]))
        inputs, outputs = (of[place] for of in self._parts)
        return output + (x @ a[:, inputs].to(x) @ b[outputs].T.to(x)).to(output)


def by_prompt(weights: Tensor, prompt_images: Tensor | None, rows: int, repeated: bool) -> Tensor:
    """(images, …) -> (rows, …): the sum of the weights of each row's images. `prompt_images` (rows,): how many images each has, one unless
    given. `repeated`: whether each prompt may stand there several times, one after the other, with its images once (beams).

    FoveateError where there are other rows or images."""
    counts = [1] * rows if prompt_images is None else [int(count) for count in prompt_images]
    times = sum(counts) // len(weights) if repeated and len(weights) else 1
    if (
        len(counts) != rows
        or sum(counts) != times * len(weights)
        or times < 1
        or counts != [n for n in counts[::times] for _ in range(times)]
    ):
        said = "one for each" if prompt_images is None else f"prompt_images {counts}"
        raise FoveateError(
            f"{len(weights)} images came with {rows} prompts ({said}): prompt_images (prompts,) has to say how many images each has; "
            "samples that are packed into one row are not told apart"
        )
    counts = counts[::times]
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(weights.device)
    summed = weights.new_zeros(len(counts), *weights.shape[1:]).index_add(0, owner, weights)
    return summed if times == 1 else summed.repeat_interleave(times, 0)


def _slices(sizes: Any) -> list[slice]:
    ends = list(accumulate(sizes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
