"""What tokens weigh in a decoder layer: its feed-forward branch is multiplied where it ends, on its way to the states.

The hooks of a layer run once, in front of it and after it; with gradient checkpointing the branch runs twice, again in the backward pass.
So the gain goes with the function that is called again, as one of its inputs, and has its gradient with reentrant checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from foveate.anatomy import feed_forward
from foveate.errors import NotApplicable, Reason
from foveate.probes.hooks import Hook
from foveate.probes.live import Live

_CHECKPOINT = "_gradient_checkpointing_func"  # the library's, of each layer


class _Now(Live):
    def __init__(self) -> None:
        self.gain: Tensor | None = None


class Gains:
    """The gain of the layer under way, in each thread."""

    def __init__(self) -> None:
        self._now = _Now()

    def hooks(self, layer: nn.Module) -> list[Any]:
        """Those that a layer needs whose tokens may have a gain."""
        branch = feed_forward(layer)
        found = [layer.register_forward_hook(Hook(self._end), always_call=True)]
        return found if branch is None else [*found, branch.register_forward_hook(Hook(self._weigh))]

    def begin(self, layer: nn.Module, gain_BM: Tensor) -> None:
        """From now until the layer has run, in this thread. NotApplicable where its branch is not known."""
        if feed_forward(layer) is None:
            raise NotApplicable(
                Reason.NO_BRANCH, f"{type(layer).__name__} has no feed-forward branch that is known by its name, so it cannot be weighed"
            )
        self._now.gain = gain_BM
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            setattr(layer, _CHECKPOINT, partial(self._checkpointed, getattr(layer, _CHECKPOINT), gain_BM))

    def _checkpointed(self, checkpoint: Callable[..., Any], gain_BM: Tensor, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(partial(self._again, function), gain_BM, *args)

    def _again(self, function: Callable[..., Any], gain_BM: Tensor, *args: Any) -> Any:
        before, self._now.gain = self._now.gain, gain_BM
        try:
            return function(*args)
        finally:
            self._now.gain = before

    def _weigh(self, module: nn.Module, args: Any, output: Any) -> Any:
        gain = self._now.gain
        if gain is None:
            return None
        branch = output[0] if isinstance(output, tuple) else output
        weight = gain.to(branch.dtype)
        branch = branch * (weight[..., None] if branch.ndim == 3 else weight.reshape(-1, 1))  # experts may give one row a token
        return (branch, *output[1:]) if isinstance(output, tuple) else branch

    def _end(self, layer: nn.Module, *_: Any) -> None:
        self._now.gain = None
        current = vars(layer).get(_CHECKPOINT)
        if isinstance(current, partial) and current.func == self._checkpointed:
            setattr(layer, _CHECKPOINT, current.args[0])
