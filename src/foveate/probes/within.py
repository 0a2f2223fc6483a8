"""Tensors that modules inside a decoder layer go by while it runs, also where gradient checkpointing runs it again.

The hooks of a layer run once, in front of it and after it; those of what is inside run twice, again in the backward pass. So the tensors go
with the function that is called again, as inputs: they are there in whatever thread that is, and have their gradients with reentrant
checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from foveate.probes.live import Live

_CHECKPOINT = "_gradient_checkpointing_func"  # the library's, of each layer


class Within(Live):
    """`values`: those of the layer under way, None outside of one."""

    def __init__(self) -> None:
        self.values: tuple[Tensor, ...] | None = None
        self._taken = 0

    def take(self, count: int) -> slice:
        """The next so many places: parts of a layer that take turns each have their own."""
        start = self._taken
        self._taken += count
        return slice(start, start + count)

    def begin(self, layer: nn.Module, *values: Tensor) -> None:
        """From now until `end`, in this thread, and whenever the layer runs again."""
        self.values, self._taken = values, 0
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            setattr(layer, _CHECKPOINT, partial(self._checkpointed, getattr(layer, _CHECKPOINT), values))

    def end(self, layer: nn.Module, *_: Any) -> None:
        """The layer has run, or an exception has ended it."""
        self.values = None
        current = vars(layer).get(_CHECKPOINT)
        if isinstance(current, partial) and current.func == self._checkpointed:
            setattr(layer, _CHECKPOINT, current.args[0])

    def _checkpointed(self, checkpoint: Callable[..., Any], values: tuple[Tensor, ...], function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(partial(self._again, function, len(values)), *values, *args)

    def _again(self, function: Callable[..., Any], count: int, *args: Any) -> Any:
        before = self.values, self._taken
        self.values, self._taken = args[:count], 0
        try:
            return function(*args[count:])
        finally:
            self.values, self._taken = before
