"""Other doors than the prompt: what is added to the hidden states of visual slots in front of decoder layers (DeepStack, arXiv 2406.04334).

A hook on the layer adds it, whatever the language model is. It runs once also where the layer is computed again in the backward pass. Of
what is to be added only the forward pass under way knows, in each thread its own; who cuts tokens takes it from there and adds it to those
that are left (`foveate.anatomy`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.probes.hooks import Hook
from foveate.probes.live import Live


class Entering(Live):
    """Of the pass under way: `slots` (B, N) bool, and by decoder layer the features (visual tokens, D) of these that are still to be added
    in front of it."""

    def __init__(self) -> None:
        self.slots = torch.zeros(0, 0, dtype=torch.bool)
        self.layers: dict[int, Tensor] = {}

    def begin(self, slots: Tensor, layers: dict[int, Tensor]) -> None:
        self.slots, self.layers = slots, layers

    def end(self) -> None:
        """Nothing is left to be added, after an exception too."""
        self.layers = {}

    def add(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a decoder layer with what enters in front of it; None: as they are."""
        features = self.layers.pop(number, None)
        if features is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        at = self.slots[..., None].to(hidden.device)
        hidden = hidden + torch.zeros_like(hidden).masked_scatter(at, features.to(hidden))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def watch(entering: Entering, language_model: nn.Module, numbers: Sequence[int]) -> list[Any]:
    """The hooks that add what enters in front of the layers of these `numbers`. FoveateError for a language model without decoder layers
    named `layers`, or without one of these."""
    if not numbers:
        return []
    found = decoder_layers(language_model)
    refuse_layers(numbers, len(found))
    before = [found[number].register_forward_pre_hook for number in numbers]
    return [of(Hook(entering.add, number), with_kwargs=True, prepend=True) for of, number in zip(before, numbers, strict=True)]


def decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """The layers of a decoder. FoveateError for one that has none by the name `layers`."""
    lists = (getattr(module, "layers", None) for module in language_model.modules())
    found = next((layers for layers in lists if isinstance(layers, nn.ModuleList)), None)
    if found is None:
        raise FoveateError(f"{type(language_model).__name__} has no decoder layers named `layers`, which images could enter by")
    return found


def refuse_layers(numbers: Sequence[int], depth: int) -> None:
    """FoveateError where one of the layers is not there."""
    if numbers and numbers[-1] >= depth:
        raise FoveateError(
            f"tokens are to be added in front of decoder layers {', '.join(map(str, numbers))}, but the last one is {depth - 1}: take "
            "fewer tiles, or a smaller start or interval"
        )
