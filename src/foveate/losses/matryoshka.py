"""Matryoshka losses over budgets of visual tokens (arXiv 2205.13147; 2405.19315).

    draw=all   L = sum over the budgets of the cross entropy of the answers, all of them in every step
    draw=one   L = the cross entropy at one budget, drawn evenly for each step

Matryoshka representation learning (2205.13147) adds up the losses of nested sizes of a representation, each with weight 1. Here they are
shares of an image's visual tokens, as the stage's reducer keeps them, and they are nested as far as that reducer's choices are. MQT
(2405.19315) draws one number of tokens for each pass in the place of the sum; its queries are a bridge of its own, its draw is here, one
for each step.

All passes of `draw=all` are in memory until the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.losses.base import Loss, Step, kept


@dataclass(frozen=True)
class Matryoshka(Loss):
    """Trains several budgets at once.

    budgets  shares in (0, 1], as "1/0.5/0.25"; 1 is all tokens, without a reducer
    draw     "all" or "one" of them in a step
    """

    name: ClassVar[str] = "matryoshka"
    paper: ClassVar[str] = "2205.13147"
    chooses: ClassVar[bool] = True
    compares: ClassVar[bool] = False
    any_budget: ClassVar[bool] = True
    budgets: str | float = "1/0.5/0.25"
    draw: str = "all"

    def __post_init__(self) -> None:
        if self.draw not in ("all", "one"):
            raise FoveateError(f"matryoshka: draw={self.draw!r} is not possible; choose all or one")
        if not all(0 < share <= 1 for share in self.shares) or len(set(self.shares)) < len(self.shares):
            raise FoveateError(f"matryoshka: budgets={self.budgets} are not different shares above 0 and at most 1; write 1/0.5/0.25")

    @property
    def shares(self) -> list[float]:
        try:
            return [float(share) for share in str(self.budgets).split("/")]
        except ValueError:
            raise FoveateError(f"matryoshka: budgets={self.budgets!r} are no shares; write 1/0.5/0.25") from None

    def students(self, step: Step) -> tuple[str, ...]:
        all_of_them = tuple(kept(self.name, step.reducers, share) for share in self.shares)
        return all_of_them if self.draw == "all" else (all_of_them[int(step.draw(self.name) * len(all_of_them))],)

    def check(self, reducers: str) -> None:
        for share in self.shares:
            kept(self.name, reducers, share)
