"""What the parts of a layer are to know while it runs.

The hooks of a layer run once, in front of it and after it; with gradient checkpointing what is in it runs twice, again in the backward
pass. So what they are to know goes with the function that is called again, as one of its inputs, and has its gradient with reentrant
checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from foveate.probes.live import Live

_CHECKPOINT = "_gradient_checkpointing_func"  # the library's, of each layer


class _Now(Live):
    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.used = 0


class Running:
    """A tensor for the layer under way, in each thread."""

    def __init__(self) -> None:
        self._now = _Now()

    @property
    def value(self) -> Tensor | None:
        return self._now.value

    def take(self, count: int) -> slice:
        """The next so many places: parts of a layer that take turns each have their own."""
        start = self._now.used
        self._now.used += count
        return slice(start, start + count)

    def begin(self, layer: nn.Module, value: Tensor) -> None:
        """From now until the layer has run, in this thread, and whenever it runs again."""
        self._now.value, self._now.used = value, 0
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            setattr(layer, _CHECKPOINT, partial(self._checkpointed, getattr(layer, _CHECKPOINT), value))

    def _checkpointed(self, checkpoint: Callable[..., Any], value: Tensor, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(partial(self._again, function), value, *args)

    def _again(self, function: Callable[..., Any], value: Tensor, *args: Any) -> Any:
        before = self._now.value, self._now.used
        self._now.value, self._now.used = value, 0
        try:
            return function(*args)
        finally:
            self._now.value, self._now.used = before

    def end(self, layer: nn.Module, *_: Any) -> None:
        """The layer has run."""
        self._now.value = None
        current = vars(layer).get(_CHECKPOINT)
        if isinstance(current, partial) and current.func == self._checkpointed:
            setattr(layer, _CHECKPOINT, current.args[0])
