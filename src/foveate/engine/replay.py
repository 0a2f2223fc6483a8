"""Decisions: asked of a reducer, in the language model and in the tower alike, and recorded ones that are made again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from foveate.contract import Bypass, Cut, Decision, Frequencies, FromLayer, InEncoder, Site, ThroughLayer, View, Visible, Workload
from foveate.engine.rulings import Ruling
from foveate.errors import FoveateError
from foveate.probes.marker import scoring
from foveate.reducers import Reducer
from foveate.tokens import Layout, TokenMap

Made = TypeVar("Made", Cut, Bypass, Visible)


def decide(reducer: Reducer, number: int, view: View, kind: type[Made]) -> Made:
    """What a reducer decides at site `number` of its sites. FoveateError where that is no decision of the site's `kind`."""
    with scoring(), torch.autocast(view.layout.kind.device.type, enabled=False):  # scores are float32, also where the model is not
        decision = reducer.reduce(view, number)
    if not isinstance(decision, kind):
        raise FoveateError(f"{reducer.name} decides {type(decision).__name__} at a site where {kind.__name__} is possible")
    return decision


def held(factor: Tensor | None) -> Tensor | None:
    """What a decision multiplies by, as it is recorded: without gradient."""
    return None if factor is None else factor.detach()


def _onto(factor: Tensor | None, layout: Layout) -> Tensor | None:
    """Factors on a sequence that goes on: what comes there is as it is."""
    return None if factor is None else torch.nn.functional.pad(factor, (0, layout.shape[1] - factor.shape[1]), value=1.0)


@dataclass(frozen=True)
class Recorded(Reducer):
    """What has been decided before."""

    name: ClassVar[str] = "replay"
    paper: ClassVar[str] = "-"

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        raise FoveateError("recorded maps have the counts of their batch, not of any image; see run.ledger")


@dataclass(frozen=True)
class Replay(Recorded):
    """A recorded decision in front of a decoder layer (or `through` it), on the same batch or on one that goes on after it."""

    layer: int = 0
    map: TokenMap | None = None
    through: bool = False
    gain: Tensor | None = None
    passing: Tensor | None = None
    steps: Tensor | None = None
    several: int = 1
    stretch: Frequencies | None = None

    def sites(self, layers: int) -> list[Site]:
        return [ThroughLayer(self.layer) if self.through else FromLayer(self.layer)]

    def reduce(self, view: View, stage: int = 0) -> Decision:
        assert self.map is not None
        layout, token_map = view.layout, self.map.onto(view.layout)
        gain = _onto(self.gain, layout)
        if self.through:
            return Bypass(token_map, gain, _onto(self.passing, layout))
        return Cut(token_map, gain, steps=_onto(self.steps, layout), several=self.several, stretch=self.stretch)


@dataclass(frozen=True)
class ReplayVisible(Recorded):
    """A recorded rule of who sees whom, which says the same on any batch."""

    ruling: Ruling | None = None

    def sites(self, layers: int) -> list[Site]:
        assert self.ruling is not None
        return [self.ruling.site]

    def reduce(self, view: View, stage: int = 0) -> Visible:
        assert self.ruling is not None
        return self.ruling.visible


@dataclass(frozen=True)
class ReplayInTower(Recorded):
    """Recorded maps in front of one block of the tower, one for each call of it."""

    block: int = 0
    maps: tuple[TokenMap | None, ...] = ()
    proportional: bool = False

    def sites(self, layers: int) -> list[Site]:
        return [InEncoder(self.block)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        """`stage` is the number of the call."""
        token_map = self.maps[stage % len(self.maps)]
        if token_map is None:
            return Cut(TokenMap.identity(view.layout))
        if not token_map.source.same(view.layout):
            raise FoveateError(
                f"this map belongs to another batch: its source has shape {token_map.source.shape}, here it is {view.layout.shape}"
            )
        return Cut(replace(token_map, source=view.layout))
