"""A marker of what is computed in order to decide: whoever counts can listen to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Listener(Protocol):
    def enter(self, part: str) -> None: ...

    def leave(self) -> None: ...


listeners: list[Listener] = []


@contextlib.contextmanager
def scoring() -> Iterator[None]:
    """What runs in it is counted as a reducer's scores, wherever in the model that is."""
    counters = list(listeners)
    for counter in counters:
        counter.enter("scores")
    try:
        yield
    finally:
        for counter in counters:
            counter.leave()
