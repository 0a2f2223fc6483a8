"""What a run has done so far and what that took."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from foveate.accounting import Ledger, predict
from foveate.accounting.dry_run import Told, settled
from foveate.reducers import parse
from foveate.tokens import ImagePlan
from foveate.train.align import flops

log = logging.getLogger(__name__)
MOST = 2**16  # samples whose FLOPs are remembered, by their reducers, images and length


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
    terms: dict[str, float] = field(default_factory=dict)  # what the loss is made of, by name, where a stage has `losses`


class Costs:
    """FLOPs of a training step by `foveate.accounting`; real tokens are counted, padding is not. NaN where they cannot be counted: that is
    no reason to stop a run. `tower`: whether it runs, or its features are read; `align`: of a stage that runs no language model,
    with `words` of how many its softmax goes over."""

    def __init__(self, config: Any, trained: Any, tower: bool = True, align: bool = False, words: int | None = None) -> None:
        self.config, self.trained, self.tower, self.align, self.words = config, trained, tower, align, words
        self._known: dict[tuple[str, tuple[ImagePlan, ...], int, bool], Ledger | None] = {}
        self._alike: dict[object, ImagePlan] = {}
        self._told: tuple[Told, ...] = ()

    def of(self, reducer: str, images: tuple[ImagePlan, ...], text: int, head: int | None = None, teaches: bool = False) -> float:
        """Of one sample with `text` tokens beside those of its images, `head` of which get logits (None: all); `teaches`: of a pass without
        gradient."""
        ledger = self.ledger(reducer, images, text, teaches)
        if ledger is None:
            return math.nan
        if self.align:
            spent = flops(ledger, self.config, images, self.words)
            return float(sum(spent.values()) - (0 if self.tower else spent["tower"]))
        head = text + sum(plan.tokens for plan in images) if head is None else head
        tower = 0 if self.tower else ledger.flops["tower"]
        return float(ledger.total_flops - tower + (head - 1) * ledger.flops["head"])

    def ledger(self, reducer: str, images: tuple[ImagePlan, ...], text: int, teaches: bool = False) -> Ledger | None:
        """A step on such a sample, one of whose tokens gets logits. None where it cannot be counted."""
        images = tuple(self._alike.setdefault(plan.cost, plan) for plan in images)
        key, mode = (reducer, images, text, teaches), "prefill" if teaches else "train"
        given: dict[str, Any] = {"config": self.config, "trained": self.trained, "mode": mode, "head_tokens": 1}
        if len(self._known) > MOST:  # where budgets are drawn, each step has others
            self._known.clear()
            self._alike.clear()
        if key not in self._known:
            try:
                self._told = self._told or (Told.by(self.config), Told.by(self.config.get_text_config()))
                with settled(*self._told):
                    self._known[key] = predict(images=images, text_tokens=text, reducers=parse(reducer), **given)
            except Exception as error:  # whatever a configuration of another make brings about
                if None not in self._known.values():
                    log.warning("FLOPs are not logged, they cannot be counted for this model: %s", error or type(error).__name__)
                self._known[key] = None
        return self._known[key]
