"""Where a reducer acts, and what it may decide there.

`SITES` is the one table of what acting at a type of site does; the rest of the house goes by it, and knows no type. What becomes of
tokens, cache and cost follows from what is acted on and whether it lasts:

    site                 fewer tokens               fewer slots in the cache of  saves
    BeforeProcessor      wherever the model looks   every layer                  as the processor makes fewer
    InEncoder(block)     from this block on         every layer                  these blocks, every layer
    BeforeLM             from the first layer on    every layer                  every layer
    FromLayer(layer)     from this layer on         these layers                 these layers
    ThroughLayer(layer)  in this layer alone        this layer                   this layer
    Visibility(layer)    nowhere                    none                         pairs of query and key

A new type is one class and one row here; one that acts on something new has its hook in the engine's wiring and driver.
What stays in a cache without the sequence becoming shorter is decided at `InCache`, by a cache policy and not by a reducer:
`foveate.contract.cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foveate.contract import Signal
from foveate.tokens import Layout, TokenMap

Frequencies = Callable[[Tensor], Tensor]
"""A rule, of the F frequencies of a rotary embedding: (F,) int64, which axis each turns by, 0 time, 1 height, 2 width -> (F,) float64,
what it is multiplied with. A value, as a `Rule` is."""


@dataclass(frozen=True)
class Cut:
    """The sequence is what the map makes of it from here on.

    gain  (B, N) what the arriving states are multiplied with before that; None: nothing. In the tower there is none
    loss  (B,) a term of each row's loss, while the reducer's weights are trained; None: it adds none
    steps (B, N) float64, what the step from the slot before to each arriving slot's position counts, in place of 1; None: 1. What comes
          after fractions goes on from the next integer. In the tower there is none
    several  positions of each target from here on, its members' from the last one backwards, among which the rotary embedding's
          frequencies are shared out; 1: the target's own. In the tower nothing but 1
    stretch  what the rotary embedding's frequencies are multiplied with, in every layer and at every later step, in samples with images;
          None: 1. At `BeforeLM` alone, and of tokens that have a time, a row and a column
    """

    map: TokenMap
    gain: Tensor | None = None
    loss: Tensor | None = None
    steps: Tensor | None = None
    several: int = 1
    stretch: Frequencies | None = None


@dataclass(frozen=True)
class Bypass:
    """At `ThroughLayer`: what the map keeps goes through the layer, the rest passes by. A selection: one source a target, weight 1.

    gain     (B, N) of each arriving slot, what its feed-forward branch is multiplied with where it goes through; None: nothing
    passing  (B, N) likewise, what its state is multiplied with where it passes by
    loss     as in `Cut`
    """

    map: TokenMap
    gain: Tensor | None = None
    passing: Tensor | None = None
    loss: Tensor | None = None


Rule = Callable[[Layout, Layout], Tensor]


@dataclass(frozen=True)
class Visible:
    """At `Visibility`: who attends to whom, by rules on the layouts of the queries (B, M) and of all keys (B, K) of the sequence so far,
    the queries' own the last of them. Rules are asked at every later step too, so they are values: equal ones are one rule.

    sees   (B, M, K) bool: what stays visible of what the model's own mask allows; None: all. A token always sees itself
    opens  (B, M, K) bool: what is visible beside that, in the same forward pass; None: nothing
    bias   (B, M or 1, K) float32, added to the products of queries and keys; None: nothing
    holds  whether visual tokens leave the layers as they came to them: nothing but their keys and values is theirs to give
    """

    sees: Rule | None = None
    opens: Rule | None = None
    bias: Rule | None = None
    holds: bool = False


Decision = Cut | Bypass | Visible


@dataclass(frozen=True)
class Effect:
    """What acting at a type of site does.

    place    what is acted on: an image in front of the processor, the blocks of the tower, the layers of the decoder
    decides  what `Reducer.reduce` returns there; None: it is not asked, `Reducer.prepare` changes the image
    lasts    whether all that comes after sees only what is left, or the one layer alone
    words    where that is, for people; {} is the number of the block or layer
    counts   the option of the site that is this number, "" where it has none
    """

    place: Literal["image", "tower", "decoder"]
    decides: type[Decision] | None
    lasts: bool
    words: str
    counts: Literal["block", "layer", ""] = ""


class _Acts:
    @property
    def effect(self) -> Effect:
        return SITES[type(self)]

    @property
    def index(self) -> int:
        """Of the block or layer in front of which it acts, 0 where it is in front of all."""
        return int(getattr(self, self.effect.counts, 0))


@dataclass(frozen=True)
class BeforeProcessor(_Acts):
    """In front of the processor: `Reducer.prepare` changes each image, and nothing is decided in the model."""

    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        return 0


@dataclass(frozen=True)
class InEncoder(_Acts):
    """In front of block index `block` of the vision tower; it may look at the block before. The view's rows are crops, its slots the
    tower's tokens: [CLS] and registers, and the patches, those together that become one token of the language model. Where a reducer says
    `proportional = True`, the blocks after that attend to merged tokens by their size."""

    block: int
    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        """Where the language model sees it."""
        return 0


@dataclass(frozen=True)
class BeforeLM(_Acts):
    """Between the bridge and the first decoder layer."""

    needs: tuple[Signal, ...] = ()

    @property
    def layer(self) -> int:
        return 0


@dataclass(frozen=True)
class FromLayer(_Acts):
    """In front of decoder layer index `layer` (0-based): `layer` complete layers see every token, the others fewer."""

    layer: int
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class ThroughLayer(_Acts):
    """Around decoder layer index `layer`: some tokens go through it, the others pass by on the residual; the next layer sees all again."""

    layer: int
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class Visibility(_Acts):
    """In decoder layer index `layer` and those after it, up to index `end` (None: to the last one): all tokens are there, and a rule says
    which of them see which."""

    layer: int = 0
    end: int | None = None
    needs: tuple[Signal, ...] = ()

    def at(self, layer: int) -> bool:
        """Whether the rule holds in a decoder layer."""
        return self.layer <= layer and (self.end is None or layer < self.end)


Site = BeforeProcessor | InEncoder | BeforeLM | FromLayer | ThroughLayer | Visibility

SITES: dict[type, Effect] = {
    BeforeProcessor: Effect("image", None, True, "the image, before the processor"),
    InEncoder: Effect("tower", Cut, True, "in the tower, from block {}", "block"),
    BeforeLM: Effect("decoder", Cut, True, "before the LM"),
    FromLayer: Effect("decoder", Cut, True, "from layer {}", "layer"),
    ThroughLayer: Effect("decoder", Bypass, False, "through layer {}", "layer"),
    Visibility: Effect("decoder", Visible, False, "who sees whom, from layer {}", "layer"),
}
