"""Where a reducer acts, and what it may decide there.

A type of site says of itself all that the rest of the house has to know: what it acts on (`place`), which decision `reduce` takes there
(`decides`; None: it is not asked), whether all that comes after sees only what is left (`lasts`), in front of which block or layer it acts
(`index`), and which decoder layer sees that first (`layer`). What becomes of tokens, cache and cost follows:

    site                 acts on  decides  fewer tokens               fewer slots in the cache of  saves
    BeforeProcessor      image    None     wherever the model looks   every layer                  as the processor makes fewer
    InEncoder(block)     tower    Cut      from this block on         every layer                  these blocks, every layer
    BeforeLM             decoder  Cut      from the first layer on    every layer                  every layer
    FromLayer(layer)     decoder  Cut      from this layer on         these layers                 these layers
    ThroughLayer(layer)  decoder  Bypass   in this layer alone        this layer                   this layer

A new type is one class here, in `Site` below; one that acts on something new has its hook in the engine's wiring and driver.
`InCache(k)` and `Visibility(k)` belong to this list as well and are not built yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.contract import Signal
from foveate.tokens import TokenMap


@dataclass(frozen=True)
class Cut:
    """The sequence is what the map makes of it from here on."""

    map: TokenMap


@dataclass(frozen=True)
class Bypass:
    """At `ThroughLayer`: what the map keeps goes through the layer, the rest passes by. A selection: one source a target, weight 1."""

    map: TokenMap


Decision = Cut | Bypass


@dataclass(frozen=True)
class BeforeProcessor:
    """In front of the processor: `Reducer.prepare` changes each image, and nothing is decided in the model."""

    place: ClassVar[str] = "image"
    decides: ClassVar[type[Decision] | None] = None
    lasts: ClassVar[bool] = True
    words: ClassVar[str] = "the image, before the processor"
    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        return 0

    @property
    def index(self) -> int:
        return 0


@dataclass(frozen=True)
class InEncoder:
    """In front of block index `block` of the vision tower; it may look at the block before. The view's rows are crops, its slots those of
    the tower, [CLS] and registers among them. Where a reducer says `proportional = True`, the blocks behind attend to merged tokens by
    their size."""

    place: ClassVar[str] = "tower"
    decides: ClassVar[type[Decision] | None] = Cut
    lasts: ClassVar[bool] = True
    words: ClassVar[str] = "in the tower, from block {}"
    block: int
    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        """Where the language model sees it."""
        return 0

    @property
    def index(self) -> int:
        return self.block


@dataclass(frozen=True)
class BeforeLM:
    """Between the bridge and the first decoder layer."""

    place: ClassVar[str] = "decoder"
    decides: ClassVar[type[Decision] | None] = Cut
    lasts: ClassVar[bool] = True
    words: ClassVar[str] = "before the LM"
    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        return 0

    @property
    def index(self) -> int:
        return 0


@dataclass(frozen=True)
class FromLayer:
    """In front of decoder layer index `layer` (0-based): `layer` complete layers see every token, the others fewer."""

    place: ClassVar[str] = "decoder"
    decides: ClassVar[type[Decision] | None] = Cut
    lasts: ClassVar[bool] = True
    words: ClassVar[str] = "from layer {}"
    layer: int
    needs: tuple[Signal, ...] = ()

    @property
    def index(self) -> int:
        return self.layer


@dataclass(frozen=True)
class ThroughLayer:
    """Around decoder layer index `layer`: some tokens go through it, the others pass by on the residual; the next layer sees all again."""

    place: ClassVar[str] = "decoder"
    decides: ClassVar[type[Decision] | None] = Bypass
    lasts: ClassVar[bool] = False
    words: ClassVar[str] = "through layer {}"
    layer: int
    needs: tuple[Signal, ...] = ()

    @property
    def index(self) -> int:
        return self.layer


Site = BeforeProcessor | InEncoder | BeforeLM | FromLayer | ThroughLayer
