"""No search: the picture is looked at once, as it is. What every search is compared with, its cost counted in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.inference.strategies.base import Strategy
from foveate.inference.strategies.session import Session


@dataclass(frozen=True)
class Once(Strategy):
    """The question and the whole picture."""

    name: ClassVar[str] = "once"
    paper: ClassVar[str] = "-"

    def search(self, session: Session) -> str:
        session.visit(session.whole, 0)
        return "searched"
