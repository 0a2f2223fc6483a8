"""The weights of a stage's reducers while it trains them, and what these reducers add to its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.anatomy import read
from foveate.engine.run import Run
from foveate.reducers.learned import Learned, registered

OWN = "reducers"  # the name of their term in the log


class Routers:
    """All weights of reducers in a model, and those among them that are trained.

    fill: give them a gradient of zero in steps in which nothing uses them. Where DDP looks for unused weights by itself, it has taken them
    out of such a step by then.
    """

    def __init__(self, model: nn.Module, fill: bool = True) -> None:
        self._fill, self._modules = fill, registered(read(model)) or nn.ModuleDict()

    @property
    def all(self) -> list[nn.Parameter]:
        """As they are now: FSDP puts others in their place."""
        return list(self._modules.parameters())

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.all if parameter.requires_grad]

    def term(self, run: Run | None, progress: float, samples: float) -> Tensor | None:
        """What the last pass' reducers add to the loss, a mean over the `samples` of the step, when `progress` of the stage is made; None
        where no weights are trained."""
        if not (trained := self.trained):
            return None
        term = torch.zeros((), device=trained[0].device)
        if self._fill:
            term = torch.stack([(0.0 * parameter.float()).sum() for parameter in trained]).sum()
        for reducer, loss_B in () if run is None else run.take_losses():
            assert isinstance(reducer, Learned)
            term = term + reducer.loss_weight(progress) * loss_B.sum() / samples
        return term
