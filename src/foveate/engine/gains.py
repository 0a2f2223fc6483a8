"""What tokens weigh in a decoder layer: its feed-forward branch is multiplied where it ends, on its way to the states."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foveate.anatomy import feed_forward
from foveate.errors import NotApplicable, Reason
from foveate.probes.hooks import Hook
from foveate.probes.within import Within


class Gains:
    """The gain of the layer under way, in each thread."""

    def __init__(self) -> None:
        self._now = Within()

    def hooks(self, layer: nn.Module) -> list[Any]:
        """Those that a layer needs whose tokens may have a gain."""
        branch = feed_forward(layer)
        found = [layer.register_forward_hook(Hook(self._now.end), always_call=True)]
        return found if branch is None else [*found, branch.register_forward_hook(Hook(self._weigh))]

    def begin(self, layer: nn.Module, gain_BM: Tensor) -> None:
        """From now until the layer has run, in this thread. NotApplicable where its branch is not known."""
        if feed_forward(layer) is None:
            raise NotApplicable(
                Reason.NO_BRANCH, f"{type(layer).__name__} has no feed-forward branch that is known by its name, so it cannot be weighed"
            )
        self._now.begin(layer, gain_BM)

    def _weigh(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._now.values is None:
            return None
        (gain,) = self._now.values
        branch = output[0] if isinstance(output, tuple) else output
        weight = gain.to(branch.dtype)
        branch = branch * (weight[..., None] if branch.ndim == 3 else weight.reshape(-1, 1))  # experts may give one row a token
        return (branch, *output[1:]) if isinstance(output, tuple) else branch
