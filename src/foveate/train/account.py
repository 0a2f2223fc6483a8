"""What a run has done so far and what that took."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from foveate.accounting import predict
from foveate.reducers import parse
from foveate.tokens import ImagePlan

log = logging.getLogger(__name__)


@dataclass
class Totals:
    """What a run has done so far, over all its stages and processes."""

    images: int = 0
    seconds: float = 0.0
    flops: float | None = 0.0  # None from the first batch on whose FLOPs cannot be counted
    supervised: int = 0


@dataclass
class Since:
    """What has come together since the last logged step."""

    loss: float = 0.0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    sources: list[list[float]] = field(default_factory=list)  # of each that is mixed, as `mixture.SourceLosses` has them


class Costs:
    """FLOPs of a training step by `foveate.accounting`; real tokens are counted, padding is not. NaN where they cannot be counted: that is
    no reason to stop a run. `tower`: whether it runs, or its features are read."""

    def __init__(self, config: Any, trained: Any, tower: bool = True) -> None:
        self.config, self.trained, self.tower = config, trained, tower
        self._known: dict[tuple[str, tuple[ImagePlan, ...], int], float] = {}

    def of(self, reducer: str, images: tuple[ImagePlan, ...], text: int) -> float:
        """Of one sample with `text` tokens beside those of its images."""
        key = (reducer, images, text)
        if key not in self._known:
            try:
                ledger = predict(self.config, images=images, text_tokens=text, reducers=parse(reducer), mode="train", trained=self.trained)
                self._known[key] = float(ledger.total_flops - (0 if self.tower else ledger.flops["tower"]))
            except Exception as error:  # whatever a configuration of another make brings about
                if not any(math.isnan(flops) for flops in self._known.values()):
                    log.warning("FLOPs are not logged, they cannot be counted for this model: %s", error or type(error).__name__)
                self._known[key] = math.nan
        return self._known[key]
