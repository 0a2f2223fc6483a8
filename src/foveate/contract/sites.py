"""Where a reducer acts, and what it may decide there.

`InCache(k)` and `Visibility(k)` belong to this list as well and are not built yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.contract import Signal
from foveate.tokens import TokenMap


@dataclass(frozen=True)
class BeforeProcessor:
    """In front of the processor: `Reducer.prepare` changes each image, and nothing is decided in the model."""

    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        return 0


@dataclass(frozen=True)
class InEncoder:
    """In front of block index `block` of the vision tower; it may look at the block before. The view's rows are crops, its slots those of
    the tower, [CLS] and registers among them. Where a reducer says `proportional = True`, the blocks behind attend to merged tokens by
    their size."""

    block: int
    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        """Where the language model sees it."""
        return 0


@dataclass(frozen=True)
class BeforeLM:
    """Between the bridge and the first decoder layer."""

    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        return 0


@dataclass(frozen=True)
class FromLayer:
    """In front of decoder layer index `layer` (0-based): `layer` complete layers see every token, the others fewer."""

    layer: int
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class ThroughLayer:
    """Around decoder layer index `layer`: some tokens go through it, the others pass by on the residual; the next layer sees all again."""

    layer: int
    needs: tuple[Signal, ...] = ()


Site = BeforeProcessor | InEncoder | BeforeLM | FromLayer | ThroughLayer


@dataclass(frozen=True)
class Cut:
    """The sequence is what the map makes of it from here on."""

    map: TokenMap


@dataclass(frozen=True)
class Bypass:
    """At `ThroughLayer`: what the map keeps goes through the layer, the rest passes by. A selection: one source a target, weight 1."""

    map: TokenMap


Decision = Cut | Bypass
