"""Where a reducer acts, and what it may decide there.

`InEncoder(layer)`, `ThroughLayer(k)`, `InCache(k)` and `Visibility(k)` belong to this list as well and are not built yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.signals import Signal
from foveate.tokens import TokenMap


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


Site = BeforeLM | FromLayer


@dataclass(frozen=True)
class Cut:
    """The sequence is what the map makes of it from here on."""

    map: TokenMap
