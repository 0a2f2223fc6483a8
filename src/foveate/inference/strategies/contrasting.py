"""What contrasting strategies share: no search, and a second pass beside the answer, which is shown another picture."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.errors import FoveateError
from foveate.inference.contrast import Beside, Contrast
from foveate.inference.strategies.base import Strategy
from foveate.inference.strategies.session import Session


@dataclass(frozen=True)
class Contrasting(Strategy):
    """The question and the whole picture, and the same about another picture, token by token (`foveate.inference.contrast`).

    alpha  how much the second pass counts; 0: there is none
    beta   the least share of the best token's probability with which a token may be said; 0: any may
    """

    alpha: float = 1.0
    beta: float = 0.1

    def check(self) -> None:
        self.between(0, 1, "beta")
        if type(self.alpha) not in (int, float) or not 0 <= self.alpha < float("inf"):
            raise FoveateError(f"{self.name}: alpha={self.alpha!r} is not possible; give a number of at least 0")

    @property
    @abstractmethod
    def contrast(self) -> Contrast: ...

    def beside(self, model: nn.Module, inputs: Mapping[str, Any]) -> Beside:
        """The processor for one call of an attached model, `model.generate(**inputs, logits_processor=[strategy.beside(model, inputs)])`:
        of batches, greedy or sampled. FoveateError for inputs without pixels."""
        return self.contrast.beside(model, inputs)

    def search(self, session: Session) -> str:
        session.visit(session.whole, 0)
        return "searched"
